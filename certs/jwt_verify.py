"""Decide which SPIFFE ID a caller's JWT-SVID proves (pure).

A token is checked only with the keys of its own trust domain, as certificates are. Refuses tokens for another audience,
without end or with one far away, of any algorithm but the nine allowed, and keys that were not published for tokens.
Source: JWT-SVID sections 2 to 5; SPIFFE Trust Domain and Bundle section 4; RFC 8725.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, Self

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from certs.errors import BadCertificate, BadSpiffeId, BadToken
from certs.spiffe import SpiffeId, TrustDomain

__all__ = ["JwtBundles", "TokenProof", "verify_token"]

MAX_TOKEN_CHARS: Final = 8 * 1024  # a JWT-SVID has five claims, and 400 to 900 characters
MAX_KEYS: Final = 64  # of one domain; SPIRE publishes two or three
LEEWAY: Final = timedelta(seconds=30)  # for clocks that differ; X.509-SVIDs are backdated by their issuer instead
MAX_LIFETIME: Final = timedelta(hours=24)  # beyond that it is a password, not a proof
MIN_RSA_BITS: Final = 2048  # RFC 7518, section 3.3
TYPES: Final = (None, "JWT", "JOSE")  # JWT-SVID section 2.3
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}  # RFC 7518, section 3.4


@dataclass(frozen=True, slots=True)
class _Key:
    algorithms: frozenset[str]
    public: EllipticCurvePublicKey | RSAPublicKey


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


class JwtBundles:
    """The keys that check each trust domain's tokens, by key id; immutable. A domain without keys is not in it."""

    __slots__ = ("_keys", "rejected_domains")

    def __init__(self, keys: Mapping[TrustDomain, Mapping[str, _Key]], rejected_domains: frozenset[str]) -> None:
        self._keys = MappingProxyType({domain: dict(held) for domain, held in keys.items() if held})
        self.rejected_domains = rejected_domains

    @classmethod
    def parse(cls, documents: Mapping[str, bytes]) -> Self:
        """Return the keys in *documents* (JWK sets by trust domain); an unreadable one costs its own domain only."""
        keys: dict[TrustDomain, dict[str, _Key]] = {}
        rejected = set()
        for name, document in documents.items():
            try:
                keys[TrustDomain.parse(name)] = _key_set(document)
            except (BadSpiffeId, BadCertificate):
                rejected.add(name)
        return cls(keys, frozenset(rejected))

    @property
    def domains(self) -> frozenset[TrustDomain]:
        """The domains whose tokens can be verified."""
        return frozenset(self._keys)

    def find(self, domain: TrustDomain, key_id: str) -> _Key | None:
        """Return the key *key_id* of *domain*."""
        return self._keys.get(domain, {}).get(key_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenProof:
    """Whom a token proved. It is a bearer token: whoever holds it is believed until it ends."""

    spiffe_id: SpiffeId
    expires_at: datetime


def verify_token(token: str, bundles: JwtBundles, audience: str, *, now: datetime) -> TokenProof:
    """Return what *token* proves to *audience*, our one name, at *now*. Raises BadToken, which never quotes it."""
    if not audience:
        raise BadToken("no audience to check against")
    if len(token) > MAX_TOKEN_CHARS:
        raise BadToken(f"longer than {MAX_TOKEN_CHARS} characters")
    try:
        header = jwt.get_unverified_header(token)
        claimed = jwt.decode(token, options={"verify_signature": False}).get("sub")
    except (jwt.PyJWTError, RecursionError) as error:  # PyJWT reads JSON of any depth
        raise BadToken(f"not a JWT: {type(error).__name__}") from error
    key, algorithm, spiffe_id = _key_for(header, claimed, bundles)
    try:
        # Times are checked below, against the clock that was handed in.
        claims: dict[str, Any] = jwt.decode(
            token,
            key.public,
            algorithms=[algorithm],
            audience=audience,
            options={"require": ["exp", "sub", "aud"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except jwt.PyJWTError as error:
        raise BadToken(f"{spiffe_id}: {error}") from error
    return TokenProof(spiffe_id=spiffe_id, expires_at=_end(claims, spiffe_id, now))


def _key_for(header: Mapping[str, Any], claimed: Any, bundles: JwtBundles) -> tuple[_Key, str, SpiffeId]:
    """Return the one key and algorithm that may have signed, and the ID that is claimed. Raises BadToken."""
    if "crit" in header:
        raise BadToken("the header demands an extension (crit)")
    if header.get("typ") not in TYPES:
        raise BadToken("typ is neither JWT nor JOSE")
    try:
        spiffe_id = SpiffeId.parse(claimed) if isinstance(claimed, str) else None
    except BadSpiffeId as error:
        raise BadToken(f"sub: {error}") from error
    if spiffe_id is None:
        raise BadToken("sub is no SPIFFE ID")
    if spiffe_id.trust_domain not in bundles.domains:
        raise BadToken(f"no keys for {spiffe_id.trust_domain}")
    # No fetch for an unknown key: the stream brings new ones long before anything is signed with them.
    key = bundles.find(spiffe_id.trust_domain, str(header.get("kid") or ""))
    if key is None:
        raise BadToken(f"{spiffe_id}: unknown key")
    algorithm = str(header.get("alg"))
    if algorithm not in key.algorithms:
        raise BadToken(f"{spiffe_id}: the algorithm is not that of the key")
    return key, algorithm, spiffe_id


def _end(claims: Mapping[str, Any], spiffe_id: SpiffeId, now: datetime) -> datetime:
    times = {name: claims[name] for name in ("exp", "nbf") if name in claims}
    for name, value in times.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            raise BadToken(f"{spiffe_id}: {name} is not a time")
    end_s, now_s = float(times["exp"]), now.timestamp()
    if now_s >= end_s + LEEWAY.total_seconds():
        raise BadToken(f"{spiffe_id}: expired")
    if end_s > now_s + MAX_LIFETIME.total_seconds() + LEEWAY.total_seconds():
        raise BadToken(f"{spiffe_id}: valid for longer than a day")
    if times.get("nbf", 0) > now_s + LEEWAY.total_seconds():
        raise BadToken(f"{spiffe_id}: not valid yet")
    return datetime.fromtimestamp(end_s + LEEWAY.total_seconds(), UTC)


def _key_set(document: bytes) -> dict[str, _Key]:
    """Return the keys for tokens in a JWK set, by id. Raises BadCertificate when there is none."""
    try:
        described = msgspec.json.decode(document, type=_KeySet).keys
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCertificate(f"JWT bundle: {error}") from error
    found: dict[str, _Key] = {}
    for each in described[:MAX_KEYS]:
        key_id = each.get("kid")
        # A federation document holds the certificates' keys as well, under another use; SPIRE's agent gives tokens' keys no use.
        if isinstance(key_id, str) and key_id and each.get("use", "jwt-svid") == "jwt-svid" and "d" not in each:
            key = _key(each)
            if key is not None:
                found.setdefault(key_id, key)
    if not found:
        raise BadCertificate("JWT bundle: no key with an id and for tokens")
    return found


def _key(described: dict[str, Any]) -> _Key | None:
    """Return the key, or None for one of another kind, or nonsense."""
    try:
        match described.get("kty"):
            case "EC":
                public: Any = ECAlgorithm.from_jwk(described)
                return _Key(frozenset({_CURVES[public.curve.name]}), public)
            case "RSA":
                public = RSAAlgorithm.from_jwk(described)
                return _Key(_RSA, public) if public.key_size >= MIN_RSA_BITS else None
    except (jwt.PyJWTError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return None  # the library checks little of what it reads
    return None
