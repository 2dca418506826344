"""An agent as anybody would write it, with the official SDK and plain HTTP, beside a sidecar in agent role."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffeId
from certs.tls import ClientCertificate, MutualServer
from certs.workload import X509Source
from sidecar.config import Capture, Role, Settings
from sidecar.core import profile
from sidecar.core.bundle import Bundle
from sidecar.core.profile import AgentRole, Destination, Profile, Server
from sidecar.shell.app import App
from tests.builders import a_snapshot
from tests.certs.agents import FAST, a_socket, an_agent, ready
from tests.certs.agents import running as both_running
from tests.certs.pki import A_TEST
from tests.fakes import a_path, allowing, eventually
from tests.wire.test_http import PATIENCE_S, a_three_tool_server, running

SERVER, AGENT = (
    SpiffeId.parse("spiffe://a.test/ns/demo/sa/tools"),
    SpiffeId.parse("spiffe://a.test/ns/agents/sa/planner"),
)
STRICT = profile.Identity(mtls="strict", user="optional", callers=("spiffe://a.test/ns/agents/sa/*",))


@asynccontextmanager
async def a_sidecar(
    agent: EmbeddedWorkloadApi, server_port: int, audit: Path, expected: str
) -> AsyncIterator[tuple[int, int]]:
    """The whole process in agent role; gives the ports of its proxy and of its health."""
    role = AgentRole(servers=(Destination(host="localhost", port=server_port, id=expected),))
    here = Server(namespace="agents", workload="planner", name="planner", port=15001)
    bundle = Bundle(revision="r1", files={}, profile=Profile(server=here, agent=role))
    settings = Settings(
        role=Role.AGENT, capture=Capture.REMAP, egress_port=0, health_host="127.0.0.1", health_port=0, drain_s=1.0,
        spiffe_socket=agent.address, audit_sink=str(audit),
    )  # fmt: skip
    listening: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(App(settings, bundle=bundle).serve(listening))
        ports = await listening
        try:
            yield ports
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ours alone: the app has a handler for it
            await serving


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_an_unmodified_agents_call_is_governed_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """It lists, calls, is denied and goes on; the server's record names it, its own record names the server."""
    audit = tmp_path / "audit.jsonl"
    domain = EmbeddedDomain(A_TEST)
    async with asyncio.timeout(PATIENCE_S):
        with a_socket() as folder:
            agents = [
                an_agent(folder.with_suffix(end), domain=domain, identities=[Identity(spiffe_id=each)])
                for end, each in ((".s", SERVER), (".a", AGENT))
            ]
            source, server = (
                X509Source(agents[0].address, timing=FAST),
                MutualServer(client_certificate=ClientCertificate.OPTIONAL),
            )
            source.subscribe(server.follow)
            async with (
                both_running(*agents, source),
                running(a_three_tool_server(), json_response=False) as upstream,
                a_path(
                    a_snapshot(allowing("add", "count"), identity=STRICT, port=upstream), tls=server.context
                ) as path,
            ):
                await ready(source)
                async with a_sidecar(agents[1], path.port, audit, str(SERVER)) as (proxy, health):
                    await _ready(health)
                    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy}")
                    async with Client(f"http://localhost:{path.port}/mcp", mode=mode) as client:  # type: ignore[arg-type]
                        listed = await client.list_tools()
                        total = await client.call_tool("add", {"a": 1, "b": 2})
                        with pytest.raises(MCPError):
                            await client.call_tool("drop", {"table": "t"})
                        again = await client.call_tool("count", {"to": 2})
                    monkeypatch.delenv("HTTP_PROXY")
                    await _refused_without_sidecar(path.port)
                await eventually(lambda: not path.serving.connections, what="the connections to end")

    assert [tool.name for tool in listed.tools] == ["add", "count"]
    assert total.structured_content == {"result": 3}
    assert not again.is_error
    called = [each for each in path.exchanges if each.message and each.message.method == "tools/call"]
    assert {str(each.principal and each.principal.workload) for each in called} == {str(AGENT)}
    records = [json.loads(line) for line in audit.read_text().splitlines()]
    out = [each for each in records if each.get("direction") == "outbound" and each["phase"] == "end"]
    assert {each["destination"]["workload"] for each in out} == {str(SERVER)}
    assert {each["who"]["workload"] for each in out} == {str(AGENT)}
    assert {each["message"]["tool"] for each in out if each["message"]["method"] == "tools/call"} == {
        "add",
        "drop",
        "count",
    }
    # One agent session on both sides; in the modern era, one for each connection.
    assert {each.agent.session for each in called} <= {each["agent"]["session"] for each in out}
    assert len({each.trace_id for each in called} - {each["trace_id"] for each in out}) == 0


async def _ready(health: int) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://127.0.0.1:{health}/readyz") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


async def _refused_without_sidecar(port: int) -> None:
    """The same call, from whom nobody injected a sidecar: strict refuses it."""
    async with aiohttp.ClientSession() as session, session.post(f"http://localhost:{port}/mcp", json={}) as response:
        assert response.status == 401
