"""sidecar.core.replies: each refusal has one shape on the wire, and clients survive it."""

import json
from typing import Any

import pytest

from sidecar.core.message import Message, Shape, parse
from sidecar.core.replies import Denied, answer, answer_batch
from sidecar.core.revision import Revision
from sidecar.errors import Reason, Refusal
from tests.builders import STREAM, a_call, a_request

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
        (Reason.UNDECLARED, 400, -32021),
        (Reason.UNAUTHENTICATED, 401, 401),
        (Reason.INSUFFICIENT_SCOPE, 403, 403),
        (Reason.PROVIDER, 200, -32603),
        (Reason.FORBIDDEN_CALLER, 403, 403),
        (Reason.EGRESS, 403, 403),
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

    assert code in (-32600, -32601, -32602, -32603, -32020, -32021, -32022) or not -32768 <= code <= -32000


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


# 2026-07-28

MODERN = "2026-07-28"
META = {"io.modelcontextprotocol/protocolVersion": MODERN, "io.modelcontextprotocol/clientCapabilities": {}}


def a_modern(method: str = "tools/call", **params: Any) -> Message:
    """A request of 2026-07-28."""
    return parse(a_request(method, {**params, "_meta": META}), MODERN)


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (Reason.DENIED, 200, 403),
        (Reason.THROTTLED, 200, 429),
        (Reason.UPSTREAM, 200, -32603),
        (Reason.UNKNOWN_METHOD, 404, -32601),
        (Reason.MALFORMED, 400, -32602),
        (Reason.UNKNOWN_TASK, 400, -32602),
        (Reason.HEADER_MISMATCH, 400, -32020),
        (Reason.UNSUPPORTED_VERSION, 400, -32022),
        (Reason.UNDECLARED, 400, -32021),
    ],
)
def test_the_later_era_gives_some_codes_a_status(reason: Reason, status: int, code: int) -> None:
    """Whether the message was read or only its id is known; its clients survive that, and look for it."""
    unread = Refusal(reason, "x")
    unread.id, unread.revision = 7, Revision.V2026_07_28
    for response in (answer(Refusal(reason, "x"), a_modern(name="x")), answer(unread, None)):
        body = json.loads(response.body)
        assert (response.status, body["error"]["code"], body["id"]) == (status, code, 7)


def test_versions_that_would_do_are_said() -> None:
    """The client chooses one of them, or falls back."""
    refusal = Refusal(Reason.UNSUPPORTED_VERSION, "x")
    refusal.data = {"supported": [MODERN], "requested": "2030-01-01"}

    assert json.loads(answer(refusal, a_modern(name="x")).body)["error"]["data"] == {
        "reason": "unsupported_version",
        "supported": [MODERN],
        "requested": "2030-01-01",
    }


def test_the_later_era_uses_post_only() -> None:
    """RFC 9110, 15.5.6: a 405 names what is allowed."""
    refusal = Refusal(Reason.METHOD_NOT_ALLOWED, "x")
    refusal.revision = Revision.V2026_07_28

    assert (b"allow", b"POST") in answer(refusal, None).headers


def test_a_notification_with_a_wrong_header_is_a_bad_request_in_the_later_era() -> None:
    """Nothing there dies of it; in the older one it is dropped."""
    note = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}'
    refusal = Refusal(Reason.HEADER_MISMATCH, "x")

    assert answer(refusal, parse(note, MODERN)).status == 400
    assert answer(refusal, parse(note)).status == 202


@pytest.mark.parametrize("reason", [Reason.UNSOLICITED, Reason.DENIED, Reason.HEADER_MISMATCH, Reason.MALFORMED])
def test_a_refused_response_is_accepted_and_dropped(reason: Reason) -> None:
    """Its id is the server's: an error with it would answer a request that nobody made."""
    response = answer(Refusal(reason, "x"), parse(b'{"jsonrpc":"2.0","id":7,"result":{}}'))

    assert (response.status, response.body) == (202, b"")


@pytest.mark.parametrize("reason", [Reason.NOT_FOUND, Reason.UNAUTHENTICATED, Reason.FORBIDDEN_CALLER])
def test_what_http_must_say_is_said_of_notifications_too(reason: Reason) -> None:
    """A session that is over, a token that has expired."""
    assert answer(Refusal(reason, "x"), NOTE).status in (401, 403, 404)


# the shape of denials


def denial(message: Message, denied: Denied) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a denial."""
    response = answer(Refusal(Reason.DENIED, "public text", detail="private"), message, denied)
    return response.status, json.loads(response.body)


@pytest.mark.parametrize(
    ("message", "result"),
    [
        (CALL, {"content": [{"type": "text", "text": "public text"}], "isError": True}),
        (
            a_modern(name="x"),
            {"content": [{"type": "text", "text": "public text"}], "isError": True, "resultType": "complete"},
        ),
    ],
)
def test_a_tools_error_is_for_the_model_to_read(message: Message, result: dict[str, Any]) -> None:
    """A result of the tool, as its revision writes one."""
    assert denial(message, "tool_error") == (200, {"jsonrpc": "2.0", "id": 7, "result": result})


def test_only_a_tool_has_a_tools_error() -> None:
    """Everything else is refused as always."""
    message = parse(a_request("prompts/get", {"name": "p"}))

    assert denial(message, "tool_error") == denial(message, "error")


@pytest.mark.parametrize(
    ("method", "params", "code", "modern_code", "text", "data"),
    [
        ("tools/call", {"name": "x"}, -32602, -32602, "Unknown tool: x", None),
        ("prompts/get", {"name": "x"}, -32602, -32602, "Unknown prompt: x", None),
        ("resources/read", {"uri": "db://x"}, -32002, -32602, "Resource not found", {"uri": "db://x"}),
        (
            "completion/complete",
            {"ref": {"type": "ref/prompt", "name": "x"}},
            -32602,
            -32602,
            "Unknown prompt: x",
            None,
        ),
        (
            "subscriptions/listen",
            {"notifications": {"resourceSubscriptions": ["db://x"]}},
            -32602,
            -32602,
            "Resource not found",
            None,
        ),
    ],
)
def test_what_is_concealed_looks_as_if_it_did_not_exist(
    method: str, params: dict[str, Any], code: int, modern_code: int, text: str, data: object
) -> None:
    """The code is the one of the era; nothing in the answer says that somebody refused."""
    old, new = denial(parse(a_request(method, params)), "conceal"), denial(a_modern(method, **params), "conceal")
    rest = {} if data is None else {"data": data}

    assert old == (200, {"jsonrpc": "2.0", "id": 7, "error": {"code": code, "message": text, **rest}})
    assert new == (400, {"jsonrpc": "2.0", "id": 7, "error": {"code": modern_code, "message": text, **rest}})


@pytest.mark.parametrize("denied", ["tool_error", "conceal"])
@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.DENIED])
def test_only_a_denial_is_disguised(reason: Reason, denied: Denied) -> None:
    """A client that is throttled or unauthenticated must know."""
    assert answer(Refusal(reason, "x"), CALL, denied) == answer(Refusal(reason, "x"), CALL)


# batches


def test_each_request_of_a_batch_gets_its_own_answer() -> None:
    """In one array, by its id; notifications and responses have none."""
    unread = Refusal(Reason.UNKNOWN_METHOD, "unknown")
    unread.id = 2
    response = answer_batch(
        [
            (Refusal(Reason.DENIED, "no"), parse(a_call(request_id=1))),
            (unread, None),
            (Refusal(Reason.UNSOLICITED, "no"), parse(b'{"jsonrpc":"2.0","id":9,"result":{}}')),
            (Refusal(Reason.NOT_SENT, "not sent"), NOTE),
            (Refusal(Reason.UNKNOWN_METHOD, "unknown"), None),
            (Refusal(Reason.NOT_SENT, "not sent"), parse(a_call(request_id="0"))),
        ]
    )

    assert response.status == 200
    assert [(each["id"], each["error"]["code"]) for each in json.loads(response.body)] == [
        (1, 403),
        (2, -32601),
        ("0", 424),
    ]


def test_a_batch_without_requests_is_accepted_and_dropped() -> None:
    """Nobody waits."""
    response = answer_batch([(Refusal(Reason.DENIED, "no"), NOTE)] * 2)

    assert (response.status, response.body) == (202, b"")


def test_a_batch_waits_for_its_slowest_limit() -> None:
    """Coming back earlier would be refused again."""
    refused = [(Refusal(Reason.THROTTLED, "x", retry_after_s=wait_s), CALL) for wait_s in (3, 7, 5)]

    assert (b"retry-after", b"7") in answer_batch(refused).headers


def test_a_batch_is_disguised_like_a_single_message() -> None:
    """The profile's word holds for all."""
    response = answer_batch([(Refusal(Reason.DENIED, "no"), CALL)], "conceal")

    assert json.loads(response.body)[0]["error"]["message"] == "Unknown tool: read_schema"
