"""The official SDKs log in through the sidecar, by their own OAuth code, at a certified OpenID provider.

They are told the sidecar's URL and nothing else: its challenge leads to its metadata, that to the provider.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from mcp import Client
from mcp.client.auth import AuthorizationCodeResult, OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata
from pydantic import AnyUrl

from sidecar.core.profile import Identity, Provider
from tests.conformance.auth_client import Storage
from tests.e2e.workloads.login import REDIRECT, a_browser, agree
from tests.parts import ENVIRONMENT, part
from tests.providers.keycloak import free_port
from tests.providers.rig import Sidecar, a_sidecar, domain, orders
from tests.providers.test_oidc_provider import a_provider

pytestmark = pytest.mark.real_provider

STEP_S = 120.0  # for one line of a client's on a busy machine
PROGRAM = Path(__file__).parent / "login_client.mjs"


class User:
    """Somebody at a browser."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent_to: list[str] = []
        self.callback = ""

    async def visit(self, url: str) -> None:
        """Log in where the client sends the browser."""
        self.sent_to.append(url)
        self.callback = await asyncio.to_thread(agree, a_browser(""), url, self.name)

    async def result(self) -> AuthorizationCodeResult:
        """What the browser brings back."""
        told = {name: values[0] for name, values in parse_qs(urlsplit(self.callback).query).items()}
        return AuthorizationCodeResult(code=told["code"], state=told.get("state"), iss=told.get("iss"))


@asynccontextmanager
async def a_governed_server(folder: Path) -> AsyncIterator[tuple[Sidecar, str]]:
    """An unmodified server behind a sidecar that wants the scope mcp; gives it and the issuer."""
    port = free_port()
    resource = f"http://127.0.0.1:{port}/mcp"
    with a_provider(folder) as (_, issuer):
        provider = Provider(name="corp", issuer=issuer, audiences=(resource,))
        identity = Identity(mtls="permissive", providers=(provider,), resource=resource, scopes=("mcp",))
        async with (
            orders("http://127.0.0.1:9/") as upstream,
            a_sidecar(upstream, folder, identity, domain(), port=port) as sidecar,
        ):
            yield sidecar, issuer


@pytest.mark.parametrize("mode", ["legacy", "auto"])
@pytest.mark.parametrize("is_registered", [False, True])
async def test_the_python_sdk_logs_in_by_itself(tmp_path: Path, mode: str, *, is_registered: bool) -> None:
    """Registering itself or registered before, in either era; the server is called as the user and sees no token."""
    user, storage = User("bob"), Storage()
    metadata = OAuthClientMetadata(
        client_name="agent",
        redirect_uris=[AnyUrl(REDIRECT)],
        grant_types=["authorization_code"],
        response_types=["code"],
    )
    if is_registered:
        storage.client = OAuthClientInformationFull(
            client_id="agent", redirect_uris=[AnyUrl(REDIRECT)], token_endpoint_auth_method="none"
        )
    async with a_governed_server(tmp_path) as (sidecar, issuer):
        login = OAuthClientProvider(sidecar.url, metadata, storage, user.visit, user.result)
        async with (
            create_mcp_http_client(auth=login) as http,
            Client(streamable_http_client(sidecar.url, http_client=http), mode=mode) as client,
        ):
            answer = await client.call_tool("headers", {})
        record = await sidecar.last_record("tools/call")

    assert [urlsplit(url).netloc for url in user.sent_to] == [urlsplit(issuer).netloc]
    asked = parse_qs(urlsplit(user.sent_to[0]).query)
    assert (asked["resource"], asked["scope"], asked["code_challenge_method"]) == ([sidecar.url], ["mcp"], ["S256"])
    assert answer.structured_content is not None
    assert "authorization" not in answer.structured_content
    assert record["decision"]["outcome"] == "allowed"
    assert (record["who"]["user"]["email"], record["who"]["user"]["issuer"]) == ("bob@corp.example", issuer)


@pytest.mark.parametrize(("generation", "packages"), [("1", "mcp-typescript-1.32"), ("2", "mcp-typescript-2.4")])
async def test_the_typescript_sdks_log_in_by_themselves(tmp_path: Path, generation: str, packages: str) -> None:
    """Both generations register themselves, go through the user's browser, and call the server as the user."""
    environment = {**ENVIRONMENT, "PACKAGES": str(part(packages)), "SDK": generation}
    async with a_governed_server(tmp_path) as (sidecar, issuer):
        agent = await asyncio.create_subprocess_exec(
            part("node"), PROGRAM, sidecar.url, "headers",
            env=environment, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert agent.stdin is not None
        assert agent.stdout is not None
        try:
            async with asyncio.timeout(STEP_S):
                sent_to = (await agent.stdout.readline()).decode().strip()
            back = await asyncio.to_thread(agree, a_browser(""), sent_to, "bob")
            agent.stdin.write(f"{back}\n".encode())
            async with asyncio.timeout(STEP_S):
                answer = json.loads(await agent.stdout.readline())
                assert await agent.wait() == 0
        finally:
            if agent.returncode is None:
                agent.kill()
                await agent.wait()
        record = await sidecar.last_record("tools/call")

    asked = parse_qs(urlsplit(sent_to).query)
    assert urlsplit(sent_to).netloc == urlsplit(issuer).netloc
    assert (asked["resource"], asked["scope"], asked["code_challenge_method"]) == ([sidecar.url], ["mcp"], ["S256"])
    assert "authorization" not in answer["structuredContent"]
    assert record["decision"]["outcome"] == "allowed"
    assert (record["who"]["user"]["email"], record["who"]["user"]["issuer"]) == ("bob@corp.example", issuer)
