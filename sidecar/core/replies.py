"""Gives each refusal its one shape on the wire.

A refused call is HTTP 200 with a JSON-RPC error that carries the request's id: the only shape that every SDK generation
survives; 4xx kills Python 1.x and Go 1.6 clients. 401, 403 and 404 are kept for what HTTP must say (authentication,
sessions), 400 and its kin for what could not be read. From 2026-07-28 on some codes have a status of their own, and
clients expect it. Codes stay outside -32768..-32000, except those that JSON-RPC and MCP themselves define (MCP
2026-07-28, error codes).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson

from sidecar.core.message import Message, Prompt, RequestId, Resource, Shape, Subscription, Tool
from sidecar.core.revision import Revision
from sidecar.errors import Reason, Refusal

# HTTP status and JSON-RPC code; tests/sidecar/core/test_replies.py holds it total.
CODES: Final[Mapping[Reason, tuple[int, int]]] = {
    Reason.DENIED: (200, 403),
    Reason.THROTTLED: (200, 429),
    Reason.UNKNOWN_TASK: (200, -32602),
    Reason.UNSOLICITED: (200, 403),
    Reason.NOT_SENT: (200, 424),
    Reason.UPSTREAM: (200, -32603),
    Reason.PROVIDER: (200, -32603),
    Reason.FAULT: (200, -32603),
    Reason.UNKNOWN_METHOD: (200, -32601),
    Reason.MALFORMED: (400, -32600),
    Reason.HEADER_MISMATCH: (400, -32020),
    Reason.UNSUPPORTED_VERSION: (400, -32600),
    Reason.UNDECLARED: (400, -32021),
    Reason.UNAUTHENTICATED: (401, 401),
    Reason.INSUFFICIENT_SCOPE: (403, 403),
    Reason.FORBIDDEN_CALLER: (403, 403),
    Reason.EGRESS: (403, 403),
    Reason.NOT_FOUND: (404, 404),
    Reason.METHOD_NOT_ALLOWED: (405, 405),
    Reason.TOO_LARGE: (413, 413),
    Reason.UNSUPPORTED_MEDIA: (415, 415),
    Reason.NOT_READY: (503, 503),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An HTTP response that the sidecar itself gives."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


# From 2026-07-28 on.
MODERN_CODES: Final[Mapping[Reason, tuple[int, int]]] = {
    **CODES,
    Reason.UNKNOWN_METHOD: (404, -32601),
    Reason.UNKNOWN_TASK: (400, -32602),
    Reason.UNSUPPORTED_VERSION: (400, -32022),
}
NO_RESOURCE: Final = -32002  # up to 2025-11-25; later ones must not say it
INVALID_PARAMS: Final = -32602

Denied = Literal["error", "tool_error", "conceal"]


def answer(refusal: Refusal, message: Message | None, denied: Denied = "error") -> Response:
    """Return the response to *message*, which was refused; None: it could not be read. *denied* is the profile's."""
    request_id = refusal.id if message is None else message.id if message.shape is Shape.REQUEST else None
    revision = refusal.revision if message is None else message.revision
    is_modern = revision is not None and Revision(revision).is_modern
    if refusal.reason is Reason.DENIED and message is not None and request_id is not None:
        disguise = _disguise(message, refusal.public, denied)
        if disguise is not None:
            status, members = disguise
            return Response(status=status, headers=_JSON, body=_body(request_id, members))
    status, code = _codes(refusal.reason, is_modern=is_modern, has_id=request_id is not None)
    if request_id is None:
        status = _status_without_id(refusal.reason, message, status, is_modern=is_modern)
        if status == 202:
            return Response(status=202, headers=(), body=b"")
    data: dict[str, Any] = {"reason": refusal.reason, **(refusal.data or {})}
    headers = [*_JSON, *refusal.headers]
    if refusal.retry_after_s is not None:
        data["retryAfterSeconds"] = refusal.retry_after_s
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    if refusal.reason is Reason.UNAUTHENTICATED and not refusal.headers:
        headers.append((b"www-authenticate", b"Bearer"))  # RFC 9110, 11.6.1 demands one
    if refusal.reason is Reason.METHOD_NOT_ALLOWED:
        headers.append((b"allow", b"POST" if is_modern else b"POST, GET, DELETE"))  # RFC 9110, 15.5.6
    error = {"code": code, "message": refusal.public, "data": data}
    return Response(status=status, headers=tuple(headers), body=_body(request_id, {"error": error}))


def answer_batch(refused: Sequence[tuple[Refusal, Message | None]], denied: Denied = "error") -> Response:
    """Return the response to a batch, none of which was sent: an array with the answer to each of its requests."""
    bodies = [
        answer(refusal, message, denied).body
        for refusal, message in refused
        if (refusal.id if message is None else message.shape is Shape.REQUEST) not in (None, False)
    ]
    if not bodies:
        return Response(status=202, headers=(), body=b"")
    waits_s = [refusal.retry_after_s for refusal, _ in refused if refusal.retry_after_s is not None]
    retry = ((b"retry-after", str(max(waits_s)).encode()),) if waits_s else ()
    return Response(status=200, headers=(*_JSON, *retry), body=b"[" + b",".join(bodies) + b"]")


_JSON: Final = ((b"content-type", b"application/json"),)


def _body(request_id: RequestId | None, members: dict[str, Any]) -> bytes:
    # Left out, not null: TypeScript's SDK refuses a null id.
    return orjson.dumps(
        {"jsonrpc": "2.0", **members} if request_id is None else {"jsonrpc": "2.0", **members, "id": request_id}
    )


def _codes(reason: Reason, *, is_modern: bool, has_id: bool) -> tuple[int, int]:
    if reason is Reason.MALFORMED and has_id:
        # The message was read, only its params make no sense: its caller waits for the id.
        return 400 if is_modern else 200, INVALID_PARAMS
    return (MODERN_CODES if is_modern else CODES)[reason]


def _status_without_id(reason: Reason, message: Message | None, status: int, *, is_modern: bool) -> int:
    """Return the HTTP status where no JSON-RPC answer is waited for; 202 drops the message."""
    if message is None:
        if reason is Reason.UNKNOWN_METHOD:  # a notification: of a request the id is known
            return 202
        return 500 if status == 200 else status  # what it was is not known, so somebody may be waiting
    if message.shape in (Shape.OPEN_STREAM, Shape.CLOSE_SESSION):
        if status == 200:  # plain HTTP: there is no id to answer
            return 429 if reason is Reason.THROTTLED else 502
        return status
    # A 4xx would end a Python 1.x session.
    return 202 if status == 200 or (status == 400 and not is_modern) else status


def _disguise(message: Message, public: str, denied: Denied) -> tuple[int, dict[str, Any]] | None:
    """Return status and members of a denial that is not to look like one; None where it is."""
    is_modern = message.revision.is_modern
    if denied == "tool_error" and message.method == "tools/call":
        result: dict[str, Any] = {"content": [{"type": "text", "text": public}], "isError": True}
        return 200, {"result": {**result, "resultType": "complete"} if is_modern else result}
    if denied != "conceal":
        return None
    code, data = INVALID_PARAMS, {}
    match message.target:
        case Tool(name=name):
            text = f"Unknown tool: {name}"
        case Prompt(name=name):
            text = f"Unknown prompt: {name}"
        case Resource(uri=uri):
            text, data = "Resource not found", {"data": {"uri": uri}}
            code = INVALID_PARAMS if is_modern else NO_RESOURCE
        case Subscription():
            text = "Resource not found"
        case _:
            return None
    return 400 if is_modern else 200, {"error": {"code": code, "message": text, **data}}
