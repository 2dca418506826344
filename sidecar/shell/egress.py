"""Outbound connections of an agent: plain HTTP from the application, mutual TLS to the MCP server, one for one.

Nothing is sent before the server has proven the identity that the profile demands: the check is a part of the TLS
handshake (certs/tls.py). A call is never sent twice. The server's own sidecar judges the call; here it is only said who
calls, and recorded. Parsing is llhttp's (httptools). RFC 9112.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, cast

import httptools

from certs.errors import CertsError, UntrustedChain
from certs.spiffe import SpiffeId
from certs.svid import X509Snapshot
from certs.tls import MutualClient, peer_of
from certs.verify import Peer, Usage, verify_peer
from sidecar.core.authorise import Agent
from sidecar.core.connection import Connection, Headers
from sidecar.core.egress import AGENT_SESSION, AgentSessions, Route, Target, find, incoming, outgoing, route, target
from sidecar.core.identity import Principal
from sidecar.core.message import Message, Shape, parse
from sidecar.core.profile import Destination
from sidecar.core.replies import answer
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Outbound
from sidecar.pipeline import MAX_LABEL_CHARS, SESSION, VERSION
from sidecar.shell.serving import Serving
from sidecar.shell.upstream import Call, Line

log = logging.getLogger(__name__)

CONNECT_S: Final = 10.0  # across the cluster, with a handshake
MAX_HEAD_BYTES: Final = 64 * 1024  # as inbound
MAX_BODY_BYTES: Final = (
    64 * 2**20
)  # what a server's profile can allow at most; the server's sidecar says how much it takes
MAX_QUEUED: Final = 16
WRITE_HIGH_BYTES: Final = 256 * 1024


class Egress:
    """What all outbound connections share. `follow` belongs into X509Source.subscribe."""

    def __init__(
        self,
        serving: Serving,
        client: MutualClient,
        *,
        own_id: Callable[[], SpiffeId | None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        grace_s: float,
    ) -> None:
        self.serving = serving
        self.client = client
        self.own_id = own_id
        self.spawn = spawn
        self.grace_s = grace_s
        self.sessions = AgentSessions(mint=lambda: secrets.token_hex(16))

    def find(self, asked: Target) -> Destination | None:
        """Return the server that *asked* means; None when the profile does not name it. Raises Refusal(NOT_READY)."""
        snapshot = self.serving.snapshot
        if snapshot is None:
            raise Refusal(
                Reason.NOT_READY, "which servers are meant is not known yet", detail="no bundle", retry_after_s=2
            )
        agent = snapshot.profile.agent
        return None if agent is None else find(asked, agent.servers, snapshot.profile.server.namespace)

    def route(self, asked: Target) -> Route:
        """Return the route for *asked*. Raises Refusal(NOT_READY or NOT_FOUND)."""
        server, own, snapshot = self.find(asked), self.own_id(), self.serving.snapshot
        if server is None or snapshot is None:
            raise Refusal(Reason.NOT_FOUND, "this connection leads to another server", detail=asked.authority[:256])
        if own is None:
            raise Refusal(Reason.NOT_READY, "the agent has no identity to call with", detail="no SVID", retry_after_s=2)
        return route(asked, server, snapshot.profile.server.namespace, own)

    def follow(self, held: X509Snapshot | None) -> None:
        """End the connections to servers that are vouched for no longer; all of them without an identity of our own."""
        for each in tuple(self.serving.connections):
            each.recheck(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A whole request of the application."""

    connection: Connection
    url: bytes
    is_last: bool
    takes_chunks: bool
    refusal: Refusal | None = None


class Outgoing(asyncio.Protocol):
    """One connection of the application, and the one connection to a server that goes with it."""

    peer = None  # of the application: it is beside us
    streams = ()

    @property
    def is_busy(self) -> bool:
        """Say whether a call is under way."""
        return self._errand is not None

    def __init__(self, egress: Egress, client: str, address: tuple[str, int] | None, closed: asyncio.Event) -> None:
        """Serve *client*; *address* is where it was going (None: the name in each request says so)."""
        self.egress = egress
        self.address = address
        self.agent_session = egress.sessions.mint()
        self._client = client
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()
        self._errand: Errand | None = None
        self._is_deaf = False
        self._is_paused = False
        self._line: Line | None = None
        self._line_of: tuple[Route, object] | None = None  # whom it leads to, and the TLS context it was made with
        self._server: Peer | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._unseen_bytes = 0  # that came since the request began, or since a piece of its body
        self._in_body = False
        self._body = bytearray()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep *transport*."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self.egress.serving.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Parse *data*; every whole request takes its turn."""
        if self._is_deaf:
            return
        self._unseen_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._reject(cause if isinstance(cause, Refusal) else Refusal(Reason.MALFORMED, "unreadable HTTP"))
        if self._unseen_bytes > 2 * MAX_HEAD_BYTES and not self._is_deaf:  # the parser keeps a field until it ends
            self._reject(Refusal(Reason.TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes"))
        self._next()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Close the other half: the server sees the application's disconnect."""
        self.egress.serving.connections.discard(self)
        self._transport = None
        self._queue.clear()
        errand, self._errand = self._errand, None
        if errand is not None:
            errand.abandon("the application closed the connection")
        self._drop_line()
        self._closed.set()

    def pause_writing(self) -> None:
        """Hold the server back: the application reads slower."""
        if self._errand is not None:
            self._errand.pause()

    def resume_writing(self) -> None:
        """Let the server go on."""
        if self._errand is not None:
            self._errand.resume()

    # httptools callbacks; what they raise comes out of `feed_data`

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._reset()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._url += url
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; trailer fields are dropped."""
        self._grow(len(name) + len(value))
        if not self._in_body:
            self._headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """Invite the body, if the application waits for that."""
        self._in_body = True
        if (b"expect", b"100-continue") in self._headers and self._errand is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._unseen_bytes = 0
        self._body += piece
        if len(self._body) > MAX_BODY_BYTES:
            raise Refusal(Reason.TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes")

    def on_message_complete(self) -> None:
        """Queue the request."""
        if self._parser.should_upgrade():
            return
        if len(self._queue) >= MAX_QUEUED:
            raise Refusal(Reason.TOO_LARGE, f"more than {MAX_QUEUED} requests are waiting")
        self._is_deaf = not self._parser.should_keep_alive()
        self._queue.append(self._request(self._parser.get_method(), bytes(self._body)))

    def _grow(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise Refusal(Reason.TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def _request(self, method: bytes, body: bytes, refusal: Refusal | None = None) -> Request:
        host = dict(self._headers).get(b"host", b"").decode("latin-1")
        path = ""
        try:
            path = target(self._url, host).path
        except Refusal as error:
            refusal = refusal or error
        plain, _, query = path.partition("?")
        connection = Connection(
            peer=None, client=self._client, method=method.decode("ascii"), path=plain, query=query,
            headers=self._headers, body=body,
        )  # fmt: skip
        speaks_1_1 = self._parser.get_http_version() == "1.1"
        return Request(
            connection=connection, url=self._url, is_last=self._is_deaf, takes_chunks=speaks_1_1, refusal=refusal
        )

    def _reject(self, refusal: Refusal) -> None:
        self._is_deaf = True
        self._queue.append(self._request(self._parser.get_method() if self._url else b"", b"", refusal))

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Read the request afresh without its Upgrade field, which a server may ignore (RFC 9110, 7.8)."""
        method = self._parser.get_method()
        fields = [pair for pair in self._headers if pair[0] != b"upgrade"]
        if method == b"CONNECT" or len(fields) == len(self._headers):
            self._reject(Refusal(Reason.MALFORMED, "a tunnel is not possible here"))
            return
        lines = [b"%b %b HTTP/1.1" % (method, self._url), *(b"%b: %b" % pair for pair in fields)]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    # turns

    def _next(self) -> None:
        if self._errand is not None or self._transport is None:
            return
        if self._queue:
            self._errand = Errand(self, self._queue.popleft())
            self._errand.start()
        elif self._is_deaf or self.egress.serving.draining:
            self._transport.close()
        self._hold_reading(hold=self._errand is not None and len(self._queue) > 0)

    def turn_over(self, *, is_last: bool) -> None:
        """Go on with the next request, or close where the application expects that."""
        self._errand = None
        self._is_deaf = self._is_deaf or is_last
        if is_last:
            self._queue.clear()
        self._next()

    def _hold_reading(self, *, hold: bool) -> None:
        if self._transport is None or self._transport.is_closing() or hold is self._is_paused:
            return
        self._is_paused = hold
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # the way to the server: what `Errand` asks for, and what `Line` tells its pool

    def carry(self, call: Call, route: Route) -> SpiffeId | None:
        """Send *call* on the line that is there, if it still leads to *route*; return who is at its other end."""
        context = self.egress.client.context(route.expected)
        line, server = self._line, self._server
        if line is None or not line.is_open or server is None or self._line_of != (route, context):
            return None
        if server.not_after <= datetime.now(UTC):
            return None
        line.carry(call)
        return server.spiffe_id

    async def dial(self, route: Route) -> SpiffeId:
        """Open the line to *route*; return who is there. Raises CertsError, OSError, TimeoutError."""
        self._drop_line()
        context = self.egress.client.context(route.expected)
        host, port = self.address or (route.host, route.port)
        async with asyncio.timeout(CONNECT_S):
            transport, line = await asyncio.get_running_loop().create_connection(
                lambda: Line(self), host, port, ssl=context
            )
        if self._transport is None:
            transport.abort()
            raise ConnectionAbortedError("the application is gone")
        server = peer_of(transport)
        assert server is not None  # noqa: S101 - the handshake has proven it
        self._line, self._line_of, self._server = line, (route, context), server
        left_s = server.not_after.timestamp() + self.egress.grace_s - time.time()
        self._deadline = asyncio.get_running_loop().call_later(
            max(0.0, left_s), self._cut, "the server's SVID has ended"
        )
        return server.spiffe_id

    @property
    def line(self) -> Line | None:
        """Return the open line."""
        return self._line

    def keep(self, line: Line) -> None:
        """Let *line* wait for the next request."""

    def forget(self, line: Line) -> None:
        """Know that *line* is closed."""
        if self._line is line:
            self._line = None

    def _drop_line(self) -> None:
        line, self._line = self._line, None
        if self._deadline is not None:
            self._deadline.cancel()
        if line is not None:
            line.abort()

    def _cut(self, why: str) -> None:
        self._drop_line()
        if self._errand is not None:
            self._errand.failed(why)

    def recheck(self, held: X509Snapshot | None) -> None:
        """End the line when the server is vouched for no longer, or when we are nobody."""
        if held is None:
            self._cut("the agent's identity has ended")
        elif self._server is not None and self._line is not None:
            try:
                verify_peer(self._server.chain_der, held.bundles, now=datetime.now(UTC), usage=Usage.SERVER)
            except UntrustedChain as error:
                self._cut(f"the server is trusted no longer: {error.reason}")

    # the socket

    def write(self, data: bytes) -> None:
        """Send *data* to the application, if it is still there."""
        if self._transport is not None and data:
            self._transport.write(data)

    def retire(self) -> None:
        """Do nothing: the application's side has no identity that could end."""

    def end_streams(self, why: str) -> None:
        """Do nothing, likewise."""

    def drain(self) -> None:
        """Close as soon as nothing is under way."""
        if self._errand is None and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


class Errand:
    """One request and its answer: the sink of its call. Over once; its exchange is told once."""

    def __init__(self, outgoing: Outgoing, request: Request) -> None:
        self._outgoing = outgoing
        self._egress = outgoing.egress
        self._request = request
        self._exchange = self._egress.serving.begin(request.connection)
        self._call: Call | None = None
        self._is_last = request.is_last
        self._is_chunked = False
        self._sent_head = False
        self._is_over = False

    def start(self) -> None:
        """Send the request on, at once where a line is open, or say why not."""
        try:
            self._go()
        except Refusal as refusal:
            self._refuse(refusal)
        except CertsError as error:
            self._refuse(Refusal(Reason.NOT_READY, "the agent has no identity to call with", detail=str(error)))
        except Exception:
            # The last resort: a defect of ours must be answered, not hang.
            log.exception("sending failed")
            self._refuse(Refusal(Reason.FAULT, "internal error", detail="see the sidecar's log"))

    def _go(self) -> None:
        if self._request.refusal is not None:
            raise self._request.refusal
        exchange, connection = self._exchange, self._request.connection
        asked = target(self._request.url, connection.header(b"host"))
        route = self._egress.route(asked)
        if connection.method == "HEAD":  # the parser of answers would wait for a body
            raise Refusal(Reason.METHOD_NOT_ALLOWED, "MCP uses POST, GET and DELETE", detail=connection.method)
        exchange.outbound = Outbound(host=route.host, port=route.port, expected=str(route.expected))
        self._describe()
        headers = outgoing(
            connection.headers,
            authority=asked.authority,
            agent_session=exchange.agent.session or "",
            traceparent=self._egress.serving.context(exchange),
        )
        lines = [
            f"{connection.method} {asked.path} HTTP/1.1".encode("latin-1"),
            *(b"%b: %b" % pair for pair in headers),
        ]
        if connection.body or connection.method in ("POST", "PUT", "PATCH"):
            lines.append(b"content-length: %d" % len(connection.body))
        self._call = Call(self, b"\r\n".join([*lines, b"", connection.body]))
        exchange.judged_s = exchange.sent_s = self._egress.serving.clock() - exchange.clock_s
        self._egress.serving.announce((exchange,))
        exchange.outbound.server = self._outgoing.carry(self._call, route)
        if exchange.outbound.server is None:
            self._egress.spawn(self._dial(self._call, route, exchange.outbound))

    def _describe(self) -> None:
        """Note who calls and what: unread, a message still goes on; the server's sidecar judges it."""
        exchange, connection = self._exchange, self._request.connection
        exchange.principal = Principal(workload=self._egress.own_id(), user=None, expires_at_s=float("inf"))
        exchange.session_id = connection.header(SESSION)
        exchange.protocol_version = connection.header(VERSION)
        said = connection.header(AGENT_SESSION)
        session = self._egress.sessions.of(
            None if said is None else said[:MAX_LABEL_CHARS], exchange.session_id, self._outgoing.agent_session
        )
        exchange.message = _message(connection, exchange.protocol_version)
        info = exchange.message.params.get("clientInfo") if exchange.message is not None else None
        client = info if isinstance(info, dict) else {}
        exchange.agent = Agent(
            session=session, client_name=_label(client.get("name")), client_version=_label(client.get("version"))
        )

    async def _dial(self, call: Call, route: Route, outbound: Outbound) -> None:
        try:
            server = await self._outgoing.dial(route)
        except (CertsError, OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self.failed(f"connect to {route.host}:{route.port}: {str(error) or 'timed out'}")
            return
        line = self._outgoing.line
        if call.abandoned or line is None:
            return
        outbound.server = server
        line.carry(call)

    def pause(self) -> None:
        """Hold the answer back."""
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        """Let the answer go on."""
        if self._call is not None:
            self._call.resume()

    def abandon(self, why: str) -> None:
        """End without an answer: nobody is there to read it."""
        if self._is_over:
            return
        if self._call is not None:
            self._call.abort()
        self._exchange.aborted = why
        self._record()

    # Sink

    def begin(self, status: int, reason: bytes, headers: Headers) -> None:
        """Pass the head on."""
        exchange = self._exchange
        exchange.upstream_s = self._egress.serving.clock() - exchange.clock_s
        exchange.status = status
        values = dict(headers)
        session = values.get(SESSION)
        if session is not None and exchange.message is not None and exchange.message.method == "initialize":
            exchange.session_id = session.decode("latin-1")
            self._egress.sessions.remember(exchange.session_id, exchange.agent.session or "")
        fields = incoming(headers)
        if status not in (204, 304):
            length = values.get(b"content-length")
            self._is_chunked = length is None and self._request.takes_chunks
            self._is_last = self._is_last or (length is None and not self._is_chunked)
            fields.append((b"transfer-encoding", b"chunked") if length is None else (b"content-length", length))
            if length is None and not self._is_chunked:
                fields.pop()
        self._send_head(status, reason, fields)

    def feed(self, piece: bytes) -> None:
        """Pass a piece on."""
        self._exchange.result_bytes += len(piece)
        self._outgoing.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece)

    def complete(self) -> None:
        """Finish the answer."""
        self._record()
        self._outgoing.write(b"0\r\n\r\n" if self._is_chunked else b"")
        self._outgoing.turn_over(is_last=self._closes)

    def failed(self, detail: str) -> None:
        """Answer for a server that was not there, or not the one that was asked for."""
        if self._is_over:
            return
        if not self._sent_head:
            self._refuse(
                Refusal(Reason.UPSTREAM, "the MCP server cannot be reached as whom the profile demands", detail=detail)
            )
            return
        self._exchange.aborted = detail
        self._record()
        self._outgoing.abort()

    # endings

    def _refuse(self, refusal: Refusal) -> None:
        if self._call is not None:
            self._call.abandoned = True
        self._exchange.refusal = refusal
        response = answer(refusal, self._exchange.message)
        self._exchange.status = response.status
        self._is_last = self._is_last or response.status in (400, 413)
        self._record()
        self._send_head(response.status, b"", [*response.headers, (b"content-length", b"%d" % len(response.body))])
        self._outgoing.write(response.body)
        self._outgoing.turn_over(is_last=self._closes)

    def _record(self) -> None:
        self._is_over = True
        exchange = self._exchange
        exchange.total_s = self._egress.serving.clock() - exchange.clock_s
        self._egress.serving.observe(exchange)
        self._call = None  # it holds this errand: a circle would keep every message until the collector comes

    @property
    def _closes(self) -> bool:
        return self._is_last or self._egress.serving.draining

    def _send_head(self, status: int, reason: bytes, headers: Headers) -> None:
        self._sent_head = True
        phrase = reason or next((each.phrase for each in HTTPStatus if each == status), "Unknown").encode("ascii")
        lines = [b"HTTP/1.1 %d %b" % (status, phrase), *(b"%b: %b" % pair for pair in headers)]
        if self._closes:
            lines.append(b"connection: close")
        self._outgoing.write(b"\r\n".join([*lines, b"", b""]))


def _message(connection: Connection, version: str | None) -> Message | None:
    """Return the message that is sent, for the record; None when it is none, or several."""
    match connection.method:
        case "GET":
            return Message(shape=Shape.OPEN_STREAM, method=Shape.OPEN_STREAM.value, params={})
        case "DELETE":
            return Message(shape=Shape.CLOSE_SESSION, method=Shape.CLOSE_SESSION.value, params={})
    try:
        return parse(connection.body, version)
    except Refusal:
        return None


def _label(value: object) -> str | None:
    return value[:MAX_LABEL_CHARS] if isinstance(value, str) and value else None
