"""Content rules on a call's whole way: judged, masked, judged again, sent; answered; recorded."""

from typing import Any

import msgspec
import orjson
import pytest

from sidecar.core.answer import Answer, Mode
from sidecar.core.authorise import Question, Verdict
from sidecar.core.connection import Connection, Headers
from sidecar.core.content import compiled
from sidecar.core.filters import Reader
from sidecar.core.limits import Admission
from sidecar.core.message import Tool
from sidecar.core.ownership import tasks
from sidecar.core.profile import ContentRule
from sidecar.core.splicing import MAX_MARKS
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import Batch, Memory, Snapshot, judge
from sidecar.record import line
from sidecar.return_path import note
from tests.builders import NOW_S, a_call, a_connection, a_snapshot, an_exchange
from tests.fakes import FakeEngine, allowing
from tests.sidecar.core.contents import KEY, a_rule

SECRET = a_call("read_schema", {"key": KEY.decode(), "n": 1})
SAID = b'{"jsonrpc":"2.0","id":7,"result":{"content":[{"type":"text","text":"' + KEY + b'"}]}}'
JSON: Headers = [(b"content-type", b"application/json")]
EVENTS: Headers = [(b"content-type", b"text/event-stream")]


def a_screening_snapshot(*rules: ContentRule, engine: Any = None) -> Snapshot:
    """What judges, with content rules."""
    snapshot = a_snapshot(engine or allowing())
    profile = msgspec.structs.replace(snapshot.profile, content=rules or (a_rule(patterns=("aws-key",)),))
    return Snapshot(
        **{name: getattr(snapshot, name) for name in Snapshot.__slots__ if name != "profile"}, profile=profile
    )


def judged(connection: Connection, snapshot: Snapshot) -> tuple[Exchange, Admission | Batch | Refusal]:
    """Judge *connection*; return its record and how it ended."""
    exchange = an_exchange(connection)
    exchange.profile = snapshot.profile
    try:
        found = judge(
            exchange,
            snapshot,
            Memory(),
            now_s=NOW_S,
            clock_s=0.0,
            divide=lambda count: [exchange, *(an_exchange(connection) for _ in range(count - 1))],
        )
    except Refusal as refusal:
        exchange.refusal = refusal
        return exchange, refusal
    assert isinstance(found, Admission | Batch)
    return exchange, found


class Seeing(FakeEngine):
    """Allows what holds no secret and remembers what it was asked; what it is told to refuse, it refuses when masked."""

    name = "seeing"

    def __init__(self, *, forbids_masked: bool = False) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self._forbids_masked = forbids_masked

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        target = question.message.target
        assert isinstance(target, Tool)
        self.asked.append(target.arguments["key"])
        return Verdict(allowed=not (self._forbids_masked and target.arguments["key"] == "[masked]"), policies=("p",))


def test_a_masked_message_is_judged_again_and_that_one_is_sent() -> None:
    """What was judged is what is sent: body, message and permit are those of the masked one."""
    engine = Seeing()
    exchange, admission = judged(a_connection(SECRET), a_screening_snapshot(engine=engine))
    assert isinstance(admission, Admission)
    message = admission.permit.question.message

    assert engine.asked == [KEY.decode(), "[masked]"]
    assert exchange.connection.body == message.body == SECRET.replace(KEY, b"[masked]")
    assert exchange.message is message
    assert exchange.permit is admission.permit


def test_a_policy_may_refuse_the_masked_message() -> None:
    """It is a new one."""
    _, refusal = judged(a_connection(SECRET), a_screening_snapshot(engine=Seeing(forbids_masked=True)))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.DENIED


def test_what_holds_nothing_is_judged_once() -> None:
    """And sent as the bytes that came."""
    engine = Seeing()
    connection = a_connection(a_call("read_schema", {"key": "x"}))
    exchange, _ = judged(connection, a_screening_snapshot(engine=engine))

    assert engine.asked == ["x"]
    assert exchange.connection is connection


def test_a_denied_call_is_on_record_without_what_it_held() -> None:
    """Rule, place and number are all that is said."""
    exchange, refusal = judged(a_connection(SECRET), a_screening_snapshot(a_rule(patterns=("aws-key",), action="deny")))
    assert isinstance(refusal, Refusal)
    document = orjson.loads(line(exchange))

    assert (document["decision"]["outcome"], document["decision"]["detail"]) == ("refused", "content rule secrets")
    assert document["decision"]["content"] == [
        {"rule": "secrets", "action": "deny", "mode": "enforce", "where": "arguments", "count": 1}
    ]
    assert document["arguments"]["content"] == {"key": "[redacted]", "n": 1}
    assert KEY not in orjson.dumps(document)


def test_a_call_that_holds_too_much_to_be_masked_is_on_record_without_it() -> None:
    """It is refused; what was found in it must not stand in the audit instead."""
    secrets = a_call("read_schema", {"key": [KEY.decode()] * (MAX_MARKS + 1)})
    exchange, refusal = judged(a_connection(secrets), a_screening_snapshot())
    assert isinstance(refusal, Refusal)
    written = line(exchange)

    assert (refusal.reason, refusal.detail) == (Reason.DENIED, f"a rule would mask more than {MAX_MARKS} places")
    assert KEY not in written
    assert orjson.loads(written)["decision"]["content"][0]["count"] == MAX_MARKS + 1


def test_one_denied_message_keeps_a_batch_from_being_sent() -> None:
    """As every refusal does."""
    version = [(b"mcp-protocol-version", b"2025-03-26")]
    body = b"[" + SECRET + b"," + a_call("read_schema", {"key": "x"}, request_id=8) + b"]"
    _, batch = judged(
        a_connection(body, headers=version), a_screening_snapshot(a_rule(patterns=("aws-key",), action="deny"))
    )
    assert isinstance(batch, Batch)
    assert batch.admission is None
    assert [each.refusal and each.refusal.reason for each in batch.exchanges] == [Reason.DENIED, Reason.NOT_SENT]


def test_a_batch_is_masked_and_judged_again() -> None:
    """Each of its messages goes as it was judged."""
    version = [(b"mcp-protocol-version", b"2025-03-26")]
    body = b"[" + SECRET + b"," + a_call("read_schema", {"key": "x"}, request_id=8) + b"]"
    exchange, batch = judged(a_connection(body, headers=version), a_screening_snapshot())
    assert isinstance(batch, Batch)
    assert batch.admission is not None

    assert exchange.connection.body == body.replace(KEY, b"[masked]")
    assert {each.connection.body for each in batch.exchanges} == {exchange.connection.body}
    assert batch.admission.permit.question.message.body == exchange.connection.body


def an_answer(*rules: ContentRule) -> Answer:
    """The way back of a call under content rules."""
    snapshot = a_screening_snapshot(*rules)
    _, admission = judged(a_connection(a_call()), snapshot)
    assert isinstance(admission, Admission)
    content = compiled(snapshot.profile.content)
    assert content is not None
    screen = content.answered(admission.permit.question.message)
    return Answer(
        Reader(permit=admission.permit, engines=snapshot.engines, tasks=tasks(), screen=screen), lambda _: None
    )


def test_a_stream_is_masked_event_by_event() -> None:
    """The first does not wait for the second, and what holds nothing keeps its bytes."""
    answer = an_answer()
    answer.begin(200, EVENTS)
    progress = b'id: 1\r\ndata:{"jsonrpc":"2.0","method":"notifications/progress","params":{"progress":1}}\r\n\r\n'

    assert answer.feed(progress + b"id: 2\ndata: " + SAID[:-30]) == progress
    assert answer.feed(SAID[-30:] + b"\n\n") == b"id: 2\ndata: " + SAID.replace(KEY, b"[masked]") + b"\n\n"
    assert answer.end() == b""


@pytest.mark.parametrize("kind", [b"text/plain", b""])
def test_what_cannot_be_screened_is_refused(kind: bytes) -> None:
    """A secret must not leave by another content type."""
    answer = an_answer()
    assert answer.begin(200, [(b"content-type", kind)]) is Mode.AS_IT_COMES
    with pytest.raises(Refusal, match="cannot be read"):
        answer.feed(b"AKIA")


@pytest.mark.parametrize(("headers", "said"), [(JSON, b"<" + KEY), ([(b"content-type", b"text/html")], KEY)])
def test_an_error_page_that_cannot_be_screened_goes_without_its_body(headers: Headers, said: bytes) -> None:
    """Its status tells the client what it must know, such as that its session is over."""
    answer = an_answer()
    answer.begin(404, headers)
    assert answer.feed(said) + answer.end() == b""


def test_an_error_page_in_json_is_masked() -> None:
    """Whatever its members are."""
    answer = an_answer()
    answer.begin(500, JSON)
    assert answer.feed(b'{"detail":"' + KEY + b'"}') + answer.end() == b'{"detail":"[masked]"}'


def test_what_was_redacted_reaches_the_client_and_not_the_record() -> None:
    """Redaction is for audit and telemetry."""
    rule = a_rule(patterns=("aws-key",), action="redact")
    snapshot = a_screening_snapshot(rule)
    exchange, _ = judged(a_connection(SECRET), snapshot)
    assert exchange.connection.body is SECRET
    answer = an_answer(rule)
    answer.begin(200, JSON)
    assert answer.feed(SAID) + answer.end() == SAID
    for seen in answer.take():
        note(seen, exchange, Memory())
    document = orjson.loads(line(exchange))

    assert document["arguments"]["content"] == {"key": "[redacted]", "n": 1}
    assert document["result"]["content"]["content"][0]["text"] == "[redacted]"
    assert [(each["where"], each["count"]) for each in document["decision"]["content"]] == [
        ("arguments", 1),
        ("results", 1),
    ]
    assert KEY not in orjson.dumps(document)
