"""The real OpenTelemetry Collector takes our spans as they are."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.core.profile import Telemetry
from sidecar.shell.tracing import Tracing
from tests.fakes import eventually
from tests.parts import part
from tests.sidecar.exchanges import a_call, a_profile, a_refused_exchange, an_exchange

pytestmark = pytest.mark.e2e  # the collector takes minutes to build

START_S = 60.0  # on a machine that builds something at the same time
_LISTENING = re.compile(rb'Starting HTTP server.*"endpoint": "([^"]+)"')


async def test_collector_reads_our_spans(tmp_path: Path) -> None:
    """An allowed call and a refused one, with their ids, resource and attributes, in the collector's own output."""
    written = tmp_path / "traces.json"
    configuration = tmp_path / "collector.yaml"
    configuration.write_text(json.dumps(_configuration(written)))
    collector = await asyncio.create_subprocess_exec(
        part("otelcol"), "--config", configuration, stderr=asyncio.subprocess.PIPE
    )
    try:
        endpoint = await _endpoint(collector)
        async with aiohttp.ClientSession() as session:
            traces = Tracing(session, endpoint=f"http://{endpoint}")
            profile = a_profile(telemetry=Telemetry(content=True))
            traces.observe(an_exchange(a_call("read_schema", {"table": "invoices"}), profile=profile))
            traces.observe(a_refused_exchange(message=a_call("drop_table"), profile=profile))
            await traces.flush()

            assert (traces.exported, traces.dropped) == (2, 0)
        await eventually(lambda: written.exists() and b"\n" in written.read_bytes(), what="the collector's line")
    finally:
        collector.terminate()
        await collector.communicate()
    resource = json.loads(written.read_text().splitlines()[0])["resourceSpans"][0]
    allowed, refused = resource["scopeSpans"][0]["spans"]

    assert _values(resource["resource"])["service.name"] == "billing"
    assert allowed["traceId"] == "0af7651916cd43dd8448eb211c80319c"
    assert allowed["name"] == "tools/call read_schema"
    assert json.loads(_values(allowed)["gen_ai.tool.call.arguments"]) == {"table": "invoices"}
    assert _values(allowed)["client.port"] == "41234"
    assert _values(refused)["sidegate.decision"] == "refused"


def _configuration(written: Path) -> dict[str, Any]:
    return {
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": "127.0.0.1:0"}}}},
        "exporters": {"file": {"path": str(written), "flush_interval": "50ms"}},
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}},
        },
    }


async def _endpoint(collector: asyncio.subprocess.Process) -> str:
    """Return the address that the collector says it listens on."""
    assert collector.stderr is not None
    async with asyncio.timeout(START_S):
        while line := await collector.stderr.readline():
            if found := _LISTENING.search(line):
                return found[1].decode()
    raise AssertionError("the collector ended without listening")


def _values(described: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: next(iter(each["value"].values())) for each in described["attributes"]}
