"""Fakes of what the sidecar's path meets: engines, observers, servers that say what a test wants; and the path itself.

The server is a real socket with a script behind it; the sidecar is the real Listener, Serving and Upstream.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sidecar.config import Capture
from sidecar.core.authorise import Question, Verdict
from sidecar.core.identity import UnknownKey
from sidecar.core.message import Tool
from sidecar.exchange import Exchange
from sidecar.pipeline import Snapshot
from sidecar.shell.listener import Listener
from sidecar.shell.quota import Store
from sidecar.shell.serving import Serving
from sidecar.shell.stdio import Stdio
from sidecar.shell.upstream import Upstream
from sidecar.shell.ways import Ways

PATIENCE_S = 30.0  # for what happens at once on an idle machine; a failing test waits, no other does


@dataclass
class FakeEngine:
    """Allows the tools it is told of, and all that is no tool; remembers the questions."""

    allows: frozenset[str] | None = None  # None: every tool
    verdict: Verdict | None = None  # the same for every question
    name: str = "fake"
    asked: list[Question] = field(default_factory=list)

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        self.asked.append(question)
        if self.verdict is not None:
            return self.verdict
        target = question.message.target
        allowed = not isinstance(target, Tool) or self.allows is None or target.name in self.allows
        return Verdict(allowed=allowed, policies=("fake-policy",))


def allowing(*tools: str) -> FakeEngine:
    """An engine that allows *tools*; all without any."""
    return FakeEngine(allows=frozenset(tools) if tools else None)


class FakeObserver:
    """Remembers every exchange, and refuses to be told of one twice."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def observe(self, exchange: Exchange) -> None:
        """Record *exchange*."""
        assert not any(each is exchange for each in self.exchanges), "an exchange was observed twice"
        self.exchanges.append(exchange)


async def eventually(condition: Callable[[], Any], *, what: str) -> None:
    """Wait until *condition* holds; fails with *what* after PATIENCE_S."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never came: {what}") from None


@dataclass(frozen=True)
class Heard:
    """One request, as the server received it."""

    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        """The request line."""
        return self.head.split(b"\r\n")[0]

    def values(self, name: bytes) -> list[bytes]:
        """All values of the header *name*."""
        pairs = (line.partition(b":") for line in self.head.split(b"\r\n")[1:] if line)
        return [value.strip() for key, _, value in pairs if key.lower() == name]


async def read_message(reader: asyncio.StreamReader) -> Heard | None:
    """Return the next HTTP message with a Content-Length or chunks; None at the end of the stream."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    heard = Heard(head=head, body=b"")
    if heard.values(b"transfer-encoding"):
        body = bytearray()
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return Heard(head=head, body=bytes(body))
    length = int((heard.values(b"content-length") or [b"0"])[0])
    return Heard(head=head, body=await reader.readexactly(length))


Script = Callable[[Heard, asyncio.StreamWriter], Awaitable[None]]


class FakeServer:
    """An HTTP server on loopback that does what *script* says with each request, and remembers them."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.heard: list[Heard] = []
        self.connections = 0
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection until either side closes it."""
        self.connections += 1
        self.open += 1
        try:
            while heard := await read_message(reader):
                self.heard.append(heard)
                await self.script(heard, writer)
                if writer.is_closing():
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def response(
    body: bytes = b"", *, status: str = "200 OK", kind: str = "application/json", headers: Sequence[str] = ()
) -> bytes:
    """A response with a length."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answers(*pieces: bytes) -> Script:
    """A script that writes *pieces*, one after the other, and closes nothing."""

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return script


def echo_script() -> Script:
    """A script that answers each request with its own body as the result's text."""

    async def script(heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(response(b'{"jsonrpc":"2.0","id":7,"result":{"echo":' + (heard.body or b"null") + b"}}"))

    return script


@dataclass
class Path:
    """The running path, from the inbound port to the server."""

    port: int
    serving: Serving
    observer: FakeObserver
    listener: Listener
    accepting: "asyncio.Task[None]"
    missing: list[UnknownKey]
    key_found: asyncio.Event
    refused_ports: list[tuple[str, int]]

    @property
    def exchanges(self) -> list[Exchange]:
        """What was observed."""
        return self.observer.exchanges

    async def dial(self) -> "Client":
        """Open a plaintext connection."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))


class Client:
    """A raw client: what is written is what goes out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, data: bytes) -> None:
        """Send *data*."""
        self.writer.write(data)
        await self.writer.drain()

    async def hear(self) -> Heard | None:
        """Return the next response."""
        async with asyncio.timeout(PATIENCE_S):
            return await read_message(self.reader)

    async def until(self, mark: bytes) -> bytes:
        """Return what comes up to and with *mark*."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(mark)

    async def rest(self) -> bytes:
        """Return all that comes until the sidecar closes."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def close(self) -> None:
        """Close."""
        self.writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


def post(body: bytes, *headers: str, path: str = "/mcp") -> bytes:
    """A POST to the MCP endpoint."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: billing.test",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def a_server(script: Script) -> AsyncIterator[tuple[FakeServer, int]]:
    """Run a FakeServer; gives it and its port."""
    fake = FakeServer(script)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0, limit=2**20)
    tasks: set[asyncio.Task[Any]] = set()
    try:
        yield fake, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await eventually(lambda: fake.open == 0, what="the server's connections to be closed")
        await server.wait_closed()


@asynccontextmanager
async def a_path(
    snapshot: Snapshot | None,
    *,
    why_not_ready: Callable[[], str | None] = lambda: None,
    capture: Capture = Capture.LISTEN,
    tls: ssl.SSLContext | None = None,
    max_connections: int = 64,
    make_stdio: Callable[[Callable[[Coroutine[Any, Any, None]], object]], Stdio] | None = None,
    store: Store | None = None,
) -> AsyncIterator[Path]:
    """Run the real inbound path with *snapshot*; a key that is missing is found when the test sets `key_found`.

    *make_stdio* is given what starts coroutines, and makes the way to a server that the profile says speaks stdio.
    """
    observer = FakeObserver()
    missing: list[UnknownKey] = []
    refused_ports: list[tuple[str, int]] = []
    key_found = asyncio.Event()

    async def find_key(unknown: UnknownKey) -> None:
        missing.append(unknown)
        await key_found.wait()

    async with asyncio.TaskGroup() as tasks:
        upstream = Upstream("127.0.0.1", tasks.create_task)
        stdio = None if make_stdio is None else make_stdio(tasks.create_task)
        serving = Serving(
            upstream=upstream if stdio is None else Ways(http=upstream, stdio=stdio),
            observers=[observer],
            spawn=tasks.create_task,
            resolve=find_key,
            why_not_ready=why_not_ready,
            store=store,
        )
        asking = None if store is None else tasks.create_task(store.run())
        serving.snapshot = snapshot
        listener = Listener(
            serving,
            host="127.0.0.1",
            port=0,
            capture=capture,
            tls=tls,
            max_connections=max_connections,
            refused_port=lambda client, port: refused_ports.append((client, port)),
        )
        accepting = tasks.create_task(listener.run())
        path = Path(listener.port, serving, observer, listener, accepting, missing, key_found, refused_ports)
        try:
            yield path
        finally:
            key_found.set()
            accepting.cancel()
            if asking is not None:
                asking.cancel()
            for connection in tuple(serving.connections):
                connection.abort()
            await eventually(lambda: not serving.connections, what="the sidecar's connections to be closed")
            upstream.close()
            if stdio is not None:
                await stdio.close()
            assert serving.in_flight == 0
