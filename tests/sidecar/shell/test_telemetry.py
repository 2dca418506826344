"""All three signals leave by one set of variables, and what a profile says of them holds at once."""

import asyncio
import logging

import aiohttp

from sidecar.config import RequestLines, Settings
from sidecar.core.conventions import IN_FLIGHT
from sidecar.core.otel import read
from sidecar.core.profile import Telemetry as Wishes
from sidecar.shell.telemetry import Telemetry
from tests.sidecar.exchanges import a_profile, an_exchange
from tests.sidecar.receivers import HttpReceiver

ALL = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_LOGS_EXPORTER": "otlp", "OTEL_SERVICE_NAME": "x"}


async def test_all_signals_reach_the_receiver() -> None:
    """On the way out, too: nothing of a last call is lost."""
    receiver = HttpReceiver()
    async with (
        asyncio.timeout(10),
        receiver.listening() as base,
        aiohttp.ClientSession() as session,
        asyncio.TaskGroup() as tasks,
    ):
        settings = Settings(request_log=RequestLines.REFUSED)
        telemetry = Telemetry(settings, session, (read(ALL | {"OTEL_EXPORTER_OTLP_ENDPOINT": base})[0], ["OTEL_X: no"]))
        telemetry.watch([(IN_FLIGHT, lambda: 3)])
        telemetry.use(a_profile())
        running = tasks.create_task(telemetry.run())
        for observer in telemetry.observers:
            observer.observe(an_exchange())
        logging.getLogger("sidecar.test").error("held up")
        await telemetry.flush()
        running.cancel()

    assert set(receiver.paths) == {"/v1/traces", "/v1/metrics", "/v1/logs"}
    assert len(receiver.items("resourceSpans", "scopeSpans", "spans")) == 2
    bodies = [each["body"]["stringValue"] for each in receiver.items("resourceLogs", "scopeLogs", "logRecords")]
    assert bodies == ["variable not honoured", "held up"]
    assert "sidegate_in_flight 3" in telemetry.metrics.render()
    assert 'sidegate_telemetry_dropped_total{signal="traces"} 0' in telemetry.metrics.render()


async def test_profile_names_another_receiver_and_ratio() -> None:
    """A namespace may have a collector of its own."""
    receiver = HttpReceiver()
    async with asyncio.timeout(10), receiver.listening() as base, aiohttp.ClientSession() as session:
        telemetry = Telemetry(Settings(otlp_endpoint="http://127.0.0.1:1"), session)
        telemetry.use(a_profile(telemetry=Wishes(otlp_endpoint=base, sample_ratio=0.0)))
        telemetry.tracing.observe(an_exchange())
        telemetry.use(a_profile(telemetry=Wishes(otlp_endpoint=base)))
        telemetry.tracing.observe(an_exchange())
        await telemetry.flush()

    assert len(receiver.items("resourceSpans", "scopeSpans", "spans")) == 2
