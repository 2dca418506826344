"""Decides who is calling: the workload by its SVID, the human by an OpenID provider's access token.

Refuses a token whose issuer, audience, algorithm, key, times, kind or subject do not hold, or that is bound to a key which
the caller does not show; nothing in a token is believed before its signature is, or before its provider said that it is
active. RFC 9068, RFC 8725, RFC 7662; MCP authorization (audience: RFC 8707). Session ids prove nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt

from certs.spiffe import SpiffeId, SpiffePattern
from sidecar.core import dpop
from sidecar.core.claims import User, check_kind, described, expiry, unproven
from sidecar.core.connection import Connection
from sidecar.core.metadata import challenge
from sidecar.core.profile import Identity, Provider
from sidecar.core.workload import WorkloadTokens, prove
from sidecar.errors import Reason, Refusal

TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})  # others are for other uses (RFC 8725, 3.11)
MAX_TOKEN_CHARS: Final = 16 * 1024  # Entra ID's tokens with many groups reach 10 KB
MAX_CACHED_TOKENS: Final = 4096  # about 2 MB; the least recently verified goes first
MAX_CACHE_S: Final = 60  # a token verified this long ago is verified again
MAX_REFUSED: Final = 4096  # opaque tokens that a provider did not vouch for
REFUSED_S: Final = 10.0  # for which it is not asked about one again


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


class Unresolved(Refusal):
    """Only the provider can tell; after it was asked, the request is judged afresh."""

    def __init__(self, provider: Provider, detail: str) -> None:
        super().__init__(Reason.UNAUTHENTICATED, "the access token does not verify", detail=detail)
        self.provider = provider


class UnknownKey(Unresolved):
    """The token's key is not among the provider's: fetched keys may be older than the token."""

    def __init__(self, provider: Provider) -> None:
        super().__init__(provider, "unknown key")


class UnknownToken(Unresolved):
    """The token means nothing to us, and the provider has not been asked about it lately."""

    def __init__(self, provider: Provider, token: str, trusted: "Trust") -> None:
        super().__init__(provider, "opaque token")
        self.token = token
        self.trusted = trusted


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom to believe: the profile's rules, the providers' keys. Caches are mutated by `authenticate` and `learn` only."""

    identity: Identity
    keys: Keys
    callers: tuple[SpiffePattern, ...]
    tokens: WorkloadTokens | None = None  # what JWT-SVIDs are checked with, where the profile allows them
    verified: dict[bytes, tuple[User, float]] = field(default_factory=dict)
    refused: dict[bytes, tuple[str, float]] = field(default_factory=dict)  # opaque tokens: why, and until when
    proofs: dpop.Proofs = field(default_factory=dpop.Proofs)


def trust(
    identity: Identity, keys: Keys, tokens: WorkloadTokens | None = None, proofs: dpop.Proofs | None = None
) -> Trust:
    """Return the trust of *identity* with *keys*; new keys mean a new, empty cache of verified tokens.

    *proofs* are those seen under the trust before: a new key must not let an old proof be used again.
    """
    return Trust(
        identity=identity,
        keys=keys,
        callers=tuple(SpiffePattern.parse(text) for text in identity.callers),
        tokens=tokens,
        proofs=dpop.Proofs() if proofs is None else proofs,
    )


def authenticate(connection: Connection, trusted: Trust, now_s: float) -> Principal:
    """Return the principal of *connection* at *now_s* (Unix time).

    Raises Refusal: UNAUTHENTICATED without a valid identity, FORBIDDEN_CALLER for a workload that may not call;
    UnknownKey when newer keys could still prove the token.
    """
    workload, expires_at_s = _workload(connection, trusted, now_s)
    header = connection.header(b"authorization")
    identity = trusted.identity
    if header is None:
        if identity.user == "required":
            refusal = Refusal(Reason.UNAUTHENTICATED, "an access token is required", detail="no Authorization header")
            refusal.headers = challenge(identity)
            raise refusal
        return Principal(workload=workload, user=None, expires_at_s=expires_at_s)
    try:
        user = _user(connection, header, trusted, now_s)
    except dpop.NonceWanted as error:
        refusal = unproven("the DPoP proof carries no nonce of ours, or an old one")
        nonce = dpop.nonce(trusted.proofs.nonce_key, now_s).encode()
        refusal.headers = (
            *challenge(identity, error="use_dpop_nonce", public=refusal.public, dpop=True),
            (b"dpop-nonce", nonce),
        )
        raise refusal from error
    except Refusal as refusal:
        if refusal.reason is Reason.UNAUTHENTICATED:
            is_dpop = header[:5].lower() == "dpop "
            refusal.headers = challenge(identity, error="invalid_token", public=refusal.public, dpop=is_dpop)
        raise
    return Principal(workload=workload, user=user, expires_at_s=min(expires_at_s, user.expires_at_s))


def svid_required() -> Refusal:
    """Return the refusal of a caller that showed no SVID where one is demanded."""
    return Refusal(Reason.UNAUTHENTICATED, "mutual TLS with a SPIFFE identity is required", detail="no SVID")


def _workload(connection: Connection, trusted: Trust, now_s: float) -> tuple[SpiffeId | None, float]:
    peer = connection.peer
    proven = prove(connection, trusted.identity, trusted.tokens, now_s)
    if peer is not None:
        expires_at_s = peer.not_after.timestamp()
        if expires_at_s <= now_s:  # a keep-alive connection outlives the certificate that opened it
            raise Refusal(Reason.UNAUTHENTICATED, "the caller's SVID has expired", detail=str(peer.spiffe_id))
        proven = peer.spiffe_id, expires_at_s
    if proven is None:
        if trusted.identity.mtls == "strict":
            raise svid_required()
        return None, float("inf")
    if not any(pattern.matches(proven[0]) for pattern in trusted.callers):
        raise Refusal(Reason.FORBIDDEN_CALLER, "this workload may not call this server", detail=str(proven[0]))
    return proven


def _user(connection: Connection, header: str, trusted: Trust, now_s: float) -> User:
    scheme, _, token = header.partition(" ")
    scheme = scheme.lower()
    if scheme not in ("bearer", "dpop") or not token or len(token) > MAX_TOKEN_CHARS:
        raise unproven("the Authorization header holds no Bearer token")
    fingerprint = hashlib.sha256(token.encode("latin-1")).digest()  # a token is never kept, only its hash
    cached = trusted.verified.get(fingerprint)
    if cached is not None and now_s < cached[1]:
        user = cached[0]
    elif token.count(".") != 2 and (provider := _introspecting(trusted.identity)) is not None:
        why, until_s = trusted.refused.get(fingerprint, ("", 0.0))
        if now_s < until_s:
            raise unproven(why)
        raise UnknownToken(provider, token, trusted)
    else:
        user = _verify(token, trusted, now_s)
        _keep(trusted, fingerprint, user, now_s)
    if scheme == "dpop" or "cnf" in user.claims or trusted.identity.dpop == "required":
        _check_bound(connection, scheme, user, fingerprint, trusted, now_s)
    return user


def _check_bound(
    connection: Connection, scheme: str, user: User, fingerprint: bytes, trusted: Trust, now_s: float
) -> None:
    """Refuse a token whose key the caller does not show, and one without where the profile demands it."""
    identity = trusted.identity
    key, certificate = dpop.confirmation(user.claims)
    if certificate is not None:
        dpop.check_certificate(connection, certificate)
    if (key is not None) is not (scheme == "dpop"):
        raise unproven("a token bound to a key goes by the scheme DPoP, and no other does")
    if key is not None:
        if identity.resource is None:
            raise unproven("DPoP needs the profile's identity.resource")
        dpop.check_proof(
            connection, fingerprint, key, identity.resource, trusted.proofs, now_s, nonces=identity.dpop_nonce
        )
    if key is None and certificate is None and identity.dpop == "required":
        raise unproven("the token is not bound to a key")


def _introspecting(identity: Identity) -> Provider | None:
    return next((each for each in identity.providers if each.introspection), None)


def _keep(trusted: Trust, fingerprint: bytes, user: User, now_s: float) -> None:
    while len(trusted.verified) >= MAX_CACHED_TOKENS:
        del trusted.verified[next(iter(trusted.verified))]
    trusted.verified.pop(fingerprint, None)
    trusted.verified[fingerprint] = (user, min(user.expires_at_s, now_s + MAX_CACHE_S))


def learn(unknown: UnknownToken, claims: Mapping[str, Any], now_s: float) -> None:
    """Keep what the provider said of an opaque token (RFC 7662, 2.2): whose it is, or for a while why it is refused."""
    trusted = unknown.trusted
    fingerprint = hashlib.sha256(unknown.token.encode("latin-1")).digest()
    try:
        user = _introspected(claims, unknown.provider, now_s)
    except Refusal as refusal:
        while len(trusted.refused) >= MAX_REFUSED:
            del trusted.refused[next(iter(trusted.refused))]
        trusted.refused[fingerprint] = (refusal.detail, now_s + REFUSED_S)
    else:
        _keep(trusted, fingerprint, user, now_s)


def _introspected(claims: Mapping[str, Any], provider: Provider, now_s: float) -> User:
    if claims.get("active") is not True:
        raise unproven("the provider says that the token is not active")
    if claims.get("iss", provider.issuer) != provider.issuer:
        raise unproven("unknown issuer")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if not any(isinstance(each, str) and each in provider.audiences for each in audiences):
        raise unproven("Audience doesn't match")
    kind = claims.get("token_type", "bearer")
    if not isinstance(kind, str) or kind.lower() not in ("bearer", "dpop"):
        raise unproven("the token is no access token")
    check_kind("", claims, provider)
    # `exp` is optional here: what the provider says now is believed until it is asked again.
    told = claims if "exp" in claims else {**claims, "exp": now_s + MAX_CACHE_S - provider.leeway_s}
    return described(claims, provider, expiry(told, provider, now_s))


def _verify(token: str, trusted: Trust, now_s: float) -> User:
    try:
        header = jwt.get_unverified_header(token)
        issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except (jwt.PyJWTError, RecursionError) as error:  # PyJWT reads JSON of any depth
        raise unproven(f"not a JWT: {error}") from error
    provider = next((each for each in trusted.identity.providers if each.issuer == issuer), None)
    if provider is None:
        raise unproven("unknown issuer")
    kind = str(header.get("typ", "JWT")).lower()
    if kind not in TYPES:
        raise unproven("typ is not that of an access token")
    algorithm, key = header.get("alg"), trusted.keys.get(provider.issuer, {}).get(str(header.get("kid")))
    if algorithm not in provider.algorithms:
        raise unproven("algorithm not allowed")
    if key is None:
        raise UnknownKey(provider)
    if key.algorithm_name != algorithm:
        raise unproven("the key is for another algorithm")
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
        raise unproven(str(error)) from error
    check_kind(kind, claims, provider)
    return described(claims, provider, expiry(claims, provider, now_s))
