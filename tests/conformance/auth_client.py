"""The client of the suite's auth/* scenarios, the official Python SDK logging in: `auth_client.py [--through FILE] URL`.

With --through it talks to a sidecar that it starts in front of URL, and writes into FILE, as JSON, what the suite's server
cannot see any more: where the SDK asked for protected-resource metadata, and for which resource it wanted its tokens. The
environment is that of client.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import httpx2
from mcp import Client
from mcp.client.auth import AuthorizationCodeResult, OAuthClientProvider
from mcp.client.auth.extensions.client_credentials import (
    ClientCredentialsOAuthProvider,
    PrivateKeyJWTOAuthProvider,
    SignedJWTParameters,
)
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
from pydantic import AnyUrl

from bench.processes import free_port
from sidecar.core.metadata import WELL_KNOWN
from tests.conformance import authorization
from tests.conformance.client import ENVIRONMENT
from tests.conformance.parties import sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

REDIRECT: Final = "http://localhost:3000/callback"
OWN_METADATA: Final = (
    "https://conformance-test.local/client-metadata.json"  # the client_id that auth/basic-cimd expects
)
MIGRATION: Final = "auth/authorization-server-migration"


@dataclass
class Storage:
    """What the SDK keeps of a login, in memory."""

    tokens: OAuthToken | None = None
    client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        """Return the tokens."""
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        """Keep the tokens."""
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        """Return who this client is at the authorization server."""
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        """Keep who this client is."""
        self.client = client_info


@dataclass
class Browser:
    """The user's browser, which agrees to everything at once."""

    wanted: list[str]  # resources that tokens are asked for
    callback: dict[str, list[str]] = field(default_factory=dict)

    async def visit(self, url: str) -> None:
        """Go where the client sends the user, up to the redirect back to it."""
        self.wanted += parse_qs(urlsplit(url).query).get("resource", [])
        async with httpx2.AsyncClient() as http:
            answer = await http.get(url)
        self.callback = parse_qs(urlsplit(answer.headers["location"]).query)

    async def result(self) -> AuthorizationCodeResult:
        """Return what the redirect told the client."""
        told = {name: values[0] for name, values in self.callback.items()}
        return AuthorizationCodeResult(code=told["code"], state=told.get("state"), iss=told.get("iss"))


def login(url: str, scenario: str, context: dict[str, Any], wanted: list[str]) -> OAuthClientProvider:
    """Return the SDK's own way to log in, as the *scenario* asks for it; *wanted* learns for which resource."""
    storage = Storage()
    if scenario == "auth/client-credentials-basic":
        return ClientCredentialsOAuthProvider(url, storage, context["client_id"], context["client_secret"])
    if scenario == "auth/client-credentials-jwt":
        signed = SignedJWTParameters(
            issuer=context["client_id"],
            subject=context["client_id"],
            signing_key=context["private_key_pem"],
            signing_algorithm=context["signing_algorithm"],
        )
        return PrivateKeyJWTOAuthProvider(url, storage, context["client_id"], signed.create_assertion_provider())
    if "client_secret" in context:
        storage.client = OAuthClientInformationFull(
            client_id=context["client_id"],
            client_secret=context["client_secret"],
            redirect_uris=[AnyUrl(REDIRECT)],
            token_endpoint_auth_method="client_secret_basic",
        )
    browser = Browser(wanted)
    wanted = OAuthClientMetadata(
        client_name="conformance",
        redirect_uris=[AnyUrl(REDIRECT)],
        grant_types=["authorization_code", "refresh_token"],
        response_types=["code"],
    )
    return OAuthClientProvider(url, wanted, storage, browser.visit, browser.result, client_metadata_url=OWN_METADATA)


@dataclass
class Witness:
    """Sees what the SDK sends and receives, and acts for the operator of the sidecar."""

    known: authorization.Introspection
    migrate: Callable[[], None] | None = None  # when the server has moved to another authorization server
    asked: list[str] = field(default_factory=list)  # URLs of metadata
    wanted: list[str] = field(default_factory=list)  # resources in authorization and token requests
    got: int = 0  # answers with results

    async def sent(self, request: httpx2.Request) -> None:
        """Note where metadata is asked for."""
        if WELL_KNOWN in request.url.path:
            self.asked.append(str(request.url))

    async def received(self, response: httpx2.Response) -> None:
        """Learn the tokens that the authorization server issues."""
        request = response.request
        at_server = str(request.url) == self.known.resource
        if not at_server and request.url.path.endswith("/token") and response.status_code == 200:
            self.wanted += parse_qs(request.content.decode()).get("resource", [])
            issued = json.loads(await response.aread())
            self.known.scopes[issued["access_token"]] = issued.get("scope", "")
        if at_server and response.status_code == 200:
            self.got += 1
        if self.migrate and at_server and "authorization" in request.headers and response.status_code == 401:
            self.migrate()
            self.migrate = None


async def run(url: str, scenario: str, version: str, witness: Witness | None) -> None:
    """Connect, which takes a login, list, call, disconnect."""
    context = json.loads(ENVIRONMENT.get("MCP_CONFORMANCE_CONTEXT", "{}"))
    wanted = [] if witness is None else witness.wanted
    async with create_mcp_http_client(auth=login(url, scenario, context, wanted)) as http:
        if witness is not None:
            http.event_hooks = {"request": [witness.sent], "response": [witness.received]}
        transport = streamable_http_client(url, http_client=http)
        async with Client(transport, mode="legacy" if version < "2026" else "auto") as client:
            await client.list_tools()
            await client.call_tool("test-tool", {})


def through(upstream: str, scenario: str, version: str, seen: Path) -> None:
    """Run the scenario with a sidecar in front of *upstream*."""
    port, path = free_port(), urlsplit(upstream).path
    resource = f"http://localhost:{port}{path}"
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conformance-auth-")))
        known = stack.enter_context(authorization.introspection(resource))
        fronts = stack.enter_context(contextlib.ExitStack())

        def govern() -> None:
            """Run the sidecar with what the server says now; one that ran before ends, and its tokens with it."""
            fronts.close()
            known.scopes.clear()
            profile = authorization.profile(scenario, authorization.describe(upstream), known, home)
            fronts.enter_context(sidecar(home, upstream.replace("localhost", "127.0.0.1"), profile=profile, port=port))

        govern()
        witness = Witness(known, govern if scenario == MIGRATION else None)
        try:
            asyncio.run(run(resource, scenario, version, witness))
        finally:
            seen.write_text(
                json.dumps({"resource": resource, "asked": witness.asked, "wanted": witness.wanted, "got": witness.got})
            )


def main(arguments: list[str]) -> None:
    """Run one scenario; any failure is the exit status."""
    url = arguments[-1]
    scenario, version = (ENVIRONMENT[f"MCP_CONFORMANCE_{name}"] for name in ("SCENARIO", "PROTOCOL_VERSION"))
    if arguments[0] == "--through":
        through(url, scenario, version, Path(arguments[1]))
    else:
        asyncio.run(run(url, scenario, version, None))


if __name__ == "__main__":
    main(sys.argv[1:])
