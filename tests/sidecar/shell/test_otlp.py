"""Telemetry reaches a receiver in batches as OTLP, and a receiver that is slow, away or greedy costs only its items."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from certs.spiffe import SpiffeId
from sidecar.core.otel import Otel, read
from sidecar.errors import ConfigError
from sidecar.shell import otlp
from sidecar.shell.otlp import Exporter, text_of
from sidecar.shell.tracing import spans
from tests.sidecar.exchanges import SERVER, STARTED_NS, a_profile, an_exchange
from tests.sidecar.receivers import HttpReceiver, values

WAIT_S = 10.0  # for a whole test; nothing here takes a second
ITEM = b'{"name":"x"}'
NAMES = ("resourceSpans", "scopeSpans", "spans")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "BACKOFF_S", (0.0, 0.0))


def _otel(**variables: str) -> Otel:
    return read({"OTEL_BSP_SCHEDULE_DELAY": "0"} | {f"OTEL_{name}": value for name, value in variables.items()})[0]


@asynccontextmanager
async def _exporting(receiver: HttpReceiver, otel: Otel | None = None) -> AsyncIterator[Exporter]:
    """Run an exporter of spans against *receiver*."""
    async with (
        asyncio.timeout(WAIT_S),
        receiver.listening() as base,
        aiohttp.ClientSession() as session,
        asyncio.TaskGroup() as tasks,
    ):
        exporter = Exporter(session, "traces", otel or _otel(), endpoint=f"{base}/base/", pod="billing-7f")
        exporter.use(SERVER, None)
        running = tasks.create_task(exporter.run())
        try:
            yield exporter
        finally:
            running.cancel()


async def _until(claim: Callable[[], Any]) -> None:
    while not claim():  # noqa: ASYNC110 - the receiver is real
        await asyncio.sleep(0.005)


async def test_spans_reach_the_receiver_as_otlp() -> None:
    """The reference definition of the protocol reads what was sent."""
    receiver = HttpReceiver()
    async with _exporting(receiver) as exporter:
        for _ in range(3):
            count, items = spans(an_exchange(), a_profile(), "127.0.0.1")
            exporter.put(items, count)
        await _until(lambda: exporter.exported == 6)
    request = json_format.Parse(receiver.raw[0], ExportTraceServiceRequest())
    resource = {each.key: each.value.string_value for each in request.resource_spans[0].resource.attributes}
    first = request.resource_spans[0].scope_spans[0].spans[0]

    assert receiver.paths[0] == "/base/v1/traces"
    assert resource["service.name"] == "billing"
    assert resource["service.namespace"] == resource["k8s.namespace.name"] == "pay"
    assert resource["service.instance.id"] == "billing-7f"
    assert first.name == "tools/call read_schema"
    assert first.start_time_unix_nano == STARTED_NS
    # OTLP's JSON has ids in hex where protobuf's has base64.
    assert base64.b64encode(first.trace_id) == b"0af7651916cd43dd8448eb211c80319c"


async def test_operator_s_word_on_the_resource_goes_first() -> None:
    """OTEL_SERVICE_NAME before OTEL_RESOURCE_ATTRIBUTES before what we know."""
    receiver = HttpReceiver()
    otel = _otel(SERVICE_NAME="other", RESOURCE_ATTRIBUTES="service.name=third,service.namespace=mine")
    async with _exporting(receiver, otel) as exporter:
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 1)
    found = values(receiver.bodies[0]["resourceSpans"][0]["resource"])

    assert (found["service.name"], found["service.namespace"]) == ("other", "mine")


async def test_receiver_that_is_busy_is_asked_again() -> None:
    """429 and 503 are retried (OTLP/HTTP, failures); the items come once."""
    receiver = HttpReceiver(429, 503)
    async with _exporting(receiver) as exporter:
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 1)

    assert len(receiver.bodies) == 3
    assert exporter.dropped == 0


@pytest.mark.parametrize("status", [400, 401, 307])
async def test_receiver_that_refuses_for_good_is_not_asked_again(status: int) -> None:
    """The batch is dropped and counted; a redirect is not followed."""
    receiver = HttpReceiver(status)
    async with _exporting(receiver) as exporter:
        exporter.put(ITEM)
        await _until(lambda: exporter.dropped == 1)

    assert len(receiver.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "rejected"),
    [
        ('{"partialSuccess":{"rejectedSpans":"2","errorMessage":"too old"}}', 2),
        ('{"partialSuccess":{}}', 0),
        ('{"partialSuccess":[]}', 0),
        ('{"partialSuccess"', 0),
    ],
)
async def test_what_a_receiver_rejects_counts_as_dropped(answer: str, rejected: int) -> None:
    """OTLP, partial success; nonsense is none."""
    receiver = HttpReceiver(answer=answer)
    async with _exporting(receiver) as exporter:
        exporter.put(b",".join([ITEM] * 3), 3)
        await _until(lambda: exporter.exported + exporter.dropped == 3)

        assert exporter.dropped == rejected


async def test_receiver_that_is_away_costs_only_its_items() -> None:
    """Tried a few times, dropped, and the next ones are tried again."""
    async with _exporting(HttpReceiver()) as exporter:
        for count, endpoint in enumerate(("http://127.0.0.1:1", "no url"), start=1):
            exporter.use(SERVER, endpoint)
            exporter.put(ITEM)
            await _until(lambda count=count: exporter.dropped == count)
        exporter.use(SERVER, None)
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 1)


async def test_headers_never_go_to_a_receiver_that_a_profile_names() -> None:
    """Its author would learn the operator's credentials."""
    operator, tenant = HttpReceiver(), HttpReceiver()
    async with (
        _exporting(operator, _otel(EXPORTER_OTLP_HEADERS="api-key=hunter2")) as exporter,
        tenant.listening() as own,
    ):
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 1)
        exporter.use(SERVER, own)
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 2)

    assert operator.headers[0]["api-key"] == "hunter2"
    assert "api-key" not in tenant.headers[0]


async def test_body_is_compressed_where_that_is_asked_for() -> None:
    """OTEL_EXPORTER_OTLP_COMPRESSION."""
    receiver = HttpReceiver()
    async with _exporting(receiver, _otel(EXPORTER_OTLP_COMPRESSION="gzip")) as exporter:
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 1)

    assert receiver.headers[0]["content-encoding"] == "gzip"
    assert receiver.items(*NAMES) == [{"name": "x"}]


async def test_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In items and in bytes; what does not fit is dropped and counted."""
    receiver = HttpReceiver()
    async with _exporting(receiver, _otel(BSP_MAX_QUEUE_SIZE="3")) as exporter:
        for _ in range(5):
            exporter.put(ITEM)

        assert exporter.dropped == 2
        await _until(lambda: exporter.exported == 3)
        monkeypatch.setattr(otlp, "MAX_QUEUED_BYTES", 10)
        exporter.put(ITEM)
        assert exporter.dropped == 3


async def test_large_queue_goes_in_batches() -> None:
    """And each batch has one resource: spans of two bundles are not mixed."""
    receiver = HttpReceiver()
    async with _exporting(receiver, _otel(BSP_MAX_EXPORT_BATCH_SIZE="2")) as exporter:
        for _ in range(3):
            exporter.put(ITEM)
        exporter.use(SERVER, None)
        exporter.put(ITEM)
        await _until(lambda: exporter.exported == 4)

    assert [len(each["resourceSpans"][0]["scopeSpans"][0]["spans"]) for each in receiver.bodies] == [2, 1, 1]


@pytest.mark.parametrize("variables", [{}, {"TRACES_EXPORTER": "none"}, {"SDK_DISABLED": "true"}])
async def test_without_a_receiver_nothing_is_kept(variables: dict[str, str]) -> None:
    """None was named, or this signal is not to be sent."""
    async with aiohttp.ClientSession() as session:
        exporter = Exporter(session, "traces", _otel(**variables), endpoint="http://x" if variables else "")
        exporter.put(ITEM)

        assert not exporter.is_on
        assert (exporter.dropped, exporter.exported) == (1, 0)


async def test_flush_sends_what_is_left() -> None:
    """On shutdown, with `run` still waiting to fill its batch."""
    receiver = HttpReceiver()
    async with _exporting(receiver) as exporter:
        for _ in range(3):
            exporter.put(ITEM)
        await exporter.flush()
        await _until(lambda: exporter.exported == 3)  # `run` may have taken some already


async def test_flush_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that hangs does not hold the shutdown up; every item is accounted for."""
    monkeypatch.setattr(otlp, "FLUSH_S", 0.05)
    receiver = HttpReceiver()
    receiver.hold = asyncio.Event()
    async with _exporting(receiver, _otel(BSP_MAX_EXPORT_BATCH_SIZE="2")) as exporter:
        for _ in range(5):
            exporter.put(ITEM)
        await _until(lambda: len(receiver.bodies) == 1)
        await exporter.flush()
        receiver.hold.set()

        assert exporter.dropped == 3
    assert exporter.dropped + exporter.exported == 5  # two were on their way


async def test_cancelled_export_counts_its_items() -> None:
    """Cut off in the middle of a POST."""
    receiver = HttpReceiver()
    receiver.hold = asyncio.Event()
    async with _exporting(receiver) as exporter:
        exporter.put(ITEM)
        await _until(lambda: len(receiver.bodies) == 1)
        receiver.hold.set()

    assert exporter.dropped + exporter.exported == 1


async def test_certificate_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    """It names the variable: a receiver that must be verified otherwise would never be."""
    async with aiohttp.ClientSession() as session:
        for path in ("/no/such.pem", str(tmp_path)):
            with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_CERTIFICATE"):
                Exporter(session, "traces", _otel(EXPORTER_OTLP_CERTIFICATE=path))


def test_names_known_by_identity_are_those_of_the_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there were, and whatever their places in memory are used for later."""
    monkeypatch.setattr(otlp, "MAX_TEXTS", 3)
    for number in range(100):
        workload = SpiffeId.parse(f"spiffe://a.test/ns/a/sa/agent-{number}")

        assert text_of(workload) == text_of(workload) == str(workload)
    assert text_of(None) == ""
    assert len(otlp._texts) <= 3
