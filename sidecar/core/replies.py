"""Gives each refusal its one shape on the wire.

A refused call is HTTP 200 with a JSON-RPC error that carries the request's id: the only shape that every SDK generation
survives; 4xx kills Python 1.x and Go 1.6 clients. 401, 403 and 404 are kept for what HTTP must say (authentication,
sessions), 400 and its kin for what could not be read. Codes stay outside -32768..-32000, except those that JSON-RPC
itself defines (MCP 2026-07-28, error codes).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from sidecar.core.message import Message, Shape
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
    Reason.UNSUPPORTED_VERSION: (400, -32022),
    Reason.UNAUTHENTICATED: (401, 401),
    Reason.INSUFFICIENT_SCOPE: (403, 403),
    Reason.FORBIDDEN_CALLER: (403, 403),
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


def answer(refusal: Refusal, message: Message | None) -> Response:
    """Return the response to *message*, which was refused; None: it could not be read."""
    request_id = refusal.id if message is None else message.id
    status, code = CODES[refusal.reason]
    if refusal.reason is Reason.MALFORMED and request_id is not None:
        status, code = 200, -32602  # the message was read, only its params make no sense: its caller waits for the id
    if request_id is None and status == 200:
        if message is None and refusal.reason is not Reason.UNKNOWN_METHOD:
            status = 500  # what it was is not known, so somebody may be waiting
        elif message is not None and message.shape in (Shape.OPEN_STREAM, Shape.CLOSE_SESSION):
            status = 429 if refusal.reason is Reason.THROTTLED else 502  # plain HTTP: there is no id to answer
        else:
            # A refused notification: a 4xx would end a Python 1.x session, and nobody waits for a body.
            return Response(status=202, headers=(), body=b"")
    data: dict[str, Any] = {"reason": refusal.reason}
    headers = [(b"content-type", b"application/json")]
    if refusal.retry_after_s is not None:
        data["retryAfterSeconds"] = refusal.retry_after_s
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    headers += refusal.headers
    if refusal.reason is Reason.UNAUTHENTICATED and not refusal.headers:
        headers.append((b"www-authenticate", b"Bearer"))  # RFC 9110, 11.6.1 demands one
    if refusal.reason is Reason.METHOD_NOT_ALLOWED:
        headers.append((b"allow", b"POST, GET, DELETE"))  # RFC 9110, 15.5.6
    error: dict[str, Any] = {"jsonrpc": "2.0", "error": {"code": code, "message": refusal.public, "data": data}}
    if request_id is not None:  # left out, not null: TypeScript's SDK refuses a null id
        error["id"] = request_id
    return Response(status=status, headers=tuple(headers), body=orjson.dumps(error))
