"""Decides which workload is calling where its certificate does not say: by a JWT-SVID in a header of our own.

For callers that cannot do mutual TLS, and only where the profile allows it: a token proves who may use it, not who sent
it. The header is not `Authorization`, which is the user's. Refuses a token beside a certificate: two identities on one
call are one too many. JWT-SVID, section 4 and 7; the server's own SPIFFE ID is the one audience.
"""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from certs.errors import BadToken
from certs.jwt_verify import JwtBundles, verify_token
from certs.spiffe import SpiffeId
from sidecar.core.connection import Connection
from sidecar.core.profile import Identity
from sidecar.errors import Reason, Refusal

HEADER: Final = b"sidegate-workload-token"
MAX_CACHED: Final = 4096  # about 2 MB; the one verified first goes first
MAX_CACHE_S: Final = 60.0  # a token verified this long ago is verified again


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadTokens:
    """What tokens are checked with; new keys mean a new, empty cache. The cache is mutated by `prove` only."""

    bundles: JwtBundles
    audience: str
    verified: dict[bytes, tuple[SpiffeId, float, float]] = field(default_factory=dict)


def prove(
    connection: Connection, identity: Identity, tokens: WorkloadTokens | None, now_s: float
) -> tuple[SpiffeId, float] | None:
    """Return the workload that the token of *connection* proves, and when that ends (Unix time); None without token.

    Raises Refusal(UNAUTHENTICATED).
    """
    token = connection.header(HEADER)
    if token is None:
        return None
    if connection.peer is not None:
        raise _unproven("a token beside a certificate")
    if identity.jwt_svid != "allowed":
        raise _unproven("the profile does not allow JWT-SVIDs")
    if tokens is None:
        raise _unproven("no keys to check it with")
    fingerprint = hashlib.sha256(token.encode("latin-1")).digest()  # a token is never kept, only its hash
    cached = tokens.verified.get(fingerprint)
    if cached is not None and now_s < cached[2]:
        return cached[:2]
    try:
        proof = verify_token(token, tokens.bundles, tokens.audience, now=datetime.fromtimestamp(now_s, UTC))
    except BadToken as error:
        raise _unproven(str(error)) from error
    expires_at_s = proof.expires_at.timestamp()
    while len(tokens.verified) >= MAX_CACHED:
        del tokens.verified[next(iter(tokens.verified))]
    tokens.verified.pop(fingerprint, None)
    tokens.verified[fingerprint] = (proof.spiffe_id, expires_at_s, min(expires_at_s, now_s + MAX_CACHE_S))
    return proof.spiffe_id, expires_at_s


def _unproven(detail: str) -> Refusal:
    return Refusal(Reason.UNAUTHENTICATED, "the workload token does not verify", detail=detail)
