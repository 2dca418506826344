"""Shutdown: calls end with their answers, streams after them, and nothing hangs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.builders import a_call, a_snapshot
from tests.fakes import Client, Heard, Path, a_path, a_server, allowing, eventually, post, response

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
GET = b"GET /mcp HTTP/1.1\r\nHost: billing.test\r\nAccept: text/event-stream\r\n\r\n"
NEWS = b'data: {"jsonrpc":"2.0","method":"notifications/message","params":{}}\n\n'
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{}}'


class Held:
    """Answers a call when the test says so; its streams never end by themselves."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None

    async def __call__(self, heard: Heard, writer: asyncio.StreamWriter) -> None:
        """Answer."""
        if heard.line.startswith(b"GET"):
            self.writer = writer
            writer.write(STREAM + b"%x\r\n%b\r\n" % (len(NEWS), NEWS))
        else:
            await self.release.wait()
            writer.write(response(RESULT))


@asynccontextmanager
async def under_way(server: Held) -> AsyncIterator[tuple[Path, Client, Client]]:
    """A stream that stands open, and a call that waits."""
    async with a_server(server) as (fake, port), a_path(a_snapshot(allowing(), port=port)) as path:
        stream, caller = await path.dial(), await path.dial()
        await stream.say(GET)
        await stream.until(NEWS)
        await caller.say(post(a_call()))
        await eventually(lambda: len(fake.heard) == 2, what="the call")
        yield path, stream, caller
        server.release.set()
        await stream.close()
        await caller.close()


async def test_a_stream_ends_after_the_last_call() -> None:
    """The call gets its answer, and what comes on the stream until then still passes; the stream ends whole."""
    server = Held()
    async with under_way(server) as (path, stream, caller), asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(path.serving.drain(30))
        assert server.writer is not None
        server.writer.write(b"%x\r\n%b\r\n" % (len(NEWS), NEWS))
        await stream.until(NEWS)
        server.release.set()
        answer = await caller.hear()
        rest = await stream.rest()
        cut = await draining
        aborted = {each.message.method: each.aborted for each in path.exchanges if each.message}

    assert answer is not None
    assert (answer.body, answer.values(b"connection"), cut) == (RESULT, [b"close"], 0)
    assert rest.endswith(b"0\r\n\r\n")
    assert aborted == {"tools/call": None, "open_stream": "drained"}


async def test_what_does_not_finish_is_cut() -> None:
    """A call without end must not hold the pod; its record says that it was cut."""
    async with under_way(Held()) as (path, stream, caller):
        cut = await path.serving.drain(0.1)
        rest = await caller.rest(), await stream.rest()
        await eventually(lambda: len(path.exchanges) == 2, what="the records")

    assert (cut, rest[0]) == (2, b"")
    assert not rest[1].endswith(b"0\r\n\r\n")
