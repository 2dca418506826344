"""sidecar.core.answer: a response as its client may see it, piece by piece."""

import hashlib

import pytest

from sidecar.core import answer as module
from sidecar.core.answer import Answer, Mode
from sidecar.core.connection import Headers
from sidecar.errors import Reason, Refusal
from tests.builders import STREAM, a_call, a_permit, a_request
from tests.fakes import allowing

JSON: Headers = [(b"content-type", b"application/json")]
EVENTS: Headers = [(b"content-type", b"text/event-stream")]
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{"x":1}}'
TWO = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"},{"name":"b"}]}}'
ONE = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"}]}}'


def begun(headers: Headers = JSON, *, body: bytes = b"", status: int = 200) -> Answer:
    """A response under way, to the request in *body*."""
    answer = Answer(a_permit(body or a_call()), [allowing("a")])
    assert answer.begin(status, headers) == b""
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


def test_an_error_status_passes_as_it_comes() -> None:
    """What stands there is often no JSON-RPC, and clients read no list from it."""
    answer = begun([*JSON, (b"content-encoding", b"gzip")], status=404)

    assert (answer.feed(b'"gone"'), answer.end()) == (b'"gone"', b"")


def test_json_is_held_until_it_is_whole() -> None:
    """Its length can change."""
    answer = begun(body=a_request("tools/list"))

    assert [answer.feed(TWO[:30]), answer.feed(TWO[30:]), answer.end()] == [b"", b"", ONE]
    assert (1, ONE, len(ONE)) == (answer.hidden, answer.result, answer.result_bytes)
    assert hashlib.sha256(ONE).hexdigest() == answer.result_sha256


def test_an_empty_answer_is_none() -> None:
    """202 to a notification, for example."""
    answer = begun()

    assert (answer.end(), answer.result, answer.result_sha256) == (b"", None, None)


def test_an_answer_to_another_request_is_no_result() -> None:
    """The record keeps what answered its own."""
    answer = begun(body=a_call(request_id=8))
    answer.feed(RESULT)

    assert (answer.end(), answer.result, answer.result_bytes) == (RESULT, None, 0)


def test_a_stream_without_a_request_has_no_result() -> None:
    """A GET asks for nothing that could be answered."""
    answer = Answer(a_permit(STREAM), [])
    answer.begin(200, EVENTS)
    answer.feed(b'data: {"id":null,"result":{}}\n\n')

    assert (answer.result, answer.result_bytes) == (None, 0)


def test_events_pass_one_by_one() -> None:
    """The first does not wait for the second; what is no message passes untouched."""
    answer = begun(EVENTS, body=a_request("tools/list"))

    assert answer.feed(b": ping\n\nid: 1\ndata:\n\ndata: " + TWO[:9]) == b": ping\n\nid: 1\ndata:\n\n"
    assert answer.feed(TWO[9:] + b"\n\n") == b"data: " + ONE + b"\n\n"
    assert (answer.end(), answer.hidden, answer.result) == (b"", 1, ONE)


def test_an_event_that_hides_nothing_keeps_its_bytes() -> None:
    """Line endings and order of fields included."""
    raw = b"data:" + RESULT + b"\r\nid: 1\r\n\r\n"

    assert raw == begun(EVENTS).feed(raw)


def test_how_a_call_ended_is_known() -> None:
    """For metrics, spans and audit."""
    failed, wrong = begun(), begun(EVENTS)
    failed.feed(b'{"id":7,"result":{"isError":true}}')
    failed.end()
    wrong.feed(b'data: {"id":7,"error":{"code":-32602}}\n\n')

    assert (failed.tool_failed, failed.error_code) == (True, None)
    assert (wrong.tool_failed, wrong.error_code) == (False, -32602)


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
    assert (answer.result, answer.result_bytes) == (None, 14)
    assert hashlib.sha256(b"0123456789abcd").hexdigest() == answer.result_sha256


def test_a_result_beyond_the_cap_is_known_by_size_and_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit record does not keep megabytes."""
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 10)
    answer = begun()
    answer.feed(RESULT)
    answer.end()

    assert (None, len(RESULT)) == (answer.result, answer.result_bytes)
    assert hashlib.sha256(RESULT).hexdigest() == answer.result_sha256
