"""One inbound connection: HTTP/1.1 in, the pipeline, the response out. Nothing here decides who may do what.

Refuses framing that two parsers could read differently, and bodies and heads beyond the caps. Parsing is llhttp's
(httptools), in its strict mode; what llhttp accepts and we do not is listed at `_check`. RFC 9112.
"""

import asyncio
from collections import deque
from http import HTTPStatus
from typing import Final

import httptools

from certs.tls import peer_of
from sidecar.core.answer import Answer, Mode
from sidecar.core.connection import Connection, Headers, returned_headers
from sidecar.core.replies import Response, answer
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell.serving import Serving
from sidecar.shell.upstream import Call

MAX_HEAD_BYTES: Final = 64 * 1024  # tokens with many groups reach 10 KB; nginx and Node stop at 8 to 32 KiB
MAX_HEADERS: Final = 128
MAX_QUEUED: Final = 16  # pipelined requests waiting for their turn
HEAD_TIMEOUT_S: Final = 30.0  # from the first byte of a request to its last (slow-loris)
IDLE_TIMEOUT_S: Final = 300.0  # a handshake costs as much as 30 calls: keep connections
WRITE_HIGH_BYTES: Final = 256 * 1024
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Inbound(asyncio.Protocol):
    """The server side of one connection; one request at a time is under way."""

    def __init__(self, serving: Serving, client: str) -> None:
        self._serving = serving
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Connection] = deque()
        self._turn: Turn | None = None
        self._close_after = False
        self._timer: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._body = bytearray()
        self._refused: Refusal | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep *transport*; the peer's certificate was verified within the handshake (certs/tls.py)."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what connect_accepted_socket gives
        self._transport = transport
        self._peer = peer_of(transport)
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._serving.connections.add(self)
        self._wait(IDLE_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Parse *data*; every complete request takes its turn."""
        if self._close_after and self._turn is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._reject(Refusal(Reason.MALFORMED, "an upgrade is not possible here"))
        except httptools.HttpParserError as error:
            self._reject(self._refused or Refusal(Reason.MALFORMED, "the HTTP request is malformed", detail=str(error)))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Give up the call under way: the server sees the client's disconnect, as it would without us."""
        self._serving.connections.discard(self)
        self._cancel_timer()
        self._transport = None
        self._queue.clear()
        if self._turn is not None:
            self._turn.abandon("client closed the connection")

    def eof_received(self) -> None:
        """Close: a client that half-closes cannot be told from one that is gone."""

    def pause_writing(self) -> None:
        """Hold the server back: the client reads slower."""
        if self._turn is not None and self._turn.call is not None:
            self._turn.call.pause()

    def resume_writing(self) -> None:
        """Let the server go on."""
        if self._turn is not None and self._turn.call is not None:
            self._turn.call.resume()

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        self._reset()
        self._wait(HEAD_TIMEOUT_S)

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._url += url
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field."""
        self._grow(len(name) + len(value))
        self._headers.append((name.lower(), value))
        if len(self._headers) > MAX_HEADERS:
            self._stop(Refusal(Reason.TOO_LARGE, f"more than {MAX_HEADERS} header fields"))

    def on_headers_complete(self) -> None:
        """Invite the body, if the client waits for that."""
        for name, value in self._headers:
            if name == b"expect" and value.lower() == b"100-continue" and self._turn is None:
                self.write(CONTINUE)

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._body += piece
        limit = self._serving.max_body_bytes
        if len(self._body) > limit:
            self._stop(Refusal(Reason.TOO_LARGE, f"the body is larger than {limit} bytes"))

    def on_message_complete(self) -> None:
        """Queue the request, and serve it if it is its turn."""
        if len(self._queue) >= MAX_QUEUED:
            self._stop(Refusal(Reason.TOO_LARGE, f"more than {MAX_QUEUED} requests are waiting"))
        if not self._parser.should_keep_alive():
            self._close_after = True
        self._queue.append(self._described())
        self._next()

    # turns

    def _described(self) -> Connection:
        path, _, query = self._url.partition(b"?")
        return Connection(
            peer=self._peer,
            client=self._client,
            method=self._parser.get_method().decode("ascii"),
            path=path.decode("latin-1"),
            query=query.decode("latin-1"),
            headers=self._headers,
            body=bytes(self._body),
        )

    def _next(self) -> None:
        if self._turn is not None or self._transport is None:
            return
        if not self._queue:
            if self._close_after or self._serving.draining:
                self._transport.close()
            else:
                self._wait(IDLE_TIMEOUT_S)
            return
        self._cancel_timer()
        self._turn = Turn(self, self._serving, self._serving.begin(self._queue.popleft()))
        self._turn.start()

    def turn_over(self, *, reusable: bool) -> None:
        """Go on with the next request, or close where the response cannot be delimited otherwise."""
        self._turn = None
        if not reusable:
            self._close_after = True
            self._queue.clear()
        self._next()

    def _reject(self, refusal: Refusal) -> None:
        """Answer what could not be read as a request; the connection cannot be trusted any more."""
        self._close_after = True
        if self._turn is not None:
            self._turn.abandon(refusal.public)
            self._turn = None
        self._queue.clear()
        self._turn = Turn(self, self._serving, self._serving.begin(self._described_so_far()))
        self._turn.refuse(refusal)

    def _described_so_far(self) -> Connection:
        self._body.clear()
        method = self._parser.get_method().decode("ascii") if self._url else ""
        path = self._url.partition(b"?")[0].decode("latin-1")
        return Connection(
            peer=self._peer, client=self._client, method=method, path=path, query="", headers=self._headers, body=b""
        )

    def _grow(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop(Refusal(Reason.TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes"))

    def _stop(self, refusal: Refusal) -> None:
        """Leave the parser by the only way that httptools has; `data_received` answers."""
        self._refused = refusal
        raise refusal

    # timers and the socket

    def _wait(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, self._timed_out)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        if self._turn is None and self._transport is not None:
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Send *data*, if the client is still there."""
        if self._transport is not None and data:
            self._transport.write(data)

    def drain(self) -> None:
        """Close as soon as nothing is under way."""
        if self._turn is None and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def closes(self) -> bool:
        """Say whether this response is the connection's last."""
        return self._close_after or self._serving.draining


class Turn:
    """One request and its response: what `Upstream` calls back."""

    def __init__(self, inbound: Inbound, serving: Serving, exchange: Exchange) -> None:
        self._inbound = inbound
        self._serving = serving
        self._exchange = exchange
        self._answer: Answer | None = None
        self._status = 0
        self._head = b""  # held until it is known whether the body is whole
        self._headers: Headers = ()
        self._chunked = False
        self._sent_head = False
        self.call: Call | None = None

    def start(self) -> None:
        """Judge the request; go on at once, or when the keys that it needs have come."""
        self._serving.admit(self._exchange, self)

    # what the serving calls

    def forward(self, call: Call) -> None:
        """Know the call that carries the admitted message."""
        self.call = call

    def refuse(self, refusal: Refusal) -> None:
        """Answer with *refusal*."""
        exchange = self._exchange
        exchange.refusal = refusal
        request_id = exchange.message.id if exchange.message is not None else refusal.id
        self._respond(answer(refusal, request_id))

    def _respond(self, response: Response) -> None:
        self._status = response.status
        self._headers = response.headers
        if response.status in (400, 413):
            self._inbound._close_after = True  # noqa: SLF001 - the two classes are one state machine
        self._end(response.body)

    # Sink

    def begin(self, status: int, reason: bytes, headers: Headers) -> None:
        """Take the head of the server's response; a stream's goes on at once."""
        exchange = self._exchange
        assert exchange.permit is not None  # noqa: S101 - nothing is sent without
        exchange.upstream_s = self._serving.clock() - exchange.clock_s
        fields = dict(headers)
        session_id = fields.get(b"mcp-session-id")
        self._serving.remember(exchange, status, None if session_id is None else session_id.decode("latin-1"))
        self._answer = Answer(exchange.permit, self._serving.engines(exchange))
        self._status, self._reason, self._headers = status, reason, returned_headers(headers)
        try:
            self._answer.begin(headers)
        except Refusal as refusal:
            self._give_up(refusal)
            return
        if self._answer.mode is Mode.EVENTS:
            self._send_head(None)

    def feed(self, piece: bytes) -> None:
        """Pass on what may be seen of *piece*."""
        assert self._answer is not None  # noqa: S101 - Upstream begins before it feeds
        try:
            passed = self._answer.feed(piece)
        except Refusal as refusal:
            self._give_up(refusal)
            return
        if passed:
            if not self._sent_head:
                self._send_head(None)
            self._inbound.write(self._framed(passed))

    def complete(self) -> None:
        """Finish the response."""
        assert self._answer is not None  # noqa: S101 - Upstream begins before it completes
        try:
            rest = self._answer.end()
        except Refusal as refusal:
            self._give_up(refusal)
            return
        self._end(rest)

    def failed(self, detail: str) -> None:
        """Answer for a server that did not."""
        self._give_up(Refusal(Reason.UPSTREAM, "the server did not answer", detail=detail))

    # endings

    def _give_up(self, refusal: Refusal) -> None:
        """End a call whose response cannot be passed on: by an error where that still fits, by a cut otherwise."""
        if self.call is not None:
            self.call.abort()
        if not self._sent_head:
            self.refuse(refusal)
            return
        self._exchange.refusal = refusal
        self._exchange.aborted = refusal.detail or refusal.public
        message = self._exchange.message
        if self._answer is not None and self._answer.mode is Mode.EVENTS and message is not None and message.id is not None:
            self._inbound.write(self._framed(b"data: " + answer(refusal, message.id).body + b"\n\n"))
            self._end(b"")
        else:
            self._observe()
            self._inbound.abort()

    def abandon(self, why: str) -> None:
        """End without an answer: nobody is there to read it."""
        if self.call is not None:
            self.call.abort()
        self._exchange.aborted = why
        self._observe()

    def _end(self, rest: bytes) -> None:
        """Send the rest and record the exchange, in this order of effects: first the record, then the last byte."""
        self._observe()
        if self._sent_head:
            self._inbound.write(self._framed(rest) + (b"0\r\n\r\n" if self._chunked else b""))
        else:
            self._send_head(rest)
        self._inbound.turn_over(reusable=not self._inbound.closes)

    def _observe(self) -> None:
        exchange, seen = self._exchange, self._answer
        exchange.status = self._status
        exchange.total_s = self._serving.clock() - exchange.clock_s
        if seen is not None:
            exchange.result, exchange.result_bytes = seen.result, seen.result_bytes
            exchange.result_sha256 = seen.result_sha256
            exchange.error_code, exchange.tool_failed, exchange.hidden = seen.error_code, seen.tool_failed, seen.hidden
        self._serving.observe(exchange)

    def _send_head(self, body: bytes | None) -> None:
        """Send the head, with *body* where that is all of it; None: the body follows in chunks."""
        self._sent_head = True
        reason = getattr(self, "_reason", b"") or _phrase(self._status)
        lines = [b"HTTP/1.1 %d %b" % (self._status, reason), *(b"%b: %b" % pair for pair in self._headers)]
        if body is None:
            self._chunked = True
            lines.append(b"transfer-encoding: chunked")
        elif self._status not in (204, 304):
            lines.append(b"content-length: %d" % len(body))
        if self._inbound.closes:
            lines.append(b"connection: close")
        self._inbound.write(b"\r\n".join([*lines, b"", body or b""]))

    def _framed(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if piece and self._chunked else piece


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b"Unknown"
