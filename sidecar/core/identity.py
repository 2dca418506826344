"""Decides who is calling: the workload by its SVID, the human by an OpenID provider's access token.

Refuses a token whose issuer, audience, algorithm, key, times or subject do not hold; nothing in a token is believed
before its signature is. RFC 9068 and RFC 8725; MCP authorization (audience: RFC 8707). Session ids prove nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt

from certs.spiffe import SpiffeId, SpiffePattern
from sidecar.core.connection import Connection
from sidecar.core.profile import ClaimPaths, Identity, Provider
from sidecar.errors import Reason, Refusal

TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})  # others are for other uses (RFC 8725, 3.11)
MAX_TOKEN_CHARS: Final = 16 * 1024  # Entra ID's tokens with many groups reach 10 KB
MAX_CACHED_TOKENS: Final = 4096  # about 2 MB; the least recently verified goes first
MAX_CACHE_S: Final = 60  # a token verified this long ago is verified again
MAX_TIME_S: Final = 2**53  # beyond it, floats skip seconds
MAX_LIFETIME_S: Final = 24 * 3600  # an access token that outlives a day is a mistake or a theft


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is calling. At least one of the two is known, unless the profile lets nobody in particular call."""

    workload: SpiffeId | None
    user: User | None
    expires_at_s: float

    @property
    def key(self) -> str:
        """Return one string for this pair of identities: what sessions and limits are bound to."""
        user = "" if self.user is None else f"{self.user.issuer} {self.user.id}"
        return f"{self.workload or ''}|{user}"


Keys = Mapping[str, Mapping[str, jwt.PyJWK]]  # issuer -> key id -> key


class UnknownKey(Refusal):
    """The token's key is not among the provider's: fetched keys may be older than the token."""

    def __init__(self, provider: Provider) -> None:
        super().__init__(Reason.UNAUTHENTICATED, "the access token does not verify", detail="unknown key")
        self.provider = provider


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom to believe: the profile's rules, the providers' keys. The cache is mutated by authenticate only."""

    identity: Identity
    keys: Keys
    callers: tuple[SpiffePattern, ...]
    verified: dict[bytes, tuple[User, float]] = field(default_factory=dict)


def trust(identity: Identity, keys: Keys) -> Trust:
    """Return the trust of *identity* with *keys*; new keys mean a new, empty cache of verified tokens."""
    return Trust(identity=identity, keys=keys, callers=tuple(SpiffePattern.parse(text) for text in identity.callers))


def authenticate(connection: Connection, trusted: Trust, now_s: float) -> Principal:
    """Return the principal of *connection* at *now_s* (Unix time).

    Raises Refusal: UNAUTHENTICATED without a valid identity, FORBIDDEN_CALLER for a workload that may not call;
    UnknownKey when newer keys could still prove the token.
    """
    workload, expires_at_s = _workload(connection, trusted, now_s)
    header = connection.header(b"authorization")
    if header is None:
        if trusted.identity.user == "required":
            raise Refusal(Reason.UNAUTHENTICATED, "an access token is required", detail="no Authorization header")
        return Principal(workload=workload, user=None, expires_at_s=expires_at_s)
    user = _user(header, trusted, now_s)
    return Principal(workload=workload, user=user, expires_at_s=min(expires_at_s, user.expires_at_s))


def svid_required() -> Refusal:
    """Return the refusal of a caller that showed no SVID where one is demanded."""
    return Refusal(Reason.UNAUTHENTICATED, "mutual TLS with a SPIFFE identity is required", detail="no SVID")


def _workload(connection: Connection, trusted: Trust, now_s: float) -> tuple[SpiffeId | None, float]:
    peer = connection.peer
    if peer is None:
        if trusted.identity.mtls == "strict":
            raise svid_required()
        return None, float("inf")
    expires_at_s = peer.not_after.timestamp()
    if expires_at_s <= now_s:  # a keep-alive connection outlives the certificate that opened it
        raise Refusal(Reason.UNAUTHENTICATED, "the caller's SVID has expired", detail=str(peer.spiffe_id))
    if not any(pattern.matches(peer.spiffe_id) for pattern in trusted.callers):
        raise Refusal(Reason.FORBIDDEN_CALLER, "this workload may not call this server", detail=str(peer.spiffe_id))
    return peer.spiffe_id, expires_at_s


def _user(header: str, trusted: Trust, now_s: float) -> User:
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_CHARS:
        raise _unproven("the Authorization header holds no Bearer token")
    fingerprint = hashlib.sha256(token.encode("latin-1")).digest()  # a token is never kept, only its hash
    cached = trusted.verified.get(fingerprint)
    if cached is not None and now_s < cached[1]:
        return cached[0]
    user = _verify(token, trusted, now_s)
    while len(trusted.verified) >= MAX_CACHED_TOKENS:
        del trusted.verified[next(iter(trusted.verified))]
    trusted.verified.pop(fingerprint, None)
    trusted.verified[fingerprint] = (user, min(user.expires_at_s, now_s + MAX_CACHE_S))
    return user


def _verify(token: str, trusted: Trust, now_s: float) -> User:
    try:
        header = jwt.get_unverified_header(token)
        issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except (jwt.PyJWTError, RecursionError) as error:  # PyJWT reads JSON of any depth
        raise _unproven(f"not a JWT: {error}") from error
    provider = next((each for each in trusted.identity.providers if each.issuer == issuer), None)
    if provider is None:
        raise _unproven("unknown issuer")
    if str(header.get("typ", "JWT")).lower() not in TYPES:
        raise _unproven("typ is not that of an access token")
    algorithm, key = header.get("alg"), trusted.keys.get(provider.issuer, {}).get(str(header.get("kid")))
    if algorithm not in provider.algorithms:
        raise _unproven("algorithm not allowed")
    if key is None:
        raise UnknownKey(provider)
    if key.algorithm_name != algorithm:
        raise _unproven("the key is for another algorithm")
    try:
        # Times are checked below, against the clock that was handed in.
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            audience=provider.audiences,
            issuer=provider.issuer,
            options={"require": ["exp", "aud", "iss"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except jwt.PyJWTError as error:
        raise _unproven(str(error)) from error
    return _described(claims, provider, _expiry(claims, provider, now_s))


def _expiry(claims: Mapping[str, Any], provider: Provider, now_s: float) -> float:
    times = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
    for name, value in times.items():
        # `not <`, because NaN is less than nothing, and Python reads it in JSON.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_TIME_S:
            raise _unproven(f"{name} is not a time")
    expires_at_s = float(times["exp"]) + provider.leeway_s
    if expires_at_s <= now_s:
        raise _unproven("expired")
    if expires_at_s > now_s + MAX_LIFETIME_S + provider.leeway_s:
        raise _unproven("valid for longer than a day")
    if max(times.get("nbf", 0), times.get("iat", 0)) > now_s + provider.leeway_s:
        raise _unproven("not valid yet")
    return expires_at_s


def _described(claims: Mapping[str, Any], provider: Provider, expires_at_s: float) -> User:
    paths: ClaimPaths = provider.claims
    subject = _claim(claims, paths.id)
    if not isinstance(subject, str) or not subject:
        raise _unproven(f"the claim {paths.id} names nobody")
    email, role = _claim(claims, paths.email), _claim(claims, paths.role)
    return User(
        provider=provider.name,
        issuer=provider.issuer,
        id=subject,
        email=email if isinstance(email, str) else None,
        role=role if isinstance(role, str) else None,
        roles=_strings(_claim(claims, paths.roles)),
        groups=_strings(_claim(claims, paths.groups)),
        claims=claims,
        expires_at_s=expires_at_s,
    )


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """Return the claim at *path*: by its whole name first, because some providers put dots and URLs in names."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for step in path.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _strings(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if isinstance(each, str))


def _unproven(detail: str) -> Refusal:
    return Refusal(Reason.UNAUTHENTICATED, "the access token does not verify", detail=detail)
