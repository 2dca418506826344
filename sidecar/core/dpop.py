"""Decides whether a caller holds the key that its access token is bound to: by DPoP, or by the TLS certificate.

A bound token without its proof is refused as if it were forged: it was stolen, or the sidecar cannot tell. So are bindings
of a kind that is not known here, proofs for another URL, method or token, old ones, and every second use of one.
RFC 9449; RFC 8705, section 3.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import jwt
from jwt.utils import base64url_encode

from sidecar.core.claims import unproven
from sidecar.core.connection import Connection
from sidecar.core.jwk import thumbprint, verifying_key

ALGORITHMS: Final = ("ES256", "ES384", "ES512", "PS256", "RS256", "EdDSA")
MAX_PROOF_CHARS: Final = 8 * 1024
MAX_AGE_S: Final = 60.0  # a proof is made for one request; agents keep time
MAX_AHEAD_S: Final = 30.0
MAX_PROOFS: Final = 65_536  # in two minutes; about 10 MB. More are refused: forgetting one would let it be replayed
NONCE_S: Final = 120  # a nonce serves for one to two of these


class NonceWanted(Exception):  # noqa: N818 - not an error: the caller asks again with the nonce
    """The proof must carry a nonce of ours."""


@dataclass(slots=True, kw_only=True)
class Proofs:
    """The proofs seen lately; the key is that of our nonces. Mutated by `check_proof` only. Outlives snapshots."""

    nonce_key: bytes = b""
    seen: dict[bytes, float] = field(default_factory=dict)  # hash of key and jti -> when it may be forgotten

    def use(self, proof: bytes, now_s: float) -> None:
        """Remember *proof*; raises Refusal when it was seen before, or when no more can be remembered."""
        while self.seen and next(iter(self.seen.values())) <= now_s:
            del self.seen[next(iter(self.seen))]
        if proof in self.seen:
            raise unproven("the DPoP proof was used before")
        if len(self.seen) >= MAX_PROOFS:
            raise unproven("too many DPoP proofs at a time")
        self.seen[proof] = now_s + MAX_AGE_S + MAX_AHEAD_S


def nonce(key: bytes, now_s: float, *, age: int = 0) -> str:
    """Return the nonce in force at *now_s*, or the one *age* before it; nothing needs to be kept of it."""
    period = int(now_s // NONCE_S) - age
    return hmac.new(key, str(period).encode(), hashlib.sha256).hexdigest()[:32]


def check_certificate(connection: Connection, expected: str) -> None:
    """Refuse unless the connection's client certificate is the one that the token is bound to (RFC 8705, 3.1)."""
    peer = connection.peer
    if peer is None or not peer.chain_der:
        raise unproven("the token is bound to a client certificate, and the connection shows none")
    found = base64url_encode(hashlib.sha256(peer.chain_der[0]).digest()).decode()
    if not hmac.compare_digest(found.encode(), expected.encode()):
        raise unproven("the token is bound to another client certificate")


def check_proof(
    connection: Connection,
    token_sha256: bytes,
    expected: str,
    resource: str,
    proofs: Proofs,
    now_s: float,
    *,
    nonces: bool,
) -> None:
    """Refuse unless the header DPoP proves the key with thumbprint *expected*, for this very request (RFC 9449, 4.3).

    *resource* is the URL by which callers know this server. Raises NonceWanted when only the nonce is missing.
    """
    proof = connection.header(b"dpop")
    if proof is None or len(proof) > MAX_PROOF_CHARS:
        raise unproven("the token is bound to a key, and there is no DPoP proof")
    claims = _verified(proof, expected)
    if claims.get("htm") != connection.method:
        raise unproven("the DPoP proof is for another method")
    asked = _target(claims.get("htu"))
    if asked is None or asked not in _targets(resource, connection.path):
        raise unproven("the DPoP proof is for another URL")
    if claims.get("ath") != base64url_encode(token_sha256).decode():
        raise unproven("the DPoP proof is for another token")
    issued, jti = claims.get("iat"), claims.get("jti")
    if isinstance(issued, bool) or not isinstance(issued, int | float) or not isinstance(jti, str) or not jti:
        raise unproven("the DPoP proof lacks iat or jti")
    if not now_s - MAX_AGE_S <= issued <= now_s + MAX_AHEAD_S:
        raise unproven("the DPoP proof is too old, or from the future")
    if nonces and claims.get("nonce") not in (nonce(proofs.nonce_key, now_s), nonce(proofs.nonce_key, now_s, age=1)):
        raise NonceWanted
    proofs.use(hashlib.sha256(f"{expected} {jti}".encode(errors="backslashreplace")).digest(), now_s)


def _verified(proof: str, expected: str) -> dict[str, Any]:
    """Return the claims of *proof*, signed by the key with thumbprint *expected*."""
    try:
        header = jwt.get_unverified_header(proof)
        described = header.get("jwk")
        if header.get("typ") != "dpop+jwt" or not isinstance(described, dict) or header.get("alg") not in ALGORITHMS:
            raise unproven("the DPoP header is no proof")
        key = verifying_key(described, (header["alg"],))
        if key is None or not hmac.compare_digest(thumbprint(described).encode(), expected.encode()):
            raise unproven("the DPoP proof is by another key")
        claims: dict[str, Any] = jwt.decode(proof, key, algorithms=[header["alg"]], options=_ONLY_SIGNATURE)
    except (jwt.PyJWTError, RecursionError, LookupError, TypeError, ValueError) as error:
        raise unproven(f"the DPoP proof does not verify: {type(error).__name__}") from error
    return claims


_ONLY_SIGNATURE: Final[Any] = {
    f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")
}  # the times and names of a proof are others, and are checked above


def _targets(resource: str, path: str) -> tuple[tuple[str, str, int | None, str] | None, ...]:
    """Return what `htu` may say: the server's own URL, or the path that was asked for below its origin."""
    own = _target(resource)
    return (own,) if own is None else (own, (*own[:3], path))


def _target(url: object) -> tuple[str, str, int | None, str] | None:
    """Return *url* without query and fragment, and written as others would write it; None when it is none."""
    if not isinstance(url, str):
        return None
    try:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, (parts.hostname or ""), port, parts.path or "/") if parts.hostname else None


def confirmation(claims: Any) -> tuple[str | None, str | None]:
    """Return the thumbprints of the DPoP key and of the certificate that *claims* are bound to, None without.

    Raises Refusal for a binding of another kind: what cannot be checked is not known to hold (RFC 7800).
    """
    bound = claims.get("cnf")
    if bound is None:
        return None, None
    key, certificate = (bound.get("jkt"), bound.get("x5t#S256")) if isinstance(bound, dict) else (None, None)
    if not all(each is None or isinstance(each, str) for each in (key, certificate)) or (key or certificate) is None:
        raise unproven("the token is bound in a way that is not known here")
    return key, certificate
