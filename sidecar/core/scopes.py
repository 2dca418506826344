"""Decides whether the user's token holds the scopes that a permitted message needs, and says which would.

Asked after the policies: a scope that would not help must not be asked for, or users consent again and again. Refuses nobody
whom the profile lets call without a user, unless a rule names the very call. MCP 2025-11-25, authorization, step-up flow.
"""

from typing import Final

from sidecar.core.authorise import Permit
from sidecar.core.message import Message, Tool
from sidecar.core.metadata import challenge
from sidecar.core.profile import Identity, Provider
from sidecar.errors import Reason, Refusal

LACKING: Final = "the access token lacks a scope that this call needs"


def require_scopes(permit: Permit, identity: Identity) -> None:
    """Refuse a call whose user's token lacks a scope: INSUFFICIENT_SCOPE, or UNAUTHENTICATED without any user.

    The challenge names all scopes that the call needs, so that one step suffices.
    """
    if not identity.step_up and not identity.scopes:
        return
    user = permit.question.principal.user
    special = _special(identity, permit.question.message)
    needed = tuple(dict.fromkeys((*identity.scopes, *special)))
    if user is None:
        if special:
            refusal = Refusal(Reason.UNAUTHENTICATED, "an access token is required for this call", detail="no user")
            refusal.headers = challenge(identity, scopes=needed)
            raise refusal
        return
    provider = next((each for each in identity.providers if each.name == user.provider), None)
    lacking = [scope for scope in needed if not _spellings(scope, provider) & user.scopes]
    if lacking:
        refusal = Refusal(Reason.INSUFFICIENT_SCOPE, LACKING, detail=" ".join(lacking))
        refusal.headers = challenge(identity, error="insufficient_scope", public=LACKING, scopes=needed)
        raise refusal


def _special(identity: Identity, message: Message) -> tuple[str, ...]:
    name = message.target.name if isinstance(message.target, Tool) else None
    return tuple(
        scope
        for rule in identity.step_up
        if message.method in rule.methods and (not rule.tools or name in rule.tools)
        for scope in rule.scopes
    )


def _spellings(scope: str, provider: Provider | None) -> set[str]:
    """Return how a token may say *scope*: Entra ID is asked for `api://app/read`, and writes `read`."""
    audiences = () if provider is None else provider.audiences
    return {scope, *(scope.removeprefix(f"{audience}/") for audience in audiences)}
