"""An OpenID provider for a laptop: discovery, JWKS, and a token for whoever asks. Development only.

Refuses to start in a cluster, and to listen anywhere but on loopback: it authenticates nobody. OpenID Connect
Discovery 1.0; RFC 7517; RFC 9068.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.errors import ConfigError

LIFETIME_S: Final = 600
KEY_ID: Final = "development"


class EmbeddedIssuer:
    """Issues ES256 access tokens for *audience* with a key that lives in this process only."""

    def __init__(self, *, audience: str, in_cluster: bool) -> None:
        if in_cluster:
            raise ConfigError("the embedded issuer is for development only and does not start in a cluster")
        self._audience = audience
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.issuer = ""

    async def start(self) -> web.AppRunner:
        """Listen on a free loopback port; return the runner, whose clean-up stops it."""
        application = web.Application()
        application.router.add_get("/.well-known/openid-configuration", self._discovery)
        application.router.add_get("/jwks", self._jwks)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.issuer = f"http://{host}:{port}"
        return runner

    def token(self, subject: str, *, email: str, role: str, groups: Sequence[str] = ()) -> str:
        """Return an access token for *subject*."""
        now_s = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "aud": self._audience,
            "sub": subject,
            "email": email,
            "role": role,
            "groups": list(groups),
            "iat": now_s,
            "exp": now_s + LIFETIME_S,
        }
        return jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": KEY_ID, "typ": "at+jwt"})

    async def _discovery(self, _: web.Request) -> web.Response:
        return web.json_response({"issuer": self.issuer, "jwks_uri": f"{self.issuer}/jwks"})

    async def _jwks(self, _: web.Request) -> web.Response:
        key: dict[str, Any] = jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return web.json_response({"keys": [{**key, "kid": KEY_ID, "use": "sig", "alg": "ES256"}]})
