"""Spans say what the conventions demand, on both sides of the sidecar, and hang where the caller's trace has them."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sidecar.core.message import Message, Prompt, Resource, Shape, Tool
from sidecar.core.otel import Sampler
from sidecar.core.profile import Telemetry
from sidecar.core.trace import TraceContext, sent_id
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange, Outbound
from sidecar.shell.tracing import CLIENT, SERVER, Tracing, new_span_id, new_trace_id, spans, traceparent
from tests.sidecar.exchanges import (
    AGENT,
    STARTED_NS,
    a_call,
    a_profile,
    a_refused_exchange,
    an_exchange,
    an_unreadable_exchange,
)
from tests.sidecar.receivers import Kept, values

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def _spans(exchange: Exchange) -> list[dict[str, Any]]:
    count, items = spans(exchange, exchange.profile or a_profile(), "127.0.0.1")
    found: list[dict[str, Any]] = json.loads(b"[%b]" % items)

    assert len(found) == count
    return found


def _tracing(kept: Kept, sampler: Sampler | None = None) -> Tracing:
    return Tracing(kept, sampler=sampler or Sampler(), host="127.0.0.1")


def test_call_has_a_span_on_either_side() -> None:
    """SERVER toward the client, and as its child CLIENT toward the server: names, kinds, times and attributes."""
    exchange = an_exchange(a_call("read_schema", request_id=7), parent_id="00f067aa0ba902b7", sent_s=0.0002)
    toward_client, toward_server = _spans(exchange)
    said = {
        "mcp.method.name": "tools/call",
        "mcp.session.id": "8a1f-session",
        "mcp.protocol.version": "2025-11-25",
        "gen_ai.tool.name": "read_schema",
        "gen_ai.operation.name": "execute_tool",
        "jsonrpc.request.id": "7",
        "network.transport": "tcp",
        "network.protocol.name": "http",
    }

    assert toward_client["name"] == toward_server["name"] == "tools/call read_schema"
    assert (toward_client["kind"], toward_server["kind"]) == (SERVER, CLIENT)
    assert toward_client["parentSpanId"] == "00f067aa0ba902b7"
    assert toward_server["parentSpanId"] == toward_client["spanId"] == exchange.span_id
    assert toward_server["spanId"] == sent_id(exchange.span_id)
    assert toward_client["startTimeUnixNano"] == str(STARTED_NS)
    assert int(toward_server["startTimeUnixNano"]) - STARTED_NS == 200_000
    assert int(toward_client["endTimeUnixNano"]) - STARTED_NS == 4_500_000
    assert toward_client["status"] == toward_server["status"] == {}
    assert values(toward_client) == said | {
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
    assert values(toward_server) == said | {"server.address": "127.0.0.1", "server.port": "8000"}


def test_stdio_server_is_reached_by_a_pipe() -> None:
    """It has no address."""
    profile = a_profile()
    profile = type(profile)(
        server=type(profile.server)(namespace="n", workload="w", name="w", port=1, transport="stdio")
    )
    found = values(_spans(an_exchange(profile=profile))[1])

    assert found["network.transport"] == "pipe"
    assert "server.address" not in found


def test_call_of_an_agent_has_one_span() -> None:
    """CLIENT, to where it went, and with who proved to be there."""
    outbound = Outbound(host="records.demo", port=8443, expected="spiffe://a.test/*", server=AGENT)
    (span,) = _spans(an_exchange(outbound=outbound))

    assert (span["kind"], span["spanId"]) == (CLIENT, "b7ad6b7169203331")
    assert values(span)["server.address"] == "records.demo"
    assert values(span)["server.port"] == "8443"
    assert values(span)["sidegate.peer.spiffe_id"] == str(AGENT)


@pytest.mark.parametrize("address", ["192.0.2.7", None])
def test_connection_of_a_server_has_no_span(address: str | None) -> None:
    """Let out or refused: a span is about a message."""
    kept = Kept()
    exchange = an_exchange(outbound=Outbound(host="api.example.com", port=443, expected="", address=address))
    exchange.refusal = None if address else Refusal(Reason.EGRESS, "no")
    _tracing(kept).observe(exchange)

    assert kept.items == []


def test_other_targets_have_their_own_attributes() -> None:
    """A resource's URI is an attribute, never part of the name: each would be a name of its own."""
    prompt = Message(
        shape=Shape.REQUEST, method="prompts/get", id="a", target=Prompt(name="p", arguments={}), params={}
    )
    resource = Message(shape=Shape.REQUEST, method="resources/read", target=Resource(uri="file:///a"), params={})
    of_prompt, of_resource = (_spans(an_exchange(each))[0] for each in (prompt, resource))

    assert of_prompt["name"] == "prompts/get p"
    assert values(of_prompt)["gen_ai.prompt.name"] == "p"
    assert values(of_prompt)["jsonrpc.request.id"] == "a"
    assert of_resource["name"] == "resources/read"
    assert values(of_resource)["mcp.resource.uri"] == "file:///a"


@pytest.mark.parametrize(
    ("changes", "error", "is_error", "of_server"),
    [
        ({"error_code": -32603}, "-32603", True, "-32603"),
        ({"error_code": -32050}, "-32050", True, "-32050"),
        ({"error_code": -32602}, "-32602", False, "-32602"),
        ({"tool_failed": True}, "tool_error", True, "tool_error"),
        ({"aborted": "client gone"}, "aborted", False, "aborted"),
        ({"refusal": Refusal(Reason.UPSTREAM, "")}, "upstream", True, "upstream"),
        ({"refusal": Refusal(Reason.DENIED, "")}, "denied", False, None),
        ({"refusal": Refusal(Reason.DENIED, ""), "error_code": -32602}, "denied", False, "-32602"),
        ({"refusal": Refusal(Reason.DENIED, ""), "tool_failed": True}, "denied", False, "tool_error"),
    ],
)
def test_each_side_tells_its_own_errors(
    changes: dict[str, Any], error: str, is_error: bool, of_server: str | None
) -> None:
    """What the caller did wrong is no error of the server; toward the server every error is one."""
    toward_client, toward_server = _spans(an_exchange(**changes))

    assert values(toward_client)["error.type"] == error
    assert (toward_client["status"] == {"code": 2}) is is_error
    assert values(toward_server).get("error.type") == of_server
    assert (toward_server["status"] == {"code": 2}) is (of_server is not None)


def test_refused_call_has_one_span_that_says_so() -> None:
    """Nothing went to the server."""
    (span,) = _spans(a_refused_exchange())

    assert span["kind"] == SERVER
    assert values(span)["sidegate.decision"] == "refused"


def test_unreadable_message_has_a_span() -> None:
    """Without what nobody could read."""
    (span,) = _spans(replace(an_unreadable_exchange(), profile=a_profile()))

    assert span["name"] == "unreadable"
    assert "mcp.method.name" not in values(span)


def test_request_around_the_message_is_a_link() -> None:
    """The message's own context is the parent (semantic conventions for MCP, context propagation)."""
    link = TraceContext(trace_id="1" * 32, parent_id="2" * 16, sampled=True)
    toward_client, toward_server = _spans(an_exchange(link=link, parent_id="3" * 16))

    assert toward_client["links"] == [{"traceId": "1" * 32, "spanId": "2" * 16}]
    assert "links" not in toward_server


def test_content_is_off_unless_the_profile_opts_in() -> None:
    """Arguments and results are sensitive."""
    call = a_call("t", {"sql": "select 1", "password": "hunter2"})

    assert "select 1" not in json.dumps(_spans(an_exchange(call)))

    attributes = values(_spans(an_exchange(call, profile=_opted_in()))[0])
    assert json.loads(attributes["gen_ai.tool.call.arguments"]) == {"sql": "select 1", "password": "[redacted]"}
    assert json.loads(attributes["gen_ai.tool.call.result"]) == {"content": [{"type": "text", "text": "ok"}]}


def _opted_in() -> Any:
    return a_profile(telemetry=Telemetry(content=True))


@pytest.mark.parametrize("result", [None, b"not json", b"[]"])
def test_content_of_an_odd_answer_is_left_out(result: bytes | None) -> None:
    """A span is made all the same."""
    found = values(_spans(an_exchange(profile=_opted_in(), result=result))[0])

    assert "gen_ai.tool.call.result" not in found


@pytest.mark.parametrize("name", ["x" * 2**20, "\ud800 lone", 'a "quoted"\\ name\n'])
def test_made_up_names_are_bounded_and_break_nothing(name: str) -> None:
    """A tool's name of a megabyte does not make a span of a megabyte."""
    message = Message(shape=Shape.REQUEST, method="tools/call", target=Tool(name=name, arguments={}), params={})

    assert len(json.dumps(_spans(an_exchange(message)))) < 16384


def test_new_ids_are_hex_and_differ() -> None:
    """128 and 64 bits; our other span's id differs from both."""
    span_id = new_span_id()

    assert (len(bytes.fromhex(new_trace_id())), len(bytes.fromhex(span_id))) == (16, 8)
    assert new_trace_id() != new_trace_id()
    assert len({span_id, sent_id(span_id), new_span_id()}) == 3


def test_server_s_spans_hang_under_ours() -> None:
    """Under the one toward the server, with the decision on sampling."""
    exchange = an_exchange()
    tracing = _tracing(Kept())

    assert tracing.context(exchange) == f"00-{TRACE_ID}-{sent_id(exchange.span_id)}-01".encode()
    tracing.use(Telemetry(sample_ratio=0.0))
    assert tracing.context(exchange).endswith(b"-00")
    tracing.use(Telemetry())
    assert tracing.context(exchange).endswith(b"-01")


def test_without_a_receiver_the_caller_s_context_travels_on() -> None:
    """A span that nobody gets must not be a parent; and who brought none gets none."""
    tracing = _tracing(Kept(is_on=False))

    assert tracing.context(an_exchange(parent_id="3" * 16, sampled=False)) == f"00-{TRACE_ID}-{'3' * 16}-00".encode()
    assert tracing.context(an_exchange()) == b""


def test_agent_s_call_always_has_a_context() -> None:
    """By it the records of both sidecars are found together."""
    outbound = Outbound(host="h", port=1, expected="spiffe://a.test/*", server=AGENT)
    exchange = an_exchange(outbound=outbound)

    for kept in (Kept(), Kept(is_on=False)):
        assert _tracing(kept).context(exchange) == traceparent(exchange)


def test_unsampled_trace_is_left_alone_unless_refused() -> None:
    """The caller decides on sampling; it must not be able to hide a refusal."""
    kept = Kept()
    tracing = _tracing(kept)
    tracing.observe(an_exchange(sampled=False, parent_id="3" * 16))
    tracing.observe(an_unreadable_exchange())  # before any bundle: no server to name
    tracing.observe(a_refused_exchange(sampled=False, parent_id="3" * 16, message=a_call("drop_table")))

    assert [each["name"] for each in kept.items] == ["tools/call drop_table"]


def test_without_a_receiver_nothing_is_made() -> None:
    """Nor named by exemplars."""
    kept = Kept(is_on=False)
    tracing = _tracing(kept)
    tracing.observe(an_exchange())

    assert kept.items == []
    assert not tracing.names(an_exchange())
