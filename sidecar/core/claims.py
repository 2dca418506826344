"""Reads a human out of the claims that a provider vouched for: id, mail, roles, groups, scopes, and who acts for them.

Refuses ID tokens where access tokens are wanted, times that do not hold, subjects that name nobody, delegation that cannot
be read, and groups that the provider left out of the token: a rule that forbids by group would pass unseen. The claims
were verified before. RFC 9068; RFC 8693, 4.1 (`act`); RFC 7662.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.core.profile import Provider
from sidecar.errors import Reason, Refusal

MAX_TIME_S: Final = 2**53  # beyond it, floats skip seconds
MAX_LIFETIME_S: Final = 24 * 3600  # an access token that outlives a day is a mistake or a theft
MAX_ACTORS: Final = 8  # of a delegation; longer ones come from loops
ACCESS_TYPES: Final = frozenset({"at+jwt", "application/at+jwt"})  # header `typ` that says it beyond doubt (RFC 9068)
# What only ID tokens carry (OpenID Connect Core, 2 and 3.3.2.11), where the header's `typ` is the common JWT.
_OF_ID_TOKENS: Final = ("nonce", "at_hash", "c_hash", "s_hash")
_ACCESS_KINDS: Final = frozenset({"bearer", "dpop"})  # Keycloak's claim `typ`; others are ID, Refresh, Offline, Logout


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegated:
    """One link of a delegation: *actor* acts for *sub*."""

    sub: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A human, as an OpenID provider vouches for them."""

    provider: str
    issuer: str
    id: str
    email: str | None
    role: str | None
    roles: tuple[str, ...]
    groups: tuple[str, ...]
    claims: Mapping[str, Any]
    expires_at_s: float
    scopes: frozenset[str] = frozenset()
    delegation: tuple[Delegated, ...] = ()  # from the user outward; the last actor is the one that calls


def described(claims: Mapping[str, Any], provider: Provider, expires_at_s: float) -> User:
    """Return the user of verified *claims*; raises Refusal(UNAUTHENTICATED)."""
    paths = provider.claims
    subject = _claim(claims, paths.id)
    if not isinstance(subject, str) or not subject:
        raise unproven(f"the claim {paths.id} names nobody")
    _check_overage(claims, paths.groups)
    return User(
        provider=provider.name,
        issuer=provider.issuer,
        id=subject,
        email=_first(claims, paths.email),
        role=_first(claims, paths.role),
        roles=_all(claims, paths.roles),
        groups=_all(claims, paths.groups),
        claims=claims,
        expires_at_s=expires_at_s,
        scopes=frozenset(scope for text in _all(claims, paths.scopes) for scope in text.split()),
        delegation=_delegation(claims, subject),
    )


def expiry(claims: Mapping[str, Any], provider: Provider, now_s: float) -> float:
    """Return when *claims* cease to hold, leeway included; raises Refusal unless they hold at *now_s*."""
    times = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
    for name, value in times.items():
        # `not <`, because NaN is less than nothing, and Python reads it in JSON.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_TIME_S:
            raise unproven(f"{name} is not a time")
    expires_at_s = float(times["exp"]) + provider.leeway_s
    if expires_at_s <= now_s:
        raise unproven("expired")
    if expires_at_s > now_s + MAX_LIFETIME_S + provider.leeway_s:
        raise unproven("valid for longer than a day")
    if max(times.get("nbf", 0), times.get("iat", 0)) > now_s + provider.leeway_s:
        raise unproven("not valid yet")
    return expires_at_s


def check_kind(header_type: str, claims: Mapping[str, Any], provider: Provider) -> None:
    """Refuse what is no access token: an ID token names the client that asked, and says nothing of this server."""
    if header_type in ACCESS_TYPES:
        return
    kind = claims.get("typ")  # of Keycloak
    if kind is not None:
        is_access = isinstance(kind, str) and kind.lower() in _ACCESS_KINDS
    else:
        use = claims.get("token_use", "access")  # of Cognito
        is_access = use == "access" and not any(name in claims for name in _OF_ID_TOKENS)
    if not is_access and not (provider.id_tokens and kind in (None, "ID")):
        raise unproven("an ID token or another kind, where an access token is wanted")


def _check_overage(claims: Mapping[str, Any], paths: str) -> None:
    """Refuse a token that says of the groups only where they could be asked for, as Entra ID's does of many."""
    elsewhere = claims.get("_claim_names")
    named = elsewhere if isinstance(elsewhere, dict) else {}
    if any(path in named for path in paths.split()) or claims.get("hasgroups") is True:
        raise unproven("the token has no room for the user's groups (overage)")


def _delegation(claims: Mapping[str, Any], subject: str) -> tuple[Delegated, ...]:
    """Return who acts for the subject. In the token the outermost actor is the latest (RFC 8693, 4.1)."""
    actors: list[str] = []
    actor = claims.get("act")
    while actor is not None:
        name = actor.get("sub", actor.get("client_id")) if isinstance(actor, dict) else None
        if not isinstance(name, str) or not name or len(actors) >= MAX_ACTORS:
            raise unproven("the claim act is not a chain of at most 8 named actors")
        actors.append(name)
        actor = actor.get("act")
    actors.reverse()
    return tuple(
        Delegated(sub=sub, actor=name) for sub, name in zip([subject, *actors[:-1]], actors, strict=bool(actors))
    )


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """Return the claim at *path*; where names hold dots, as URLs and client ids do, the longest that is there counts."""
    if path in claims:
        return claims[path]
    end = len(path)
    while (end := path.rfind(".", 0, end)) > 0:
        inner = claims.get(path[:end])
        found = _claim(inner, path[end + 1 :]) if isinstance(inner, dict) else None
        if found is not None:
            return found
    return None


def _first(claims: Mapping[str, Any], paths: str) -> str | None:
    return next((found for path in paths.split() if isinstance(found := _claim(claims, path), str)), None)


def _all(claims: Mapping[str, Any], paths: str) -> tuple[str, ...]:
    found = [_claim(claims, path) for path in paths.split()]
    values = [value for each in found for value in (each if isinstance(each, list) else [each])]
    return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))


def unproven(detail: str) -> Refusal:
    """Return the refusal of a token; *detail* is for the operator."""
    return Refusal(Reason.UNAUTHENTICATED, "the access token does not verify", detail=detail)
