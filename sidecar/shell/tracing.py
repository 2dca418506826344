"""Gives each message a span in the caller's trace, and posts the spans to an OTLP/HTTP receiver as JSON.

Names follow OpenTelemetry's semantic conventions for MCP (status Development, 2026). Content is on spans only where the
profile opts in, and redacted as in the audit trail. Nothing here slows or fails a call: the queue is bounded, what does
not fit or cannot be delivered is dropped and counted. Built by hand: 4 us a span where the SDK takes 57.
"""

import asyncio
import logging
import os
import random
from collections import deque
from functools import lru_cache
from typing import Any, Final

import aiohttp
import orjson

from sidecar.core.message import Message, Prompt, Resource, Tool
from sidecar.core.profile import Profile
from sidecar.core.redaction import encode, redact
from sidecar.errors import Reason
from sidecar.exchange import Exchange, Outbound
from sidecar.record import TOOL_ERROR, answer, cut, error_type

log = logging.getLogger(__name__)

MAX_QUEUED: Final = 2048  # spans, as OpenTelemetry's batch processor
MAX_QUEUED_BYTES: Final = 4 * 2**20  # content can make a span large
MAX_VALUE_CHARS: Final = 2**20  # of an attribute: what `audit.max_bytes` allows at most
SHORT_CHARS: Final = 256  # of an attribute that is kept for the next span: 1,024 of them are 1 MB at most
MAX_BATCH: Final = 512  # spans, as OpenTelemetry's batch processor
LINGER_S: Final = 1.0  # from a first span to its batch
POST_S: Final = 10.0  # deadline of one POST, as OTEL_EXPORTER_OTLP_TIMEOUT
FLUSH_S: Final = 2.0  # deadline of the last one, on shutdown
ATTEMPTS: Final = 5
BACKOFF_S: Final = (0.5, 8.0)  # first and longest pause, before jitter
RETRIED: Final = frozenset({None, 429, 502, 503, 504})  # OTLP/HTTP, retryable response codes; None: no response
_SERVER_KIND: Final = 2  # opentelemetry.proto.trace.v1.Span.SpanKind
_CLIENT_KIND: Final = 3
_ERROR: Final = 2  # opentelemetry.proto.trace.v1.Status.StatusCode


def new_trace_id() -> str:
    """Return a random trace id."""
    return os.urandom(16).hex()


def new_span_id() -> str:
    """Return a random span id."""
    return os.urandom(8).hex()


def traceparent(exchange: Exchange) -> bytes:
    """Return the header by which the server's spans become children of ours."""
    return f"00-{exchange.trace_id}-{exchange.span_id}-{'01' if exchange.sampled else '00'}".encode()


class Tracing:
    """Mutated by `observe`, `use_endpoint` and the exporter, all on the loop.

    Attributes:
        dropped: spans that no receiver got.
        exported: spans that a receiver took.
    """

    def __init__(self, session: aiohttp.ClientSession, *, endpoint: str) -> None:
        self._session = session
        self._default = endpoint
        self._endpoint = endpoint
        self._queue: deque[tuple[Profile, bytes]] = deque()
        self._queued_bytes = 0
        self._filled = asyncio.Event()
        self.dropped = 0
        self.exported = 0

    def use_endpoint(self, endpoint: str | None) -> None:
        """Send to *endpoint* (a base URL) from now on; None: to the one of the settings."""
        self._endpoint = endpoint or self._default

    def observe(self, exchange: Exchange) -> None:
        """Queue the span of *exchange*; of refusals always, of others as the caller's trace is sampled."""
        profile = exchange.profile
        if profile is None or not (exchange.sampled or exchange.refusal):
            return
        data = encode(span(exchange, profile))
        if not self._endpoint or len(self._queue) >= MAX_QUEUED or self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            self.dropped += 1
            return
        self._queue.append((profile, data))
        self._queued_bytes += len(data)
        self._filled.set()

    async def run(self) -> None:
        """Post spans as they come; never returns."""
        while True:
            await self._filled.wait()
            await asyncio.sleep(LINGER_S)
            self._filled.clear()
            while self._queue:
                await self._post_batch(ATTEMPTS)

    async def flush(self) -> None:
        """Post what is queued, once and without patience; what is left then is dropped."""
        try:
            async with asyncio.timeout(FLUSH_S):
                while self._queue:
                    await self._post_batch(attempts=1)
        except TimeoutError:
            while self._queue:
                self.dropped += self._batch()[0]

    async def _post_batch(self, attempts: int) -> None:
        """Post the head of the queue until it is taken, refused for good, or tried often enough."""
        count, body = self._batch()
        delivered = False
        try:
            delivered = await self._deliver(body, attempts)
        finally:  # cancelled on shutdown: these spans are gone as well
            if delivered:
                self.exported += count
            else:
                self.dropped += count

    async def _deliver(self, body: bytes, attempts: int) -> bool:
        pause_s, longest_s = BACKOFF_S
        status: int | None = None
        for attempt in range(1, attempts + 1):
            status = await self._post(body)
            if status is not None and status < 300:
                return True
            if attempt == attempts or status not in RETRIED:
                break
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311 - jitter, no secret
            pause_s = min(longest_s, 2 * pause_s)
        log.warning("spans dropped", extra={"endpoint": self._endpoint, "status": status})
        return False

    async def _post(self, body: bytes) -> int | None:
        """Return the receiver's HTTP status; None when it gave none."""
        url = f"{self._endpoint.rstrip('/')}/v1/traces"
        try:
            async with (
                asyncio.timeout(POST_S),
                self._session.post(
                    url, data=body, headers={"content-type": "application/json"}, allow_redirects=False
                ) as response,
            ):
                return response.status
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:  # ValueError: no URL
            log.debug("spans not posted", extra={"endpoint": url, "error": str(error)})
            return None

    def _batch(self) -> tuple[int, bytes]:
        """Take the spans at the queue's head that share a profile; return their number and their OTLP request."""
        profile = self._queue[0][0]
        spans: list[orjson.Fragment] = []
        while self._queue and self._queue[0][0] is profile and len(spans) < MAX_BATCH:
            data = self._queue.popleft()[1]
            self._queued_bytes -= len(data)
            spans.append(orjson.Fragment(data))
        scope = {"scope": {"name": "sidegate"}, "spans": spans}
        resource = {"attributes": _pairs(_resource(profile))}
        return len(spans), orjson.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]})


def span(exchange: Exchange, profile: Profile) -> dict[str, Any]:
    """Return the span of *exchange* in OTLP's JSON."""
    document: dict[str, Any] = {
        "traceId": exchange.trace_id,
        "spanId": exchange.span_id,
        "name": _name(exchange),
        "kind": _SERVER_KIND if exchange.outbound is None else _CLIENT_KIND,
        "startTimeUnixNano": str(exchange.started_ns),
        "endTimeUnixNano": str(exchange.started_ns + int(exchange.total_s * 1e9)),
        "attributes": _pairs(
            _attributes(exchange) | (_content(exchange, profile) if profile.telemetry.content else {})
        ),
        "status": {"code": _ERROR} if _is_error(exchange) else {},
    }
    if exchange.parent_id is not None:
        document["parentSpanId"] = exchange.parent_id
    return document


def _name(exchange: Exchange) -> str:
    """Return `{method} {tool or prompt}`; never a URI, which would be a name of its own for each resource."""
    message = exchange.message
    if message is None:
        return "unreadable"
    target = message.target
    return f"{message.method} {cut(target.name)}" if isinstance(target, Tool | Prompt) else message.method


def _attributes(exchange: Exchange) -> dict[str, str | None]:
    message, principal, agent = exchange.message, exchange.principal, exchange.agent
    user = None if principal is None else principal.user
    address, _, port = exchange.connection.client.rpartition(":")
    return {
        "mcp.session.id": exchange.session_id,
        "mcp.protocol.version": exchange.protocol_version,
        "network.transport": "tcp",
        "client.address": address.strip("[]") or None,
        "client.port": port or None,
        "error.type": error_type(exchange) or None,
        "rpc.response.status_code": None if exchange.error_code is None else str(exchange.error_code),
        "sidegate.decision": "allowed" if exchange.was_sent else "refused",
        "sidegate.policy.revision": exchange.revision or None,
        "sidegate.agent.session": agent.session,
        "sidegate.agent.client_name": agent.client_name,
        "sidegate.workload.spiffe_id": None if principal is None else str(principal.workload or "") or None,
        "sidegate.user.id": None if user is None else user.id,
        "sidegate.user.issuer": None if user is None else user.issuer,
        **({} if message is None else _described(message)),
        **({} if exchange.outbound is None else _destination(exchange.outbound)),
    }


def _destination(outbound: Outbound) -> dict[str, str | None]:
    return {
        "server.address": cut(outbound.host),
        "server.port": str(outbound.port),
        "sidegate.peer.spiffe_id": None if outbound.server is None else str(outbound.server),
    }


def _described(message: Message) -> dict[str, str | None]:
    described: dict[str, str | None] = {
        "mcp.method.name": message.method,
        "jsonrpc.request.id": None if message.id is None else str(message.id),
    }
    match message.target:
        case Tool(name=name):
            described |= {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": cut(name)}
        case Prompt(name=name):
            described["gen_ai.prompt.name"] = cut(name)
        case Resource(uri=uri):
            described["mcp.resource.uri"] = cut(uri)
    return described


def _content(exchange: Exchange, profile: Profile) -> dict[str, str | None]:
    """Return arguments and result, redacted and cut as in the audit trail: opt-in, since many read a collector."""
    message, audit = exchange.message, profile.audit
    if message is None or not isinstance(message.target, Tool):
        return {}
    result = answer(exchange, audit)
    return {
        "gen_ai.tool.call.arguments": redact(message.target.arguments, audit.redact).cut(audit.max_bytes),
        "gen_ai.tool.call.result": None if result is None else result.cut(audit.max_bytes),
    }


def _is_error(exchange: Exchange) -> bool:
    """Return whether the span failed; what the caller did wrong is no error of the server (conventions, span status)."""
    if exchange.refusal is not None:
        return exchange.refusal.reason in (Reason.UPSTREAM, Reason.FAULT, Reason.NOT_READY)
    code = exchange.error_code
    return error_type(exchange) == TOOL_ERROR or code == -32603 or (code is not None and -32099 <= code <= -32000)


def _resource(profile: Profile) -> dict[str, str | None]:
    server = profile.server
    return {
        "service.name": server.name,
        "service.namespace": server.namespace,
        "service.version": server.version or None,
        "k8s.namespace.name": server.namespace,
        "sidegate.server.workload": server.workload,
    }


def _pairs(attributes: dict[str, str | None]) -> list[dict[str, Any]]:
    """Return OTLP's KeyValues; what is None is left out."""
    return [
        _short_pair(key, value) if len(value) <= SHORT_CHARS else _pair(key, value)
        for key, value in attributes.items()
        if value is not None
    ]


def _pair(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"intValue" if key in _INTEGERS else "stringValue": value[:MAX_VALUE_CHARS]}}


_short_pair: Final = lru_cache(maxsize=1024)(_pair)  # most are the same in every call of a session; nobody changes them


_INTEGERS: Final = frozenset({"client.port", "server.port"})  # protobuf's JSON writes 64-bit integers as strings
