"""The official SDK's server, unmodified, behind the sidecar; its client in front, which survives every refusal."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from mcp import Client
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError

from sidecar.core.message import Listing, Tool
from sidecar.core.profile import Limit
from sidecar.errors import Reason
from tests.builders import a_snapshot
from tests.fakes import FakeEngine, Path, a_path, allowing, eventually

PATIENCE_S = 30.0


def a_three_tool_server() -> MCPServer:
    """A server as anybody would write it: it knows nothing of a sidecar."""
    server = MCPServer("three-tools")

    @server.tool()
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    @server.tool()
    def drop(table: str) -> str:
        """Drop a table."""
        return f"dropped {table}"

    @server.tool()
    async def count(to: int, ctx: Context) -> str:  # type: ignore[type-arg]
        """Count aloud."""
        for step in range(to):
            await ctx.report_progress(step, to, f"step {step}")
        return "done"

    return server


@asynccontextmanager
async def running(server: MCPServer, *, json_response: bool) -> AsyncIterator[int]:
    """Serve on a free loopback port; gives the port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        app = server.streamable_http_app(json_response=json_response)
        uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(uvicorn_server.serve(sockets=[sock]))
            await eventually(lambda: uvicorn_server.started, what="the server")
            try:
                yield sock.getsockname()[1]
            finally:
                uvicorn_server.should_exit = True


@asynccontextmanager
async def governed(
    engine: FakeEngine, *, json_response: bool = False, limits: tuple[Limit, ...] = ()
) -> AsyncIterator[Path]:
    """The server with the sidecar in front."""
    async with (
        asyncio.timeout(PATIENCE_S),
        running(a_three_tool_server(), json_response=json_response) as port,
        a_path(a_snapshot(engine, limits=limits, port=port)) as path,
    ):
        yield path


ERAS = pytest.mark.parametrize("mode", ["legacy", "auto"])
FORMS = pytest.mark.parametrize("json_response", [False, True], ids=["stream", "json"])


@ERAS
@FORMS
async def test_a_governed_client_works_and_survives_refusals(mode: str, *, json_response: bool) -> None:
    """It connects, lists what it may use, calls, is denied, and goes on; the record has it all."""
    async with governed(allowing("add", "count"), json_response=json_response) as path:
        async with Client(f"http://127.0.0.1:{path.port}/mcp", mode=mode) as client:  # type: ignore[arg-type]
            listed = await client.list_tools()
            sums = [await client.call_tool("add", {"a": 1, "b": 2})]
            with pytest.raises(MCPError) as denied:
                await client.call_tool("drop", {"table": "t"})
            sums.append(await client.call_tool("add", {"a": 3, "b": 4}))
        exchanges = path.exchanges

    assert [tool.name for tool in listed.tools] == ["add", "count"]
    assert [each.structured_content for each in sums] == [{"result": 3}, {"result": 7}]
    assert (denied.value.code, "'drop'" in denied.value.message) == (403, True)
    calls = [each for each in exchanges if each.message and isinstance(each.message.target, Tool)]
    assert [each.refusal.reason if each.refusal else None for each in calls] == [None, Reason.DENIED, None]
    lists = [each for each in exchanges if each.message and each.message.target is Listing.TOOLS]
    assert {each.hidden for each in lists} == {1}
    assert {each.agent.client_name for each in calls} == {"mcp"}


@ERAS
async def test_progress_arrives_while_the_call_runs(mode: str) -> None:
    """Events pass one by one, before the result."""
    seen: list[str | None] = []

    async def on_progress(_progress: float, _total: float | None, message: str | None) -> None:
        seen.append(message)

    async with governed(allowing()) as path, Client(f"http://127.0.0.1:{path.port}/mcp", mode=mode) as client:  # type: ignore[arg-type]
        result = await client.call_tool("count", {"to": 3}, progress_callback=on_progress)

    assert seen == ["step 0", "step 1", "step 2"]
    assert result.structured_content == {"result": "done"}


@ERAS
async def test_a_throttled_client_survives(mode: str) -> None:
    """It is told so, by an error of its call, and not by a broken connection."""
    limit = Limit(name="adds", rate_per_s=0.001, burst=1)
    async with (
        governed(allowing(), limits=(limit,)) as path,
        Client(f"http://127.0.0.1:{path.port}/mcp", mode=mode) as client,  # type: ignore[arg-type]
    ):
        await client.call_tool("add", {"a": 1, "b": 2})
        with pytest.raises(MCPError) as throttled:
            await client.call_tool("add", {"a": 1, "b": 2})
        assert len((await client.list_tools()).tools) == 3

    assert throttled.value.code == 429


async def test_a_session_is_opened_and_closed_with_the_client() -> None:
    """DELETE passes, and afterwards the id is worth nothing."""
    async with governed(allowing()) as path:
        async with Client(f"http://127.0.0.1:{path.port}/mcp", mode="legacy") as client:
            await client.call_tool("add", {"a": 1, "b": 2})
            assert len(path.serving.memory.sessions.opened) == 1
        await eventually(lambda: not path.serving.memory.sessions.opened, what="the end of the session")
        shapes = {each.message.shape.value for each in path.exchanges if each.message}

    assert "close_session" in shapes


async def test_two_clients_do_not_see_each_other() -> None:
    """Each has its own session and its own answers, at the same time."""
    async with governed(allowing()) as path:
        url = f"http://127.0.0.1:{path.port}/mcp"
        async with Client(url, mode="legacy") as one, Client(url, mode="legacy") as two:
            results = await asyncio.gather(
                *(client.call_tool("add", {"a": number, "b": 0}) for number in range(10) for client in (one, two))
            )
            assert len(path.serving.memory.sessions.opened) == 2

    assert [each.structured_content for each in results] == [{"result": number} for number in range(10) for _ in "12"]
