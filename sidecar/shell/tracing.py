"""Makes the spans of each message, and says under which of them the server's own spans hang.

Two for a message that was sent: SERVER toward the client, CLIENT toward the server, its child; one for a message that
was refused, and one (CLIENT) in agent role. Names follow OpenTelemetry's semantic conventions for MCP (status
Development, 2026); sidecar/core/spans.py is their table. Content is on spans only where the profile opts in, and
redacted as in the audit trail. Written as text, of parts that most calls share: 3 us where the SDK takes 57 for one.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from certs.spiffe import SpiffeId
from sidecar.core.message import Ask, Message, Prompt, Resource, Tool
from sidecar.core.otel import Sampler
from sidecar.core.profile import Profile, Telemetry
from sidecar.core.redaction import encode
from sidecar.core.trace import sent_id
from sidecar.core.trace import traceparent as written
from sidecar.errors import Reason
from sidecar.exchange import Exchange
from sidecar.record import ABORTED, TOOL_ERROR, answer, arguments_of, cut, error_type
from sidecar.shell.otlp import Receiver, attribute, text_of

MAX_VALUE_CHARS: Final = 2**20  # of an attribute: what `audit.max_bytes` allows at most
SHORT_CHARS: Final = 256  # of what is kept for the next span
SERVER: Final = 2  # opentelemetry.proto.trace.v1.Span.SpanKind
CLIENT: Final = 3
_ERROR: Final = '{"code":2}'  # opentelemetry.proto.trace.v1.Status.StatusCode
_UNSET: Final = "{}"
_OURS: Final = (Reason.UPSTREAM, Reason.FAULT, Reason.NOT_READY, Reason.PROVIDER)  # no fault of the caller's

# As OpenTelemetry's SDK draws them: they tell spans apart, and keep no secret.
_draw: Final = random.Random().getrandbits  # noqa: S311 - see above


def new_trace_id() -> str:
    """Return a random trace id."""
    return f"{_draw(128) or 1:032x}"


def new_span_id() -> str:
    """Return a random span id; its sister, `sent_id`, is never zero either."""
    return f"{_draw(64) | 2:016x}"


def traceparent(exchange: Exchange) -> bytes:
    """Return the header by which the other side's spans become children of the exchange's first span."""
    return written(exchange.trace_id, exchange.span_id, sampled=exchange.sampled)


class Tracing:
    """Gives *receiver* the spans that *sampler* wants, and those of every refusal. Mutated by `use`."""

    def __init__(self, receiver: Receiver, *, sampler: Sampler, host: str) -> None:
        """*host* is the server's address as the sidecar calls it."""
        self._receiver = receiver
        self._default = sampler
        self._sampler = sampler
        self._host = host

    def use(self, telemetry: Telemetry) -> None:
        """Sample as the profile says from now on."""
        ratio = telemetry.sample_ratio
        self._sampler = self._default if ratio is None else Sampler(ratio=ratio)

    def samples(self, exchange: Exchange) -> bool:
        """Say whether the trace of *exchange* is recorded."""
        return self._sampler.samples(
            exchange.trace_id, has_parent=exchange.parent_id is not None, parent_sampled=exchange.sampled
        )

    def names(self, exchange: Exchange) -> bool:
        """Say whether there is a span of *exchange*."""
        return self._receiver.is_on and (exchange.refusal is not None or self.samples(exchange))

    def context(self, exchange: Exchange) -> bytes:
        """Return the `traceparent` for the server; without a receiver it is the caller's, and empty where there is none."""
        if self._receiver.is_on:
            span_id = exchange.span_id if exchange.outbound is not None else sent_id(exchange.span_id)
            return written(exchange.trace_id, span_id, sampled=self.samples(exchange))
        if exchange.parent_id is not None:
            return written(exchange.trace_id, exchange.parent_id, sampled=exchange.sampled)
        # Ours would say to the server which of its traces it may record; an agent's call needs it to be found again.
        return b"" if exchange.outbound is None else traceparent(exchange)

    def observe(self, exchange: Exchange) -> None:
        """Queue the spans of *exchange*; a connection of the server's own is no message, and has none."""
        profile, outbound = exchange.profile, exchange.outbound
        if outbound is not None and not outbound.expected:
            return
        if profile is not None and self.names(exchange):
            count, items = spans(exchange, profile, self._host)
            self._receiver.put(items, count)


def spans(exchange: Exchange, profile: Profile, host: str) -> tuple[int, bytes]:
    """Return how many spans *exchange* has, and them in OTLP's JSON with commas between; the server is at *host*."""
    message, outbound, was_sent = exchange.message, exchange.outbound, exchange.was_sent
    name, said = ('"unreadable"', "") if message is None else _said(exchange, message)
    error, code = error_type(exchange), exchange.error_code
    began_ns = exchange.started_ns
    ended_ns = began_ns + int(exchange.total_s * 1e9)
    is_asked = message is not None and isinstance(message.target, Ask)  # by the server, of the client
    described = said + _outcome(error, code, "allowed" if was_sent else "refused") + _caller(exchange)
    if not is_asked:
        described += _client(exchange.connection.client)
    if outbound is not None:
        described += _destination(outbound.host, outbound.port, outbound.server)
    if message is not None and profile.telemetry.content:
        described += _content(exchange, message, profile)
    parent = exchange.parent_id
    first = (
        f'{{"traceId":"{exchange.trace_id}","spanId":"{exchange.span_id}",'
        f"{'' if parent is None else _PARENT % parent}"
        f'"name":{name},"kind":{SERVER if outbound is None else CLIENT},'
        f'"startTimeUnixNano":"{began_ns}","endTimeUnixNano":"{ended_ns}","attributes":[{described[1:]}],'
        f'{"" if exchange.link is None else _link(exchange)}"status":{_ERROR if _is_error(exchange) else _UNSET}}}'
    )
    if outbound is not None or not was_sent or is_asked:
        return 1, first.encode()
    error, server = _of_server(exchange, error), profile.server
    sent_ns = began_ns + int((exchange.judged_s if exchange.sent_s is None else exchange.sent_s) * 1e9)
    described = said + _outcome(error, code, None) + _server(host, server.port, server.transport)
    second = (
        f',{{"traceId":"{exchange.trace_id}","spanId":"{sent_id(exchange.span_id)}","parentSpanId":"{exchange.span_id}",'
        f'"name":{name},"kind":{CLIENT},"startTimeUnixNano":"{sent_ns}","endTimeUnixNano":"{ended_ns}",'
        f'"attributes":[{described[1:]}],"status":{_ERROR if error else _UNSET}}}'
    )
    return 2, (first + second).encode()


_PARENT: Final = '"parentSpanId":"%s",'


def _said(exchange: Exchange, message: Message) -> tuple[str, str]:
    """Return the span's name as JSON, and what the message says of itself: the same on both sides.

    Attributes are text here, each with a comma in front.
    """
    match message.target:
        case Tool(name=label):
            kind = "tool"
        case Prompt(name=label):
            kind = "prompt"
        case Resource(uri=label):
            kind = "resource"
        case _:
            kind = label = ""
    describe = _described if len(label) <= SHORT_CHARS else _described.__wrapped__
    version, session_id = (exchange.protocol_version or "")[:SHORT_CHARS], (exchange.session_id or "")[:SHORT_CHARS]
    name, described = describe(message.method, kind, label, version, session_id)
    request_id = message.id
    if request_id is None:
        return name, described
    if isinstance(request_id, int):
        return name, f'{described},{{"key":"jsonrpc.request.id","value":{{"stringValue":"{request_id}"}}}}'
    return name, described + _joined([("jsonrpc.request.id", request_id[:SHORT_CHARS])])


@lru_cache(maxsize=1024)
def _described(method: str, kind: str, label: str, version: str, session_id: str) -> tuple[str, str]:
    """Return the name, `{method} {tool or prompt}`, and attributes; a URI is no name, each would be one of its own."""
    found = [("mcp.method.name", method)]
    short = cut(label) or ""
    if kind == "tool":
        found += [("gen_ai.operation.name", "execute_tool"), ("gen_ai.tool.name", short)]
    elif kind == "prompt":
        found.append(("gen_ai.prompt.name", short))
    elif kind == "resource":
        found.append(("mcp.resource.uri", short))
    found += [
        (key, value) for key, value in (("mcp.protocol.version", version), ("mcp.session.id", session_id)) if value
    ]
    name = f"{method} {short}" if kind in ("tool", "prompt") else method
    return encode(name).decode(), _joined(found)


def _caller(exchange: Exchange) -> str:
    agent, principal = exchange.agent, exchange.principal
    user = None if principal is None else principal.user
    workload = "" if principal is None else text_of(principal.workload)
    if user is None:
        return _who(exchange.revision, agent.session, agent.client_name, workload, "", "")
    tell = _who if len(user.id) <= SHORT_CHARS else _who.__wrapped__
    return tell(exchange.revision, agent.session, agent.client_name, workload, user.id, user.issuer)


@lru_cache(maxsize=512)
def _who(revision: str, session: str | None, client_name: str | None, workload: str, user: str, issuer: str) -> str:
    found = (
        ("sidegate.policy.revision", revision),
        ("sidegate.agent.session", session),
        ("sidegate.agent.client_name", client_name),
        ("sidegate.workload.spiffe_id", workload),
        ("sidegate.user.id", user),
        ("sidegate.user.issuer", issuer),
    )
    return _joined([(key, value) for key, value in found if value])


@lru_cache(maxsize=512)
def _client(client: str) -> str:
    address, _, port = client.rpartition(":")
    found: list[tuple[str, str | int]] = [("network.transport", "tcp"), ("network.protocol.name", "http")]
    if address:
        found += [("client.address", address.strip("[]")), ("client.port", int(port) if port.isdecimal() else port)]
    return _joined(found)


@lru_cache(maxsize=16)
def _server(host: str, port: int, transport: str) -> str:
    if transport == "stdio":
        return _joined([("network.transport", "pipe")])
    return _joined(
        [
            ("network.transport", "tcp"),
            ("network.protocol.name", "http"),
            ("server.address", host),
            ("server.port", port),
        ]
    )


@lru_cache(maxsize=512)
def _destination(host: str, port: int, server: SpiffeId | None) -> str:
    found: list[tuple[str, str | int]] = [("server.address", cut(host) or ""), ("server.port", port)]
    if server is not None:
        found.append(("sidegate.peer.spiffe_id", str(server)))
    return _joined(found)


@lru_cache(maxsize=512)
def _outcome(error: str, code: int | None, decision: str | None) -> str:
    found = (
        ("sidegate.decision", decision),
        ("error.type", error),
        ("rpc.response.status_code", None if code is None else str(code)),
    )
    return _joined([(key, value) for key, value in found if value])


def _joined(found: Sequence[tuple[str, str | int]]) -> str:
    return "".join("," + attribute(key, value).decode() for key, value in found)


def _content(exchange: Exchange, message: Message, profile: Profile) -> str:
    """Return arguments and result, redacted and cut as in the audit trail: opt-in, since many read a collector."""
    audit, target = profile.audit, message.target
    if not isinstance(target, Tool):
        return ""
    arguments = arguments_of(exchange, target, audit).cut(audit.max_bytes)[:MAX_VALUE_CHARS]
    found = [("gen_ai.tool.call.arguments", arguments)]
    result = answer(exchange, audit)
    if result is not None:
        found.append(("gen_ai.tool.call.result", result.cut(audit.max_bytes)[:MAX_VALUE_CHARS]))
    return _joined(found)


def _link(exchange: Exchange) -> str:
    """Return the link to the span that brought the HTTP request, where the message has a parent of its own."""
    link = exchange.link
    return "" if link is None else f'"links":[{{"traceId":"{link.trace_id}","spanId":"{link.parent_id}"}}],'


def _is_error(exchange: Exchange) -> bool:
    """Say whether the SERVER span failed; what the caller did wrong is no error of the server (conventions, status)."""
    if exchange.refusal is not None:
        return exchange.refusal.reason in _OURS
    code = exchange.error_code
    return exchange.tool_failed or code == -32603 or (code is not None and -32099 <= code <= -32000)


def _of_server(exchange: Exchange, error: str) -> str:
    """Return `error.type` of the CLIENT span: how the server failed; empty where it did not."""
    if exchange.refusal is None or exchange.refusal.reason is Reason.UPSTREAM:
        return error
    if exchange.error_code is not None:  # answered, and we refused the answer
        return str(exchange.error_code)
    if exchange.tool_failed:
        return TOOL_ERROR
    return "" if exchange.aborted is None else ABORTED
