"""Carries admitted messages to the MCP server and its responses back, a kept-alive connection each.

Takes nothing but an Admission: the type proves that the message was judged. A call is never sent twice: a server that
closes a kept connection just as we write to it may have run the call. Callbacks instead of tasks: a task for each
call costs a fifth of the whole path (docs/explanation/decisions.md).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from sidecar.core.connection import Headers, forwarded_headers
from sidecar.core.limits import Admission
from sidecar.exchange import Exchange

log = logging.getLogger(__name__)

IDLE_S: Final = 3.0  # uvicorn closes idle connections after 5 s, Node's http server after 5 s: be first
CONNECT_S: Final = 5.0  # to loopback; a listening server accepts in microseconds
MAX_HEAD_BYTES: Final = 64 * 1024  # of a response's head; nginx stops at 32 KiB, Node at 16 KiB
WRITE_HIGH_BYTES: Final = 256 * 1024
MAX_REPLIES: Final = 64  # under way at a time, to requests of the server that may not pass
REPLY_S: Final = 10.0  # a server takes them as fast as it reads


class Sink(Protocol):
    """Who receives a response. `failed` is the last call, or `complete` is; never both."""

    def begin(self, status: int, reason: bytes, headers: Headers) -> None:
        """Take the head."""
        ...

    def feed(self, piece: bytes) -> None:
        """Take a piece of the body."""
        ...

    def complete(self) -> None:
        """Know that the response is whole."""
        ...

    def failed(self, detail: str) -> None:
        """Know that there is no response, or no rest of it."""
        ...


class Call:
    """One message under way. The caller may pause its response or give it up."""

    def __init__(self, sink: Sink, request: bytes) -> None:
        self.sink = sink
        self.request = request
        self.line: Line | None = None
        self.abandoned = False

    def abort(self) -> None:
        """Give the call up and close its connection; the sink hears no more. The server sees a disconnect."""
        self.abandoned = True
        if self.line is not None:
            self.line.abort()

    def pause(self) -> None:
        """Stop reading: the client is slower than the server."""
        if self.line is not None:
            self.line.pause()

    def resume(self) -> None:
        """Read again."""
        if self.line is not None:
            self.line.resume()


class Pool(Protocol):
    """Who owns lines."""

    def keep(self, line: "Line") -> None:
        """Take *line* back: its call is over, and another can be sent."""
        ...

    def forget(self, line: "Line") -> None:
        """Drop *line*, which is closed."""
        ...


class Line(asyncio.Protocol):
    """One connection to the server; carries one call at a time."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._call: Call | None = None
        self._is_paused = False
        self.idle_since_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._unseen_bytes = 0  # that came since the response began, or since a piece of its body
        self._reason = b""
        self._begun = False  # the final head has come
        self._whole = False
        self._reusable = False
        self._is_delimited = False  # by a length or by chunks; otherwise by the end of the connection

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep *transport*."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        """Parse *data* of the response."""
        if self._call is None or self._parser is None:
            self.abort()  # a server that speaks unasked cannot be understood
            return
        self._unseen_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._whole:
                self._fail(f"unreadable response: {error.__context__ or error}")
                return
            self._reusable = False  # what follows a whole response was not asked for
        if self._whole:
            self._finish()
        elif self._unseen_bytes > 2 * MAX_HEAD_BYTES:  # the parser keeps a field to itself until it ends
            self._fail("response head too large")

    def eof_received(self) -> None:
        """Let the transport close; connection_lost says what it means."""

    def connection_lost(self, error: Exception | None) -> None:
        """End the call: complete when its response ends with the connection, failed otherwise."""
        self._pool.forget(self)
        self._transport = None
        if self._call is None:
            return
        if self._begun and error is None and not self._is_delimited:
            self._finish()
        else:
            self._fail(f"connection closed: {error or 'end of file'}")

    # httptools callbacks; what they raise comes out of `feed_data`

    def on_message_begin(self) -> None:
        """Refuse a second response to one request: it would be taken for a part of the first."""
        if self._whole:
            raise ValueError("more than one response")

    def on_status(self, reason: bytes) -> None:
        """Take a part of the reason phrase."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; trailer fields are dropped, no client of MCP reads them."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("response head too large")
        if not self._begun:
            self._headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """Hand the head over, unless it is an interim one."""
        assert self._parser is not None  # noqa: S101 - the parser is calling
        status = self._parser.get_status_code()
        headers, self._headers, self._head_bytes = self._headers, [], 0
        reason, self._reason = self._reason, b""
        if 100 <= status < 200:
            return
        self._begun = True
        self._is_delimited = any(name in (b"content-length", b"transfer-encoding") for name, _ in headers)
        if self._call is not None and not self._call.abandoned:
            self._call.sink.begin(status, reason, headers)

    def on_body(self, piece: bytes) -> None:
        """Hand a piece of the body over."""
        self._unseen_bytes = 0
        if self._call is not None and not self._call.abandoned:
            self._call.sink.feed(piece)

    def on_message_complete(self) -> None:
        """Note that the response is whole; `data_received` ends the call once the parser has returned."""
        assert self._parser is not None  # noqa: S101 - the parser is calling
        if self._begun:
            self._whole = True
            self._reusable = self._parser.should_keep_alive()

    # for Upstream and Call

    def carry(self, call: Call) -> None:
        """Send *call* on this connection."""
        assert self._transport is not None  # noqa: S101 - Upstream hands out only open lines
        self._parser = httptools.HttpResponseParser(self)
        self._reset()
        self._call = call
        call.line = self
        self._transport.write(call.request)

    @property
    def is_open(self) -> bool:
        """Say whether a call can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Close at once; nobody hears of it."""
        self._call = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Stop reading."""
        if self.is_open and self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self.is_open and self._transport is not None and self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def _finish(self) -> None:
        call, self._call = self._call, None
        self.resume()  # the client may be slow to read, the next call is another's
        if self._reusable and self.is_open:
            self._pool.keep(self)
        elif self._transport is not None:
            self._transport.close()
        if call is not None and not call.abandoned:
            call.line = None  # it is the next call's now
            call.sink.complete()

    def _fail(self, detail: str) -> None:
        call = self._call
        self.abort()
        if call is not None and not call.abandoned:
            call.sink.failed(detail)


class _Unheard:
    """The sink of a reply: what the server says to it is nobody's answer."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done

    def begin(self, status: int, reason: bytes, headers: Headers) -> None:
        del reason, headers
        if status >= 300:
            log.warning("reply to the server refused", extra={"status": status})

    def feed(self, piece: bytes) -> None:
        pass

    def complete(self) -> None:
        self._done()

    def failed(self, detail: str) -> None:
        log.warning("reply to the server failed", extra={"detail": detail})
        self._done()


class Upstream:
    """The pooled way to one server."""

    def __init__(self, host: str, spawn: Callable[..., object]) -> None:
        """Prepare for *host*; *spawn* starts a coroutine in the process's root TaskGroup."""
        self._host = host
        self._authority = (f"[{host}]" if ":" in host else host).encode()
        self._spawn = spawn
        self._idle: deque[Line] = deque()  # the one used last at the right
        self._replies: dict[Call, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def send(self, admission: Admission, exchange: Exchange, sink: Sink, *, traceparent: bytes) -> Call:
        """Send the message that was admitted, byte for byte; *sink* receives the response."""
        server = admission.permit.question.server
        call = Call(sink, _request(exchange, b"%b:%d" % (self._authority, server.port), traceparent))
        self._carry(call, server.port)
        return call

    def reply(self, exchange: Exchange, body: bytes, *, target: str | None = None) -> None:
        """Tell the server that a request of its own does not pass: *body* is an error of ours, in the exchange's session.

        *target* is path and query to post to; None: those of the exchange.
        """
        if len(self._replies) >= MAX_REPLIES:
            log.warning("reply to the server dropped: too many are under way")
            return
        assert exchange.permit is not None  # noqa: S101 - nothing comes back without
        port = exchange.permit.question.server.port
        request = _reply(exchange, b"%b:%d" % (self._authority, port), target or exchange.connection.target, body)
        call = Call(_Unheard(lambda: self._replies.pop(call).cancel()), request)
        self._replies[call] = self._loop.call_later(REPLY_S, self._drop_reply, call)
        self._carry(call, port)

    def _drop_reply(self, call: Call) -> None:
        """Give up a reply that the server does not take."""
        log.warning("reply to the server given up", extra={"seconds": REPLY_S})
        del self._replies[call]
        call.abort()

    def _carry(self, call: Call, port: int) -> None:
        line = self._take()
        if line is not None:
            line.carry(call)
        else:
            self._spawn(self._connect(call, port))

    def _take(self) -> Line | None:
        """Return the line that was used last and is still fresh."""
        fresh_since_s = self._loop.time() - IDLE_S
        while self._idle:
            line = self._idle.pop()
            if line.is_open and line.idle_since_s > fresh_since_s:
                return line
            line.abort()
        return None

    async def _connect(self, call: Call, port: int) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                _, line = await self._loop.create_connection(lambda: Line(self), self._host, port)
        except (OSError, TimeoutError) as error:
            if not call.abandoned:
                call.sink.failed(f"connect: {error or 'timed out'}")
            return
        if call.abandoned:
            line.abort()
        else:
            line.carry(call)

    def keep(self, line: Line) -> None:
        """Take *line* back for the next call; drop those that have waited for too long."""
        line.idle_since_s = self._loop.time()
        self._idle.append(line)
        while self._idle[0].idle_since_s < line.idle_since_s - IDLE_S:
            self._idle.popleft().abort()

    def forget(self, line: Line) -> None:
        """Drop *line*, which is closed."""
        if line in self._idle:
            self._idle.remove(line)

    def close(self) -> None:
        """Close the idle lines, and those of replies."""
        for call, timer in self._replies.items():
            timer.cancel()
            call.abort()
        self._replies.clear()
        while self._idle:
            self._idle.pop().abort()


def _request(exchange: Exchange, authority: bytes, traceparent: bytes) -> bytes:
    connection = exchange.connection
    lines = [f"{connection.method} {connection.target} HTTP/1.1".encode("latin-1"), b"host: " + authority]
    in_session = connection.values.get(b"mcp-session-id") == (exchange.session_id or "").encode("latin-1")
    forwarded = forwarded_headers(connection.headers, in_session=in_session)
    if exchange.link is not None:  # the state belongs to the trace that the request came with, not to the message's
        forwarded = [pair for pair in forwarded if pair[0] != b"tracestate"]
    lines += [b"%b: %b" % pair for pair in forwarded]
    # identity: what cannot be read cannot be judged.
    lines.append(b"accept-encoding: identity")
    if traceparent:
        lines.append(b"traceparent: " + traceparent)
    lines += [b"%b: %b" % pair for pair in exchange.credentials]
    if connection.body or connection.method == "POST":
        lines.append(b"content-length: %d" % len(connection.body))
    return b"\r\n".join([*lines, b"", connection.body])


def _reply(exchange: Exchange, authority: bytes, target: str, body: bytes) -> bytes:
    """Return a POST with nothing of the client's but its session and revision: it is not the client who speaks."""
    lines = [f"POST {target} HTTP/1.1".encode("latin-1"), b"host: " + authority]
    lines += [b"content-type: application/json", b"accept: application/json, text/event-stream"]
    if exchange.session_id is not None and target == exchange.connection.target:
        lines.append(b"mcp-session-id: " + exchange.session_id.encode("latin-1"))
    version = exchange.connection.values.get(b"mcp-protocol-version")
    if version is not None:
        lines.append(b"mcp-protocol-version: " + version)
    lines += [b"%b: %b" % pair for pair in exchange.credentials]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])
