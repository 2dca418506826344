"""sidecar.core.replies: each refusal has one shape on the wire, and clients survive it."""

import json
from typing import Any

import pytest

from sidecar.core.message import Message, Shape, parse
from sidecar.core.replies import answer
from sidecar.errors import Reason, Refusal
from tests.builders import STREAM, a_call

CALL = parse(a_call())
NOTE = parse(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
CLOSE = Message(shape=Shape.CLOSE_SESSION, method="close_session", params={})


def body_of(refusal: Refusal, message: Message | None) -> dict[str, Any]:
    """The JSON of the response."""
    document: dict[str, Any] = json.loads(answer(refusal, message).body)
    return document


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (Reason.DENIED, 200, 403),
        (Reason.THROTTLED, 200, 429),
        (Reason.UPSTREAM, 200, -32603),
        (Reason.FAULT, 200, -32603),
        (Reason.UNKNOWN_METHOD, 200, -32601),
        (Reason.MALFORMED, 200, -32602),
        (Reason.UNKNOWN_TASK, 200, -32602),
        (Reason.UNSOLICITED, 200, 403),
        (Reason.NOT_SENT, 200, 424),
        (Reason.HEADER_MISMATCH, 400, -32020),
        (Reason.UNSUPPORTED_VERSION, 400, -32600),
        (Reason.UNAUTHENTICATED, 401, 401),
        (Reason.INSUFFICIENT_SCOPE, 403, 403),
        (Reason.PROVIDER, 200, -32603),
        (Reason.FORBIDDEN_CALLER, 403, 403),
        (Reason.NOT_FOUND, 404, 404),
        (Reason.METHOD_NOT_ALLOWED, 405, 405),
        (Reason.TOO_LARGE, 413, 413),
        (Reason.UNSUPPORTED_MEDIA, 415, 415),
        (Reason.NOT_READY, 503, 503),
    ],
)
def test_each_reason_has_its_status_and_code(reason: Reason, status: int, code: int) -> None:
    """The table of docs/reference; a call's refusal carries its id and the public text, never the detail."""
    refusal = Refusal(reason, "public text", detail="private text")
    response = answer(refusal, CALL)

    assert status == response.status
    assert json.loads(response.body) == {
        "jsonrpc": "2.0",
        "id": 7,
        "error": {"code": code, "message": "public text", "data": {"reason": reason.value}},
    }


def test_every_reason_is_tried_above() -> None:
    """No reason enters without its row."""
    marks = test_each_reason_has_its_status_and_code.pytestmark  # type: ignore[attr-defined]

    assert set(Reason) == {row[0] for row in marks[0].args[1]}


@pytest.mark.parametrize("reason", list(Reason))
def test_codes_stay_out_of_the_protocols_range(reason: Reason) -> None:
    """But for those that JSON-RPC and MCP themselves define."""
    code = body_of(Refusal(reason, "x"), CALL)["error"]["code"]

    assert code in (-32600, -32601, -32602, -32603, -32020, -32022) or not -32768 <= code <= -32000


@pytest.mark.parametrize("request_id", [0, -1, 2**63 - 1, "", "1", "\u2028"])
def test_the_id_comes_back_as_it_was(request_id: str | int) -> None:
    """1 and "1" are two ids."""
    message = parse(json.dumps({"jsonrpc": "2.0", "id": request_id, "method": "ping"}).encode())
    echoed = body_of(Refusal(Reason.DENIED, "x"), message)["id"]

    assert (request_id, type(request_id)) == (echoed, type(echoed))


def test_an_id_is_known_of_a_request_that_could_not_be_read_further() -> None:
    """The caller's SDK finds its call again."""
    refusal = Refusal(Reason.MALFORMED, "x")
    refusal.id = "r-1"

    assert body_of(refusal, None)["id"] == "r-1"


def test_without_an_id_there_is_none() -> None:
    """Not null: TypeScript's SDK refuses that."""
    assert "id" not in body_of(Refusal(Reason.UNAUTHENTICATED, "x"), None)


@pytest.mark.parametrize("reason", [Reason.DENIED, Reason.THROTTLED, Reason.UPSTREAM, Reason.FAULT])
def test_a_refused_notification_is_accepted_and_dropped(reason: Reason) -> None:
    """A 4xx would end a Python 1.x session."""
    response = answer(Refusal(reason, "x"), NOTE)

    assert (response.status, response.body) == (202, b"")


def test_an_unknown_notification_is_accepted_and_dropped() -> None:
    """It could not be read as one that is known, but it has no id."""
    assert answer(Refusal(Reason.UNKNOWN_METHOD, "x"), None).status == 202


def test_a_defect_before_the_message_is_known_is_an_error() -> None:
    """A request that is accepted and never answered hangs its client."""
    assert answer(Refusal(Reason.FAULT, "x"), None).status == 500


@pytest.mark.parametrize("message", [STREAM, CLOSE], ids=lambda message: message.method)
@pytest.mark.parametrize(("reason", "status"), [(Reason.UPSTREAM, 502), (Reason.FAULT, 502), (Reason.THROTTLED, 429)])
def test_what_is_no_json_rpc_is_refused_as_http(message: Message, reason: Reason, status: int) -> None:
    """A GET answered 202 would be a stream that never opens, a DELETE answered 202 a session that seems closed."""
    assert answer(Refusal(reason, "x"), message).status == status


def test_when_to_come_back_is_said_twice() -> None:
    """To HTTP and to JSON-RPC."""
    response = answer(Refusal(Reason.THROTTLED, "x", retry_after_s=3), CALL)

    assert (b"retry-after", b"3") in response.headers
    assert json.loads(response.body)["error"]["data"] == {"reason": "throttled", "retryAfterSeconds": 3}


@pytest.mark.parametrize(
    ("reason", "header"),
    [
        (Reason.UNAUTHENTICATED, (b"www-authenticate", b"Bearer")),
        (Reason.METHOD_NOT_ALLOWED, (b"allow", b"POST, GET, DELETE")),
    ],
)
def test_http_demands_a_header_of_some(reason: Reason, header: tuple[bytes, bytes]) -> None:
    """RFC 9110, 11.6.1 and 15.5.6."""
    assert header in answer(Refusal(reason, "x"), None).headers


def test_a_message_that_could_not_be_read_is_a_bad_request() -> None:
    """Without an id nobody waits for a JSON-RPC answer: HTTP says it."""
    response = answer(Refusal(Reason.MALFORMED, "public text"), None)

    assert response.status == 400
    assert json.loads(response.body)["error"]["code"] == -32600
