"""sidecar.shell.inbound: one reading of each request, its answers in order, every exchange told once."""

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.core.answer import Answer
from sidecar.core.filters import Reader
from sidecar.core.limits import Admission
from sidecar.core.ownership import tasks
from sidecar.core.profile import Identity, Limit, Provider
from sidecar.core.replies import Response
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell import inbound
from sidecar.shell.inbound import MAX_HEAD_BYTES, MAX_HEADERS, MAX_QUEUED, Inbound
from sidecar.shell.upstream import Call
from tests.builders import ANYBODY, a_call, a_permit, a_snapshot
from tests.fakes import (
    FakeObserver,
    Heard,
    a_path,
    a_server,
    allowing,
    answers,
    echo_script,
    eventually,
    post,
    response,
)

CALL = a_call()
HEAD = b"POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(CALL)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CALL), CALL)


# Its key is not known, and it is not signed: what is looked at first is which key it names.
A_TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.eyJpc3MiOiJodHRwczovL2lkLnRlc3QifQ.eHg"


def a_result(text: str = "ok") -> bytes:
    """The answer to the call."""
    return b'{"jsonrpc":"2.0","id":7,"result":{"x":"%b"}}' % text.encode()


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + IN_CHUNKS, id="length and chunks"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + IN_CHUNKS, id="chunks and length"),
        pytest.param(HEAD + LENGTH + LENGTH + b"\r\n" + CALL, id="length twice"),
        pytest.param(HEAD + b"Content-Length: 4, 4\r\n\r\nabcd", id="list of lengths"),
        pytest.param(HEAD + b"Content-Length: +4\r\n\r\nabcd", id="length with a sign"),
        pytest.param(HEAD + b"Content-Length: 0x4\r\n\r\nabcd", id="length in hexadecimal"),
        pytest.param(HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", id="length overflow"),
        pytest.param(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + IN_CHUNKS, id="two codings"),
        pytest.param(
            HEAD + b"Transfer-Encoding: identity\r\n" + CHUNKED + b"\r\n" + IN_CHUNKS, id="identity and chunked"
        ),
        pytest.param(HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + IN_CHUNKS, id="unknown coding"),
        pytest.param(HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + IN_CHUNKS, id="space before the colon"),
        pytest.param(HEAD + b"X: a\r\n Transfer-Encoding: chunked\r\n\r\n" + IN_CHUNKS, id="folded line"),
        pytest.param(HEAD.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + IN_CHUNKS, id="chunks in HTTP/1.0"),
        pytest.param(HEAD + CHUNKED + b"\r\n0x4\r\nabcd\r\n0\r\n\r\n", id="chunk size in C"),
        pytest.param(HEAD + CHUNKED + b"\r\n4\nabcd\r\n0\r\n\r\n", id="chunk size ended by LF"),
        pytest.param(HEAD + CHUNKED + b"\r\n4\r\nabcde\r\n0\r\n\r\n", id="chunk longer than its size"),
        pytest.param(HEAD + CHUNKED + b"\r\n4;a\nb\r\nabcd\r\n0\r\n\r\n", id="LF in a chunk extension"),
        pytest.param(b"POST /mcp HTTP/1.1\nHost: x\n\n", id="bare LF"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", id="one bare LF"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\r\nX: a\rY: b\r\n\r\n", id="bare CR in a value"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", id="NUL in a value"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\r\nX\x00: b\r\n\r\n", id="NUL in a name"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\r\nX\xc3: b\r\n\r\n", id="name beyond ASCII"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n", id="empty name"),
        pytest.param(b"POST /mcp HTTP/1.1\r\n\r\n", id="no Host"),
        pytest.param(b"POST /mcp HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", id="Host twice"),
        pytest.param(b"POST /mcp HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", id="Host twice in HTTP/1.0"),
        pytest.param(b"POST /mcp HTTP/2.0\r\nHost: x\r\n\r\n", id="HTTP/2.0"),
        pytest.param(b"POST /mcp HTTP/1.2\r\nHost: x\r\n\r\n", id="HTTP/1.2"),
        pytest.param(b"POST /mcp\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 preface"),
        pytest.param(b"POST http://y/mcp HTTP/1.1\r\nHost: x\r\n\r\n", id="absolute target"),
        pytest.param(b"POST * HTTP/1.1\r\nHost: x\r\n\r\n", id="target *"),
        pytest.param(b"POST /mcp#x HTTP/1.1\r\nHost: x\r\n\r\n", id="fragment"),
        pytest.param(b"POST /m\x00cp HTTP/1.1\r\nHost: x\r\n\r\n", id="NUL in the target"),
        pytest.param(b"POST /m\xc3cp HTTP/1.1\r\nHost: x\r\n\r\n", id="target beyond ASCII"),
        pytest.param(b"POST /mcp x HTTP/1.1\r\nHost: x\r\n\r\n", id="space in the target"),
        pytest.param(b"CONNECT y:1 HTTP/1.1\r\nHost: x\r\n\r\nabc", id="CONNECT"),
        pytest.param(b"post /mcp HTTP/1.1\r\nHost: x\r\n\r\n", id="method in small letters"),
        pytest.param(b"FROB /mcp HTTP/1.1\r\nHost: x\r\n\r\n", id="unknown method"),
        pytest.param(b"\x00\x00\x00\x00", id="noise"),
    ],
)
@pytest.mark.parametrize("is_split", [False, True], ids=["at once", "byte by byte"])
async def test_ambiguous_framing_is_refused(request_bytes: bytes, *, is_split: bool) -> None:
    """400 and the end of the connection; nothing reaches the server, one record is made."""
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        for piece in [request_bytes] if not is_split else [bytes([byte]) for byte in request_bytes]:
            await client.say(piece)
        answer = await client.rest()
        await client.close()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1
    assert server.heard == []
    assert [each.refusal.reason for each in path.exchanges if each.refusal] == [Reason.MALFORMED]


@pytest.mark.parametrize(
    ("request_bytes", "why"),
    [
        (b"POST /mcp HTTP/1.1\r\nHost: x\r\nX: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", "head is larger"),
        (b"POST /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n", "head is larger"),
        (b"POST /mcp HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * MAX_HEADERS + b"\r\n", "header fields"),
        (HEAD + CHUNKED + b"\r\n0\r\n" + b"X: aaaaaaaa\r\n" * 9000 + b"\r\n", "head is larger"),
        (HEAD + b"X: " + b"a" * 8 * MAX_HEAD_BYTES, "head is larger"),
        (HEAD + CHUNKED + b"\r\n0\r\nX: " + b"a" * 8 * MAX_HEAD_BYTES, "head is larger"),
        (HEAD + CHUNKED + b"\r\n1;x=" + b"a" * 8 * MAX_HEAD_BYTES, "head is larger"),
        (HEAD + b"Content-Length: 2000\r\n\r\n", "body is larger than 1024 bytes"),
        (HEAD + CHUNKED + b"\r\n7d0\r\n" + b"a" * 2000, "body is larger than 1024 bytes"),
    ],
    ids=[
        "value", "target", "fields", "trailers", "value without end", "trailer without end", "extension without end",
        "announced body", "body in chunks",
    ],
)  # fmt: skip
async def test_what_is_too_large_is_refused_as_soon_as_that_is_known(request_bytes: bytes, why: str) -> None:
    """Before it is whole; the client sees why, though it may still be sending."""
    async with a_path(a_snapshot(allowing(), max_body_bytes=1024)) as path:
        client = await path.dial()
        await client.say(request_bytes)
        answer = await client.rest()
        await client.close()

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert why.encode() in answer
    assert path.exchanges[0].refusal is not None
    assert path.exchanges[0].refusal.reason is Reason.TOO_LARGE


async def test_nobody_in_particular_fills_no_memory() -> None:
    """Where an SVID is demanded, a caller without one is refused before its body, and holds no place."""
    async with a_path(a_snapshot(allowing(), identity=Identity(mtls="strict"))) as path:
        client = await path.dial()
        await client.say(HEAD + b"Content-Length: 1000\r\n\r\n")
        answer = await client.rest()
        await client.close()

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"mutual TLS" in answer
    assert b"connection: close" in answer
    assert [each.refusal.reason for each in path.exchanges if each.refusal] == [Reason.UNAUTHENTICATED]


async def test_a_client_that_goes_on_sending_sees_why_it_was_refused() -> None:
    """The answer is not lost in a reset connection."""
    async with a_path(a_snapshot(allowing(), max_body_bytes=1024)) as path:
        client = await path.dial()
        await client.say(HEAD + b"Content-Length: 3000000\r\n\r\n")
        assert b"larger than 1024" in await client.until(b'"too_large"}}}')
        for _ in range(30):
            await client.say(b"a" * 100_000)
        assert await client.rest() == b""
        await client.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(post(CALL), id="plain"),
        pytest.param(HEAD + CHUNKED + b"\r\n" + IN_CHUNKS, id="chunks"),
        pytest.param(HEAD + CHUNKED + b"\r\n" + IN_CHUNKS[:-2] + b"Authorization: x\r\nHost: y\r\n\r\n", id="trailers"),
        pytest.param(
            HEAD + CHUNKED + b"\r\n%x;name=value\r\n%b\r\n0\r\n\r\n" % (len(CALL), CALL), id="chunk extension"
        ),
        pytest.param(b"\r\n" + post(CALL), id="empty line before"),
        pytest.param(post(CALL, "X:   padded\t "), id="padded value"),
        pytest.param(post(CALL, path="/mcp?a=b&c"), id="query"),
    ],
)
@pytest.mark.parametrize("is_split", [False, True], ids=["at once", "byte by byte"])
async def test_every_way_to_write_a_request_is_the_same_request(request_bytes: bytes, *, is_split: bool) -> None:
    """The server gets one form of it, with our length and Host, and nothing of its trailers."""
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        for piece in [request_bytes] if not is_split else [bytes([byte]) for byte in request_bytes]:
            await client.say(piece)
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.line == b"HTTP/1.1 200 OK"
    (heard,) = server.heard
    assert heard.body == CALL
    assert heard.values(b"host") == [b"127.0.0.1:%d" % port]
    assert heard.values(b"content-length") == [b"%d" % len(CALL)]
    assert heard.values(b"transfer-encoding") == heard.values(b"authorization") == []
    assert heard.values(b"x") in ([], [b"padded"])
    assert heard.line in (b"POST /mcp HTTP/1.1", b"POST /mcp?a=b&c HTTP/1.1")


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=1, max_size=12), st.binary(min_size=1, max_size=12), st.binary(max_size=12))
def test_no_byte_of_a_request_can_make_a_line_of_the_upstreams(name: bytes, value: bytes, target: bytes) -> None:
    """Names, values and targets of any bytes: the server sees one request of the expected lines, or none."""

    async def run() -> None:
        async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
            client = await path.dial()
            line = b"POST /mcp?" + target + b" HTTP/1.1\r\n"
            fields = (
                b"Host: x\r\nContent-Type: application/json\r\nConnection: close\r\n" + name + b": " + value + b"\r\n"
            )
            await client.say(line + fields + LENGTH + b"\r\n" + CALL)
            await client.rest()
            await client.close()
        assert len(path.exchanges) == 1
        for heard in server.heard:
            lines = heard.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
            assert heard.body == CALL
            assert b"\n" not in b"".join(lines)
            assert b"\0" not in heard.head
            names = [line.partition(b":")[0] for line in lines[1:]]
            extra = [each for each in names if each not in KNOWN]
            assert extra in ([], [name.lower()])
        assert len(server.heard) <= 1

    asyncio.run(run())


KNOWN = {b"host", b"content-type", b"accept-encoding", b"traceparent", b"content-length"}


# connections


async def test_a_connection_is_kept() -> None:
    """A handshake costs as much as thirty calls."""
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        for _ in range(3):
            await client.say(post(CALL))
            assert await client.hear() is not None
        await client.close()

    assert (server.connections, len(server.heard), len(path.exchanges)) == (1, 3, 3)


@pytest.mark.parametrize("is_split", [False, True])
async def test_pipelined_requests_are_answered_in_order(*, is_split: bool) -> None:
    """Admitted and refused ones alike, each in its turn."""
    bodies = [a_call(tool, request_id=number) for number, tool in enumerate(("a", "no", "b", "no", "c"))]
    async with (
        a_server(echo_script()) as (server, port),
        a_path(a_snapshot(allowing("a", "b", "c"), port=port)) as path,
    ):
        client = await path.dial()
        data = b"".join(post(body) for body in bodies)
        for piece in [data] if not is_split else [data[at : at + 7] for at in range(0, len(data), 7)]:
            await client.say(piece)
        answers = [await client.hear() for _ in bodies]
        await client.close()

    told = [b"echo" in each.body for each in answers if each is not None]
    assert told == [True, False, True, False, True]
    assert [heard.body for heard in server.heard] == bodies[::2]
    assert [exchange.request_id for exchange in path.exchanges] == [0, 1, 2, 3, 4]


async def test_requests_before_a_close_are_answered() -> None:
    """All of them, the last one with the close."""
    async with a_server(echo_script()) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL) * 2 + post(CALL, "Connection: close") + b"\r\nGET / HTTP/1.1\r\n\r\n")
        answer = await client.rest()
        await client.close()

    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"connection: close") == 1
    assert len(path.exchanges) == 3


async def test_garbage_after_a_request_does_not_harm_it() -> None:
    """It has its own answer, after."""
    async with a_server(echo_script()) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL) + b"\0garbage\r\n\r\n")
        answer = await client.rest()
        await client.close()

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b"HTTP/1.1 400 ") == 1
    assert [each.status for each in path.exchanges] == [200, 400]


async def test_too_many_pipelined_requests_end_in_a_refusal() -> None:
    """After the answers to those that were taken; memory is bounded."""
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL) * (MAX_QUEUED + 20))
        answer = await client.rest()
        await client.close()

    assert len(server.heard) >= MAX_QUEUED
    assert answer.count(b"HTTP/1.1 200 OK") == len(server.heard)
    assert answer.count(b"HTTP/1.1 413 ") == (1 if len(server.heard) < MAX_QUEUED + 20 else 0)


async def test_http_1_0_is_answered_without_chunks() -> None:
    """It does not know them: the end of the connection is the end of the body."""
    stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(stream + b"9\r\ndata: {}\n\r\n1\r\n\n\r\n0\r\n\r\n")

    async with a_server(script) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        await client.close()

    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body == b"data: {}\n\n"


async def test_a_client_that_waits_is_invited() -> None:
    """Before it sends the body, and once."""
    async with a_server(echo_script()) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        head, body = post(CALL, "Expect: 100-continue").split(b"\r\n\r\n")
        await client.say(head + b"\r\n\r\n")
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.say(body)
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.line == b"HTTP/1.1 200 OK"


async def test_a_client_that_waits_with_too_much_is_not_invited() -> None:
    """It is refused before it has sent it."""
    async with a_path(a_snapshot(allowing(), max_body_bytes=1024)) as path:
        client = await path.dial()
        await client.say(HEAD + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n")
        answer = await client.rest()
        await client.close()

    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("is_split", [False, True])
async def test_an_offer_of_http_2_is_ignored(*, is_split: bool) -> None:
    """Java's client makes it with its first request, body and all; a further request follows."""
    offer = post(CALL, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAA")
    async with a_server(echo_script()) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        for piece in [offer + post(CALL)] if not is_split else [bytes([byte]) for byte in offer + post(CALL)]:
            await client.say(piece)
        answers = [await client.hear(), await client.hear()]
        await client.close()

    assert [each.line for each in answers if each is not None] == [b"HTTP/1.1 200 OK"] * 2
    assert [heard.body for heard in server.heard] == [CALL, CALL]
    assert [heard.values(b"upgrade") + heard.values(b"http2-settings") for heard in server.heard] == [[], []]
    assert len(path.exchanges) == 2


async def test_a_head_request_gets_no_body() -> None:
    """Or the next answer would begin with it."""
    async with a_path(a_snapshot(allowing())) as path:
        client = await path.dial()
        await client.say(b"HEAD /mcp HTTP/1.1\r\nHost: x\r\n\r\nPUT /mcp HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await client.until(b"\r\n\r\n")
        following = await client.hear()
        await client.close()

    assert head.startswith(b"HTTP/1.1 405 ")
    assert following is not None
    assert following.head.startswith(b"HTTP/1.1 405 ")


async def test_a_slow_request_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow-loris: each byte in time, the whole never; nothing is recorded, for nothing was asked."""
    monkeypatch.setattr(inbound, "REQUEST_TIMEOUT_S", 0.05)
    async with a_path(a_snapshot(allowing())) as path:
        client = await path.dial()
        await client.say(b"P")
        await eventually(lambda: path.serving.connections, what="the connection")
        try:
            async with asyncio.timeout(5):
                for byte in b"OST /mcp HTTP/1.1\r\n" + b"X: a\r\n" * 1000:
                    await client.say(bytes([byte]))
                    await asyncio.sleep(0.005)
        except (ConnectionError, RuntimeError):  # uvloop's word for a transport that is closed already
            pass
        await eventually(lambda: not path.serving.connections, what="the end of the connection")
        await client.close()

    assert path.exchanges == []


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an answer as before the first request."""
    monkeypatch.setattr(inbound, "IDLE_TIMEOUT_S", 0.05)
    async with a_server(echo_script()) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL))
        assert await client.hear() is not None
        assert await client.rest() == b""
        await client.close()


async def test_a_long_call_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools may think for longer than clients may be silent."""
    monkeypatch.setattr(inbound, "IDLE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(inbound, "REQUEST_TIMEOUT_S", 0.05)

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(response(a_result()))

    async with a_server(script) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL) + b"POST /mcp")
        answer = await client.hear()
        assert await client.rest() == b""  # the half request after it has its own time
        await client.close()

    assert answer is not None
    assert answer.body == a_result()


# endings


async def test_a_client_that_leaves_ends_its_call() -> None:
    """The server sees the disconnect, the record says so."""
    async with (
        a_server(lambda _, __: asyncio.sleep(0)) as (server, port),
        a_path(a_snapshot(allowing(), port=port)) as path,
    ):
        client = await path.dial()
        await client.say(post(CALL))
        await eventually(lambda: server.heard, what="the call")
        await client.close()
        await eventually(lambda: path.exchanges, what="the record")
        await eventually(lambda: server.open == 0, what="the disconnect")

    assert path.exchanges[0].aborted == "client closed the connection"


async def test_a_client_that_leaves_while_a_key_is_fetched_is_not_served() -> None:
    """Nothing is sent for it, and its record is made once."""
    provider = Provider(name="p", issuer="https://id.test", audiences=("a",))
    rules = Identity(mtls="permissive", providers=(provider,))
    async with (
        a_server(echo_script()) as (server, port),
        a_path(a_snapshot(allowing(), identity=rules, port=port)) as path,
    ):
        client = await path.dial()
        await client.say(post(CALL, f"Authorization: Bearer {A_TOKEN}"))
        await eventually(lambda: path.missing, what="the look for the key")
        await client.close()
        await eventually(lambda: path.exchanges, what="the record")
        path.key_found.set()

    assert server.heard == []
    assert len(path.exchanges) == 1


async def test_draining_lets_the_call_finish_and_closes() -> None:
    """Idle connections at once, busy ones with their answer."""
    release = asyncio.Event()

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(response(a_result()))

    async with a_server(script) as (server, port), a_path(a_snapshot(allowing(), port=port)) as path:
        idle, busy = await path.dial(), await path.dial()
        await idle.say(b"\r\n")
        await busy.say(post(CALL))
        await eventually(lambda: server.heard and len(path.serving.connections) == 2, what="the call")
        path.serving.draining = True
        for connection in tuple(path.serving.connections):
            connection.drain()
        assert await idle.rest() == b""
        release.set()
        answer = await busy.rest()
        await idle.close()
        await busy.close()

    assert b"connection: close" in answer
    assert answer.endswith(a_result())


async def test_a_defect_in_judging_an_answer_is_answered() -> None:
    """Neither passed nor left hanging; the log has the rest."""

    class Broken:
        name = "broken"

        def decide(self, _: object) -> Any:
            raise RuntimeError("boom")

    listing = b'{"jsonrpc":"2.0","id":7,"method":"tools/list"}'
    tools = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"}]}}'
    async with (
        a_server(lambda _, writer: answers_with(writer, response(tools))) as (_, port),
        a_path(a_snapshot(Broken(), port=port)) as path,
    ):
        client = await path.dial()
        await client.say(post(listing))
        answer = await client.hear()
        await client.say(post(CALL))
        defect_on_the_way_in = await client.hear()
        await client.close()

    assert answer is not None
    assert b'"fault"' in answer.body
    assert b"boom" not in answer.body
    assert defect_on_the_way_in is not None
    assert b'"fault"' in defect_on_the_way_in.body
    assert [each.refusal.reason for each in path.exchanges if each.refusal] == [Reason.FAULT] * 2


async def answers_with(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write *data*."""
    writer.write(data)


@pytest.mark.parametrize(("upstream", "is_told"), [("token", True), ("none", False)])
async def test_a_server_that_got_the_token_may_ask_for_another(upstream: Any, *, is_told: bool) -> None:
    """Its own challenge never passes; ours says the same, to a page as well."""
    identity = msgspec.structs.replace(ANYBODY, resource="https://mcp.test/mcp", upstream=upstream)
    theirs = 'www-authenticate: Bearer error="insufficient_scope", scope="more", resource_metadata="https://evil.test"'
    async with (
        a_server(answers(response(b"", status="403 Forbidden", headers=[theirs]))) as (_, port),
        a_path(a_snapshot(allowing(), identity=identity, port=port)) as path,
    ):
        client = await path.dial()
        await client.say(post(CALL))
        answer = await client.hear()
        await client.close()
    assert answer is not None
    told = b"".join(answer.values(b"www-authenticate"))

    assert (b'scope="more"' in told, b"https://mcp.test/.well-known" in told) == (is_told, is_told)
    assert b"evil" not in told


async def test_a_throttled_call_says_when_to_come_back() -> None:
    """And its connection goes on."""
    limit = Limit(name="one", rate_per_s=0.01, burst=1)
    async with a_server(echo_script()) as (_, port), a_path(a_snapshot(allowing(), limits=[limit], port=port)) as path:
        client = await path.dial()
        await client.say(post(CALL) * 2 + post(b'{"jsonrpc":"2.0","id":8,"method":"ping"}'))
        answers = [await client.hear() for _ in range(3)]
        await client.close()

    assert [each is not None and bool(each.values(b"retry-after")) for each in answers] == [False, True, False]


# every exchange is told once, whatever happens in whatever order


class Wire:
    """A transport that keeps what is written, and closes when it is told to."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closing = False

    def write(self, data: bytes) -> None:
        """Keep *data*."""
        self.written += data

    def is_closing(self) -> bool:
        """Say whether it was closed."""
        return self.closing

    def can_write_eof(self) -> bool:
        """Say no: TLS cannot."""
        return False

    def _close(self) -> None:
        self.closing = True

    close = abort = write_eof = _close

    def pause_reading(self) -> None:
        """Nothing is read here."""

    resume_reading = pause_reading

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing is buffered here."""

    def get_extra_info(self, _: str) -> None:
        """There is no TLS."""


class ScriptedServing:
    """Stands where Serving does: decides nothing, keeps what it was asked, counts what was begun and told."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.draining = False
        self.max_body_bytes = 1024
        self.demands_svid = lambda _: False
        self.begun: list[Exchange] = []
        self.observer = FakeObserver()
        self.waiting: list[tuple[Exchange, Any]] = []

    def begin(self, connection: Any) -> Exchange:
        """Begin a record."""
        exchange = Exchange(
            connection=connection,
            profile=None,
            revision="",
            started_ns=0,
            clock_s=0.0,
            trace_id="",
            span_id="",
            permit=a_permit(CALL),
            message=a_permit(CALL).question.message,
        )
        self.begun.append(exchange)
        return exchange

    def admit(self, exchange: Exchange, requester: Any) -> None:
        """Leave the decision to the test."""
        self.waiting.append((exchange, requester))

    def clock(self) -> float:
        """Return no time."""
        return 0.0

    def answer(self, exchange: Exchange) -> Answer:
        """Judge the way back."""
        assert exchange.permit is not None
        return Answer(Reader(permit=exchange.permit, engines=(allowing(),), tasks=tasks()), lambda _: None)

    def remember(self, *_: object) -> None:
        """Forget."""

    note = remember

    def deliver(self, _: Exchange, response: Response) -> Response:
        """There is no stream to deliver it on."""
        return response

    def observe(self, exchange: Exchange) -> None:
        """Tell the observer, which refuses a second time."""
        self.observer.observe(exchange)


class ScriptedCall:
    """Stands where Upstream's call does; once aborted it says nothing."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        """Stop."""
        self.aborted = True

    def pause(self) -> None:
        """Nothing flows by itself."""

    resume = pause


def _answer(turn: Any) -> None:
    turn.begin(200, b"OK", [(b"content-type", b"application/json")])
    turn.feed(a_result())
    turn.complete()


def _refuse(turn: Any) -> None:
    try:
        raise Refusal(Reason.DENIED, "no")  # noqa: TRY301 - as the pipeline does
    except Refusal as refusal:
        turn.refuse(refusal)


@pytest.mark.parametrize("end", [_answer, _refuse])
async def test_a_call_is_freed_at_its_end(end: Callable[[Any], None]) -> None:
    """A circle would keep each message and its answer in memory until the garbage collector comes."""
    serving = ScriptedServing()
    protocol = Inbound(serving, "client")  # type: ignore[arg-type]
    protocol.connection_made(Wire())  # type: ignore[arg-type]
    protocol.data_received(post(CALL))
    _, turn = serving.waiting.pop()
    turn.forward(Call(turn, b""))
    end(turn)
    ended = weakref.ref(turn)
    del turn
    assert ended() is None
    assert len(serving.observer.exchanges) == 1


KINDS = [
    "request", "last request", "garbage", "refuse", "forward", "head", "head of a stream", "head of a page", "piece", "event",
    "bad event", "complete", "failed", "client gone", "stuck", "unstuck", "drain", "abort", "time out",
]  # fmt: skip
# A call's usual way with anything in between, or a few kinds in any order: all kinds at once seldom meet.
USUAL = st.tuples(
    st.just("request"),
    st.sampled_from(["forward", "refuse"]),
    st.sampled_from(["head", "head of a stream", "head of a page"]),
    st.sampled_from(["piece", "event", "bad event"]),
    st.sampled_from(["complete", "failed"]),
)
WITH_SURPRISE = st.tuples(USUAL, st.integers(0, 5), st.lists(st.sampled_from(KINDS), max_size=3)).map(
    lambda drawn: [*drawn[0][: drawn[1]], *drawn[2], *drawn[0][drawn[1] :]]
)
FEW_KINDS = st.lists(st.sampled_from(KINDS), min_size=1, max_size=6).flatmap(
    lambda few: st.lists(st.sampled_from(few), max_size=30)
)
EVENTS = st.lists(WITH_SURPRISE, max_size=4).map(lambda parts: [each for part in parts for each in part]) | FEW_KINDS


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_every_exchange_is_told_exactly_once(events: list[str]) -> None:
    """Whatever comes in whatever order; after the end of the connection nothing is open."""
    asyncio.run(_play(events))


async def _play(events: list[str]) -> None:  # noqa: C901 - one small act for each kind of event
    serving, wire = ScriptedServing(), Wire()
    protocol = Inbound(serving, "client")  # type: ignore[arg-type]
    protocol.connection_made(wire)  # type: ignore[arg-type]
    calls: list[tuple[ScriptedCall, Any]] = []
    begun: list[Any] = []  # the turns themselves: a freed one's id would be another's
    gone = False

    def sink(*, after_head: bool) -> Any:
        if calls and not calls[-1][0].aborted and any(each is calls[-1][1] for each in begun) is after_head:
            return calls[-1][1]
        return None

    def lose() -> None:
        nonlocal gone
        if not gone:
            gone = True
            protocol.connection_lost(None)

    def forward() -> None:
        while serving.waiting:
            exchange, requester = serving.waiting.pop()
            if not requester.is_over:
                exchange.admission = Admission(permit=a_permit(CALL))
                call = ScriptedCall()
                calls.append((call, requester))
                requester.forward(call)

    def refuse() -> None:
        while serving.waiting:
            _, requester = serving.waiting.pop()
            if not requester.is_over:
                requester.refuse(Refusal(Reason.DENIED, "no"))

    def head(kind: bytes) -> None:
        receiver = sink(after_head=False)
        if receiver is not None:
            begun.append(receiver)
            receiver.begin(200, b"OK", [(b"content-type", kind)])

    def feed(piece: bytes) -> None:
        receiver = sink(after_head=True)
        if receiver is not None:
            receiver.feed(piece)

    def end(*, well: bool) -> None:
        receiver = sink(after_head=True) or (None if well else sink(after_head=False))
        if receiver is not None:
            calls.pop()
            receiver.complete() if well else receiver.failed("cut")

    acts: dict[str, Callable[[], object]] = {
        "request": lambda: gone or protocol.data_received(post(CALL)),
        "last request": lambda: gone or protocol.data_received(post(CALL, "Connection: close")),
        "garbage": lambda: gone or protocol.data_received(b"\0\r\n\r\n"),
        "refuse": refuse,
        "forward": forward,
        "head": lambda: head(b"application/json"),
        "head of a page": lambda: head(b"text/html"),
        "head of a stream": lambda: head(b"text/event-stream"),
        "piece": lambda: feed(b'{"jsonrpc":"2.0"'),
        "event": lambda: feed(b"data: {}\n\n"),
        "bad event": lambda: feed(b"data: x\r\r\n\n"),
        "complete": lambda: end(well=True),
        "failed": lambda: end(well=False),
        "client gone": lose,
        "stuck": lambda: gone or protocol._is_stuck or protocol.pause_writing(),
        "unstuck": lambda: gone or not protocol._is_stuck or protocol.resume_writing(),
        "drain": lambda: gone or (setattr(serving, "draining", True), protocol.drain()),
        "abort": lambda: gone or protocol.abort(),
        "time out": lambda: gone or protocol._timed_out(),
    }
    for event in events:
        acts[event]()
    lose()
    forward()  # keys that come too late

    assert len(serving.begun) == len(serving.observer.exchanges)
    assert all(call.aborted or all(sink_ is not each for each in begun) or sink_.is_over for call, sink_ in calls)
    assert serving.connections == set()
    assert protocol._timer is None
