"""A real OpenTelemetry Collector takes our traces, metrics and logs, and what it writes keeps to the conventions."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.conventions import ATTRIBUTES, INSTRUMENTS, LINE_FIELDS
from sidecar.core.profile import Telemetry
from sidecar.shell.tracing import CLIENT, SERVER
from tests.parts import part
from tests.sidecar.receivers import values
from tests.telemetry.rig import PATIENCE_S, a_client, a_server, a_sidecar

pytestmark = pytest.mark.e2e  # the collector takes minutes to build

_LISTENING = re.compile(rb'Starting HTTP server.*"endpoint": "([^"]+)"')
# From the conventions themselves (semantic-conventions-genai, docs/gen-ai/mcp.md, May 2026), not from our tables.
REQUIRED = {"mcp.method.name"}
OF_A_TOOL = {"gen_ai.operation.name": "execute_tool"}
BUCKETS_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300]


@asynccontextmanager
async def a_collector(folder: Path) -> AsyncIterator[str]:
    """Run it; each signal goes to a file in *folder*. Give the base URL."""
    signals = ("traces", "metrics", "logs")
    configuration = folder / "collector.yaml"
    configuration.write_text(
        json.dumps(
            {
                "receivers": {"otlp": {"protocols": {"http": {"endpoint": "127.0.0.1:0"}}}},
                "exporters": {
                    f"file/{each}": {"path": str(folder / f"{each}.json"), "flush_interval": "50ms"} for each in signals
                },
                "service": {
                    "telemetry": {"metrics": {"level": "none"}},
                    "pipelines": {each: {"receivers": ["otlp"], "exporters": [f"file/{each}"]} for each in signals},
                },
            }
        )
    )
    program = await asyncio.create_subprocess_exec(
        part("otelcol"), "--config", configuration, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield f"http://{await _endpoint(program)}"
    finally:
        program.terminate()
        await program.communicate()  # which flushes its files


async def _endpoint(collector: asyncio.subprocess.Process) -> str:
    """Return the address that the collector says it listens on."""
    assert collector.stderr is not None
    while line := await collector.stderr.readline():
        if found := _LISTENING.search(line):
            return found[1].decode()
    raise AssertionError("the collector ended without listening")


def _items(path: Path, outer: str, scope: str, inner: str, service: str) -> Iterator[dict[str, Any]]:
    """Yield what came from *service*."""
    for line in path.read_text().splitlines():
        for resource in json.loads(line)[outer]:
            if values(resource["resource"])["service.name"] == service:
                for each in resource[scope]:
                    yield from each[inner]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the collector wrote of some calls."""
    folder = tmp_path_factory.mktemp("collected")

    async def collect() -> None:
        async with asyncio.timeout(PATIENCE_S), a_collector(folder) as base:
            variables = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": base,
                "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
                "OTEL_METRICS_EXPORTER": "otlp,prometheus",
                "OTEL_LOGS_EXPORTER": "otlp",
                "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            }
            async with (
                a_server(base) as server,
                a_sidecar(variables, server, folder, telemetry=Telemetry(content=True)) as (port, _),
            ):
                await a_client(base, port)

    asyncio.run(collect())
    return folder


def test_every_span_keeps_to_the_conventions(written: Path) -> None:
    """Name, kind, attributes and their types; a call has a span on either side, a refused one has one."""
    spans = list(_items(written / "traces.json", "resourceSpans", "scopeSpans", "spans", "billing"))
    known = {each.name: each for each in ATTRIBUTES}
    sides = {SERVER: ("both", "server"), CLIENT: ("both", "client")}
    calls = [each for each in spans if each["name"] == "tools/call add"]
    (denied,) = (each for each in spans if each["name"] == "tools/call drop")

    assert sorted(each["kind"] for each in calls) == [SERVER] * 3 + [CLIENT] * 3
    for span in spans:
        found = values(span)
        typed = {each["key"]: next(iter(each["value"])) for each in span["attributes"]}
        assert found.keys() >= REQUIRED
        assert span["name"] == " ".join(filter(None, (found["mcp.method.name"], found.get("gen_ai.tool.name"))))
        assert all(known[name].side in sides[span["kind"]] for name in found)
        assert all(typed[name] == ("intValue" if known[name].kind == "int" else "stringValue") for name in found)
        assert int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])
    assert all(values(each).items() >= OF_A_TOOL.items() for each in calls)
    content = [values(each)["gen_ai.tool.call.arguments"] for each in calls if each["kind"] == SERVER]
    assert [json.loads(each)["b"] for each in content] == [2, 2, 2]
    assert values(denied)["error.type"] == "denied"
    assert denied["kind"] == SERVER
    assert denied.get("status", {}) == {}  # what the caller did wrong is no error of the server


def test_a_trace_has_all_three_parties(written: Path) -> None:
    """The collector holds one trace with the client's, our and the server's spans."""
    traces = {
        service: {
            each["traceId"] for each in _items(written / "traces.json", "resourceSpans", "scopeSpans", "spans", service)
        }
        for service in ("agent", "billing", "records")
    }

    assert traces["agent"]
    assert traces["agent"] & traces["billing"] & traces["records"]


def test_every_metric_keeps_to_the_conventions(written: Path) -> None:
    """Names, units, kinds; the buckets that the conventions advise; an exemplar that names one of the spans."""
    metrics = {
        each["name"]: each
        for each in _items(written / "metrics.json", "resourceMetrics", "scopeMetrics", "metrics", "billing")
    }
    known = {each.name: each for each in INSTRUMENTS}
    operation = metrics["mcp.server.operation.duration"]
    (point,) = (
        each
        for each in operation["histogram"]["dataPoints"]
        if values(each) == {"mcp.method.name": "tools/call", "gen_ai.tool.name": "add"}
    )
    spans = {
        each["spanId"] for each in _items(written / "traces.json", "resourceSpans", "scopeSpans", "spans", "billing")
    }

    for name, metric in metrics.items():
        data = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}[known[name].kind]
        assert metric.get("unit", "") == known[name].unit
        assert {label for each in metric[data]["dataPoints"] for label in values({"attributes": []} | each)} <= set(
            known[name].labels
        )
        assert metric[data].get("aggregationTemporality", 2) == 2
    assert operation["unit"] == "s"
    assert point["explicitBounds"] == BUCKETS_S
    assert point["count"] == "2"
    assert {each["spanId"] for each in point["exemplars"]} <= spans


def test_every_log_record_names_its_span(written: Path) -> None:
    """A line for each message, with the ids of its span; what happens to the process is there, too."""
    records = list(_items(written / "logs.json", "resourceLogs", "scopeLogs", "logRecords", "billing"))
    requests = [each for each in records if each["body"]["stringValue"] == "request"]
    spans = {
        each["spanId"] for each in _items(written / "traces.json", "resourceSpans", "scopeSpans", "spans", "billing")
    }

    assert {each["spanId"] for each in requests} <= spans
    assert {values(each).get("target") for each in requests} == {None, "add", "drop"}
    assert all(set(values(each)) <= {name for name, _, _ in LINE_FIELDS} for each in requests)
    assert {each["severityText"] for each in requests} == {"INFO"}


def test_the_resource_says_where_it_comes_from(written: Path) -> None:
    """The workload, the pod, and what the operator adds."""
    for signal, outer in (("traces", "resourceSpans"), ("metrics", "resourceMetrics"), ("logs", "resourceLogs")):
        found = [
            values(resource["resource"])
            for line in (written / f"{signal}.json").read_text().splitlines()
            for resource in json.loads(line)[outer]
        ]
        (ours,) = {json.dumps(each, sort_keys=True) for each in found if each["service.name"] == "billing"}

        assert (
            json.loads(ours).items()
            >= {
                "service.namespace": "pay",
                "service.instance.id": "billing-7f",
                "k8s.namespace.name": "pay",
                "deployment.environment.name": "test",
            }.items()
        )
