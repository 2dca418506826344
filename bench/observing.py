"""What telemetry costs a call: its spans, its metrics, its log line, beside OpenTelemetry's SDK. `python -m bench.observing`.

CPU time of this thread, the best of many blocks: what else the machine does only adds. Ours includes the encoding for the
receiver; so does the SDK's, whose batch processor encodes on another thread of the same interpreter, under the same lock.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PrometheusHistogram

from sidecar.core.conventions import ATTRIBUTES, SERVER_OPERATION
from sidecar.exchange import Exchange
from sidecar.shell import logs, tracing
from sidecar.shell.metrics import Metrics
from tests.sidecar.exchanges import a_call, a_profile, an_exchange

BLOCKS: Final = 300
CALLS: Final = 50
TRACEPARENT: Final = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"}


def exchanges() -> Sequence[Exchange]:
    """Return calls of one session: the same caller, session and tool, another id each."""
    return [an_exchange(a_call(request_id=number), parent_id="00f067aa0ba902b7") for number in range(CALLS)]


def cost_us(observe: Callable[[Exchange], Any]) -> float:
    """Return the CPU time of one call of *observe*."""
    calls = exchanges()
    best_ns = min(_block_ns(observe, calls) for _ in range(BLOCKS))
    return best_ns / CALLS / 1000


def _block_ns(observe: Callable[[Exchange], Any], calls: Sequence[Exchange]) -> int:
    started_ns = time.thread_time_ns()
    for each in calls:
        observe(each)
    return time.thread_time_ns() - started_ns


class Encoding(SpanProcessor):
    """Encodes each span as the exporter would, and sends it nowhere."""

    def on_end(self, span: ReadableSpan) -> None:
        """Encode *span*."""
        encode_spans([span]).SerializeToString()


def sdk_spans() -> Callable[[Exchange], None]:
    """Return the SDK's way to the same two spans: context in, SERVER, CLIENT, context out, both encoded."""
    provider = TracerProvider(resource=Resource.create({"service.name": "billing"}))
    provider.add_span_processor(Encoding())
    tracer, propagator = provider.get_tracer("bench"), TraceContextTextMapPropagator()
    attributes = {each.name: "0123456789" for each in ATTRIBUTES if each.level != "opt-in" and each.side != "client"}
    sent = {each.name: "0123456789" for each in ATTRIBUTES if each.level != "opt-in" and each.side != "server"}

    def observe(_: Exchange) -> None:
        parent = propagator.extract(TRACEPARENT)
        outer = tracer.start_span("tools/call x", context=parent, kind=SpanKind.SERVER, attributes=attributes)
        context = set_span_in_context(outer)
        inner = tracer.start_span("tools/call x", context=context, kind=SpanKind.CLIENT, attributes=sent)
        propagator.inject({}, context=set_span_in_context(inner))
        inner.end()
        outer.end()

    return observe


def sdk_metrics() -> Callable[[Exchange], None]:
    """Return the SDK's way to what a call counts here: two histograms and a counter."""
    meter = MeterProvider([InMemoryMetricReader()]).get_meter("bench")
    operations, decisions = meter.create_histogram("a", unit="s"), meter.create_histogram("b", unit="s")
    calls = meter.create_counter("c")

    def observe(exchange: Exchange) -> None:
        operations.record(exchange.total_s, dict.fromkeys(SERVER_OPERATION.labels, "x"))
        decisions.record(exchange.judged_s)
        calls.add(1, {"caller": "x", "gen_ai.tool.name": "x", "decision": "allowed"})

    return observe


def prometheus_client_metrics() -> Callable[[Exchange], None]:
    """Return prometheus_client's way to the operation's histogram alone."""
    histogram = PrometheusHistogram("a", "a", ["method", "tool", "error"], registry=CollectorRegistry())

    def observe(exchange: Exchange) -> None:
        histogram.labels("tools/call", "x", "").observe(exchange.total_s)

    return observe


def our_spans(exchange: Exchange) -> None:
    """Draw an id, write the header for the server, and both spans."""
    tracing.new_span_id()
    tracing.traceparent(exchange)
    tracing.spans(exchange, PROFILE, "127.0.0.1")


def our_line(exchange: Exchange) -> None:
    """Write the line of a message."""
    logs.line_of(exchange, 20, logs.line_fields(exchange))


PROFILE: Final = a_profile()


def rows() -> Iterator[tuple[str, float, float]]:
    """Yield what is measured, our cost and the other way's, in microseconds of CPU."""
    yield "a span, of two (SDK)", cost_us(our_spans) / 2, cost_us(sdk_spans()) / 2
    yield "metrics (SDK)", cost_us(Metrics().observe), cost_us(sdk_metrics())
    yield "metrics with exemplars (SDK)", cost_us(Metrics(lambda _: True).observe), cost_us(sdk_metrics())
    yield "metrics (prometheus_client, one histogram)", cost_us(Metrics().observe), cost_us(prometheus_client_metrics())
    yield "log line (json.dumps, unbuffered)", cost_us(our_line), cost_us(_formatted())


def _formatted() -> Callable[[Exchange], None]:
    """Return the way of the standard library's logging, without its write."""
    formatter = logs.JsonFormatter()

    def observe(exchange: Exchange) -> None:
        record = logs.logging.LogRecord("x", 20, "x.py", 1, "request", None, None)
        record.__dict__.update(logs.line_fields(exchange))
        formatter.format(record)

    return observe


def main() -> None:
    """Print the table."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; microseconds of CPU per call")
    for what, ours_us, theirs_us in rows():
        print(f"{what:44} {ours_us:7.2f} {theirs_us:8.2f}   {theirs_us / ours_us:5.1f} x")


if __name__ == "__main__":
    main()
