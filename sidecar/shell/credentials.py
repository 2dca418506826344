"""Gives the server behind us what the profile lets it learn of the user: nothing, a token, or a signed header.

Never the caller's token, unless that token names this very server. What must be fetched first is fetched before the call goes
on, and without it the call does not. MCP authorization, token passthrough; RFC 8693.
"""

import secrets
import time
from typing import Any, Final, assert_never

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from sidecar.core import assertion
from sidecar.core.connection import Headers
from sidecar.core.jwk import thumbprint
from sidecar.core.metadata import challenge
from sidecar.core.profile import Identity, Server
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell.oauth import OAuthClient

NOTHING: Final[Headers] = ()


class Signer:
    """Signs identity headers by a key that lives as long as this process; the health port publishes its public half."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        public: dict[str, Any] = ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        self._kid = thumbprint(public)
        self.jwks = {"keys": [{**public, "kid": self._kid, "alg": "ES256", "use": "sig"}]}

    def sign(self, claims: dict[str, Any]) -> str:
        """Return *claims* as a JWT."""
        return jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": self._kid})


class Credentials:
    """What each call carries to the server. Owned by sidecar/shell/app.py."""

    def __init__(self, oauth: OAuthClient, signer: Signer) -> None:
        self._oauth = oauth
        self._signer = signer

    def at_hand(self, exchange: Exchange, identity: Identity, server: Server) -> Headers | None:
        """Return the header fields for an admitted call; None when they must be fetched. Raises Refusal."""
        match identity.upstream:
            case "none":
                return NOTHING
            case "token":
                return _passed(exchange, identity)
            case "header":
                return self._signed(exchange, identity, server)
            case "exchange":
                token = _token(exchange)
                if token is None:
                    return NOTHING
                found = self._oauth.at_hand(token)
                return None if found is None else _bearer(found)
        assert_never(identity.upstream)

    async def fetch(self, exchange: Exchange, identity: Identity) -> Headers:
        """Return the header fields that had to be fetched; raises Refusal(PROVIDER)."""
        token = _token(exchange)
        return NOTHING if token is None else _bearer(await self._oauth.exchange(token, identity))

    def _signed(self, exchange: Exchange, identity: Identity, server: Server) -> Headers:
        assert exchange.permit is not None  # noqa: S101 - only what was admitted comes here
        told = assertion.claims(
            exchange.permit.question, identity.resource or server.name, now_s=time.time(), jti=secrets.token_urlsafe(12)
        )
        return NOTHING if told is None else ((assertion.HEADER, self._signer.sign(told).encode()),)


def _token(exchange: Exchange) -> str | None:
    """Return the user's token; None without user."""
    principal = exchange.principal
    header = exchange.connection.header(b"authorization")
    return None if header is None or principal is None or principal.user is None else header.partition(" ")[2]


def _bearer(token: str) -> Headers:
    return ((b"authorization", f"Bearer {token}".encode("latin-1")),)


def _passed(exchange: Exchange, identity: Identity) -> Headers:
    """Return the caller's own token, if it names this server's URL as its audience. Raises Refusal."""
    principal, token = exchange.principal, _token(exchange)
    if token is None or principal is None or principal.user is None:
        return NOTHING
    audience = principal.user.claims.get("aud")
    if identity.resource not in (audience if isinstance(audience, list) else [audience]):
        refusal = Refusal(
            Reason.UNAUTHENTICATED,
            "the access token does not name this server's URL",
            detail=f"aud lacks {identity.resource}, so the token may not be passed on",
        )
        refusal.headers = challenge(identity, error="invalid_token", public=refusal.public)
        raise refusal
    connection = exchange.connection
    names = (b"authorization", b"dpop")  # the proof names our URL, which is the server's own
    return tuple((name, connection.values[name]) for name in names if name in connection.values)
