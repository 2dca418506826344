"""sidecar.core.answer: a response as its client may see it, piece by piece."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import answer as module
from sidecar.core.answer import Answer, Mode
from sidecar.core.connection import Headers
from sidecar.core.content import Content
from sidecar.core.filters import Reader
from sidecar.core.message import Message, parse_any
from sidecar.core.ownership import tasks
from sidecar.errors import Reason, Refusal
from tests.builders import STREAM, a_call, a_permit, a_request
from tests.fakes import allowing
from tests.sidecar.core.contents import KEY, a_rule

JSON: Headers = [(b"content-type", b"application/json")]
EVENTS: Headers = [(b"content-type", b"text/event-stream")]
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{"x":1}}'
TWO = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"},{"name":"b"}]}}'
ONE = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"}]}}'


def an_answer(message: Message | bytes, *, stream_path: str | None = None, refused: str = "") -> Answer:
    """The way back of *message*; the server may ask anything but *refused*."""
    reader = Reader(permit=a_permit(message), engines=[allowing("a")], tasks=tasks())

    def judge(asked: Message) -> Refusal | None:
        return Refusal(Reason.DENIED, "no") if asked.method == refused else None

    return Answer(reader, judge, stream_path=stream_path)


def begun(headers: Headers = JSON, *, body: bytes = b"", status: int = 200, refused: str = "") -> Answer:
    """A response under way, to the request in *body*."""
    answer = an_answer(body or a_call(), refused=refused)
    assert answer.begin(status, headers) is answer.mode
    return answer


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (b"application/json", Mode.WHOLE),
        (b"Application/JSON ; charset=utf-8", Mode.WHOLE),
        (b"application/jsonx", Mode.WHOLE),
        (b"text/plain; application/json", Mode.WHOLE),
        (b"text/event-stream", Mode.EVENTS),
        (b"text/event-stream;charset=utf-8", Mode.EVENTS),
        (b"text/html", Mode.AS_IT_COMES),
        (b"", Mode.AS_IT_COMES),
    ],
)
def test_what_some_client_reads_as_mcp_is_judged(kind: bytes, mode: Mode) -> None:
    """TypeScript's looks for the name anywhere in the value."""
    assert begun([(b"content-type", kind)]).mode is mode


def test_a_content_type_given_twice_counts_twice() -> None:
    """Clients differ in which of the two they take."""
    assert begun([(b"content-type", b"text/html"), *JSON]).mode is Mode.WHOLE
    assert begun([*JSON, (b"content-type", b"text/html")]).mode is Mode.WHOLE


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ([*JSON, *EVENTS], "two content types"),
        ([*JSON, (b"content-encoding", b"gzip")], "encoded"),
        ([*EVENTS, (b"content-encoding", b"br")], "encoded"),
        ([*JSON, (b"content-encoding", b"gzip"), (b"content-encoding", b"identity")], "encoded"),
    ],
)
def test_what_cannot_be_judged_is_refused(headers: Headers, detail: str) -> None:
    """Before a byte of it has passed."""
    with pytest.raises(Refusal) as caught:
        begun(headers)

    assert caught.value.reason is Reason.UPSTREAM
    assert detail in caught.value.detail


@pytest.mark.parametrize("headers", [[*JSON, (b"content-encoding", b"identity")], [(b"content-encoding", b"gzip")]])
def test_an_encoding_that_hides_nothing_passes(headers: Headers) -> None:
    """Identity is none, and what is no MCP is not judged."""
    begun(headers)


@pytest.mark.parametrize("headers", [[*JSON, (b"content-encoding", b"gzip")], EVENTS, [*JSON, *EVENTS], []])
def test_an_error_status_passes_as_it_comes(headers: Headers) -> None:
    """What stands there is often no JSON-RPC, and clients read no list from it."""
    answer = begun(headers, status=404)
    passed = answer.feed(b'"gone"') + answer.end()

    assert (passed, answer.take()) == (b'"gone"', [])


def test_an_error_that_can_be_read_is_told() -> None:
    """Servers of 2026-07-28 give JSON-RPC errors with 400 and 404."""
    answer = begun(status=404)
    error = b'{"jsonrpc":"2.0","id":7,"error":{"code":-32601,"message":"x"}}'
    passed = answer.feed(error) + answer.end()

    assert (passed, [each.error_code for each in answer.take()]) == (error, [-32601])


def test_json_is_held_until_it_is_whole() -> None:
    """Its length can change."""
    answer = begun(body=a_request("tools/list"))

    assert [answer.feed(TWO[:30]), answer.feed(TWO[30:]), answer.end()] == [b"", b"", ONE]
    assert [(each.hidden, each.data, each.answers) for each in answer.take()] == [(1, ONE, 7)]
    assert answer.take() == []


def test_an_empty_answer_is_none() -> None:
    """202 to a notification, for example."""
    answer = begun()

    assert (answer.end(), answer.take(), answer.passed) == (b"", [], None)


def test_events_pass_one_by_one() -> None:
    """The first does not wait for the second; what is no message passes untouched."""
    answer = begun(EVENTS, body=a_request("tools/list"))

    assert answer.feed(b": ping\n\nid: 1\ndata:\n\ndata: " + TWO[:9]) == b": ping\n\nid: 1\ndata:\n\n"
    assert answer.feed(TWO[9:] + b"\n\n") == b"data: " + ONE + b"\n\n"
    assert (answer.end(), [each.data for each in answer.take()]) == (b"", [ONE])


def test_an_event_that_hides_nothing_keeps_its_bytes() -> None:
    """Line endings and order of fields included."""
    raw = b"data:" + RESULT + b"\r\nid: 1\r\n\r\n"

    assert raw == begun(EVENTS).feed(raw)


def test_an_event_that_may_not_pass_is_left_out() -> None:
    """The ones around it go on; the server's request is answered by whoever takes what was seen."""
    answer = begun(EVENTS, refused="roots/list")
    asked = b'id: 2\ndata: {"id":1,"method":"roots/list"}\n\n'
    ping = b'id: 3\ndata: {"id":2,"method":"ping"}\n\n'

    assert answer.feed(b": hello\n\n" + asked + ping) == b": hello\n\n" + ping
    assert [bool(each.reply) for each in answer.take()] == [True, False]


def test_ids_of_events_that_passed_are_told() -> None:
    """A client can name them to resume; one that was left out it does not know."""
    answer = begun(EVENTS, refused="roots/list")
    answer.feed(b"id: 1\ndata:\n\nid:2 \n\n: x\n\nid: 3\nevent: endpoint\ndata: /x\n\n")
    answer.feed(b'id: 4\ndata: {"id":1,"method":"roots/list"}\n\n')

    assert answer.event_ids == [b"1", b"2", b"3"]


def test_a_batch_in_an_event_is_judged() -> None:
    """2025-03-26 has them."""
    answer = begun(EVENTS)

    assert answer.feed(b"data: [" + TWO + b"," + RESULT + b"]\n\n") == b"data: [" + ONE + b"," + RESULT + b"]\n\n"
    assert len(answer.take()) == 2


def test_an_answer_of_which_nothing_may_pass_is_refused() -> None:
    """An empty body would leave its caller guessing."""
    answer = begun(refused="roots/list")
    answer.feed(b'{"id":1,"method":"roots/list"}')

    with pytest.raises(Refusal, match="did not answer"):
        answer.end()


@pytest.mark.parametrize(
    ("stream_path", "told"),
    [("/sse", b"/messages?s=1"), (None, b"http://127.0.0.1:8000/messages?s=1")],
)
def test_an_endpoint_stays_on_this_server(stream_path: str | None, told: bytes) -> None:
    """Where streams announce one: in 2024-11-05 only."""
    answer = an_answer(STREAM, stream_path=stream_path)
    answer.begin(200, EVENTS)
    passed = answer.feed(b"id: 1\nevent: endpoint\ndata: http://127.0.0.1:8000/messages?s=1\n\n")

    assert passed == b"id: 1\nevent: endpoint\ndata: " + told + b"\n\n"
    assert answer.endpoint == (None if stream_path is None else "/messages?s=1")


def test_an_endpoint_that_needs_no_change_keeps_its_bytes() -> None:
    """As everything does."""
    answer = an_answer(STREAM, stream_path="/sse")
    answer.begin(200, EVENTS)
    raw = b"event:endpoint\r\ndata:/messages\r\n\r\n"

    assert (answer.feed(raw), answer.endpoint) == (raw, "/messages")


STREAMS = st.lists(
    st.sampled_from(
        [
            b": ping\n\n",
            b"id: 1\ndata:\n\n",
            b"data: " + TWO + b"\n\n",
            b"data:" + RESULT + b"\r\n\r\n",
            b'event: message\ndata: {"id":1,"method":"roots/list"}\n\n',
            b"event: endpoint\ndata: http://x/y\n\n",
        ]
    ),
    max_size=5,
).map(b"".join)


@given(STREAMS, st.data())
def test_a_stream_cut_at_any_byte_passes_the_same(stream: bytes, data: st.DataObject) -> None:
    """Where TCP cuts is nobody's meaning."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    outcomes = []
    for bounds in ([0, len(stream)], [0, *cuts, len(stream)]):
        answer = an_answer(STREAM, stream_path="/sse", refused="roots/list")
        answer.begin(200, EVENTS)
        passed = b"".join(answer.feed(stream[start:end]) for start, end in pairwise(bounds)) + answer.end()
        outcomes.append((passed, [(each.data, each.reply) for each in answer.take()], answer.endpoint))

    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("piece", [b"data: x\n\n", b"data: 1\r\r\n\n", b"\xef\xbb\xbfdata: {}\n\n"])
def test_an_event_that_cannot_be_judged_ends_the_stream(piece: bytes) -> None:
    """It does not pass, and nothing after it does."""
    with pytest.raises(Refusal) as caught:
        begun(EVENTS).feed(piece)

    assert caught.value.reason is Reason.UPSTREAM


def test_a_stream_that_ends_within_an_event_is_refused() -> None:
    """Go's client would dispatch the rest."""
    answer = begun(EVENTS)
    answer.feed(b"data: " + TWO)

    with pytest.raises(Refusal, match="stream cannot be read"):
        answer.end()


def test_json_that_cannot_be_judged_is_refused() -> None:
    """Nothing of it has passed."""
    answer = begun()
    answer.feed(b"<html>")

    with pytest.raises(Refusal, match="cannot be read"):
        answer.end()


def test_a_long_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must be whole to be filtered, and memory is bounded."""
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 10)

    with pytest.raises(Refusal, match="too large"):
        begun(body=a_request("tools/list")).feed(b"x" * 11)


def test_a_long_result_passes_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to filter; its size and hash are still the record's."""
    monkeypatch.setattr(module, "MAX_HELD_BYTES", 10)
    answer = begun()
    passed = [answer.feed(b"0123456"), answer.feed(b"789ab"), answer.feed(b"cd"), answer.end()]

    assert passed == [b"", b"0123456789ab", b"cd", b""]
    assert answer.take() == []
    assert answer.passed == (14, hashlib.sha256(b"0123456789abcd").hexdigest())


def test_a_batch_too_large_to_be_read_does_not_pass() -> None:
    """A list could stand behind the first answer."""
    batch = parse_any(b"[" + a_call() + b"," + a_request("tools/list", request_id=8) + b"]", "2025-03-26")
    assert isinstance(batch, tuple)
    first = batch[0]
    assert isinstance(first, Message)
    answer = an_answer(first)
    answer.begin(200, JSON)

    with pytest.raises(Refusal, match="too large"):
        answer.feed(b"[" + b" " * module.MAX_HELD_BYTES)


def test_a_list_of_another_type_does_not_pass() -> None:
    """A client that looks at no type would read it all the same."""
    answer = begun([(b"content-type", b"text/plain")], body=a_request("tools/list"))

    with pytest.raises(Refusal, match="cannot be read"):
        answer.feed(TWO)


@pytest.mark.parametrize("status", [201, 202, 203, 302, 404, 500])
def test_what_cannot_be_screened_goes_without_its_body(status: int) -> None:
    """Whatever the status: the server chooses it."""
    permit = a_permit(a_call())
    screen = Content([a_rule(patterns=("aws-key",))]).answered(permit.question.message)
    answer = Answer(Reader(permit=permit, engines=[allowing("a")], tasks=tasks(), screen=screen), lambda _: None)

    assert answer.begin(status, [(b"content-type", b"text/plain")]) is Mode.AS_IT_COMES
    assert answer.feed(KEY) == b""
    assert answer.end() == b""


# beside the answer: what content rules see of a stream

NOTE = b'{"method":"notifications/message","params":{"data":"%b"}}'
MASKED_NOTE = NOTE % b"[masked]"
NOTE %= KEY


def a_screened_stream(
    body: Message | bytes, *, status: int = 200, stream_path: str | None = None, **rule: Any
) -> Answer:
    """The stream that answers *body*, screened by a rule that, by default, masks keys."""
    permit = a_permit(body)
    screen = Content([a_rule(**{"patterns": ("aws-key",), **rule})]).answered(permit.question.message)
    reader = Reader(permit=permit, engines=[allowing("a")], tasks=tasks(), screen=screen)
    stream = Answer(reader, lambda _: None, stream_path=stream_path)
    stream.begin(status, EVENTS if status == 200 else [(b"content-type", b"text/html")])
    return stream


BARE = [a_request(method) for method in ("initialize", "ping", "tools/list", "resources/templates/list", "tasks/list")]


@pytest.mark.parametrize("body", BARE)
def test_what_travels_beside_a_listing_is_screened(body: bytes) -> None:
    """A log message is content wherever it stands; by rules for any tool, as nobody knows whose it is."""
    stream = a_screened_stream(body, tools=("other",))
    ask = b'{"id":1,"method":"ping","params":{"k":"' + KEY + b'"}}'

    assert stream.feed(b"data: " + NOTE + b"\n\n") == b"data: " + MASKED_NOTE + b"\n\n"
    assert stream.feed(b"data: " + ask + b"\n\n") == b"data: " + ask.replace(KEY, b"[masked]") + b"\n\n"
    assert [each.found[0].count for each in stream.take()] == [1, 1]


@pytest.mark.parametrize("body", BARE)
def test_the_answer_to_a_listing_is_no_content(body: bytes) -> None:
    """Descriptions and instructions stay as they are, in a batch of events too; the answer to another request does not."""
    stream = a_screened_stream(body)
    said = b'{"id":7,"result":{"instructions":"' + KEY + b'"}}'
    other = said.replace(b"7", b"8")

    assert stream.feed(b"data: " + said + b"\n\n") == b"data: " + said + b"\n\n"
    masked = other.replace(KEY, b"[masked]")
    assert stream.feed(b"data: [" + said + b"," + other + b"]\n\n") == b"data: [" + said + b"," + masked + b"]\n\n"


def test_an_error_page_to_a_listing_passes() -> None:
    """As it does without rules: a client may need it to see what is wrong."""
    for body in BARE:
        page = a_screened_stream(body, status=500)
        assert page.feed(b"<html>") + page.end() == b"<html>"


@pytest.mark.parametrize("body", [a_call(), *BARE[:1]])
def test_what_is_no_message_of_an_event_is_screened_as_text(body: bytes) -> None:
    """Comments, fields that nobody knows, events of another kind; an id is the server's to read again, like a cursor."""
    stream = a_screened_stream(body)
    raw = b": %b\nid: %b\nevent: message\nx: %b\ndata: " % (KEY, KEY, KEY) + RESULT + b"\n\n"

    assert stream.feed(raw) == b":\nid: %b\nevent: message\n:\ndata: " % KEY + RESULT + b"\n\n"
    assert stream.feed(b": %b\r\n\r\n" % KEY) == b":\n\n"
    assert stream.feed(b"event: x\ndata: %b\n\n" % KEY) == b"event: x\n:\n\n"
    assert stream.feed(b"event: endpoint\ndata: /%b\n\n" % KEY) == b"event: endpoint\n:\n\n"
    assert sum(found.count for each in stream.take() for found in each.found) == 5


def test_an_event_whose_kind_may_not_pass_is_left_out() -> None:
    """Without its kind a client would take it for a message, which nobody has judged."""
    stream = a_screened_stream(a_call())
    ask = a_request("sampling/createMessage")

    assert stream.feed(b"id: 3\nevent: %b\ndata: %b\n\n" % (KEY, ask)) == b""
    assert stream.feed(b"event: message\nevent: %b\ndata: %b\n\n" % (KEY, ask)) == b""
    assert stream.event_ids == []
    assert stream.feed(b"event: %b\nevent: message\ndata: %b\n\n" % (KEY, RESULT)) == (
        b":\nevent: message\ndata: %b\n\n" % RESULT
    )


def test_an_event_of_which_nothing_is_found_keeps_its_bytes() -> None:
    """And what is only to be left out of the record reaches the client."""
    for rule in ({}, {"action": "redact"}, {"mode": "shadow"}):
        stream = a_screened_stream(a_call(), **rule)
        raw = b": ping\r\nid: 1\r\nretry: 10\r\ndata:\r\n\r\n" + (b": %b\r\n\r\n" % KEY if rule else b"")
        assert stream.feed(raw) == raw
        assert [each.found[0].count for each in stream.take()] == ([1] if rule else [])


@pytest.mark.parametrize("line", [b":a\n", b": " + b"a" * 2**20 + b"\n"])
def test_what_would_take_too_long_to_screen_beside_a_message_is_refused(line: bytes) -> None:
    """As a message is that is too large; every other call waits meanwhile."""
    count = module.MAX_SCREENED_LINES + 1 if len(line) < 9 else 4
    tail = b"data: " + RESULT + b"\n\n"

    assert a_screened_stream(a_call()).feed(line * (count - 1) + tail) == line * (count - 1) + tail
    with pytest.raises(Refusal) as raised:
        a_screened_stream(a_call()).feed(line * count + tail)
    assert (raised.value.reason, raised.value.detail) == (Reason.UPSTREAM, "an event to be screened")


def test_candidates_in_all_lines_of_an_event_are_counted_together() -> None:
    """Each takes a look; what is left when there are none any more does not pass."""
    line = b": " + b"4111 1111 1111 1112 x " * 9_000
    stream = a_screened_stream(a_call(), patterns=("credit-card",))

    passed = stream.feed((line + b"\n") * 4 + b"\n")
    assert passed.split(b"\n") == [line, line, b":", b":", b"", b""]


def test_the_endpoint_of_a_screened_stream_stays() -> None:
    """Without it no client of 2024-11-05 could post anything."""
    stream = a_screened_stream(STREAM, stream_path="/sse", regex="messages", patterns=())
    raw = b"event: endpoint\ndata: /messages\n\n"

    assert (stream.feed(raw), stream.endpoint) == (raw, "/messages")
