"""The sidecar in front of a server of the suite that asks for tokens: what an operator would tell it, and whom it asks.

The suite's authorization server publishes no keys and answers no introspection, so an endpoint here (RFC 7662) says what that
server itself said of the tokens it issued: which there are, and for what scopes. Any other token is not active. The rest of the
profile is what the server says of itself, in its challenge (RFC 6750) and its own metadata (RFC 9728).
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import httpx2
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from sidecar.core.metadata import WELL_KNOWN
from sidecar.core.profile import Client, Identity, Profile, Provider, Server, StepUp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What calls need beyond what the first challenge names; a server tells it only to who already has a token.
STEP_UPS: Final = {"auth/scope-step-up": (StepUp(scopes=("mcp:write",)),)}
ASK: Final = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
ACCEPTED: Final = {"accept": "application/json, text/event-stream"}
ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a server says of itself to who has no token."""

    issuer: str
    scopes: tuple[str, ...]


def describe(upstream: str) -> Described:
    """Ask the server at *upstream*. One without metadata is of 2025-03-26: its own origin is the authorization server."""
    parts = urlsplit(upstream)
    origin = f"{parts.scheme}://{parts.netloc}"
    with httpx2.Client(timeout=ANSWER_S) as http:
        challenge = http.post(upstream, json=ASK, headers=ACCEPTED).headers.get("www-authenticate", "")
        named = _parameter(challenge, "resource_metadata")
        for url in [named] if named else [f"{origin}{WELL_KNOWN}{parts.path}", f"{origin}{WELL_KNOWN}"]:
            answer = http.get(url)
            if answer.status_code == 200:
                document = answer.json()
                scopes = _parameter(challenge, "scope").split() or document.get("scopes_supported", [])
                return Described(issuer=document["authorization_servers"][0], scopes=tuple(scopes))
    return Described(issuer=origin, scopes=tuple(_parameter(challenge, "scope").split()))


def _parameter(challenge: str, name: str) -> str:
    found = re.search(rf'\b{name}="([^"]*)"', challenge)
    return "" if found is None else found[1]


@dataclass
class Introspection:
    """The tokens that the authorization server has issued, with their scopes; told by whoever got them from it."""

    resource: str
    url: str = ""
    scopes: dict[str, str] = field(default_factory=dict)

    def claims(self, token: str) -> dict[str, Any]:
        """Return the answer about *token*."""
        if token not in self.scopes:
            return {"active": False}
        return {"active": True, "sub": "tester", "aud": self.resource, "scope": self.scopes[token]}


@contextlib.contextmanager
def introspection(resource: str) -> Iterator[Introspection]:
    """Answer on loopback, POST about tokens and GET with a key set, whose one key has signed nothing."""
    known = Introspection(resource)
    public: dict[str, Any] = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)
    keys = {"keys": [{**public, "kid": "none", "use": "sig", "alg": "ES256"}]}

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
            self._answer(known.claims(form["token"][0]))

        def do_GET(self) -> None:
            self._answer(keys)

        def _answer(self, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: standard error belongs to the suite."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        known.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield known
        finally:
            server.shutdown()


def profile(scenario: str, described: Described, known: Introspection, home: Path) -> Profile:
    """Return what the sidecar enforces: tokens of that server alone, for the URL by which the client knows it.

    The token goes on, because the suite's server wants to see it.
    """
    (home / "secret").write_text("only for tests")
    provider = Provider(
        name="suite",
        issuer=described.issuer,
        audiences=(known.resource,),
        introspection=True,
        introspection_endpoint=known.url,
        jwks_uri=known.url,
        client=Client(id="sidecar", method="client_secret_basic", file=str(home / "secret")),
    )
    identity = Identity(
        mtls="permissive",
        providers=(provider,),
        resource=known.resource,
        scopes=described.scopes,
        step_up=STEP_UPS.get(scenario, ()),
        upstream="token",
    )
    return Profile(server=Server(namespace="local", workload="local", name="local", port=1), identity=identity)
