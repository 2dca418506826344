"""The standard variables come to what OpenTelemetry's specification says, and what is not honoured is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.otel import SIGNALS, TABLE, Batching, Otel, Otlp, Sampler, read

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def test_nothing_said_means_the_defaults() -> None:
    """Spans where there is a receiver, metrics by Prometheus, logs on stderr; empty counts as unset."""
    assert read({}) == (Otel(), [])
    assert read({"OTEL_TRACES_SAMPLER": "", "PATH": "/bin"}) == (Otel(), [])


def test_defaults_are_spelt_as_the_variables_would() -> None:
    """The page shows what holds: saying every default changes nothing."""
    spelt = {each.name: each.default for each in TABLE if each.default and not each.default.startswith("as ")}

    assert read(spelt) == (Otel(), [])


def test_endpoint_of_all_signals_gets_a_path_and_that_of_one_does_not() -> None:
    """OTLP exporter specification, endpoint URLs."""
    otel, _ = read(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/base/",
            "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "https://logs.test/own",
        }
    )

    assert {signal: otel.otlp[signal].url for signal in SIGNALS} == {
        "traces": "http://collector:4318/base/v1/traces",
        "metrics": "http://collector:4318/base/v1/metrics",
        "logs": "https://logs.test/own",
    }


def test_what_is_said_of_one_signal_goes_first() -> None:
    """Headers, deadline, compression and certificates, of one or of all."""
    otel, warnings = read(
        {
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a%20b, team = x",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2500",
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "500",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "none",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": "/ca.pem",
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "/c.pem",
            "OTEL_EXPORTER_OTLP_CLIENT_KEY": "/k.pem",
        }
    )
    common = {
        "headers": (("api-key", "a b"), ("team", "x")),
        "ca_file": "/ca.pem",
        "client_files": ("/c.pem", "/k.pem"),
    }

    assert warnings == []
    assert otel.otlp["traces"] == Otlp(**common, timeout_s=0.5, gzip=True)
    assert otel.otlp["metrics"] == Otlp(**common, timeout_s=2.5, gzip=False)


def test_exporters_batches_and_resource_are_read() -> None:
    """Each variable reaches its place."""
    otel, warnings = read(
        {
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "prometheus,otlp",
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_SERVICE_NAME": "billing",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=prod,k8s.cluster.name=a%2Cb",
            "OTEL_BSP_SCHEDULE_DELAY": "5000",
            "OTEL_BSP_MAX_QUEUE_SIZE": "100",
            "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": "7",
            "OTEL_METRIC_EXPORT_INTERVAL": "15000",
            "OTEL_METRICS_EXEMPLAR_FILTER": "always_off",
        }
    )

    assert warnings == []
    assert otel.exported == {"metrics", "logs"}
    assert otel.service_name == "billing"
    assert otel.resource == (("deployment.environment.name", "prod"), ("k8s.cluster.name", "a,b"))
    assert otel.spans == Batching(delay_s=5.0, queue=100, batch=100)  # a batch is no larger than the queue
    assert otel.logs == Batching(batch=7)
    assert (otel.metrics_every_s, otel.exemplars) == (15.0, False)


def test_disabled_sends_nothing_at_all() -> None:
    """OTEL_SDK_DISABLED goes before the exporters."""
    otel, _ = read({"OTEL_SDK_DISABLED": "true", "OTEL_LOGS_EXPORTER": "otlp"})

    assert otel.exported == frozenset()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "expected one of parentbased_always_on"),
        ("OTEL_TRACES_SAMPLER_ARG", "2", "expected a number from 0 to 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "x", "expected a number from 0 to 1"),
        ("OTEL_TRACES_EXPORTER", "console", "expected a list of otlp; or none"),
        ("OTEL_SDK_DISABLED", "yes", "expected true or false"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "begins with http://"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "expected one of http/json"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5", "expected a whole number from 1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "9" * 5000, "expected a whole number from 1"),
        ("OTEL_RESOURCE_ATTRIBUTES", "novalue", "expected key=value"),
        ("OTEL_PROPAGATORS", "b3", "not honoured here"),
    ],
)
def test_what_cannot_be_honoured_is_told_and_the_default_holds(name: str, value: str, expected: str) -> None:
    """A warning, not an error: telemetry must not stop a process (specification, parsing)."""
    otel, (warning,) = read({name: value})

    assert warning.startswith(name)
    assert expected in warning
    assert otel == Otel()


def test_header_that_cannot_be_read_is_not_repeated() -> None:
    """It is a credential."""
    _, (warning,) = read({"OTEL_EXPORTER_OTLP_HEADERS": "hunter2"})

    assert "hunter2" not in warning


def test_header_cannot_smuggle_another() -> None:
    """Percent-encoded line ends are no part of a header."""
    otel, warnings = read({"OTEL_EXPORTER_OTLP_HEADERS": "a=b%0d%0Ax: y"})

    assert otel.otlp["traces"].headers == ()
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("name", "parent", "fresh"),
    [
        ("parentbased_always_on", (False, True), True),
        ("parentbased_always_off", (False, True), False),
        ("always_on", (True, True), True),
        ("always_off", (False, False), False),
    ],
)
def test_samplers_follow_the_parent_or_not(name: str, parent: tuple[bool, bool], fresh: bool) -> None:
    """By name: of a parent that is not sampled, of one that is, and of a new trace."""
    sampler = read({"OTEL_TRACES_SAMPLER": name})[0].sampler
    found = tuple(sampler.samples(TRACE_ID, has_parent=True, parent_sampled=each) for each in (False, True))

    assert found == parent
    assert sampler.samples(TRACE_ID, has_parent=False, parent_sampled=True) is fresh


@given(trace_id=st.integers(1, 2**128 - 1), ratio=st.floats(0, 1))
def test_ratio_decides_as_the_sdk_does(trace_id: int, ratio: float) -> None:
    """By the lower half of the trace id, so that all parties keep the same traces."""
    from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased  # noqa: PLC0415 - slow to import

    theirs = TraceIdRatioBased(ratio).should_sample(None, trace_id, "x").decision is Decision.RECORD_AND_SAMPLE
    ours = Sampler(ratio=ratio).samples(f"{trace_id:032x}", has_parent=False, parent_sampled=True)
    bound = round(ratio * 2**64)

    assert ours == theirs or abs(trace_id % 2**64 - bound) <= 2**12  # a float's own rounding
