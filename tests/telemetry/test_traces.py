"""A trace runs from the client through the sidecar to the server, each with an OpenTelemetry of its own."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar.shell.tracing import CLIENT, SERVER
from tests.telemetry.rig import PATIENCE_S, a_client, a_server, a_sidecar

Spans = dict[str, dict[str, Any]]  # by id


@asynccontextmanager
async def a_receiver(spans: Spans) -> AsyncIterator[str]:
    """Take OTLP in either encoding; give the base URL."""

    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        if request.content_type == "application/json":
            message = json_format.Parse(body, ExportTraceServiceRequest())
        else:
            message = ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            (service,) = (
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    # OTLP's JSON has ids in hex where protobuf's reader expects base64.
                    ids = [span.trace_id, span.span_id, span.parent_span_id]
                    if request.content_type == "application/json":
                        ids = [bytes.fromhex(base64.b64encode(each).decode()) for each in ids]
                    trace_id, span_id, parent = (each.hex() for each in ids)
                    spans[span_id] = {
                        "trace": trace_id, "parent": parent, "service": service, "name": span.name, "kind": span.kind
                    }  # fmt: skip
        return web.json_response({})

    application = web.Application()
    application.router.add_post("/v1/traces", take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_trace_runs_from_client_to_server_unbroken(tmp_path: Path) -> None:
    """Every span of the trace has its parent in it; ours hang under the client's, the server's HTTP spans under ours."""
    spans: Spans = {}
    async with (
        asyncio.timeout(PATIENCE_S),
        a_receiver(spans) as base,
        a_server(base) as server,
        a_sidecar({"OTEL_EXPORTER_OTLP_ENDPOINT": base}, server, tmp_path) as (port, _),
    ):
        trace_id = await a_client(base, port)
        # The end of the sidecar sends what is left, and the receiver is there until then.
    trace = {span_id: each for span_id, each in spans.items() if each["trace"] == trace_id}
    roots = [each for each in trace.values() if each["parent"] not in trace]
    calls = [each for each in trace.values() if each["name"] == "tools/call add"]
    under = {(each["service"], each["kind"]): trace[each["parent"]] for each in calls}
    http = [each for each in trace.values() if each["service"] == "records" and each["name"] == "POST"]
    (denied,) = (each for each in trace.values() if each["name"] == "tools/call drop")

    assert [(each["service"], each["name"]) for each in roots] == [("agent", "turn")]
    assert under["billing", SERVER]["service"] == "agent"
    assert (under["billing", CLIENT]["service"], under["billing", CLIENT]["kind"]) == ("billing", SERVER)
    assert under["records", SERVER]["service"] == "agent"  # the SDK reads `_meta`, which is left as it came
    assert {(trace[each["parent"]]["service"], trace[each["parent"]]["kind"]) for each in http} == {("billing", CLIENT)}
    assert (denied["service"], trace[denied["parent"]]["service"]) == ("billing", "agent")
