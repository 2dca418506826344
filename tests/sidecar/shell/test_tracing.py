"""Spans say what the conventions demand, reach a receiver in batches, and never hold a call up."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar.core.message import Message, Prompt, Resource, Shape, Tool
from sidecar.core.profile import Telemetry
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell import tracing
from sidecar.shell.tracing import Tracing, new_span_id, new_trace_id, span, traceparent
from tests.sidecar.exchanges import (
    STARTED_NS,
    a_call,
    a_profile,
    a_refused_exchange,
    an_exchange,
    an_unreadable_exchange,
)

WAIT_S = 10.0  # for a whole test; nothing here takes a second


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "LINGER_S", 0.0)
    monkeypatch.setattr(tracing, "BACKOFF_S", (0.0, 0.0))


def _attributes(exchange: Exchange) -> dict[str, str]:
    assert exchange.profile is not None
    return {each["key"]: next(iter(each["value"].values())) for each in span(exchange, exchange.profile)["attributes"]}


def _span(exchange: Exchange) -> dict[str, Any]:
    assert exchange.profile is not None
    return span(exchange, exchange.profile)


class Receiver:
    """An OTLP/HTTP receiver that keeps what it gets, and answers what the test says (200 when nothing is left)."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.hold: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Take one POST."""
        self.paths.append(request.path)
        self.bodies.append(await request.read())
        if self.hold is not None:
            await self.hold.wait()
        return web.Response(status=self.statuses.pop(0) if self.statuses else 200, text="{}")

    @property
    def names(self) -> list[str]:
        """Return the names of all spans that came."""
        return [
            each["name"]
            for body in self.bodies
            for resource in json.loads(body)["resourceSpans"]
            for scope in resource["scopeSpans"]
            for each in scope["spans"]
        ]


@asynccontextmanager
async def _exporting(receiver: Receiver) -> AsyncIterator[Tracing]:
    """Run a Tracing against *receiver*."""
    application = web.Application(client_max_size=2**26)
    application.router.add_post("/{path:.*}", receiver.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with asyncio.timeout(WAIT_S), aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        traces = Tracing(session, endpoint=f"http://127.0.0.1:{runner.addresses[0][1]}/base/")
        running = tasks.create_task(traces.run())
        try:
            yield traces
        finally:
            running.cancel()
            await runner.cleanup()


async def _until(claim: Callable[[], bool]) -> None:
    while not claim():  # noqa: ASYNC110 - the receiver is real
        await asyncio.sleep(0.005)


def test_span_of_a_tool_call_follows_the_conventions() -> None:
    """Name, kind, times and attributes of OpenTelemetry's MCP conventions."""
    document = _span(an_exchange(a_call("read_schema", request_id=7), parent_id="00f067aa0ba902b7"))

    assert document["name"] == "tools/call read_schema"
    assert document["kind"] == 2
    assert document["parentSpanId"] == "00f067aa0ba902b7"
    assert document["startTimeUnixNano"] == str(STARTED_NS)
    assert int(document["endTimeUnixNano"]) - STARTED_NS == 4_500_000
    assert document["status"] == {}
    assert _attributes(an_exchange(a_call("read_schema", request_id=7))) == {
        "mcp.method.name": "tools/call",
        "mcp.session.id": "8a1f-session",
        "mcp.protocol.version": "2025-11-25",
        "gen_ai.tool.name": "read_schema",
        "gen_ai.operation.name": "execute_tool",
        "jsonrpc.request.id": "7",
        "network.transport": "tcp",
        "client.address": "10.0.0.9",
        "client.port": "41234",
        "sidegate.decision": "allowed",
        "sidegate.policy.revision": "a1b2",
        "sidegate.agent.session": "run-42",
        "sidegate.agent.client_name": "planner",
        "sidegate.workload.spiffe_id": "spiffe://a.test/ns/agents/sa/planner",
        "sidegate.user.id": "alice",
        "sidegate.user.issuer": "https://id.test",
    }


def test_other_targets_have_their_own_attributes() -> None:
    """A resource's URI is an attribute, never part of the name: each would be a name of its own."""
    prompt = Message(shape=Shape.REQUEST, method="prompts/get", target=Prompt(name="p", arguments={}), params={})
    resource = Message(shape=Shape.REQUEST, method="resources/read", target=Resource(uri="file:///a"), params={})

    assert _span(an_exchange(prompt))["name"] == "prompts/get p"
    assert _attributes(an_exchange(prompt))["gen_ai.prompt.name"] == "p"
    assert _span(an_exchange(resource))["name"] == "resources/read"
    assert _attributes(an_exchange(resource))["mcp.resource.uri"] == "file:///a"


@pytest.mark.parametrize(
    ("changes", "error", "is_error"),
    [
        ({"error_code": -32603}, "-32603", True),
        ({"error_code": -32050}, "-32050", True),
        ({"error_code": -32602}, "-32602", False),
        ({"tool_failed": True}, "tool_error", True),
        ({"refusal": Refusal(Reason.UPSTREAM, "")}, "upstream", True),
        ({"refusal": Refusal(Reason.DENIED, "")}, "denied", False),
    ],
)
def test_only_the_server_s_faults_make_the_span_an_error(changes: dict[str, Any], error: str, is_error: bool) -> None:
    """What the caller did wrong has its error.type, and no error status."""
    exchange = an_exchange(**changes)

    assert _attributes(exchange)["error.type"] == error
    assert (_span(exchange)["status"] == {"code": 2}) is is_error


def test_refused_call_says_so() -> None:
    """The decision is an attribute."""
    assert _attributes(a_refused_exchange())["sidegate.decision"] == "refused"


def test_content_is_off_unless_the_profile_opts_in() -> None:
    """Arguments and results are sensitive."""
    exchange = an_exchange(a_call("t", {"sql": "select 1", "password": "hunter2"}))

    assert "select 1" not in json.dumps(_span(exchange))

    attributes = _attributes(an_exchange(a_call("t", {"sql": "select 1", "password": "hunter2"}), profile=_opted_in()))
    assert json.loads(attributes["gen_ai.tool.call.arguments"]) == {"sql": "select 1", "password": "[redacted]"}
    assert json.loads(attributes["gen_ai.tool.call.result"]) == {"content": [{"type": "text", "text": "ok"}]}


def _opted_in() -> Any:
    return a_profile(telemetry=Telemetry(content=True))


@pytest.mark.parametrize("result", [None, b"not json", b"[]"])
def test_content_of_an_odd_answer_is_left_out(result: bytes | None) -> None:
    """A span is made all the same."""
    assert "gen_ai.tool.call.result" not in _attributes(an_exchange(profile=_opted_in(), result=result))


def test_made_up_names_are_bounded() -> None:
    """A tool's name of a megabyte does not make a span of a megabyte."""
    message = Message(shape=Shape.REQUEST, method="tools/call", target=Tool(name="x" * 2**20, arguments={}), params={})

    assert len(json.dumps(_span(an_exchange(message)))) < 8192


def test_new_ids_are_hex_and_differ() -> None:
    """128 and 64 bits."""
    assert (len(bytes.fromhex(new_trace_id())), len(bytes.fromhex(new_span_id()))) == (16, 8)
    assert new_trace_id() != new_trace_id()


@pytest.mark.parametrize(("sampled", "flags"), [(True, b"01"), (False, b"00")])
def test_header_makes_our_span_the_parent(sampled: bool, flags: bytes) -> None:
    """The server's spans become children of ours, and sampling is the caller's."""
    exchange = an_exchange(sampled=sampled)

    assert traceparent(exchange) == b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-" + flags


async def test_spans_reach_the_receiver_as_otlp() -> None:
    """The reference definition of the protocol reads what was sent."""
    receiver = Receiver()
    async with _exporting(receiver) as traces:
        for number in range(3):
            traces.observe(an_exchange(a_call(f"tool-{number}"), profile=PROFILE))
        await _until(lambda: traces.exported == 3)
    request = json_format.Parse(receiver.bodies[0], ExportTraceServiceRequest())
    resource = {each.key: each.value.string_value for each in request.resource_spans[0].resource.attributes}
    first = request.resource_spans[0].scope_spans[0].spans[0]

    assert receiver.paths == ["/base/v1/traces"]
    assert resource["service.name"] == "billing"
    assert first.name == "tools/call tool-0"
    assert first.start_time_unix_nano == STARTED_NS
    # OTLP's JSON has ids in hex where protobuf's has base64.
    assert base64.b64encode(first.trace_id) == b"0af7651916cd43dd8448eb211c80319c"


PROFILE = a_profile()


async def test_receiver_that_is_busy_is_asked_again() -> None:
    """429 and 503 are retried (OTLP/HTTP, failures); the spans come once."""
    receiver = Receiver(429, 503)
    async with _exporting(receiver) as traces:
        traces.observe(an_exchange())
        await _until(lambda: traces.exported == 1)

    assert len(receiver.bodies) == 3
    assert traces.dropped == 0


@pytest.mark.parametrize("status", [400, 401, 307])
async def test_receiver_that_refuses_for_good_is_not_asked_again(status: int) -> None:
    """The batch is dropped and counted; a redirect is not followed."""
    receiver = Receiver(status)
    async with _exporting(receiver) as traces:
        traces.observe(an_exchange())
        await _until(lambda: traces.dropped == 1)

    assert len(receiver.bodies) == 1


async def test_receiver_that_is_away_costs_only_its_spans() -> None:
    """Tried a few times, dropped, and the next ones are tried again."""
    async with _exporting(Receiver()) as traces:
        for count, endpoint in enumerate(("http://127.0.0.1:1", "no url"), start=1):
            traces.use_endpoint(endpoint)
            traces.observe(an_exchange())
            await _until(lambda count=count: traces.dropped == count)
        traces.use_endpoint(None)
        traces.observe(an_exchange())
        await _until(lambda: traces.exported == 1)


async def test_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In spans and in bytes; what does not fit is dropped and counted."""
    monkeypatch.setattr(tracing, "MAX_QUEUED", 3)
    receiver = Receiver()
    async with _exporting(receiver) as traces:
        for _ in range(5):
            traces.observe(an_exchange())

        assert traces.dropped == 2
        await _until(lambda: traces.exported == 3)
        monkeypatch.setattr(tracing, "MAX_QUEUED_BYTES", 10)
        traces.observe(an_exchange())
        assert traces.dropped == 3


async def test_large_queue_goes_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each batch has one resource: spans of two bundles are not mixed."""
    monkeypatch.setattr(tracing, "MAX_BATCH", 2)
    receiver = Receiver()
    async with _exporting(receiver) as traces:
        for profile in (PROFILE, PROFILE, PROFILE, a_profile()):
            traces.observe(an_exchange(profile=profile))
        await _until(lambda: traces.exported == 4)

    assert len(receiver.bodies) == 3


async def test_unsampled_trace_is_left_alone_unless_refused() -> None:
    """The caller decides on sampling; it must not be able to hide a refusal."""
    receiver = Receiver()
    async with _exporting(receiver) as traces:
        traces.observe(an_exchange(sampled=False))
        traces.observe(an_unreadable_exchange())  # before any bundle: no resource to name
        traces.observe(a_refused_exchange(sampled=False, message=a_call("drop_table")))
        await _until(lambda: traces.exported == 1)

    assert receiver.names == ["tools/call drop_table"]


async def test_without_a_receiver_spans_are_counted_and_dropped() -> None:
    """Nothing is kept for nobody."""
    async with aiohttp.ClientSession() as session:
        traces = Tracing(session, endpoint="")
        traces.observe(an_exchange())

        assert (traces.dropped, traces.exported) == (1, 0)


async def test_flush_sends_what_is_left() -> None:
    """On shutdown, with `run` still waiting to fill its batch."""
    receiver = Receiver()
    async with _exporting(receiver) as traces:
        for _ in range(3):
            traces.observe(an_exchange())
        await traces.flush()
        await _until(lambda: traces.exported == 3)  # `run` may have taken some already


async def test_flush_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that hangs does not hold the shutdown up; every span is accounted for."""
    monkeypatch.setattr(tracing, "FLUSH_S", 0.05)
    monkeypatch.setattr(tracing, "MAX_BATCH", 2)
    receiver = Receiver()
    receiver.hold = asyncio.Event()
    async with _exporting(receiver) as traces:
        for _ in range(5):
            traces.observe(an_exchange(profile=PROFILE))
        await _until(lambda: len(receiver.bodies) == 1)
        await traces.flush()
        receiver.hold.set()

        assert traces.dropped == 3
    assert traces.dropped + traces.exported == 5  # two were on their way


async def test_cancelled_export_counts_its_spans() -> None:
    """Cut off in the middle of a POST."""
    receiver = Receiver()
    receiver.hold = asyncio.Event()
    async with _exporting(receiver) as traces:
        traces.observe(an_exchange())
        await _until(lambda: len(receiver.bodies) == 1)
        receiver.hold.set()

    assert traces.dropped + traces.exported == 1
