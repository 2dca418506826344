"""A real OpenTelemetry Collector takes audit lines as log records, and behind it the chain can still be verified."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.config import Settings
from sidecar.core.chain import verify
from sidecar.shell.audit import Audit
from sidecar.shell.shipping import Shipping, opened
from tests.fakes import eventually
from tests.sidecar.exchanges import STARTED_NS, a_refused_exchange, an_exchange
from tests.telemetry.rig import PATIENCE_S
from tests.telemetry.test_collector import a_collector

pytestmark = pytest.mark.e2e  # the collector takes minutes to build


async def test_the_collector_keeps_the_lines_as_they_are(tmp_path: Path) -> None:
    """With the time, the trace and the severity that the protocol has fields for."""
    written = tmp_path / "logs.json"
    async with asyncio.timeout(PATIENCE_S), a_collector(tmp_path) as base:
        settings = Settings(
            audit_sink=str(tmp_path / "audit.jsonl"), audit_keep_bytes=2.0**20, audit_ship=base, pod="billing-7f"
        )
        file = opened(settings)
        assert file is not None
        audit = Audit(file, sign=lambda _: "signature")
        for _ in range(50):
            audit.begin([an_exchange()])
            audit.observe(an_exchange())
            audit.observe(a_refused_exchange())
        audit.close()
        shipping = Shipping(settings, file, None)
        await shipping.flush()
        await eventually(lambda: len(_records(written)) == 151, what="the records")

    assert (shipping.shipped, shipping.rejected) == (151, 0)
    records = _records(written)
    arrived = [each["body"]["stringValue"].encode() for each in records]
    report = verify(arrived, None)
    assert report.is_sound
    assert [(state.lines, state.closed) for state in report.chains.values()] == [(151, True)]
    assert records[0]["timeUnixNano"] == str(STARTED_NS)
    assert records[0]["traceId"] == "0af7651916cd43dd8448eb211c80319c"
    assert [each["severityText"] for each in records[:3]] == ["INFO", "INFO", "WARN"]
    assert {each["eventName"] for each in records} == {"sidegate.audit"}


def _records(written: Path) -> list[dict[str, Any]]:
    lines = written.read_text().splitlines() if written.exists() else []
    return [
        record
        for line in lines
        for resource in json.loads(line)["resourceLogs"]
        for scope in resource["scopeLogs"]
        for record in scope["logRecords"]
    ]
