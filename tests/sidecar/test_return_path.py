"""sidecar.return_path: what the server says is kept where it belongs, and what it asks is judged as it comes."""

from dataclasses import replace
from hashlib import sha256

import msgspec
import pytest
from msgspec import Raw

from sidecar import return_path as module
from sidecar.core.content import Found
from sidecar.core.message import Ask, Message, Shape
from sidecar.core.profile import Limit
from sidecar.core.review import Seen
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import Memory, scope
from sidecar.return_path import judge_ask, note, open_endpoint
from tests.builders import STREAM, a_permit, a_principal, a_snapshot, an_exchange
from tests.fakes import FakeEngine, allowing
from tests.sidecar.core.contents import a_rule

RESULT = b'{"id":7,"result":{}}'


def under_way(message: Message | None = None, *, session_id: str | None = "s1") -> Exchange:
    """An exchange that was admitted and sent."""
    permit = a_permit() if message is None else a_permit(message)
    exchange = an_exchange(message=permit.question.message)
    return replace(exchange, permit=permit, principal=a_principal(), session_id=session_id)


def test_what_content_rules_find_on_a_stream_is_added_up() -> None:
    """It has no end: an entry for each event would fill the memory."""
    exchange = under_way()
    for count in (1, 2):
        note(Seen(data=b"", found=(Found(rule=a_rule(regex="x"), where="results", count=count),)), exchange, Memory())

    assert [each.count for each in exchange.content] == [3]


@pytest.mark.parametrize(("answers", "is_kept"), [(7, True), (8, False), ("7", False), (None, False)])
def test_the_answer_to_its_request_is_the_result(answers: str | int | None, is_kept: bool) -> None:
    """The record keeps no other; how many items were hidden counts either way."""
    exchange = under_way()
    note(Seen(data=RESULT, answers=answers, error_code=3, tool_failed=True, hidden=2), exchange, Memory())

    assert (exchange.hidden, exchange.result) == (2, RESULT if is_kept else None)
    assert (exchange.error_code, exchange.tool_failed) == ((3, True) if is_kept else (None, False))
    assert (exchange.result_bytes, exchange.result_sha256) == (
        (len(RESULT), sha256(RESULT).hexdigest()) if is_kept else (0, None)
    )


def test_a_stream_without_a_request_has_no_result() -> None:
    """A GET asks for nothing that could be answered; a client's response has an id, too."""
    stream = under_way(STREAM)
    response = under_way(Message(shape=Shape.RESPONSE, method="response", id=7, params={}))
    for exchange in (stream, response):
        note(Seen(data=RESULT, answers=7), exchange, Memory())

    assert (stream.result, response.result) == (None, None)


def test_a_result_beyond_the_cap_is_known_by_size_and_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit record does not keep megabytes."""
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 10)
    exchange = under_way()
    note(Seen(data=RESULT, answers=7), exchange, Memory())

    assert (exchange.result, exchange.result_bytes) == (None, len(RESULT))
    assert exchange.result_sha256 == sha256(RESULT).hexdigest()


def test_an_answer_that_was_refused_says_why() -> None:
    """The call was allowed, and yet its answer did not come."""
    exchange = under_way()
    refusal = Refusal(Reason.DENIED, "no")
    note(Seen(data=b"{}", answers=7, error_code=403, refusal=refusal), exchange, Memory())

    assert (exchange.refusal, exchange.error_code) == (refusal, 403)


def test_a_task_belongs_to_whom_it_was_given() -> None:
    """To nobody else, and to nobody anew."""
    memory, other = Memory(), under_way()
    other.principal = a_principal("bob")
    note(Seen(data=RESULT, task_id="t"), under_way(), memory)
    note(Seen(data=RESULT, task_id="t"), other, memory)

    assert memory.tasks.owns("t", a_principal())
    assert not memory.tasks.owns("t", a_principal("bob"))


def an_ask(request_id: str | int | None = "a1") -> Message:
    """What a server asks."""
    target = Ask(method="sampling/createMessage")
    return Message(shape=Shape.REQUEST, method=target.method, id=request_id, target=target, params={})


def test_an_allowed_ask_may_be_answered() -> None:
    """By the session that it went to, and no other; it is judged for the one it goes to."""
    memory, carrier, exchange, engine = Memory(), under_way(), an_exchange(), allowing()
    judge_ask(exchange, an_ask(), carrier, a_snapshot(engine), memory, clock_s=0)

    assert exchange.admission is not None
    assert memory.asked.has(scope(carrier), "a1")
    assert not memory.asked.has(scope(under_way(session_id="s2")), "a1")
    asked = engine.asked[0]
    assert (asked.message.method, asked.principal, asked.session_id) == (
        "sampling/createMessage",
        a_principal(),
        carrier.permit and carrier.permit.question.session_id,
    )


@pytest.mark.parametrize(
    ("engine", "limits", "reason"),
    [
        (FakeEngine(verdict=allowing("x").decide(a_permit().question)), (), Reason.DENIED),
        (allowing(), (Limit(name="l", rate_per_s=1e-6, burst=1, methods=("sampling/createMessage",)),), Reason.THROTTLED),
    ],
)  # fmt: skip
def test_a_refused_ask_may_not_be_answered(engine: FakeEngine, limits: tuple[Limit, ...], reason: Reason) -> None:
    """Policy and limits hold for it as for a call; the record has it all the same."""
    memory, exchange, snapshot = Memory(), an_exchange(), a_snapshot(engine, limits=limits)
    if limits:
        judge_ask(an_exchange(), an_ask("a0"), under_way(), snapshot, memory, clock_s=0)
    with pytest.raises(Refusal) as caught:
        judge_ask(exchange, an_ask(), under_way(), snapshot, memory, clock_s=0)

    assert (caught.value.reason, exchange.message, exchange.admission) == (reason, an_ask(), None)
    assert not memory.asked.has(scope(under_way()), "a1")


def test_an_ask_without_id_waits_for_nothing() -> None:
    """The next request of the client carries its answer (MCP 2026-07-28)."""
    memory = Memory()
    judge_ask(an_exchange(), an_ask(None), under_way(), a_snapshot(allowing()), memory, clock_s=0)

    assert memory.asked.waiting == {}


def test_an_endpoint_is_its_readers_session() -> None:
    """What is asked and answered there belongs to it (2024-11-05)."""
    memory, stream = Memory(), under_way(STREAM, session_id=None)
    open_endpoint("/messages?s=1", stream, memory)

    assert memory.sessions.require("/messages?s=1", a_principal())
    assert stream.session_id == "/messages?s=1"


def test_an_endpoint_of_another_cannot_be_had() -> None:
    """A server without session ids serves one reader at a time; the same one may come again."""
    memory, other = Memory(), under_way(STREAM)
    other.principal = a_principal("bob")
    open_endpoint("/messages", under_way(STREAM), memory)
    open_endpoint("/messages", under_way(STREAM), memory)
    with pytest.raises(Refusal) as caught:
        open_endpoint("/messages", other, memory)

    assert caught.value.reason is Reason.UPSTREAM
    assert memory.sessions.require("/messages", a_principal())


def test_what_tools_say_of_headers_is_learnt() -> None:
    """From every list that passes; the next call is held to it."""
    memory = Memory()
    schema = b'{"name":"a","inputSchema":{"properties":{"region":{"type":"string","x-mcp-header":"Region"}}}}'
    note(Seen(data=b"", tools=[("a", Raw(schema))]), under_way(), memory)

    assert [each.header for each in memory.param_headers.known["a"]] == [b"mcp-param-region"]


def test_an_ask_may_bring_a_context_of_its_own() -> None:
    """The server's own span is its parent then; the call that carries it is a link."""
    ask, exchange = an_ask(), an_exchange()
    exchange.trace_id, exchange.parent_id = "c" * 32, "d" * 16
    own = {"traceparent": f"00-{'c' * 32}-{'e' * 16}-01"}
    asked = msgspec.structs.replace(ask, params={"_meta": own})
    judge_ask(exchange, asked, under_way(), a_snapshot(allowing()), Memory(), clock_s=0)

    assert (exchange.trace_id, exchange.parent_id) == ("c" * 32, "e" * 16)
    assert exchange.link is not None
    assert exchange.link.parent_id == "d" * 16
