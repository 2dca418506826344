"""sidecar.core.scopes: a scope is asked for only where it would help."""

from dataclasses import replace

import pytest

from sidecar.core.authorise import Permit
from sidecar.core.profile import Identity, Provider, StepUp
from sidecar.core.scopes import require_scopes
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_permit, a_principal, a_request, a_user

PROVIDER = Provider(name="corporate", issuer="https://id.test", audiences=("api://app", "https://mcp.test"))
IDENTITY = Identity(
    resource="https://mcp.test/mcp",
    providers=(PROVIDER,),
    scopes=("mcp",),
    step_up=(
        StepUp(scopes=("db:write",), tools=("execute",)),
        StepUp(scopes=("prompts",), methods=("prompts/get",)),
        StepUp(scopes=("tools",), methods=("tools/call",)),
    ),
)
EVERY = ("mcp", "tools", "db:write", "prompts")


def permitted(message: bytes, *scopes: str) -> Permit:
    """A permit for *message* of a user whose token holds *scopes*."""
    principal = replace(a_principal(), user=replace(a_user(), scopes=frozenset(scopes)))
    return a_permit(message, principal=principal)


def refused(permit: Permit, identity: Identity = IDENTITY) -> Refusal:
    """The refusal of *permit*."""
    with pytest.raises(Refusal) as caught:
        require_scopes(permit, identity)
    return caught.value


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (a_call("execute"), {"mcp", "tools", "db:write"}),
        (a_call("read"), {"mcp", "tools"}),
        (a_request("prompts/get", {"name": "execute"}), {"mcp", "prompts"}),
        (a_request("tools/list"), {"mcp"}),
        (a_request("initialize", {"protocolVersion": "2025-11-25"}), {"mcp"}),
    ],
    ids=["the named tool", "another tool", "a prompt of the tool's name", "a listing", "initialize"],
)
def test_a_call_needs_its_own_scopes(message: bytes, needed: set[str]) -> None:
    """Each one is missed, and what is not needed is not asked for."""
    require_scopes(permitted(message, *needed), IDENTITY)

    for scope in needed:
        assert refused(permitted(message, *(set(EVERY) - {scope}))).detail == scope


def test_the_challenge_names_all_that_the_call_needs() -> None:
    """One step must suffice (MCP 2026-07-28)."""
    refusal = refused(permitted(a_call("execute"), "tools"))

    assert (refusal.reason, refusal.detail) == (Reason.INSUFFICIENT_SCOPE, "mcp db:write")
    assert dict(refusal.headers)[b"www-authenticate"].decode() == (
        'Bearer resource_metadata="https://mcp.test/.well-known/oauth-protected-resource/mcp", '
        'scope="mcp db:write tools", error="insufficient_scope", '
        'error_description="the access token lacks a scope that this call needs"'
    )


def test_entra_writes_less_than_it_is_asked_for() -> None:
    """Asked for api://app/mcp, it grants mcp; another application's scope of that name does not count."""
    wanted = Identity(providers=(PROVIDER,), scopes=("api://app/mcp",))
    require_scopes(permitted(a_call(), "mcp"), wanted)
    require_scopes(permitted(a_call(), "api://app/mcp"), wanted)

    assert refused(permitted(a_call(), "api://other/mcp"), wanted).detail == "api://app/mcp"


def test_a_workload_alone_needs_none_where_it_may_call() -> None:
    """Except for calls that a rule names: then a user is wanted, not a scope."""
    alone = a_principal(None)
    require_scopes(a_permit(a_request("tools/list"), principal=alone), IDENTITY)
    refusal = refused(a_permit(a_call("execute"), principal=alone))

    assert (refusal.reason, refusal.detail) == (Reason.UNAUTHENTICATED, "no user")
    assert b"error=" not in dict(refusal.headers)[b"www-authenticate"]


def test_without_rules_nothing_is_asked() -> None:
    """The default."""
    require_scopes(permitted(a_call()), Identity())
