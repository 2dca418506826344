"""HTTP+SSE of 2024-11-05: the reference server of npm, unmodified, behind the sidecar; the official client in front."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from mcp import ClientSession
from mcp.client.sse import sse_client
from mcp.shared.exceptions import MCPError

from sidecar.core.authorise import Engine, Question, Verdict
from sidecar.core.message import Tool
from sidecar.errors import Reason
from sidecar.record import line
from tests.builders import a_snapshot
from tests.fakes import Client, FakeEngine, Heard, Path, a_path, a_server, allowing, eventually, post
from tests.parts import part

PATIENCE_S = 60.0
ENDPOINT = "/message?sessionId=1"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
GET = b"GET /sse HTTP/1.1\r\nHost: billing.test\r\nAccept: text/event-stream\r\n\r\n"


@asynccontextmanager
async def everything() -> AsyncIterator[int]:
    """Run server-everything in SSE mode; gives its port."""
    server = part("mcp-server-everything") / "node_modules/@modelcontextprotocol/server-everything/dist/index.js"
    listening = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    await listening.wait_closed()
    process = await asyncio.create_subprocess_exec(
        *(part("node"), server, "sse"), env={"PORT": str(port)}, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        while b"running" not in (said := await process.stderr.readline()):
            assert said, "the server ended"
        yield port
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def governed(engine: FakeEngine) -> AsyncIterator[Path]:
    """The server with the sidecar in front."""
    async with (
        asyncio.timeout(PATIENCE_S),
        everything() as port,
        a_path(a_snapshot(engine, port=port, transport="sse", paths=("/sse",))) as path,
    ):
        yield path


async def test_a_governed_client_works_and_survives_refusals() -> None:
    """It connects, lists what it may use, calls, is denied on its stream, and goes on; the record has it all."""
    async with governed(allowing("echo", "get-sum")) as path:
        async with (
            sse_client(f"http://127.0.0.1:{path.port}/sse") as (reader, writer),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            listed = await session.list_tools()
            sums = [await session.call_tool("get-sum", {"a": 1, "b": 2})]
            with pytest.raises(MCPError) as denied:
                await session.call_tool("get-env", {})
            sums.append(await session.call_tool("get-sum", {"a": 3, "b": 4}))
        await eventually(lambda: not path.serving.memory.sessions.opened, what="the end of the session")
        exchanges = path.exchanges

    assert [tool.name for tool in listed.tools] == ["echo", "get-sum"]
    assert [each.content[0].text for each in sums] == ["The sum of 1 and 2 is 3.", "The sum of 3 and 4 is 7."]  # type: ignore[union-attr]
    assert (denied.value.code, "'get-env'" in denied.value.message) == (403, True)
    calls = [each for each in exchanges if each.message and isinstance(each.message.target, Tool)]
    assert [each.refusal.reason if each.refusal else None for each in calls] == [None, Reason.DENIED, None]
    assert [each.result is not None for each in calls] == [True, False, True]
    assert {each.agent.client_name for each in calls} == {"mcp"}
    written = [json.loads(line(each)) for each in calls]
    assert {each["http"]["status"] for each in written} == {202}
    assert len({each["session"] for each in written}) == 1


async def test_two_clients_do_not_see_each_other() -> None:
    """Each has its own stream and its own answers, though both count their ids from nought."""
    async with governed(allowing()) as path:
        url = f"http://127.0.0.1:{path.port}/sse"
        async with (
            sse_client(url) as one,
            sse_client(url) as two,
            ClientSession(*one) as first,
            ClientSession(*two) as second,
        ):
            await asyncio.gather(first.initialize(), second.initialize())
            echoes = await asyncio.gather(
                *(each.call_tool("echo", {"message": f"{each is first} {n}"}) for n in range(10) for each in (first, second))
            )  # fmt: skip

    assert [each.content[0].text for each in echoes] == [  # type: ignore[union-attr]
        f"Echo: {is_first} {n}" for n in range(10) for is_first in (True, False)
    ]


class Legacy:
    """A small server of 2024-11-05; the test says what comes on the stream."""

    def __init__(self, announced: str = ENDPOINT) -> None:
        self.announced = announced
        self.writer: asyncio.StreamWriter | None = None

    async def __call__(self, heard: Heard, writer: asyncio.StreamWriter) -> None:
        """Open the stream, or acknowledge what is posted."""
        if heard.line.startswith(b"GET"):
            self.writer = writer
            writer.write(STREAM + f"event: endpoint\ndata: {self.announced}\n\n".encode())
        else:
            writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 8\r\n\r\nAccepted")

    def say(self, message: str) -> None:
        """Send an event."""
        assert self.writer is not None
        self.writer.write(f"event: message\ndata: {message}\n\n".encode())


@asynccontextmanager
async def an_open_stream(server: Legacy, engine: Engine) -> AsyncIterator[tuple[Path, Client, Client, list[Heard]]]:
    """A client with its stream open, and another connection to post on."""
    async with (
        a_server(server) as (fake, port),
        a_path(a_snapshot(engine, port=port, transport="sse", paths=("/sse",))) as path,
    ):
        stream, poster = await path.dial(), await path.dial()
        await stream.say(GET)
        await stream.until(b"\r\n\r\n")
        yield path, stream, poster, fake.heard
        await stream.close()
        await poster.close()


def a_call(name: str, request_id: int = 7) -> bytes:
    """What is posted."""
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": {"name": name}}).encode()


@pytest.mark.parametrize("announced", [ENDPOINT, f"http://127.0.0.1:9{ENDPOINT}", f"//elsewhere.test{ENDPOINT}"])
async def test_the_endpoint_is_a_path_here(announced: str) -> None:
    """Whatever the server calls itself; it is worth nothing to anybody else and nothing after the stream."""
    server = Legacy(announced)
    async with an_open_stream(server, allowing()) as (path, stream, poster, heard):
        told = await stream.until(b"\n\n")
        await poster.say(post(a_call("a"), path="/message?sessionId=2"))
        foreign = await poster.hear()
        await poster.say(post(a_call("a"), path=ENDPOINT))
        own = await poster.hear()
        await stream.close()
        await eventually(lambda: not path.serving.memory.sessions.opened, what="the end of the session")
        await poster.say(post(a_call("a"), path=ENDPOINT))
        late = await poster.hear()

    assert f"data: {ENDPOINT}\n\n".encode() in told
    assert [each and each.line.split()[1] for each in (foreign, own, late)] == [b"404", b"202", b"404"]
    assert [each.line.split()[0] for each in heard] == [b"GET", b"POST"]


async def test_what_is_refused_is_answered_on_the_stream() -> None:
    """A 4xx would make these clients hang; what was never read, or by nobody in particular, gets one."""
    async with an_open_stream(Legacy(), allowing("a")) as (_, stream, poster, heard):
        await stream.until(b"\n\n")
        answers = []
        for body in (a_call("b"), b'{"jsonrpc":"2.0","id":8,"method":"tools/call","params":{}}', b"[]"):
            await poster.say(post(body, path=ENDPOINT))
            answers.append(await poster.hear())
            if body != b"[]":
                event = await stream.until(b"\n\n")
                assert json.loads(event.split(b"data: ")[1].split(b"\n")[0])["error"]["code"] in (403, -32602)

    assert [each and each.line.split()[1] for each in answers] == [b"202", b"202", b"400"]
    assert len(heard) == 1


async def test_an_exchange_lasts_until_its_answer() -> None:
    """Its record has the result, though that came elsewhere; lists are filtered there."""
    server = Legacy()
    async with an_open_stream(server, allowing("a")) as (path, stream, poster, _):
        await stream.until(b"\n\n")
        await poster.say(post(b'{"jsonrpc":"2.0","id":3,"method":"tools/list"}', path=ENDPOINT))
        await poster.hear()
        assert path.exchanges == []
        server.say('{"jsonrpc":"2.0","id":3,"result":{"tools":[{"name":"a"},{"name":"b"}]}}')
        event = await stream.until(b"\n\n")
        (exchange,) = path.exchanges

    assert b'"tools":[{"name":"a"}]' in event
    assert (exchange.hidden, exchange.status, exchange.aborted) == (1, 202, None)
    assert exchange.result is not None
    assert exchange.result in event


async def test_what_waits_when_the_stream_ends_is_recorded() -> None:
    """Its answer can never come."""
    async with an_open_stream(Legacy(), allowing()) as (path, stream, poster, _):
        await stream.until(b"\n\n")
        await poster.say(post(a_call("a"), path=ENDPOINT))
        await poster.hear()
        await stream.close()
        await eventually(lambda: len(path.exchanges) == 2, what="both records")
        ended = {each.message.method: each.aborted for each in path.exchanges if each.message}

    assert ended == {"tools/call": "the stream ended", "open_stream": "client closed the connection"}


class OnlyRoots:
    """Lets the server ask for roots, and for nothing else."""

    name = "only-roots"

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        return Verdict(allowed=question.message.method == "roots/list")


async def test_the_server_asks_under_policy() -> None:
    """A refused ask is answered in the client's place, where the server listens; only what passed may be answered."""
    server = Legacy()
    async with an_open_stream(server, OnlyRoots()) as (path, stream, poster, heard):
        await stream.until(b"\n\n")
        server.say('{"jsonrpc":"2.0","id":"s","method":"sampling/createMessage","params":{"messages":[]}}')
        server.say('{"jsonrpc":"2.0","id":"r","method":"roots/list"}')
        event = await stream.until(b"\n\n")
        await eventually(lambda: len(heard) == 2, what="the reply")
        for request_id in ("s", "r", "r"):
            body = json.dumps({"jsonrpc": "2.0", "id": request_id, "result": {"roots": []}}).encode()
            await poster.say(post(body, path=ENDPOINT))
            await poster.hear()
        outcomes = [
            (each.message.method, each.refusal and each.refusal.reason) for each in path.exchanges if each.message
        ]

    assert b'"roots/list"' in event
    assert heard[1].line == b"POST " + ENDPOINT.encode() + b" HTTP/1.1"
    assert heard[1].values(b"mcp-session-id") == []
    reply = json.loads(heard[1].body)
    assert (reply["id"], reply["error"]["code"]) == ("s", 403)
    assert [json.loads(each.body)["id"] for each in heard[2:]] == ["r"]
    assert outcomes == [
        ("sampling/createMessage", Reason.DENIED),
        ("roots/list", None),
        ("response", Reason.UNSOLICITED),
        ("response", None),
        ("response", Reason.UNSOLICITED),
    ]
