"""Public stdio servers, unmodified, behind the sidecar: started by it, or behind the relay as in a pod; the official client in front."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcp_types as types
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError

from sidecar.core.authorise import Question, Verdict
from sidecar.core.message import Ask, Listing, Tool
from sidecar.shell.stdio import Stdio
from tests.builders import a_snapshot
from tests.fakes import FakeEngine, a_path, allowing, eventually
from tests.fakes import Path as GovernedPath
from tests.parts import ENVIRONMENT, part
from tests.relays import free_port, is_alive, is_open, relayed

PATIENCE_S = 120.0
ERAS = pytest.mark.parametrize("mode", ["legacy", "auto"])


def python_server(name: str, part_name: str, *arguments: str) -> tuple[str, ...]:
    """A public server of PyPI."""
    packages = part(part_name)
    return ("/usr/bin/env", f"PYTHONPATH={packages}", sys.executable, str(packages / "bin" / name), *arguments)


def clock() -> tuple[str, ...]:
    """mcp-server-time, written on the second generation of the SDK."""
    return python_server("mcp-server-time", "mcp-servers-python", "--local-timezone", "UTC")


def database(directory: Path) -> tuple[str, ...]:
    """mcp-server-sqlite, written on the first generation of the SDK."""
    return python_server("mcp-server-sqlite", "mcp-servers-python-1", "--db-path", str(directory / "test.db"))


def everything() -> tuple[str, ...]:
    """Npm's server-everything, which asks its clients, too."""
    root = part("mcp-server-everything") / "node_modules" / "@modelcontextprotocol" / "server-everything"
    return (str(part("node")), str(root / "dist" / "index.js"), "stdio")


@dataclass
class Governed:
    """The path with a public server behind it."""

    path: GovernedPath
    stdio: Stdio

    @property
    def url(self) -> str:
        """Where clients call."""
        return f"http://127.0.0.1:{self.path.port}/mcp"

    @property
    def processes(self) -> int:
        """How many there are, those that are ending included."""
        return len(self.stdio._processes)


@asynccontextmanager
async def governed(
    engine: FakeEngine, *command: str, behind_relay: bool = False, **server: Any
) -> AsyncIterator[Governed]:
    """*command* with the sidecar in front, started by it or behind the relay."""
    made: list[Stdio] = []

    def make(spawn: Callable[..., object]) -> Stdio:
        own = () if behind_relay else command
        made.append(Stdio("127.0.0.1", spawn, command=own, max_processes=8, idle_s=600))
        return made[0]

    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(PATIENCE_S))
        port = await stack.enter_async_context(relayed(*command)) if behind_relay else 1
        snapshot = a_snapshot(engine, transport="stdio", port=port, **server)
        yield Governed(await stack.enter_async_context(a_path(snapshot, make_stdio=make)), made[0])


def text_of(result: types.CallToolResult) -> str:
    """The text of a tool's answer."""
    return "".join(each.text for each in result.content if isinstance(each, types.TextContent))


@pytest.mark.parametrize("behind_relay", [False, True], ids=["started", "relay"])
@ERAS
async def test_a_python_server_works_and_its_client_survives_refusals(mode: str, *, behind_relay: bool) -> None:
    """It lists what may be used, calls, is denied, and goes on; the record has it all."""
    async with governed(allowing("get_current_time"), *clock(), behind_relay=behind_relay) as it:
        async with Client(it.url, mode=mode) as client:  # type: ignore[arg-type]
            listed = await client.list_tools()
            now = await client.call_tool("get_current_time", {"timezone": "UTC"})
            with pytest.raises(MCPError) as denied:
                await client.call_tool(
                    "convert_time", {"source_timezone": "UTC", "time": "1:00", "target_timezone": "UTC"}
                )
            again = await client.call_tool("get_current_time", {"timezone": "Asia/Tokyo"})
        exchanges = it.path.exchanges

    assert [tool.name for tool in listed.tools] == ["get_current_time"]
    assert "UTC" in text_of(now)
    assert "Asia/Tokyo" in text_of(again)
    assert denied.value.code == 403
    assert {each.hidden for each in exchanges if each.message and each.message.target is Listing.TOOLS} == {1}
    calls = [each for each in exchanges if each.message and isinstance(each.message.target, Tool)]
    assert [each.refusal is None for each in calls] == [True, False, True]


async def test_a_server_of_the_first_generation_works(tmp_path: Path) -> None:
    """A client that asks for the later era first falls back; a session's state is its own."""
    engine = allowing("create_table", "write_query", "read_query")
    async with governed(engine, *database(tmp_path)) as it, Client(it.url) as client:
        await client.call_tool("create_table", {"query": "CREATE TABLE t (n INTEGER)"})
        await client.call_tool("write_query", {"query": "INSERT INTO t VALUES (42)"})
        assert "42" in text_of(await client.call_tool("read_query", {"query": "SELECT n FROM t"}))
        assert {tool.name for tool in (await client.list_tools()).tools} == {
            "create_table",
            "write_query",
            "read_query",
        }


async def test_a_git_server_sees_the_repository_it_was_started_in(tmp_path: Path) -> None:
    """Its arguments are its own."""
    commit = ("-c", "user.name=t", "-c", "user.email=t@t.test", "commit", "--quiet", "--allow-empty", "-m", "first")
    for command in (("init", "--quiet"), commit):
        git = await asyncio.create_subprocess_exec("git", *command, cwd=tmp_path)
        assert await git.wait() == 0
    server = python_server("mcp-server-git", "mcp-servers-python", "--repository", str(tmp_path))
    async with governed(allowing("git_log"), *server, behind_relay=True) as it, Client(it.url) as client:
        assert "first" in text_of(await client.call_tool("git_log", {"repo_path": str(tmp_path)}))


async def test_two_sessions_are_two_processes_and_end_with_their_clients() -> None:
    """A client that closes well ends its own."""
    async with governed(allowing(), *clock()) as it:
        async with Client(it.url, mode="legacy") as one:
            async with Client(it.url, mode="legacy") as two:
                await asyncio.gather(one.list_tools(), two.list_tools())
                assert it.processes == 2
            await eventually(lambda: it.processes == 1, what="the end of a process")
            assert (await one.list_tools()).tools
        await eventually(lambda: it.processes == 0, what="the end of the other")


@ERAS
async def test_a_shared_process_serves_many_clients(mode: str) -> None:
    """Each gets its own answers, at the same time."""
    async with (
        governed(allowing(), *clock(), processes="shared") as it,
        Client(it.url, mode=mode) as one,  # type: ignore[arg-type]
        Client(it.url, mode=mode) as two,  # type: ignore[arg-type]
    ):
        zones = ("UTC", "Asia/Tokyo", "Europe/Oslo", "America/Lima")
        answers = await asyncio.gather(
            *(client.call_tool("get_current_time", {"timezone": zone}) for zone in zones for client in (one, two))
        )
        assert it.processes == 1

    assert [
        zone in text_of(answer) for zone, answer in zip([z for z in zones for _ in "12"], answers, strict=True)
    ] == [True] * 8


@pytest.mark.parametrize("behind_relay", [False, True], ids=["started", "relay"])
async def test_the_server_asks_the_client_and_reports_progress(*, behind_relay: bool) -> None:
    """Sampling and elicitation pass to the client and back; progress comes while the call runs."""
    seen: list[float] = []

    async def sample(*_: Any) -> types.CreateMessageResult:
        return types.CreateMessageResult(
            role="assistant", model="none", content=types.TextContent(type="text", text="sampled here")
        )

    async def elicit(*_: Any) -> types.ElicitResult:
        return types.ElicitResult(action="decline")

    async def on_progress(progress: float, _total: float | None, _message: str | None) -> None:
        seen.append(progress)

    async with (
        governed(allowing(), *everything(), behind_relay=behind_relay) as it,
        Client(it.url, mode="legacy", sampling_callback=sample, elicitation_callback=elicit) as client,
    ):
        sampled = await client.call_tool("trigger-sampling-request", {"prompt": "hello", "maxTokens": 5})
        elicited = await client.call_tool("trigger-elicitation-request", {})
        await client.call_tool(
            "trigger-long-running-operation", {"duration": 0.4, "steps": 4}, progress_callback=on_progress
        )
        asked = [
            each.message.method for each in it.path.exchanges if each.message and isinstance(each.message.target, Ask)
        ]

    assert "sampled here" in text_of(sampled)
    assert "declin" in text_of(elicited).lower()
    assert seen == [1, 2, 3, 4]
    assert {"sampling/createMessage", "elicitation/create"} <= set(asked)


class NoSampling(FakeEngine):
    """Allows everything but that the server uses the client's model."""

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        return Verdict(allowed=question.message.method != "sampling/createMessage", policies=("fake",))


async def test_a_server_that_may_not_ask_is_told_so() -> None:
    """The client never hears of it, the tool fails, and both go on."""
    asked: list[Any] = []

    async def sample(*arguments: Any) -> types.CreateMessageResult:
        asked.append(arguments)
        raise AssertionError("never to be asked")

    async with (
        governed(NoSampling(), *everything()) as it,
        Client(it.url, mode="legacy", sampling_callback=sample) as client,
    ):
        refused = await client.call_tool("trigger-sampling-request", {"prompt": "hello", "maxTokens": 5})
        assert refused.is_error
        assert "policy" in text_of(refused)
        assert "hi" in text_of(await client.call_tool("echo", {"message": "hi"}))

    assert asked == []


async def test_a_killed_process_is_answered_for_and_the_client_can_start_anew() -> None:
    """Its call fails, its session is gone, the next client finds a new process."""
    async with governed(allowing(), *everything()) as it:
        async with Client(it.url, mode="legacy") as client:
            (process,) = it.stdio._processes
            call = client.call_tool("trigger-long-running-operation", {"duration": 60, "steps": 2})
            waiting = asyncio.gather(call, return_exceptions=True)
            await eventually(lambda: len(process.whose.callers()) == 2, what="the call")
            pid = process.pipe.pid  # type: ignore[union-attr]
            os.kill(pid, signal.SIGKILL)
            (failed,) = await waiting
            assert isinstance(failed, MCPError)
            assert failed.code == -32603
            with pytest.raises(MCPError, match=r"(?i)session|not open"):
                await client.list_tools()
        async with Client(it.url, mode="legacy") as client:
            assert (await client.list_tools()).tools


@asynccontextmanager
async def sidegate_run(directory: Path, *command: str) -> AsyncIterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run `sidegate run -- COMMAND` as a user would; gives its address and the process."""
    (directory / "all.cedar").write_text("permit (principal, action, resource);")
    (directory / "no.cedar").write_text(
        'forbid (principal, action == Action::"tools/call", resource) when { resource.name == "convert_time" };'
    )
    port = free_port()
    sidegate = (sys.executable, "-m", "webhook.cli", "run", "--listen", f"127.0.0.1:{port}", "--policy", directory)
    own = ("--user", "optional", "--audit", directory / "audit.jsonl")
    process = subprocess.Popen([*sidegate, *own, "--", *command], env=ENVIRONMENT)  # noqa: S603, ASYNC220 - ours
    try:
        await eventually(lambda: is_open(port) or process.poll() is not None, what="the sidecar")
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}/mcp", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        await eventually(lambda: process.poll() is not None, what="the sidecar's end")


def children(pid: int) -> list[int]:
    """The processes that *pid* started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_sidegate_run_starts_governs_and_ends_a_server(tmp_path: Path, signal_number: signal.Signals) -> None:
    """With the policies of a directory; nothing of the server outlives it."""
    async with asyncio.timeout(PATIENCE_S), sidegate_run(tmp_path, *clock()) as (url, process):
        async with Client(url) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["get_current_time"]
            assert "UTC" in text_of(await client.call_tool("get_current_time", {"timezone": "UTC"}))
            with pytest.raises(MCPError):
                await client.call_tool(
                    "convert_time", {"source_timezone": "UTC", "time": "1:00", "target_timezone": "UTC"}
                )
            started = children(process.pid)
            assert started
        process.send_signal(signal_number)
        began_s = time.monotonic()
        await eventually(lambda: process.poll() is not None, what="the end")
        await eventually(lambda: not any(is_alive(pid) for pid in started), what="the servers' end")
        assert time.monotonic() - began_s < 20
        assert process.returncode == 0
