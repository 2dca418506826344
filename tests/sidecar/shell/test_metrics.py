"""What is exposed parses, adds up, and stays bounded whatever callers send."""

import asyncio
from collections import Counter
from dataclasses import replace

import aiohttp
import orjson
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from certs.errors import PeerReason
from sidecar.core.authorise import Difference
from sidecar.core.conventions import BUNDLE_AGE, BUNDLE_INFO, INSTRUMENTS, OPERATION_BUCKETS_S, QUESTIONS
from sidecar.core.limits import Admission, Charge, Rule
from sidecar.core.message import Message, Shape, Tool
from sidecar.core.otel import read
from sidecar.core.profile import Limit
from sidecar.errors import Reason, Refusal
from sidecar.shell.metrics import MAX_CALLERS, MAX_RULES, MAX_TOOLS, OTHER, Histogram, Metrics, Publisher
from sidecar.shell.otlp import Exporter
from tests.sidecar.exchanges import AGENT, a_call, a_refused_exchange, an_exchange, an_unreadable_exchange
from tests.sidecar.receivers import HttpReceiver

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
OPERATION = "mcp_server_operation_duration_seconds"


def _samples(text: str) -> Samples:
    """Return what the reference parser reads."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _count(samples: Samples, **labels: str) -> float:
    """Return the operations counted under *labels*."""
    return sum(
        value
        for (name, found), value in samples.items()
        if name == f"{OPERATION}_count" and labels.items() <= dict(found).items()
    )


def _tools(samples: Samples) -> set[str]:
    return {dict(labels)["gen_ai_tool_name"] for name, labels in samples if name == f"{OPERATION}_count"}


def _a_call_of(name: str) -> Message:
    target = Tool(name=name, arguments={})
    return Message(shape=Shape.REQUEST, method="tools/call", id=1, target=target, params={})


def test_admitted_call_is_timed_by_method_and_tool() -> None:
    """The name and the buckets are those of OpenTelemetry's MCP conventions."""
    metrics = Metrics()
    metrics.observe(an_exchange(a_call("read_schema"), total_s=0.03))
    samples = _samples(metrics.render())
    labels = (("error_type", ""), ("gen_ai_tool_name", "read_schema"), ("mcp_method_name", "tools/call"))

    assert samples[f"{OPERATION}_count", labels] == 1
    assert samples[f"{OPERATION}_sum", labels] == 0.03
    assert samples[f"{OPERATION}_bucket", tuple(sorted((*labels, ("le", "0.02"))))] == 0
    assert samples[f"{OPERATION}_bucket", tuple(sorted((*labels, ("le", "0.05"))))] == 1
    assert samples[f"{OPERATION}_bucket", tuple(sorted((*labels, ("le", "+Inf"))))] == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"error_code": -32602}, "-32602"),
        ({"error_code": 4711}, OTHER),
        ({"tool_failed": True}, "tool_error"),
        ({"aborted": "client gone"}, "aborted"),
        ({"refusal": Refusal(Reason.UPSTREAM, "")}, "upstream"),
    ],
)
def test_operation_that_failed_says_how(changes: dict[str, object], expected: str) -> None:
    """Codes of JSON-RPC and MCP have a series each, a server's own share one."""
    metrics = Metrics()
    metrics.observe(an_exchange(**changes))

    assert _count(_samples(metrics.render()), error_type=expected) == 1


def test_refusal_is_counted_by_reason_and_is_no_operation() -> None:
    """A refused call says nothing about the server's speed."""
    metrics = Metrics()
    metrics.observe(a_refused_exchange(Reason.DENIED))
    metrics.observe(an_unreadable_exchange())
    samples = _samples(metrics.render())

    assert samples["sidegate_refusals_total", (("reason", "denied"),)] == 1
    assert samples["sidegate_refusals_total", (("reason", "malformed"),)] == 1
    assert samples["sidegate_refusals_total", (("reason", "throttled"),)] == 0
    assert _count(samples) == 0
    assert samples["sidegate_decision_duration_seconds_count", ()] == 1


def test_open_stream_is_not_timed() -> None:
    """It lasts as long as its client likes."""
    metrics = Metrics()
    metrics.observe(an_exchange(Message(shape=Shape.OPEN_STREAM, method="open_stream", params={}), total_s=7200.0))

    assert _count(_samples(metrics.render())) == 0


def test_every_reason_is_there_from_the_start() -> None:
    """A rate over a counter that appears with its first event misses that event."""
    samples = _samples(Metrics().render())

    assert all(samples["sidegate_refusals_total", (("reason", reason),)] == 0 for reason in Reason)
    assert all(samples["sidegate_handshake_refusals_total", (("reason", each),)] == 0 for each in PeerReason)


def test_state_of_the_sidecar_is_shown() -> None:
    """What exchanges count, and what others know; what is not known is left out."""
    metrics = Metrics()
    metrics.handshake_refused(PeerReason.EXPIRED)
    metrics.observe(an_exchange(hidden=3, shadow=(Difference(policy="cluster/x", allowed=False),)))
    metrics.watch(BUNDLE_INFO, lambda: {("a1b2",): 1})
    metrics.watch(BUNDLE_AGE, lambda: None)
    metrics.watch(QUESTIONS, lambda: Counter({("corp", "introspect", "answered"): 2}))
    samples = _samples(metrics.render())

    assert samples["sidegate_handshake_refusals_total", (("reason", "expired"),)] == 1
    assert samples["sidegate_hidden_items_total", ()] == 3
    assert samples["sidegate_shadow_differences_total", (("allowed", "false"), ("policy", "cluster/x"))] == 1
    assert samples["sidegate_bundle_info", (("revision", "a1b2"),)] == 1
    assert ("sidegate_bundle_age_seconds", ()) not in samples
    labels = (("outcome", "answered"), ("provider", "corp"), ("question", "introspect"))
    assert samples["sidegate_provider_questions_total", labels] == 2


def test_calls_are_counted_by_who_and_what_and_how() -> None:
    """The caller's workload, the tool, and whether it was let through; never the user."""
    metrics = Metrics()
    metrics.observe(an_exchange(a_call("read_schema")))
    metrics.observe(a_refused_exchange(message=a_call("read_schema")))
    text = metrics.render()
    workload = "spiffe://a.test/ns/agents/sa/planner"
    calls = {
        dict(labels)["decision"]: value
        for (name, labels), value in _samples(text).items()
        if name == "sidegate_calls_total" and dict(labels)["caller"] == workload
    }

    assert calls == {"allowed": 1, "refused": 1}
    assert "alice" not in text


def test_spend_is_counted_by_limit_caller_and_tool() -> None:
    """In the limit's own units; who the user was, the audit trail says."""
    metrics = Metrics()
    permit = an_exchange().permit
    assert permit is not None
    charge = Charge(Rule(Limit(name="month", rate_per_s=1, burst=10), 10), "", 4, None)
    for _ in range(3):
        metrics.observe(an_exchange(a_call("query"), admission=Admission(permit=permit, charges=(charge,))))
    labels = (("caller", str(AGENT)), ("gen_ai_tool_name", "query"), ("limit", "month"))

    assert _samples(metrics.render())["sidegate_limit_spend_total", labels] == 12


def test_denials_are_counted_by_rule() -> None:
    """As the policy names it; a bundle with more than the bound shares one series for the rest."""
    metrics = Metrics()
    for number in range(MAX_RULES + 5):
        metrics.observe(a_refused_exchange(refusal=Refusal(Reason.DENIED, "", detail=f"pay/rule-{number}")))
    samples = _samples(metrics.render())

    assert samples["sidegate_denials_total", (("rule", "pay/rule-0"),)] == 1
    assert samples["sidegate_denials_total", (("rule", OTHER),)] == 5


def test_callers_beyond_the_bound_share_a_series() -> None:
    """However many service accounts call."""
    metrics = Metrics()
    for number in range(MAX_CALLERS + 7):
        exchange = an_exchange()
        assert exchange.principal is not None
        workload = type(AGENT).parse(f"spiffe://a.test/ns/agents/sa/agent-{number}")
        metrics.observe(replace(exchange, principal=replace(exchange.principal, workload=workload)))
    calls = {
        dict(labels)["caller"]: value
        for (name, labels), value in _samples(metrics.render()).items()
        if name == "sidegate_calls_total"
    }

    assert calls[OTHER] == 7
    assert len(calls) == MAX_CALLERS + 1


def test_openmetrics_names_a_call_in_each_bucket() -> None:
    """The reference parser reads it, and the exemplar is the trace of the call."""
    metrics = Metrics(lambda _: True)
    metrics.observe(an_exchange(a_call("read_schema"), total_s=0.03))
    text = metrics.render(openmetrics=True)
    exemplars = {
        sample.labels["le"]: sample.exemplar
        for family in openmetrics.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{OPERATION}_bucket" and sample.exemplar
    }

    assert text.endswith("# EOF\n")
    assert set(exemplars) == {"0.05"}
    assert exemplars["0.05"].labels["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert exemplars["0.05"].value == 0.03
    assert "0af7" not in metrics.render()  # the older format has none


def test_call_without_a_span_is_no_exemplar() -> None:
    """It would lead nowhere."""
    metrics = Metrics(lambda _: False)
    metrics.observe(an_exchange())

    assert "0af7" not in metrics.render(openmetrics=True)


def test_otlp_is_what_the_protocol_defines() -> None:
    """The reference definition reads every metric; names, units and values are those of the table."""
    metrics = Metrics(lambda _: True)
    metrics.observe(an_exchange(a_call("read_schema"), total_s=0.03))
    metrics.observe(a_refused_exchange())
    metrics.watch(BUNDLE_AGE, lambda: 1.5)
    count, items = metrics.points(began_ns=1, now_ns=2)
    found = {
        each.name: each for each in (json_format.ParseDict(item, Metric()) for item in orjson.loads(b"[%b]" % items))
    }
    operation = found["mcp.server.operation.duration"].histogram
    known = {each.name: each for each in INSTRUMENTS}

    assert len(found) == count
    assert all(known[name].unit == each.unit for name, each in found.items())
    assert operation.aggregation_temporality == 2
    assert tuple(operation.data_points[0].explicit_bounds) == OPERATION_BUCKETS_S
    assert {each.key: each.value.string_value for each in operation.data_points[0].attributes} == {
        "mcp.method.name": "tools/call",
        "gen_ai.tool.name": "read_schema",
    }
    assert operation.data_points[0].exemplars[0].as_double == 0.03
    assert found["sidegate.refusals"].sum.is_monotonic
    assert found["sidegate.bundle.age"].gauge.data_points[0].as_double == 1.5


async def test_publisher_sends_all_of_it_every_so_often() -> None:
    """By OTLP, where that is asked for; each report holds everything, so that a lost one loses nothing."""
    receiver = HttpReceiver()
    metrics = Metrics()
    metrics.observe(an_exchange())
    otel, _ = read({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "10"})
    async with (
        asyncio.timeout(10),
        receiver.listening() as base,
        aiohttp.ClientSession() as session,
        asyncio.TaskGroup() as tasks,
    ):
        publisher = Publisher(metrics, Exporter(session, "metrics", otel, endpoint=base), every_s=otel.metrics_every_s)
        running = tasks.create_task(publisher.run())
        while len(receiver.bodies) < 2:  # noqa: ASYNC110 - the receiver is real
            await asyncio.sleep(0.005)
        running.cancel()
        await Publisher(metrics, Exporter(session, "metrics", read({})[0], endpoint=base), every_s=1).flush()
        sent = len(receiver.bodies)
    names = [each["name"] for each in receiver.items("resourceMetrics", "scopeMetrics", "metrics")]

    assert sent == len(receiver.bodies)  # metrics are pulled unless OTEL_METRICS_EXPORTER says otherwise
    assert set(receiver.paths) == {"/v1/metrics"}
    assert names.count("mcp.server.operation.duration") == len(receiver.bodies)


def test_made_up_tool_names_get_no_series() -> None:
    """A caller that asks for names that do not exist cannot push real tools out."""
    metrics = Metrics()
    for number in range(3 * MAX_TOOLS):
        metrics.observe(an_exchange(_a_call_of(f"made-up-{number}"), error_code=-32602))
        metrics.observe(an_exchange(_a_call_of(f"made-up-{number}"), tool_failed=True))
    metrics.observe(an_exchange(_a_call_of("real")))

    assert _tools(_samples(metrics.render())) == {OTHER, "real"}


def test_number_of_series_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with more tools than the bound shares one series for the rest; no call is lost."""
    monkeypatch.setattr("sidecar.shell.metrics.MAX_SERIES", 150)
    metrics = Metrics()
    for number in range(300):
        for changes in ({}, {"tool_failed": True}):
            metrics.observe(an_exchange(_a_call_of(f"tool-{number}"), **changes))
    samples = _samples(metrics.render())

    assert len(metrics._operations) <= 152
    assert len(_tools(samples)) <= MAX_TOOLS + 1
    assert _count(samples) == 600


@given(names=st.lists(st.text(st.characters(), max_size=140), max_size=20))
def test_any_name_survives_the_format(names: list[str]) -> None:
    """Quotes, line ends and backslashes in a tool's name break nothing."""
    metrics = Metrics()
    for name in names:
        metrics.observe(an_exchange(_a_call_of(name)))

    assert _count(_samples(metrics.render())) == len(names)


@given(values=st.lists(st.floats(min_value=0, max_value=1000)))
def test_histogram_buckets_are_cumulative_and_complete(values: list[float]) -> None:
    """Each bucket counts what is at most its bound; the last counts all."""
    histogram = Histogram(OPERATION_BUCKETS_S)
    for value in values:
        histogram.observe(value)
    counts = [int(text.rsplit(" ", 1)[1]) for text in histogram.lines("h", "") if text.startswith("h_bucket")]

    assert counts == [*(sum(value <= bound for value in values) for bound in OPERATION_BUCKETS_S), len(values)]
