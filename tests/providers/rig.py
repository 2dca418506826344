"""The sidecar as it runs, between real providers and an unmodified MCP server that calls a protected API."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import jwt
from aiohttp import web
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from certs.embedded import EmbeddedDomain
from certs.spiffe import SpiffeId
from sidecar.config import Settings
from sidecar.core.bundle import Bundle
from sidecar.core.profile import Identity, PolicySet, Profile, Server
from sidecar.shell.app import App
from tests.builders import a_call
from tests.certs.agents import a_socket, an_agent, running
from tests.certs.pki import A_TEST
from tests.fakes import eventually
from tests.providers.keycloak import free_port

WORKLOAD = SpiffeId.parse("spiffe://a.test/ns/pay/sa/orders")
POLICY = b"""permit(principal in Role::"analyst", action, resource == Tool::"orders/my_orders");
permit(principal in Role::"engineer", action, resource);"""
HEADERS = {"content-type": "application/json", "accept": "application/json, text/event-stream"}


@dataclass
class Api:
    """A protected API that takes only the provider's tokens for it."""

    issuer: str
    audience: str
    keys: str
    heard: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer with the user's name, if the token is for this API."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            key = await asyncio.to_thread(jwt.PyJWKClient(self.keys).get_signing_key_from_jwt, token)
            claims = jwt.decode(token, key, algorithms=["RS256"], audience=self.audience, issuer=self.issuer)
        except jwt.PyJWTError as error:
            return web.Response(status=401, text=str(error))
        self.heard.append(claims)
        return web.Response(text=f"orders of {claims.get('preferred_username', claims['sub'])}")


@asynccontextmanager
async def serving(handle: Any) -> AsyncIterator[str]:
    """Serve GETs on loopback by *handle*; gives the URL."""
    application = web.Application()
    application.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def orders(api: str) -> AsyncIterator[int]:
    """Run the MCP server; gives its port."""
    port = free_port()
    program = Path(__file__).parent / "orders.py"
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        str(port),
        api,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                break
        yield port
    finally:
        server.terminate()
        await server.wait()


@dataclass
class Sidecar:
    """The running sidecar, seen from outside."""

    url: str
    health: str
    audit: Path

    async def post(
        self, token: str | None, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """One raw POST: status, headers and text of the answer."""
        told = HEADERS | headers | ({} if token is None else {"authorization": f"Bearer {token}"})
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url, data=body or a_call("my_orders"), headers=told) as answer,
        ):
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.text()

    async def call(self, token: str | None, tool: str = "my_orders", **headers: str) -> str:
        """What the official client gets of a call: the text, or the error's message."""
        told = headers | ({} if token is None else {"authorization": f"Bearer {token}"})
        async with (
            httpx2.AsyncClient(headers=told, timeout=60) as client,
            streamable_http_client(self.url, http_client=client) as streams,
            ClientSession(streams[0], streams[1]) as session,
        ):
            await session.initialize()
            try:
                result = await session.call_tool(tool, {})
            except MCPError as error:
                return f"error {error.error.code}: {error.error.message}"
            return "".join(getattr(part, "text", "") for part in result.content)

    def records(self) -> Iterator[dict[str, Any]]:
        """The audit records so far, without the links of their chain."""
        return (each for each in map(json.loads, self.audit.read_text().splitlines()) if each.get("phase") == "end")

    async def last_record(self, method: str) -> dict[str, Any]:
        """The last record of a message *method*, once it is written."""
        await eventually(
            lambda: any((each["message"] or {}).get("method") == method for each in self.records()), what=method
        )
        return [each for each in self.records() if (each["message"] or {}).get("method") == method][-1]


@asynccontextmanager
async def a_sidecar(
    upstream: int, folder: Path, identity: Identity, domain: EmbeddedDomain, *, port: int = 0
) -> AsyncIterator[Sidecar]:
    """The whole process but its main(), in front of *upstream*, with an SVID of *domain*."""
    profile = Profile(
        server=Server(namespace="pay", workload="orders", name="orders", port=upstream),
        identity=identity,
        policies=(PolicySet(cedar=True),),
    )
    bundle = Bundle(revision="r1", files={"cedar/all.cedar": POLICY}, profile=profile)
    with a_socket() as socket:
        agent = an_agent(socket, WORKLOAD, domain=domain)
        settings = Settings(
            listen_host="127.0.0.1", listen_port=port, health_host="127.0.0.1", health_port=0, drain_s=1.0,
            spiffe_socket=agent.address, audit_sink=str(folder / "audit.jsonl"),
        )  # fmt: skip
        app = App(settings, bundle=bundle)
        listening: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        async with running(agent), asyncio.TaskGroup() as tasks:
            main = tasks.create_task(app.serve(listening))
            port, health = await listening
            await eventually(lambda: not app.conditions(), what="readiness")
            try:
                yield Sidecar(f"http://127.0.0.1:{port}/mcp", f"http://127.0.0.1:{health}", folder / "audit.jsonl")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # ours alone: the app has a handler for it
                await main


def domain() -> EmbeddedDomain:
    """The trust domain of the MCP server."""
    return EmbeddedDomain(A_TEST)


def altered(token: str, part: int, **changes: Any) -> str:
    """The token with other members in header (0) or payload (1), its signature kept."""
    parts = token.split(".")
    document = json.loads(jwt.utils.base64url_decode(parts[part])) | changes
    parts[part] = jwt.utils.base64url_encode(json.dumps(document).encode()).decode()
    return ".".join(parts)
