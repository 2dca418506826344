"""What is exposed parses, adds up, and stays bounded whatever callers send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from certs.errors import PeerReason
from sidecar.core.authorise import Difference
from sidecar.core.message import Message, Shape, Tool
from sidecar.errors import Reason, Refusal
from sidecar.shell.metrics import MAX_TOOLS, OPERATION_BUCKETS_S, OTHER, Histogram, Metrics
from tests.sidecar.exchanges import a_call, a_refused_exchange, an_exchange, an_unreadable_exchange

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
    """Bundle, SVID, handshakes, audit and spans; what is not known is left out."""
    metrics = Metrics()
    metrics.handshake_refused(PeerReason.EXPIRED)
    metrics.observe(an_exchange(hidden=3, shadow=(Difference(policy="cluster/x", allowed=False),)))
    samples = _samples(
        metrics.render(revision="a1b2", bundle_age_s=1.5, svid_expires_at_s=1.8e9, audit_failures=2, spans_dropped=4)
    )

    assert samples["sidegate_handshake_refusals_total", (("reason", "expired"),)] == 1
    assert samples["sidegate_hidden_items_total", ()] == 3
    assert samples["sidegate_shadow_differences_total", (("allowed", "false"), ("policy", "cluster/x"))] == 1
    assert samples["sidegate_bundle_info", (("revision", "a1b2"),)] == 1
    assert samples["sidegate_bundle_age_seconds", ()] == 1.5
    assert samples["sidegate_svid_expiry_timestamp_seconds", ()] == 1.8e9
    assert samples["sidegate_audit_failures_total", ()] == 2
    assert samples["sidegate_spans_dropped_total", ()] == 4
    assert ("sidegate_bundle_age_seconds", ()) not in _samples(metrics.render())


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
