"""sidecar.shell.upstream: one response to one call, whatever the server does; a call is never sent twice."""

import asyncio
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress

import pytest

from sidecar.core.trace import TraceContext
from sidecar.errors import Reason
from sidecar.shell import upstream
from sidecar.shell.upstream import Call, Line, _request
from tests.builders import a_call, a_connection, a_request, a_snapshot, an_exchange
from tests.fakes import Heard, a_path, a_server, allowing, answers, echo_script, eventually, post, response

CALL = a_call()
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{"x":1}}'
TWO = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"},{"name":"b"}]}}'
ONE = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"}]}}'
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def hang(_: Heard, __: asyncio.StreamWriter) -> None:
    """Say nothing."""


def closes_after(*pieces: bytes) -> object:
    """A script that writes *pieces* and closes."""

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    return script


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([response(RESULT)], id="length"),
        pytest.param([JSON + b"transfer-encoding: chunked\r\n\r\n" + chunk(RESULT) + b"0\r\n\r\n"], id="chunks"),
        pytest.param(
            [JSON + b"transfer-encoding: chunked\r\n\r\n" + chunk(RESULT) + b"0\r\nX-T: 1\r\n\r\n"], id="trailers"
        ),
        pytest.param([bytes([byte]) for byte in response(RESULT)], id="byte by byte"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", response(RESULT)], id="100 before"),
        pytest.param([b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + response(RESULT)], id="103 before"),
        pytest.param([response(RESULT, headers=["x: 1\t "])], id="padded value"),
    ],
)
async def test_every_way_to_write_a_response_is_the_same_response(pieces: Sequence[bytes]) -> None:
    """The client gets one form of it; the connection is used again."""
    async with a_server(answers(*pieces)) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        heads = set()
        for _ in range(2):
            await client.say(post(CALL))
            answer = await client.hear()
            assert answer is not None
            assert answer.body == RESULT
            assert answer.values(b"content-length") == [b"%d" % len(RESULT)]
            assert answer.values(b"x-t") == answer.values(b"link") == []
            heads.add(answer.head)
        await client.close()

    assert len(heads) == 1
    assert server.connections == 1


@pytest.mark.parametrize("head", [JSON + b"\r\n", JSON.replace(b"1.1", b"1.0") + b"\r\n"], ids=["1.1", "1.0"])
async def test_a_response_without_length_ends_with_the_connection(head: bytes) -> None:
    """RFC 9112, 6.3; our side stays open."""
    script = closes_after(head, RESULT)
    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        for _ in range(2):
            await client.say(post(CALL))
            answer = await client.hear()
            assert answer is not None
            assert answer.body == RESULT
        await client.close()

    assert server.connections == 2


@pytest.mark.parametrize("status", ["204 No Content", "202 Accepted", "304 Not Modified"])
async def test_a_response_without_body_has_none(status: str) -> None:
    """And the next is not read as one."""
    length = [] if status.startswith(("204", "304")) else ["content-length: 0"]
    raw = "\r\n".join([f"HTTP/1.1 {status}", *length, "", ""]).encode()
    async with a_server(answers(raw)) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        note = b'{"jsonrpc":"2.0","method":"notifications/initialized"}'
        await client.say(post(note) * 2)
        heads = [await client.until(b"\r\n\r\n") for _ in range(2)]
        await client.close()

    assert [head.split(b"\r\n")[0] for head in heads] == [f"HTTP/1.1 {status}".encode()] * 2
    assert server.connections == 1


@pytest.mark.parametrize(
    ("pieces", "detail"),
    [
        ([], "connection closed"),
        ([b"HTTP/1.1 200 OK\r\ncontent-"], "connection closed"),
        ([JSON + b"content-length: 100\r\n\r\n" + RESULT], "connection closed"),
        ([JSON + b"transfer-encoding: chunked\r\n\r\n" + chunk(RESULT)], "connection closed"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], "connection closed"),
        ([b"SSH-2.0-OpenSSH\r\n"], "unreadable response"),
        ([JSON + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"], "unreadable response"),
        ([JSON + b"content-length: 4\r\ncontent-length: 5\r\n\r\n"], "unreadable response"),
        ([JSON + b"x: " + b"a" * upstream.MAX_HEAD_BYTES + b"\r\n\r\n"], "head too large"),
        ([JSON + b"x: " + b"a" * 8 * upstream.MAX_HEAD_BYTES], "head too large"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"], "unreadable response"),
        ([JSON + b"x: a\rb\r\ncontent-length: 0\r\n\r\n"], "unreadable response"),
        ([response(b"<html>")], "malformed"),
        ([response(RESULT, headers=["content-encoding: gzip"])], "encoded"),
    ],
    ids=lambda value: None if isinstance(value, list) else value,
)
async def test_what_is_no_whole_response_is_answered_for(pieces: list[bytes], detail: str) -> None:
    """200 with an error that carries the id: the client survives; the call is not sent again."""
    script = closes_after(*pieces)
    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        await client.say(post(CALL))
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.line == b"HTTP/1.1 200 OK"
    assert b'"id":7' in answer.body
    assert b"-32603" in answer.body
    assert len(server.heard) == 1
    (exchange,) = path.exchanges
    assert exchange.refusal is not None
    assert exchange.refusal.reason is Reason.UPSTREAM
    assert detail in exchange.refusal.detail


async def test_a_server_that_is_not_there_is_answered_for() -> None:
    """Refused connections are the server's failure, not the caller's."""
    async with a_server(hang) as (_, port):
        pass
    async with a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL) + b"DELETE /mcp HTTP/1.1\r\nHost: x\r\n\r\n")
        call, close = await client.hear(), await client.hear()
        await client.close()

    assert call is not None
    assert close is not None
    assert [call.line, close.line] == [b"HTTP/1.1 200 OK", b"HTTP/1.1 502 Bad Gateway"]


# kept connections


async def test_a_server_that_closes_an_idle_connection_costs_nothing() -> None:
    """The next call takes another."""
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        server.script = closes_after(response(RESULT))  # type: ignore[assignment]
        for _ in range(3):
            await client.say(post(CALL))
            answer = await client.hear()
            assert answer is not None
            assert answer.body == RESULT
            await eventually(lambda: server.open == 0, what="the server's close")
            await eventually(lambda: not path.serving._upstream._idle, what="the sidecar's notice of it")
        await client.close()

    assert server.connections == 3


async def test_a_kept_connection_is_left_before_the_server_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call must not meet the server's close on its way."""
    monkeypatch.setattr(upstream, "IDLE_S", 0.0)
    async with a_server(answers(response(RESULT))) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        for _ in range(3):
            await client.say(post(CALL))
            assert await client.hear() is not None
        await client.close()

    assert server.connections == 3


async def test_stale_connections_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a peak only those in use are kept, even by servers that never close."""
    monkeypatch.setattr(upstream, "IDLE_S", 0.05)
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        clients = [await path.dial() for _ in range(8)]
        for client in clients:
            await client.say(post(CALL))
        for client in clients:
            assert await client.hear() is not None

        while server.open > 1:
            await asyncio.sleep(0.01)  # the calls below are what drops the stale ones
            await clients[0].say(post(CALL))
            assert await clients[0].hear() is not None
        for client in clients:
            await client.close()

    assert len(server.heard) > 8


async def test_a_second_response_to_one_request_is_dropped() -> None:
    """It would be taken for the answer to another caller's call."""
    forged = b'{"jsonrpc":"2.0","id":7,"result":{"forged":true}}'
    async with (
        a_server(answers(response(RESULT) + response(forged))) as (server, port),
        a_path(a_snapshot(allowing(), port=port)) as path,
    ):
        client = await path.dial()
        bodies = []
        for _ in range(3):
            await client.say(post(CALL))
            answer = await client.hear()
            assert answer is not None
            bodies.append(answer.body)
        await client.close()

    assert bodies == [RESULT] * 3
    assert server.connections == 3


async def test_what_comes_unasked_on_a_kept_connection_is_dropped() -> None:
    """With the connection: it cannot be understood."""
    writers: list[asyncio.StreamWriter] = []

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(response(RESULT))

    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL))
        assert await client.hear() is not None
        writers[0].write(response(b'{"jsonrpc":"2.0","id":7,"result":{"forged":true}}'))
        await eventually(lambda: server.open == 0, what="the end of the connection")
        await client.say(post(CALL))
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.body == RESULT


async def test_headers_of_one_response_do_not_reach_the_next() -> None:
    """Trailers come late, and were once taken for the next call's headers."""
    trailed = JSON + b"transfer-encoding: chunked\r\n\r\n" + chunk(RESULT) + b"0\r\nmcp-session-id: stolen\r\n\r\n"
    async with a_server(answers(trailed)) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        heads = []
        for _ in range(2):
            await client.say(post(CALL))
            answer = await client.hear()
            assert answer is not None
            heads.append(answer.values(b"mcp-session-id"))
        await client.close()

    assert heads == [[], []]


# streams


async def test_an_event_reaches_the_client_before_the_next_is_made() -> None:
    """Nothing waits for the end of a stream."""
    go_on = asyncio.Event()

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(b": hello\n\n"))
        writer.write(chunk(b'data: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n'))
        await go_on.wait()
        writer.write(chunk(b"data: " + RESULT + b"\n\n") + b"0\r\n\r\n")

    async with a_server(script) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL))
        first = await client.until(b'progress"}\n\n\r\n')
        assert RESULT not in first
        assert path.exchanges == []
        go_on.set()
        rest = await client.until(b"0\r\n\r\n")
        await client.say(post(b'{"jsonrpc":"2.0","id":8,"method":"ping"}'))
        assert await client.until(b"200 OK")
        await client.close()

    assert RESULT in rest
    assert path.exchanges[0].result == RESULT


@pytest.mark.parametrize(
    "raw",
    [
        response(TWO),
        STREAM + chunk(b"event: message\ndata: " + TWO + b"\n\n") + b"0\r\n\r\n",
        STREAM + b"".join(chunk(bytes([byte])) for byte in b"data: " + TWO + b"\n\n") + b"0\r\n\r\n",
        STREAM + chunk(b"data: " + TWO.replace(b",", b",\r\ndata: ") + b"\r\n\r\n") + b"0\r\n\r\n",
        JSON + b"\r\n" + TWO,
    ],
    ids=["json", "event", "event byte by byte", "event of several lines", "no length"],
)
async def test_a_list_is_filtered_however_it_comes(raw: bytes) -> None:
    """What the caller may not use is not shown."""
    script = closes_after(raw)
    async with a_server(script) as (_, port), a_path(a_snapshot(allowing("a"), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        await client.say(post(a_request("tools/list")))
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert b'"name":"a"' in answer.body
    assert b'"name":"b"' not in answer.body
    assert path.exchanges[0].hidden == 1


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"data: {}\rdata: {}\n\n", "carriage return"),
        (b"data: {\n\n", "truncated"),
        (b"data: " + TWO, "within an event"),
    ],
)
async def test_a_stream_that_cannot_be_judged_ends_in_an_error(bad: bytes, why: str) -> None:
    """What was whole has passed; the rest is an error with the caller's id, and the connection goes on."""
    good = b'data: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n'
    raw = STREAM + chunk(good) + chunk(bad) + b"0\r\n\r\n"
    async with a_server(answers(raw)) as (server, port), a_path(a_snapshot(allowing("a"), port=port)) as path:
        client = await path.dial()
        await client.say(post(a_request("tools/list")))
        answer = await client.hear()
        server.script = answers(response(RESULT))
        await client.say(post(CALL.replace(b"read_schema", b"a")))
        following = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.body.startswith(good + b'data: {"jsonrpc":"2.0","error"')
    assert b'"name"' not in answer.body
    assert following is not None
    assert following.body == RESULT
    assert path.exchanges[0].refusal is not None
    assert why in path.exchanges[0].refusal.detail


async def test_a_server_that_dies_within_a_stream_is_answered_for() -> None:
    """The client learns it by an event, and can go on."""
    good = b'data: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n'
    script = closes_after(STREAM + chunk(good))
    async with a_server(script) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        await client.say(post(CALL))
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.body.startswith(good)
    assert b"the server did not answer" in answer.body
    assert path.exchanges[0].aborted is not None


async def test_a_body_that_is_cut_is_cut_for_the_client_too() -> None:
    """Where no error fits any more, an end that looks whole would lie."""
    raw = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 100\r\n\r\nabc"
    script = closes_after(raw)
    async with a_server(script) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        await client.say(post(CALL))
        got = b""
        with suppress(ConnectionResetError):
            got = await client.rest()
        await client.close()

    assert not got.endswith(b"0\r\n\r\n")
    assert len(path.exchanges) == 1


# backpressure

PIECE = 2**18
PIECES = 240  # of them: 60 MB


async def test_a_client_that_does_not_read_holds_the_server_back() -> None:
    """A 60 MB stream waits where it is made, not in our memory, and arrives whole once it is read."""
    event = b"data: " + b'{"method":"x","params":"' + b"a" * (PIECE - 64) + b'"}\n\n'
    sent = 0

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM)
        for _ in range(PIECES):
            writer.write(chunk(event))
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    async with a_server(script) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        tracemalloc.start()
        await client.say(post(CALL))
        still = -1
        while still != sent:  # until nothing moves any more
            still = sent
            await asyncio.sleep(0.3)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sent < PIECES // 2
        assert peak_bytes < 12 * 2**20
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.hear()
        await client.say(post(b'{"jsonrpc":"2.0","id":8,"method":"ping"}'))
        assert await client.until(b"200 OK")  # the line that was held is not held for the next call
        await client.close()

    assert answer is not None
    assert len(answer.body) == PIECES * len(event)


class Wire:
    """A transport that says whether it is read."""

    def __init__(self) -> None:
        self.is_read = True

    def write(self, _: bytes) -> None:
        """Take it."""

    def is_closing(self) -> bool:
        """Say no."""
        return False

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing is buffered here."""

    def pause_reading(self) -> None:
        """Stop."""
        self.is_read = False

    def resume_reading(self) -> None:
        """Go on."""
        self.is_read = True


class SlowSink:
    """Holds its call back at every piece, as a client does whose buffer is full."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.ended = False

    def begin(self, *_: object) -> None:
        """Take the head."""

    def feed(self, _: bytes) -> None:
        """Take a piece, and have enough."""
        assert self.call is not None
        self.call.pause()

    def complete(self) -> None:
        """Know the end."""
        self.ended = True

    def failed(self, detail: str) -> None:
        """Know a failure, which is none here."""
        raise AssertionError(detail)


def test_a_connection_is_not_kept_held_back() -> None:
    """The call that held it is over; the next one is another's, and would wait for ever."""
    kept: list[Line] = []

    class Pool:
        keep = kept.append

    line, wire, sink = Line(Pool()), Wire(), SlowSink()  # type: ignore[arg-type]
    line.connection_made(wire)  # type: ignore[arg-type]
    sink.call = Call(sink, b"")
    line.carry(sink.call)
    line.data_received(STREAM + chunk(b": x\n\n"))
    assert not wire.is_read
    line.data_received(chunk(b": x\n\n") + b"0\r\n\r\n")

    assert (sink.ended, wire.is_read, kept) == (True, True, [line])
    sink.call.pause()  # a late word of the call that is over
    assert wire.is_read


async def test_a_server_that_does_not_read_holds_no_more_than_one_body() -> None:
    """And the call still arrives whole."""
    body = a_call(arguments={"x": "a" * 3_000_000})
    release = asyncio.Event()
    got: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(Heard(head=head, body=b"").values(b"content-length")[0])
        got.append(len(await reader.readexactly(length)))
        writer.write(response(RESULT))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    port = server.sockets[0].getsockname()[1]
    async with a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(body))
        await eventually(lambda: path.serving.in_flight == 1, what="the call")
        release.set()
        answer = await client.hear()
        await client.close()
    server.close()
    await server.wait_closed()

    assert answer is not None
    assert (answer.body, got) == (RESULT, [len(body)])


async def test_a_stuck_client_with_an_abandoned_call_frees_the_server() -> None:
    """When it goes, its stream ends at the server too."""

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(b": " + b"a" * PIECE + b"\n\n"))
            await writer.drain()

    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.say(post(CALL))
        await eventually(
            lambda: any(each._is_stuck for each in path.serving.connections), what="the client to be stuck"
        )
        client.writer.transport.abort()  # type: ignore[attr-defined]
        await eventually(lambda: server.open == 0, what="the server's notice")
        await client.close()

    assert path.exchanges[0].aborted == "client closed the connection"


ASK = b'data: {"jsonrpc":"2.0","id":"a%d","method":"own/ask"}\n\n'


def asks(count: int, *, replied: str) -> object:
    """A script that asks *count* unknown things and answers the call; *replied* is the status line's rest for replies."""

    async def script(heard: Heard, writer: asyncio.StreamWriter) -> None:
        if b'"method"' in heard.body:
            events = b"".join(ASK % number for number in range(count)) + b"data: " + RESULT + b"\n\n"
            writer.write(STREAM + chunk(events) + b"0\r\n\r\n")
        elif replied:
            writer.write(f"HTTP/1.1 {replied}\r\ncontent-length: 0\r\n\r\n".encode())

    return script


@pytest.mark.parametrize("replied", ["202 Accepted", "400 Bad Request"])
async def test_a_reply_to_the_server_is_nobodys_answer(replied: str) -> None:
    """The call has its own; whatever the server says to the reply is dropped, and its connection kept."""
    script = asks(3, replied=replied)
    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        for _ in range(2):
            before = len(server.heard)
            await client.say(post(CALL))
            answer = await client.hear()
            await eventually(lambda before=before: len(server.heard) == before + 4, what="the replies")  # type: ignore[misc]
        await client.close()

    assert answer is not None
    assert answer.body == b"data: " + RESULT + b"\n\n"
    assert server.connections < len(server.heard)


async def test_replies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that asks without end and takes no reply must not hold our descriptors for ever."""
    monkeypatch.setattr(upstream, "MAX_REPLIES", 2)
    monkeypatch.setattr(upstream, "REPLY_S", 0.1)
    script = asks(5, replied="")
    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:  # type: ignore[arg-type]
        client = await path.dial()
        for expected in (3, 6):
            await client.say(post(CALL))
            assert await client.hear()
            await eventually(lambda expected=expected: len(server.heard) == expected, what="two replies")  # type: ignore[misc]
            await eventually(lambda: server.open <= 1, what="the end of their connections")
        await client.close()


@pytest.mark.parametrize(
    ("traceparent", "linked", "expected"),
    [
        (b"00-1-2-01", False, [b"00-1-2-01", b"vendor=1"]),
        (b"00-1-2-01", True, [b"00-1-2-01"]),
        (b"", False, [b"vendor=1"]),
    ],
)
def test_request_names_one_trace(traceparent: bytes, linked: bool, expected: list[bytes]) -> None:
    """The caller's header is replaced or left out, and a state travels with its own trace only."""
    exchange = an_exchange(a_connection(headers=((b"traceparent", b"00-9-9-01"), (b"tracestate", b"vendor=1"))))
    if linked:
        exchange.link = TraceContext(trace_id="9" * 32, parent_id="9" * 16, sampled=True)
    lines = _request(exchange, b"127.0.0.1:1", traceparent).partition(b"\r\n\r\n")[0].split(b"\r\n")

    assert sorted(line.partition(b": ")[2] for line in lines if line.startswith(b"trace")) == sorted(expected)
