"""Posts telemetry to an OTLP/HTTP receiver as JSON: a bounded queue for each signal, batches, retries.

Nothing here slows or fails a call: what does not fit or cannot be delivered is dropped and counted. Source: OTLP 1.x,
OTLP/HTTP (JSON encoding, retryable response codes, partial success).
"""

import asyncio
import gzip
import logging
import random
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, Protocol

import aiohttp
import orjson

from sidecar import __version__
from sidecar.core.otel import Batching, Otel, Otlp, Signal
from sidecar.core.profile import Server
from sidecar.core.redaction import encode
from sidecar.errors import ConfigError

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES: Final = 4 * 2**20  # content can make a span large
MAX_TEXTS: Final = 4096  # as many connections as a sidecar has at a time, and more
MAX_ANSWER_BYTES: Final = 64 * 1024
FLUSH_S: Final = 2.0  # deadline of the last request, on shutdown
ATTEMPTS: Final = 5
BACKOFF_S: Final = (0.5, 8.0)  # first and longest pause, before jitter
RETRIED: Final = frozenset({None, 429, 502, 503, 504})  # retryable response codes; None: no response
GZIP_LEVEL: Final = 1  # on a thread, and a third of the CPU of the usual 6 for a tenth more bytes

# The three messages around the items: resource, scope, item.
ENVELOPES: Final[Mapping[Signal, tuple[bytes, bytes, bytes]]] = {
    "traces": (b"resourceSpans", b"scopeSpans", b"spans"),
    "metrics": (b"resourceMetrics", b"scopeMetrics", b"metrics"),
    "logs": (b"resourceLogs", b"scopeLogs", b"logRecords"),
}
_SCOPE: Final = encode({"name": "sidegate", "version": __version__})


_texts: Final[dict[int, tuple[object, str]]] = {}  # by identity, which lasts as long as the object that is kept here


def text_of(workload: object) -> str:
    """Return str(*workload*), "" of None; a connection's is one object, and to hash it costs as much as half a span."""
    held = _texts.get(id(workload))
    if held is not None and held[0] is workload:
        return held[1]
    if len(_texts) >= MAX_TEXTS:
        _texts.clear()
    text = "" if workload is None else str(workload)
    _texts[id(workload)] = workload, text
    return text


def attribute(key: str, value: str | int) -> bytes:
    """Return OTLP's KeyValue; protobuf's JSON writes 64-bit integers as strings."""
    kind = "stringValue" if isinstance(value, str) else "intValue"
    return encode({"key": key, "value": {kind: value if isinstance(value, str) else str(value)}})


def resource(server: Server | None, otel: Otel, pod: str) -> bytes:
    """Return the resource that telemetry comes from: the server here, or in agent role the agent; the operator's word first."""
    own: dict[str, str] = {"telemetry.sdk.name": "sidegate", "telemetry.sdk.language": "python"}
    own |= {"telemetry.sdk.version": __version__, "service.name": "unknown_service:sidegate"}
    if server is not None:
        own |= {"service.name": server.name, "service.namespace": server.namespace, "service.version": server.version}
        own |= {"k8s.namespace.name": server.namespace, "sidegate.server.workload": server.workload}
    own |= {"service.instance.id": pod, "k8s.pod.name": pod} | dict(otel.resource)
    if otel.service_name:
        own["service.name"] = otel.service_name
    return b'{"attributes":[%b]}' % b",".join(attribute(key, value) for key, value in own.items() if value)


class Receiver(Protocol):
    """Where items of one signal go."""

    is_on: bool

    def put(self, items: bytes, count: int = 1) -> None:
        """Queue *count* items, OTLP's JSON with commas between them."""
        ...


class Exporter:
    """One signal's way to its receiver. Mutated by `put`, `use` and its own tasks, all on the loop; raises ConfigError.

    Attributes:
        is_on: whether there is a receiver.
        dropped: items that no receiver took.
        exported: items that a receiver took.
    """

    def __init__(
        self, session: aiohttp.ClientSession, signal: Signal, otel: Otel, *, endpoint: str = "", pod: str = ""
    ) -> None:
        """*endpoint* is the base URL where the `OTEL_*` variables and the profile name none."""
        self._session = session
        self._signal = signal
        self._otel = otel
        self._pod = pod
        self._otlp: Otlp = otel.otlp[signal]
        self._batching: Batching = otel.logs if signal == "logs" else otel.spans
        self._own_url = self._otlp.url or _url(endpoint, signal)
        self._tls = _tls(self._otlp)
        self._queue: deque[tuple[bytes, int, bytes]] = deque()  # resource, number of items, items
        self._queued = 0
        self._queued_bytes = 0
        self._filled = asyncio.Event()
        self.dropped = 0
        self.exported = 0
        self.use(None, None)

    def use(self, server: Server | None, endpoint: str | None) -> None:
        """From now on send what comes from *server* to *endpoint*, a base URL; None: to our own receiver."""
        self._resource = resource(server, self._otel, self._pod)
        self._url = _url(endpoint, self._signal) if endpoint else self._own_url
        # A profile's author must not learn the operator's credentials by naming a receiver of his own.
        self._headers = dict(self._otlp.headers) if self._url == self._own_url else {}
        self.is_on = bool(self._url) and self._signal in self._otel.exported

    def put(self, items: bytes, count: int = 1) -> None:
        """Queue *count* items, OTLP's JSON with commas between them; drop them when the queue is full."""
        if (
            not self.is_on
            or self._queued + count > self._batching.queue
            or self._queued_bytes + len(items) > MAX_QUEUED_BYTES
        ):
            self.dropped += count
            return
        self._queue.append((self._resource, count, items))
        self._queued += count
        self._queued_bytes += len(items)
        if not self._filled.is_set():
            self._filled.set()

    async def run(self) -> None:
        """Post items as they come; never returns."""
        while True:
            await self._filled.wait()
            await asyncio.sleep(self._batching.delay_s)
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

    async def post(self, items: bytes, count: int, attempts: int = 1) -> None:
        """Post *items* at once, ahead of the queue."""
        await self._deliver(self._envelope(self._resource, [items]), count, attempts)

    async def _post_batch(self, attempts: int) -> None:
        count, body = self._batch()
        await self._deliver(body, count, attempts)

    async def _deliver(self, body: bytes, count: int, attempts: int) -> None:
        """Post *body* until it is taken, refused for good, or tried often enough."""
        taken = 0
        try:
            taken = await self._taken(body, count, attempts)
        finally:  # cancelled on shutdown: these items are gone as well
            self.exported += taken
            self.dropped += count - taken

    async def _taken(self, body: bytes, count: int, attempts: int) -> int:
        """Return how many of the *count* items in *body* the receiver took."""
        if self._otlp.gzip:
            body = await asyncio.to_thread(gzip.compress, body, GZIP_LEVEL)
        pause_s, longest_s = BACKOFF_S
        status: int | None = None
        for attempt in range(1, attempts + 1):
            status, wait_s, rejected = await self._post(body)
            if status is not None and 200 <= status < 300:
                return max(0, count - rejected)
            if attempt == attempts or status not in RETRIED:
                break
            await asyncio.sleep(max(wait_s, random.uniform(0.5, 1.0) * pause_s))  # noqa: S311 - jitter, no secret
            pause_s = min(longest_s, 2 * pause_s)
        log.warning("telemetry dropped", extra={"signal": self._signal, "endpoint": self._url, "status": status})
        return 0

    async def _post(self, body: bytes) -> tuple[int | None, float, int]:
        """Return the receiver's HTTP status (None: it gave none), seconds to wait, and how many items it rejected."""
        headers = {**self._headers, "content-type": "application/json"}
        if self._otlp.gzip:
            headers["content-encoding"] = "gzip"
        try:
            async with (
                asyncio.timeout(self._otlp.timeout_s),
                self._session.post(
                    self._url, data=body, headers=headers, allow_redirects=False, ssl=self._tls
                ) as response,
            ):
                said = await response.content.read(MAX_ANSWER_BYTES)
                return response.status, asked_wait_s(response.headers.get("retry-after")), _rejected(said)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:  # ValueError: no URL
            log.debug("telemetry not posted", extra={"endpoint": self._url, "error": str(error)})
            return None, 0.0, 0

    def _batch(self) -> tuple[int, bytes]:
        """Take the items at the queue's head that share a resource; return their number and their OTLP request."""
        origin = self._queue[0][0]
        parts: list[bytes] = []
        total = 0
        while (
            self._queue
            and self._queue[0][0] is origin
            and (not total or total + self._queue[0][1] <= self._batching.batch)
        ):
            _, count, items = self._queue.popleft()
            self._queued -= count
            self._queued_bytes -= len(items)
            total += count
            parts.append(items)
        return total, self._envelope(origin, parts)

    def _envelope(self, origin: bytes, parts: list[bytes]) -> bytes:
        outer, scope, inner = ENVELOPES[self._signal]
        head = b'{"%b":[{"resource":%b,"%b":[{"scope":%b,"%b":[' % (outer, origin, scope, _SCOPE, inner)
        return head + b",".join(parts) + b"]}]}]}"


def _url(base: str, signal: Signal) -> str:
    return f"{base.rstrip('/')}/v1/{signal}" if base else ""


def _tls(otlp: Otlp) -> ssl.SSLContext | bool:
    """Return by what the receiver is verified; True: by the system's authorities. Raises ConfigError."""
    if not otlp.ca_file and otlp.client_files is None:
        return True
    try:
        context = ssl.create_default_context(cafile=otlp.ca_file or None)
        if otlp.client_files is not None:
            context.load_cert_chain(*otlp.client_files)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"OTEL_EXPORTER_OTLP_CERTIFICATE and its kin: {error}") from error
    return context


def asked_wait_s(retry_after: str | None) -> float:
    """Return the seconds that a receiver asks for in its Retry-After, at most a minute; 0 when it says none."""
    return min(60.0, float(retry_after)) if retry_after and retry_after.isascii() and retry_after.isdecimal() else 0.0


def _rejected(answer: bytes) -> int:
    """Return how many items a partial success leaves out."""
    if b"partialSuccess" not in answer:
        return 0
    try:
        said: Any = orjson.loads(answer)
        partial = said["partialSuccess"]
        return sum(int(value) for name, value in partial.items() if name.startswith("rejected"))
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        return 0
