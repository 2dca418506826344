"""Counts exchanges, and says the counts in Prometheus' text formats and in OTLP.

Label sets are closed or bounded: a caller can make up as many tool names as it likes, so a name gets its own series only
once a call to it has succeeded; users and sessions are never labels, the audit trail counts for those. What a metric is
called stands in sidecar/core/conventions.py. Built by hand: an observation costs 1 us where the libraries take 10.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from certs.errors import PeerReason
from sidecar.core.conventions import (
    CALLS,
    CLIENT_OPERATION,
    CONTENT,
    DECISION,
    DENIALS,
    DIFFERENCES,
    HANDSHAKES,
    HIDDEN,
    REFUSALS,
    SERVER_OPERATION,
    SPEND,
    Instrument,
)
from sidecar.core.message import Ask, Message, Shape, Tool
from sidecar.core.redaction import encode
from sidecar.errors import Reason
from sidecar.exchange import Exchange
from sidecar.record import ABORTED, TOOL_ERROR, error_type
from sidecar.shell.otlp import Exporter, text_of

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
MAX_TOOLS: Final = 200  # series of each further tool are counted under "other"
MAX_CALLERS: Final = 50  # calling service accounts; the same
MAX_RULES: Final = 200  # a bundle's; the same
MAX_SERIES: Final = 1000  # of an instrument; a histogram's have 17 lines each, written in about 10 ms
OTHER: Final = "other"
NO_RULE: Final = "no rule allows it"
MAX_NAME_CHARS: Final = 128  # SDKs warn beyond it (MCP 2025-11-25, tool names); a label should be readable
# Codes that JSON-RPC and MCP define; a server's own are counted together.
KNOWN_CODES: Final = frozenset(
    {-32700, -32600, -32601, -32602, -32603, -32000, -32001, -32002, -32020, -32021, -32022, -32042}
)
_CLOSED: Final = frozenset({"", TOOL_ERROR, ABORTED, *Reason, *map(str, KNOWN_CODES)})

Labels = tuple[str, ...]
Exemplar = tuple[str, str, float, int]  # trace id, span id, value, Unix time in nanoseconds
Reading = Mapping[Any, float]  # of a counter or gauge, by the values of its labels
Gauges = Sequence[tuple[Instrument, Callable[[], Reading | float | None]]]  # what is not counted by exchanges


class Histogram:
    """How often a value fell into which bucket, and the last sampled call of each."""

    __slots__ = ("_buckets", "counts", "exemplars", "total")

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.exemplars: list[Exemplar | None] = [None] * (len(buckets) + 1)
        self.total = 0.0

    def observe(self, value: float, exchange: Exchange | None = None) -> None:
        """Count *value*; an upper bound belongs to its bucket. Its exemplar is *exchange*, where there is one."""
        place = bisect_left(self._buckets, value)
        self.counts[place] += 1
        self.total += value
        if exchange is not None:
            self.exemplars[place] = exchange.trace_id, exchange.span_id, value, exchange.started_ns

    def lines(self, name: str, labels: str, *, exemplars: bool = False) -> Iterator[str]:
        """Return the histogram's samples; *labels* are written already, without braces."""
        separator = "," if labels else ""
        running = 0
        bounds = (*map(str, self._buckets), "+Inf")
        for bound, count, seen in zip(bounds, self.counts, self.exemplars, strict=True):
            running += count
            text = f'{name}_bucket{{{labels}{separator}le="{bound}"}} {running}'
            yield text if seen is None or not exemplars else text + _exemplar(seen)
        braced = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braced} {self.total!r}"
        yield f"{name}_count{braced} {running}"

    def point(self) -> dict[str, Any]:
        """Return the histogram as a data point of OTLP, without attributes and times."""
        return {
            "count": str(sum(self.counts)),
            "sum": self.total,
            "bucketCounts": [str(count) for count in self.counts],
            "explicitBounds": list(self._buckets),
            "exemplars": [
                {"timeUnixNano": str(at_ns), "asDouble": value, "traceId": trace_id, "spanId": span_id}
                for trace_id, span_id, value, at_ns in filter(None, self.exemplars)
            ],
        }


class Tally:
    """A count."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class Series(NamedTuple):
    """Where a message counts: by one look for most of them."""

    calls: Tally | None  # None: no request
    operations: Histogram | None  # None: not sent
    caller: str
    tool: str


class Metrics:
    """The sidecar's metrics. Mutated by `observe`, `handshake_refused` and `watch` only.

    *samples* says of which exchanges there is a span that an exemplar can name; None: there are no exemplars.
    """

    def __init__(self, samples: Callable[[Exchange], bool] | None = None) -> None:
        self._samples = samples
        self._operations: dict[Labels, Histogram] = {}
        self._outbound: dict[Labels, Histogram] = {}
        self._decisions = Histogram(DECISION.buckets)
        self._calls: dict[Labels, Tally] = {}
        self._known: dict[tuple[str, str, str, bool, str], Series] = {}
        self._spend: dict[Labels, int] = {}
        self._refusals = dict.fromkeys(Reason, 0)
        self._denials: dict[Labels, int] = {}
        self._handshakes = dict.fromkeys(PeerReason, 0)
        self._hidden = 0
        self._differences: Counter[Labels] = Counter()
        self._content: Counter[Labels] = Counter()
        self._tools: set[str] = set()
        self._callers = {""}
        self._watched: list[tuple[Instrument, Callable[[], Reading | float | None]]] = []

    def observe(self, exchange: Exchange) -> None:
        """Count *exchange*."""
        refusal, message = exchange.refusal, exchange.message
        if refusal is not None:
            self._refused(exchange)
        if message is None:
            return
        samples = self._samples
        named = exchange if samples is not None and samples(exchange) else None
        self._decisions.observe(exchange.judged_s, named)
        if exchange.hidden or exchange.content or exchange.shadow:
            self._remarks(exchange)
        # A stream's duration says how long a client stayed, and an ask's nothing, not how long the server took.
        shape, target = message.shape, message.target
        if (shape is not Shape.REQUEST and shape is not Shape.NOTIFICATION) or isinstance(target, Ask):
            return
        error, was_sent, principal = error_type(exchange), exchange.was_sent, exchange.principal
        tool = target.name if isinstance(target, Tool) else ""
        caller = "" if principal is None else text_of(principal.workload)
        key = (message.method, tool, error, was_sent, caller)
        series = self._known.get(key) or self._series(exchange, message, key)
        if series.calls is not None:
            series.calls.number += 1
        if series.operations is not None:
            series.operations.observe(exchange.total_s, named)
        if exchange.admission is not None and exchange.admission.charges:
            for charge in exchange.admission.charges:
                spent = (charge.name, series.caller, series.tool)
                self._spend[spent] = self._spend.get(spent, 0) + charge.cost

    def handshake_refused(self, reason: PeerReason) -> None:
        """Count a TLS handshake that was refused."""
        self._handshakes[reason] += 1

    def watch(self, instrument: Instrument, read: Callable[[], Reading | float | None]) -> None:
        """Show what *read* returns whenever metrics are shown: a number, several by labels, or None to leave it out."""
        self._watched.append((instrument, read))

    def render(self, *, openmetrics: bool = False) -> str:
        """Return all metrics in the Prometheus text format 0.0.4, or in OpenMetrics 1.0, which has exemplars."""
        lines: list[str] = []
        for instrument, series in self._all():
            name = instrument.exposed
            family = name.removesuffix("_total") if openmetrics else name
            lines += (f"# HELP {family} {instrument.meaning}", f"# TYPE {family} {instrument.kind}")
            for labels, value in series.items():
                written = _written(instrument, labels)
                if isinstance(value, Histogram):
                    lines += value.lines(name, written, exemplars=openmetrics)
                else:
                    lines.append(f"{name}{{{written}}} {value}" if written else f"{name} {value}")
        return "\n".join([*lines, *(["# EOF"] if openmetrics else []), ""])

    def points(self, *, began_ns: int, now_ns: int) -> tuple[int, bytes]:
        """Return how many metrics there are, and them in OTLP's JSON with commas between; since *began_ns*."""
        times = {"startTimeUnixNano": str(began_ns), "timeUnixNano": str(now_ns)}
        items = [
            encode(_metric(instrument, [_point(instrument, labels, value) | times for labels, value in series.items()]))
            for instrument, series in self._all()
            if series
        ]
        return len(items), b",".join(items)

    def _all(self) -> Iterator[tuple[Instrument, Mapping[Labels, Any]]]:
        yield SERVER_OPERATION, self._operations
        yield CLIENT_OPERATION, self._outbound
        yield DECISION, {(): self._decisions}
        yield CALLS, {labels: tally.number for labels, tally in self._calls.items()}
        yield SPEND, self._spend
        yield REFUSALS, {(reason,): count for reason, count in self._refusals.items()}
        yield DENIALS, self._denials
        yield HANDSHAKES, {(reason,): count for reason, count in self._handshakes.items()}
        yield HIDDEN, {(): self._hidden}
        yield DIFFERENCES, dict(sorted(self._differences.items()))
        yield CONTENT, dict(sorted(self._content.items()))
        for instrument, read in self._watched:
            found = read()
            if found is not None:
                yield instrument, found if isinstance(found, Mapping) else {(): found}

    def _remarks(self, exchange: Exchange) -> None:
        self._hidden += exchange.hidden
        for found in exchange.content:
            rule = found.rule
            self._content[rule.name, rule.action, rule.mode, found.where] += found.count
        for each in exchange.shadow:
            self._differences[each.policy, str(each.allowed).lower()] += 1

    def _refused(self, exchange: Exchange) -> None:
        refusal = exchange.refusal
        assert refusal is not None  # noqa: S101 - for the type checker: it is why we are here
        self._refusals[refusal.reason] += 1
        if refusal.reason is Reason.DENIED:
            rule = (refusal.detail or NO_RULE)[:MAX_NAME_CHARS]
            if (rule,) not in self._denials and len(self._denials) >= MAX_RULES:
                rule = OTHER
            self._denials[rule,] = self._denials.get((rule,), 0) + 1

    def _series(self, exchange: Exchange, message: Message, key: tuple[str, str, str, bool, str]) -> "Series":
        """Return in which series messages with *key* count; kept for the next one unless a name had no place."""
        method, name, error, was_sent, workload = key
        tool = self._tool(name, failed=bool(error) or not was_sent) if name else ""
        caller = self._caller(workload)
        calls = operations = None
        if message.shape is Shape.REQUEST:
            calls = self._calls.setdefault((caller, tool, "allowed" if was_sent else "refused"), Tally())
        if was_sent:
            operations = self._histogram(exchange, (method, tool, error if error in _CLOSED else OTHER))
        series = Series(calls, operations, caller, tool)
        if (tool, caller) == (name, workload) and error in _CLOSED and len(self._known) < MAX_SERIES:
            self._known[key] = series
        return series

    def _histogram(self, exchange: Exchange, key: Labels) -> Histogram:
        held = self._operations if exchange.outbound is None else self._outbound
        series = held.get(key)
        if series is None:
            if len(held) >= MAX_SERIES:
                key = (key[0], OTHER if key[1] else "", key[2])  # at most methods x errors more
            series = held.setdefault(key, Histogram(SERVER_OPERATION.buckets))
        return series

    def _tool(self, name: str, *, failed: bool) -> str:
        if name in self._tools:
            return name
        if failed or len(self._tools) >= MAX_TOOLS or len(name) > MAX_NAME_CHARS:
            return OTHER
        self._tools.add(name)
        return name

    def _caller(self, name: str) -> str:
        if name not in self._callers:
            if len(self._callers) > MAX_CALLERS:
                return OTHER
            self._callers.add(name)
        return name


class Publisher:
    """Sends *metrics* by *exporter* every so often. Its tasks are `run`, and `flush` at the end."""

    def __init__(self, metrics: Metrics, exporter: Exporter, *, every_s: float) -> None:
        self._metrics = metrics
        self._exporter = exporter
        self._every_s = every_s
        self._began_ns = time.time_ns()

    async def run(self) -> None:
        """Send as often as was said; never returns."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.flush()

    async def flush(self) -> None:
        """Send now, once: the next report holds all that this one does."""
        if self._exporter.is_on:
            count, items = self._metrics.points(began_ns=self._began_ns, now_ns=time.time_ns())
            await self._exporter.post(items, count)


def _metric(instrument: Instrument, points: list[dict[str, Any]]) -> dict[str, Any]:
    cumulative = {"aggregationTemporality": 2, "dataPoints": points}
    data: dict[str, Any]
    match instrument.kind:
        case "histogram":
            data = {"histogram": cumulative}
        case "counter":
            data = {"sum": cumulative | {"isMonotonic": True}}
        case _:
            data = {"gauge": {"dataPoints": points}}
    return {"name": instrument.name, "unit": instrument.unit, "description": instrument.meaning} | data


def _point(instrument: Instrument, labels: Labels, value: float | Histogram) -> dict[str, Any]:
    found: dict[str, Any] = value.point() if isinstance(value, Histogram) else {"asDouble": float(value)}
    pairs = zip(instrument.labels, labels, strict=True)
    # An absent label and an empty one are the same to Prometheus; OpenTelemetry leaves it out.
    found["attributes"] = [{"key": key, "value": {"stringValue": _plain(each)}} for key, each in pairs if each]
    return found


def _written(instrument: Instrument, labels: Labels) -> str:
    pairs = zip(instrument.labels, labels, strict=True)
    return ",".join(f'{name.replace(".", "_")}="{_escape(value)}"' for name, value in pairs)


def _exemplar(seen: Exemplar) -> str:
    trace_id, span_id, value, at_ns = seen
    return f' # {{trace_id="{trace_id}",span_id="{span_id}"}} {value!r} {at_ns / 1e9:.3f}'


def _plain(value: str) -> str:
    return value.encode(errors="replace").decode()


def _escape(value: str) -> str:
    """Return *value* as the text formats want a label's value."""
    return _plain(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
