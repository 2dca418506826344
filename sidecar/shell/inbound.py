"""One inbound connection: HTTP/1.1 in, the pipeline, the response out. Nothing here decides who may do what.

Refuses framing that two parsers could read differently, and bodies and heads beyond the caps. Parsing is llhttp's
(httptools), in its strict mode; what llhttp accepts and we do not stands in `_check`. RFC 9112.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, TypeVar, cast

import httptools

from certs.tls import peer_of
from certs.verify import Peer
from sidecar.core.answer import Answer, Mode
from sidecar.core.connection import Connection, Headers, returned_headers
from sidecar.core.identity import svid_required
from sidecar.core.lifetime import is_stream
from sidecar.core.message import Shape
from sidecar.core.metadata import relayed
from sidecar.core.origin import shared
from sidecar.core.replies import Response, answer, answer_batch
from sidecar.core.review import Seen
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.return_path import is_answer
from sidecar.shell.serving import Serving
from sidecar.shell.streams import Stream
from sidecar.shell.upstream import Call

log = logging.getLogger(__name__)

Found = TypeVar("Found")

MAX_HEAD_BYTES: Final = 64 * 1024  # tokens with many groups reach 10 KB; nginx and Node stop at 8 to 32 KiB
MAX_HEADERS: Final = 128
MAX_QUEUED: Final = 16  # pipelined requests that came in one piece; reading stops while any waits
REQUEST_TIMEOUT_S: Final = 30.0  # from the first byte of a request to its last (slow-loris)
IDLE_TIMEOUT_S: Final = 300.0  # a handshake costs as much as 30 calls: keep connections; a stuck reader gets as long
LINGER_S: Final = 5.0  # for a client that is still sending to see why it was refused
WRITE_HIGH_BYTES: Final = 256 * 1024
MAX_UNREAD_BYTES: Final = 2**20  # on a 2024-11-05 stream; refusals come there whether it is read or not
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that waits for its turn."""

    connection: Connection
    is_last: bool = True  # on its connection
    takes_chunks: bool = False  # HTTP/1.0 does not know them
    refusal: Refusal | None = None  # it could not be read, and this is its answer


class Inbound(asyncio.Protocol):
    """The server side of one connection; one request at a time is under way."""

    def __init__(self, serving: Serving, client: str) -> None:
        self._serving = serving
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._peer: Peer | None = None
        self.opened_s = time.time()
        self.is_retiring = False  # the next answer is the last one
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()
        self._turn: Turn | None = None
        self._is_deaf = False  # no further request is read
        self._is_unreadable = False  # because the last one was no request
        self._is_receiving = False  # a request has begun and is not whole
        self._is_stuck = False  # the client does not read
        self._holds_reading = False
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._unseen_bytes = 0  # that came since the request began, or since a piece of its body
        self._speaks_1_1 = False
        self._in_body = False
        self._body = bytearray()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep *transport*; the peer's certificate was verified within the handshake (certs/tls.py)."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it
        self._peer = peer_of(transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._serving.connections.add(self)
        self._wait(IDLE_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Parse *data*; every complete request takes its turn."""
        if self._is_deaf:
            return
        after_upgrade: bytes | None = None
        self._unseen_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            after_upgrade = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback raised
            malformed = Refusal(Reason.MALFORMED, "the HTTP request is malformed", detail=str(cause or error))
            self._reject(cause if isinstance(cause, Refusal) else malformed)
        if self._unseen_bytes > 2 * MAX_HEAD_BYTES:
            # The parser keeps a field to itself until it ends; twice, because only names and values count as the head.
            self._reject(Refusal(Reason.TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes"))
        if after_upgrade is not None and not self._is_deaf:
            self._go_on_without_upgrade(after_upgrade)
        elif self._queue:
            self._next()
            self._hold_reading(hold=bool(self._queue))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Give up the call under way: the server sees the client's disconnect, as it would without us."""
        self._serving.connections.discard(self)
        self._cancel_timer()
        self._transport = None
        self._queue.clear()
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.abandon("client closed the connection")

    def eof_received(self) -> None:
        """Close: a client that half-closes cannot be told from one that is gone."""

    def pause_writing(self) -> None:
        """Hold the server back: the client reads slower."""
        self._is_stuck = True
        self._wait(IDLE_TIMEOUT_S)
        if self._turn is not None:
            self._turn.pause()

    def resume_writing(self) -> None:
        """Let the server go on, or the next request have its turn."""
        self._is_stuck = False
        if self._turn is not None:
            self._cancel_timer()
            self._turn.resume()
        else:
            self._next()

    # httptools callbacks; what they raise comes out of `feed_data`

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        self._reset()
        self._is_receiving = True
        self._wait(REQUEST_TIMEOUT_S)

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._url += url
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; trailer fields are dropped, they must not pass for headers (RFC 9110, 6.5.1)."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._grow(0)
        if self._in_body:
            return
        self._headers.append((name.lower(), value.strip(b" \t")))  # llhttp leaves trailing white space
        if len(self._headers) > MAX_HEADERS:
            raise Refusal(Reason.TOO_LARGE, f"more than {MAX_HEADERS} header fields")

    def on_headers_complete(self) -> None:
        """Judge the head's framing; invite the body, if the client waits for that."""
        self._in_body = True
        if self._parser.should_upgrade():
            return
        self._check()
        if self._turn is None and (b"expect", b"100-continue") in self._headers and self._speaks_1_1:
            self.write(CONTINUE)

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._unseen_bytes = 0
        self._body += piece
        self._limit_body(len(self._body))

    def on_message_complete(self) -> None:
        """Queue the request."""
        if self._parser.should_upgrade():
            return
        self._is_receiving = False
        if len(self._queue) >= MAX_QUEUED:
            raise Refusal(Reason.TOO_LARGE, f"more than {MAX_QUEUED} requests are waiting")
        # An HTTP/1.0 connection is not kept: nobody we know needs it.
        self._is_deaf = not self._parser.should_keep_alive() or not self._speaks_1_1
        connection = self._described(self._parser.get_method(), bytes(self._body))
        self._queue.append(Request(connection=connection, is_last=self._is_deaf, takes_chunks=self._speaks_1_1))

    # reading

    def _check(self) -> None:
        """Refuse what llhttp lets through and servers could read differently."""
        version = self._parser.get_http_version()
        self._speaks_1_1 = version == "1.1"
        if version not in ("1.0", "1.1"):
            raise Refusal(Reason.MALFORMED, "the HTTP version must be 1.1 or 1.0")
        if not self._url.startswith(b"/") or b"#" in self._url:
            raise Refusal(Reason.MALFORMED, "the request target must be a path")
        names = [name for name, _ in self._headers]
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and self._speaks_1_1):
            raise Refusal(Reason.MALFORMED, "Host must be given once")
        if self._peer is None and self._serving.demands_svid(names):
            raise svid_required()  # before the body: nobody in particular must not fill our memory
        if b"transfer-encoding" in names:
            codings = [value.lower() for name, value in self._headers if name == b"transfer-encoding"]
            if codings != [b"chunked"] or not self._speaks_1_1:
                raise Refusal(Reason.MALFORMED, "Transfer-Encoding must be chunked, and HTTP 1.1")
        if b"content-length" in names:  # llhttp has refused a second one
            self._limit_body(int(self._headers[names.index(b"content-length")][1]))

    def _limit_body(self, size_bytes: int) -> None:
        limit = self._serving.max_body_bytes
        if size_bytes > limit:
            raise Refusal(Reason.TOO_LARGE, f"the body is larger than {limit} bytes")

    def _grow(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise Refusal(Reason.TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def _described(self, method: bytes, body: bytes) -> Connection:
        path, _, query = self._url.partition(b"?")
        return Connection(
            peer=self._peer,
            client=self._client,
            method=method.decode("ascii"),
            path=path.decode("latin-1"),
            query=query.decode("latin-1"),
            headers=self._headers,
            body=body,
        )

    def _reject(self, refusal: Refusal) -> None:
        """Answer, in its turn, what could not be read as a request; nothing that follows it can be trusted."""
        if self._is_deaf:  # only bytes after the last request
            return
        self._is_deaf = self._is_unreadable = True
        self._is_receiving = False
        method = self._parser.get_method() if self._url else b""
        self._queue.append(Request(connection=self._described(method, b""), refusal=refusal))

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Read the request afresh without its Upgrade field, which a server may ignore (RFC 9110, 7.8).

        Java's client offers h2c with its first request, whatever it is; llhttp stops at the end of such a head.
        """
        method, version = self._parser.get_method(), self._parser.get_http_version()
        fields = [pair for pair in self._headers if pair[0] != b"upgrade"]
        if method == b"CONNECT" or len(fields) == len(self._headers):
            self._reject(Refusal(Reason.MALFORMED, "a tunnel is not possible here"))
            self._next()
            return
        lines = [b"%b %b HTTP/%b" % (method, self._url, version.encode()), *(b"%b: %b" % pair for pair in fields)]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    # turns

    def _next(self) -> None:
        """Begin the next turn; with nothing left to do, wait for more or close."""
        if self._turn is not None or self._is_stuck or self._transport is None:
            return
        if self._queue:
            request = self._queue.popleft()
            self._turn = Turn(self, self._serving, request, self._serving.begin(request.connection))
            self._turn.start()
        elif self._is_deaf or self._serving.draining:
            self._close()
        else:
            self._hold_reading(hold=False)
            self._wait(REQUEST_TIMEOUT_S if self._is_receiving else IDLE_TIMEOUT_S)

    def turn_over(self, *, is_last: bool) -> None:
        """Go on with the next request, or close where the client expects that."""
        self._turn = None
        if is_last:
            self._is_deaf = True
            self._queue.clear()
        self._next()

    # timers and the socket

    def _wait(self, seconds: float) -> None:
        """Abort in *seconds*, unless told otherwise until then. A timer that goes off too early serves: see `_timed_out`."""
        self._deadline_s = self._loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._deadline_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._timed_out)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        if self._turn is not None and not self._is_stuck:
            return
        left_s = self._deadline_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._timed_out)
        else:
            self.abort()

    def _hold_reading(self, *, hold: bool) -> None:
        """Leave further requests in the kernel's buffer while some wait here."""
        if self._transport is None or self._transport.is_closing() or hold is self._holds_reading:
            return
        self._holds_reading = hold
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _close(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._wait(LINGER_S)  # closing waits for a client that does not read
        if self._is_unreadable and self._transport.can_write_eof():
            # Closing with bytes unread resets the connection, and the client might never see its answer.
            self._hold_reading(hold=False)
            self._transport.write_eof()
        else:
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Send *data*, if the client is still there."""
        if self._transport is not None and data:
            self._transport.write(data)

    @property
    def peer(self) -> Peer | None:
        """Return the verified workload at the other end."""
        return self._peer

    @property
    def streams(self) -> Sequence[Exchange]:
        """Return the exchanges under way, streams among them."""
        return () if self._turn is None else self._turn.exchanges

    def retire(self) -> None:
        """Let the next answer be the last on this connection."""
        self.is_retiring = True

    def end_streams(self, why: str) -> None:
        """End the stream under way, if it is one."""
        if self._turn is not None and any(is_stream(each.message) for each in self.streams if each.message is not None):
            self._turn.conclude(why)

    @property
    def is_busy(self) -> bool:
        """Say whether a call is under way, not only a stream that nobody waits for the end of."""
        return self._turn is not None and not self._turn.is_standing

    def abort_if_unread(self) -> None:
        """Close at once when the client does not read what comes without being asked for."""
        if self._transport is not None and self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.abort()

    def drain(self) -> None:
        """Close as soon as nothing is under way."""
        if self._turn is None:
            self._close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


class Turn:
    """One request and its response: what `Serving` and `Upstream` call back. Over once; its exchange is told once."""

    def __init__(self, inbound: Inbound, serving: Serving, request: Request, exchange: Exchange) -> None:
        self._inbound = inbound
        self._serving = serving
        self._request = request
        self._exchange = exchange  # of the HTTP request, and of its first message
        self.exchanges: Sequence[Exchange] = (exchange,)  # of all its messages
        self._stream: Stream | None = None  # 2024-11-05: what this one opened
        self._call: Call | None = None
        self._answer: Answer | None = None
        self._status = 0
        self._reason = b""
        self._headers: Headers = ()
        self._is_last = request.is_last
        self._is_chunked = False
        self._sent_head = False
        self.is_over = False

    def start(self) -> None:
        """Judge the request; go on at once, or when the keys that it needs have come."""
        if self._request.refusal is not None:
            self.refuse(self._request.refusal)
        else:
            self._serving.admit(self._exchange, self)

    def pause(self) -> None:
        """Hold the response back."""
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        """Let the response go on."""
        if self._call is not None:
            self._call.resume()

    def abandon(self, why: str) -> None:
        """End without an answer: nobody is there to read it."""
        if self.is_over:
            return
        if self._call is not None:
            self._call.abort()
        for exchange in self.exchanges:
            exchange.aborted = why
        self._record()

    @property
    def is_standing(self) -> bool:
        """Say whether only a stream is under way that nobody waits for the end of."""
        message = self._exchange.message
        is_awaited = self._stream is not None and self._stream.is_awaited
        return self._sent_head and message is not None and is_stream(message) and not is_awaited

    def say(self, data: bytes) -> None:
        """Send *data*, whole events of our own, on the stream under way."""
        if self._sent_head and not self.is_over:
            self._inbound.write(self._framed(data))
            self._inbound.abort_if_unread()

    def conclude(self, why: str) -> None:
        """End a stream as a server does that has nothing more to say; before its head, it is left to its answer."""
        if self.is_over or not self._sent_head:
            return
        if self._call is not None:
            self._call.abort()
        for exchange in self.exchanges:
            exchange.aborted = why
        self._is_last = True
        self._end(b"")

    # what the serving calls

    def forward(self, call: Call) -> None:
        """Know the call that carries the admitted message."""
        self._call = call

    def divide(self, count: int) -> Sequence[Exchange]:
        """Return an exchange for each of so many messages of the body; all of them are answered for from now on."""
        connection = self._request.connection
        self.exchanges = (self._exchange, *(self._serving.begin(connection) for _ in range(count - 1)))
        return self.exchanges

    def refuse(self, refusal: Refusal | None) -> None:
        """Answer with *refusal*; None: each exchange has its own."""
        for exchange in self.exchanges:
            exchange.refusal = refusal or exchange.refusal
        profile = self._exchange.profile
        denied = "error" if profile is None else profile.denied
        if refusal is None or len(self.exchanges) > 1:
            refused = [(each.refusal, each.message) for each in self.exchanges if each.refusal is not None]
            response = answer_batch(refused, denied)
        else:
            assert self._exchange.refusal is not None  # noqa: S101 - one message, one refusal
            response = answer(self._exchange.refusal, self._exchange.message, denied)
            response = self._serving.deliver(self._exchange, response)
        nobody = self._request.connection.peer is None and response.status in (401, 403)  # must not hold a place
        is_unread = response.status == 413 or (response.status == 400 and self._exchange.request_id is None)
        self._is_last = self._is_last or nobody or is_unread
        self._status, self._reason, self._headers = response.status, b"", self._readable(response.headers)
        self._end(b"" if self._request.connection.method == "HEAD" else response.body)

    def respond(self, response: Response) -> None:
        """Answer with *response*, and leave no record: what was asked is no message."""
        self._status, self._headers = response.status, response.headers
        self.is_over = True
        self._serving.forget(self._exchange)
        self._send_head(response.body)
        self._inbound.turn_over(is_last=self._closes)

    # Sink

    def begin(self, status: int, reason: bytes, headers: Headers) -> None:
        """Take the head of the server's response; a stream's goes on at once."""
        exchange, answered_s = self._exchange, self._serving.clock()
        for each in self.exchanges:
            each.upstream_s = answered_s - each.clock_s
        session_id = dict(headers).get(b"mcp-session-id")
        self._serving.remember(exchange, status, None if session_id is None else session_id.decode("latin-1"))
        kept = returned_headers(headers)
        if status in (401, 403) and exchange.profile is not None:
            kept += relayed(exchange.profile.identity, headers)
        self._status, self._reason, self._headers = status, reason, self._readable(kept)
        seen = self._answer = self._serving.answer(exchange)
        if self._look(lambda: seen.begin(status, headers)) is Mode.EVENTS:
            self._send_head(None)

    def feed(self, piece: bytes) -> None:
        """Pass on what may be seen of *piece*."""
        assert self._answer is not None  # noqa: S101 - Upstream begins before it feeds
        seen = self._answer
        passed = self._look(lambda: seen.feed(piece))
        if passed:
            if not self._sent_head:
                self._send_head(None)
            self._inbound.write(self._framed(passed))

    def complete(self) -> None:
        """Finish the response."""
        assert self._answer is not None  # noqa: S101 - Upstream begins before it completes
        rest = self._look(self._answer.end)
        if rest is not None:
            self._end(rest)

    def failed(self, detail: str) -> None:
        """Answer for a server that did not."""
        self._give_up(Refusal(Reason.UPSTREAM, "the server did not answer", detail=detail))

    def _look(self, look: Callable[[], Found]) -> Found | None:
        """Return what was found in the response, and keep what it says; None when it was given up instead."""
        try:
            found = look()
            came = self._answer
            if came is not None and (came.seen or came.endpoint is not None):
                self._note(came)
            if came is not None and came.event_ids:
                self._serving.told(self._exchange, came.event_ids)
                came.event_ids.clear()
        except Refusal as refusal:
            self._give_up(refusal)
        except Exception:
            # The last resort of the way back: a defect in judging must neither pass nor hang.
            log.exception("judging a response failed")
            self._give_up(Refusal(Reason.FAULT, "internal error", detail="see the sidecar's log"))
        else:
            return found
        return None

    def _note(self, came: Answer) -> None:
        """Keep what the messages say that have come since the last time."""
        if came.endpoint is not None and self._stream is None:
            self._stream = self._serving.open_stream(came.endpoint, self._exchange, self.say)
        for seen in came.take():
            if self._stream is None or not self._serving.answered(seen, self._stream):
                self._serving.note(seen, self._whose(seen), self._stream)

    def _whose(self, seen: Seen) -> Exchange:
        """Return the exchange that *seen* answers; the first one where it answers none."""
        if len(self.exchanges) == 1 or seen.answers is None:
            return self._exchange
        return next((each for each in self.exchanges if is_answer(each, seen.answers)), self._exchange)

    # endings

    def _give_up(self, refusal: Refusal) -> None:
        """End a call whose response cannot be passed on: by an error where that still fits, by a cut otherwise."""
        if self._call is not None:
            self._call.abort()
        if not self._sent_head:
            self.refuse(refusal)
            return
        left = [each for each in self.exchanges if each.result_sha256 is None] or self.exchanges
        errors = bytearray()
        for exchange in left:
            exchange.refusal = refusal
            exchange.aborted = refusal.detail or refusal.public
            if exchange.message is not None and exchange.message.shape is Shape.REQUEST:
                errors += b"data: " + answer(refusal, exchange.message).body + b"\n\n"
        if errors and self._answer is not None and self._answer.mode is Mode.EVENTS:
            self._end(bytes(errors))
        else:
            self._record()
            self._inbound.abort()

    def _end(self, rest: bytes) -> None:
        """Record the exchange, then send the rest: who has an answer finds it recorded."""
        self._record()
        if self._sent_head:
            self._inbound.write(self._framed(rest) + (b"0\r\n\r\n" if self._is_chunked else b""))
        else:
            self._send_head(rest)
        self._inbound.turn_over(is_last=self._closes)

    def _record(self) -> None:
        self.is_over = True
        over_s = self._serving.clock()
        passed = None if self._answer is None else self._answer.passed
        if passed is not None:
            self._exchange.result_bytes, self._exchange.result_sha256 = passed
        if self._stream is not None:
            self._serving.close_stream(self._stream)
        for exchange in self.exchanges:
            exchange.status = self._status
            exchange.total_s = over_s - exchange.clock_s
            self._serving.observe(exchange)
            if exchange.refusal is not None:
                exchange.refusal.__traceback__ = None
        # They hold this turn or its exchange: circles would keep every message until the collector comes.
        self._call = self._answer = self._stream = None

    # the wire

    def _readable(self, headers: Headers) -> Headers:
        """Return *headers* as the page that called may read them, if one did."""
        origin, profile = self._request.connection.values.get(b"origin"), self._exchange.profile
        if origin is None or profile is None:
            return headers
        return shared(headers, origin.decode("latin-1"), profile.server.origins)

    @property
    def _closes(self) -> bool:
        return self._is_last or self._serving.draining or self._inbound.is_retiring

    def _send_head(self, body: bytes | None) -> None:
        """Send the head, with *body* where that is all of it; None: the body follows, in chunks or up to the close."""
        self._sent_head = True
        lines = [b"HTTP/1.1 %d %b" % (self._status, self._reason or _phrase(self._status))]
        lines += [b"%b: %b" % pair for pair in self._headers]
        if body is None:
            self._is_chunked = self._request.takes_chunks
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked")
        elif self._status not in (204, 304):
            lines.append(b"content-length: %d" % len(body))
        if self._closes:
            lines.append(b"connection: close")
        self._inbound.write(b"\r\n".join([*lines, b"", body or b""]))

    def _framed(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if piece and self._is_chunked else piece


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b"Unknown"
