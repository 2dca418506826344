"""Decides what of the server's messages the client may get: responses, requests to it, notifications.

A message is looked at by its form, not by what was asked: a replayed stream can carry any response. Lists are filtered;
what the server asks of the client is judged like a call, wherever it stands (a request on a stream, `inputRequests` in
a result, URL elicitations in an error); a notification of a resource or a task passes to who may read it. Refuses what
cannot be read. MCP 2024-11-05 to 2026-07-28.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from sidecar.core.asks import ASKS, read_ask, read_url_elicitations
from sidecar.core.content import MAX_SCREENED_BYTES, Found, Rule, Screen
from sidecar.core.detectors import Looks
from sidecar.core.filters import Filtered, Reader, filtered
from sidecar.core.message import MAX_ID, Message, RequestId, Resource
from sidecar.core.replies import CODES, answer
from sidecar.core.screening import denial
from sidecar.core.splicing import ANSWER
from sidecar.errors import Reason, Refusal

URL_ELICITATION_REQUIRED: Final = -32042  # MCP 2025-11-25

Judge = Callable[[Message], Refusal | None]  # returns why what the server asks may not pass


class Seen(msgspec.Struct, frozen=True, kw_only=True):  # made ten times as fast as a frozen dataclass
    """A message of the server, as the client may see it."""

    data: bytes  # empty: it does not pass
    hidden: int = 0  # list items that were taken out
    answers: RequestId | None = None  # the request that it is the response to
    error_code: int | None = None  # of its JSON-RPC error
    tool_failed: bool = False  # result.isError
    task_id: str | None = None  # of the task that it created
    tools: Sequence[tuple[str, msgspec.Raw]] = ()  # all that it listed
    reply: bytes = b""  # to the server, whose request does not pass
    refusal: Refusal | None = None  # why it is not what the server said
    found: tuple[Found, ...] = ()  # by content rules


_UNSET: Final = msgspec.UNSET
_Asked = tuple[str, msgspec.Raw, RequestId | None]  # method, params, id


class _InputRequest(msgspec.Struct):
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")


class _Result(msgspec.Struct, rename="camel"):
    is_error: Any = False
    cache_scope: msgspec.Raw | msgspec.UnsetType = _UNSET
    tools: msgspec.Raw | msgspec.UnsetType = _UNSET
    prompts: msgspec.Raw | msgspec.UnsetType = _UNSET
    resources: msgspec.Raw | msgspec.UnsetType = _UNSET
    resource_templates: msgspec.Raw | msgspec.UnsetType = _UNSET
    tasks: msgspec.Raw | msgspec.UnsetType = _UNSET
    input_requests: dict[str, _InputRequest] | None = None
    result_type: Any = None
    task: Any = None  # MCP 2025-11-25; the tasks extension has its members right here
    task_id: Any = None


class _Envelope(msgspec.Struct):
    id: str | int | float | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"{}")
    result: _Result | None = None
    error: Any = None  # an OAuth error has a string here


class _Notified(msgspec.Struct, rename="camel"):
    """What a notification is about; a task that was created has its id likewise."""

    uri: str = ""
    task_id: str = ""
    input_requests: dict[str, _InputRequest] | None = None


_envelope: Final = msgspec.json.Decoder(_Envelope)
_array: Final = msgspec.json.Decoder(list[msgspec.Raw])
_notified: Final = msgspec.json.Decoder(_Notified)


def review(data: bytes, reader: Reader, judge: Judge) -> tuple[bytes, Sequence[Seen]]:
    """Return *data*, one message or a batch of them, as *reader* may see it, and each message that it held.

    The very object comes back when nothing was changed; nothing is left when none may pass. Raises Refusal(UPSTREAM).
    """
    try:
        if data[:1] == b"{" or data.lstrip(b" \t\r\n")[:1] != b"[":
            one = _message(data, reader, judge)
            return one.data, (one,)
        held = [bytes(each) for each in _array.decode(data)]
        looks: Mapping[Rule, Looks] = defaultdict(Looks)  # of all messages
        seen = [_message(each, reader, judge, looks) for each in held]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # nested as deep as the server likes
        raise _unreadable(str(error)) from error
    if not seen:
        raise _unreadable("an empty batch")
    if all(each.data is old for each, old in zip(seen, held, strict=True)):
        return data, seen
    passed = b",".join([each.data for each in seen if each.data])
    return b"[" + passed + b"]" if passed else b"", seen


def _unreadable(detail: str) -> Refusal:
    return Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail=detail)


def _message(data: bytes, reader: Reader, judge: Judge, looks: Mapping[Rule, Looks] | None = None) -> Seen:
    if reader.screen is not None:
        return _screened(data, reader.screen, reader, judge, looks)
    return _judged(data, _envelope.decode(data), reader, judge)


def _screened(data: bytes, screen: Screen, reader: Reader, judge: Judge, looks: Mapping[Rule, Looks] | None) -> Seen:
    """Judge *data* as content rules leave it: that, and nothing else, goes on."""
    envelope = _envelope.decode(data)
    if screen.is_beside and envelope.method is None and _answered(envelope) == reader.permit.question.message.id:
        return _judged(data, envelope, reader, judge)
    if len(data) > MAX_SCREENED_BYTES:
        raise Refusal(
            Reason.UPSTREAM, "the server's answer is too large", detail=f"> {MAX_SCREENED_BYTES} to be screened"
        )
    screened = screen.screen(data, ANSWER, looks)
    if screened.data is not data:
        data, envelope = screened.data, _envelope.decode(screened.data)
    denied, found = screened.denied, screened.found
    seen = _withheld(envelope, denial(denied), reader) if denied else _judged(data, envelope, reader, judge)
    return msgspec.structs.replace(seen, found=found) if found else seen


def _withheld(envelope: _Envelope, refusal: Refusal, reader: Reader) -> Seen:
    """Return what stands for a message that may not pass: an error for an answer, in the shape that denials have."""
    if envelope.method is not None:
        is_request = envelope.id is not None
        return Seen(data=b"", reply=_error(envelope.id, refusal) if is_request else b"", refusal=refusal)
    asked, seen = reader.permit.question.message, _refused(envelope, refusal)
    if reader.denied != "tool_error" or asked.id != seen.answers or asked.method != "tools/call":
        return seen
    return msgspec.structs.replace(
        seen, data=answer(refusal, asked, "tool_error").body, error_code=None, tool_failed=True
    )


def _judged(data: bytes, envelope: _Envelope, reader: Reader, judge: Judge) -> Seen:
    if envelope.method is None:
        return _response(data, envelope, reader, judge)
    if envelope.result is not None or envelope.error is not None:
        raise _unreadable("both a request and a response")  # clients differ in which of the two they take
    if envelope.id is not None:
        return _request(data, envelope, envelope.method, reader, judge)
    return _notification(data, envelope, envelope.method, reader, judge)


# responses


def _response(data: bytes, envelope: _Envelope, reader: Reader, judge: Judge) -> Seen:
    result, code = envelope.result, _code(envelope.error)
    if result is None:
        refusal = None
        if code == URL_ELICITATION_REQUIRED:
            refusal = next(filter(None, map(judge, read_url_elicitations(envelope.error, reader.revision))), None)
        return _refused(envelope, refusal) if refusal else Seen(data=data, answers=_answered(envelope), error_code=code)
    has_failed = result.is_error is True
    if not _concerns(result):
        return Seen(data=data, answers=_answered(envelope), error_code=code, tool_failed=has_failed)
    if result.input_requests:
        refusal = _why_not(_asked(result.input_requests), reader, judge)
        if refusal is not None:
            return _refused(envelope, refusal)
    seen = filtered(data, reader) if _holds_lists(result) else Filtered(data=data)
    return Seen(
        data=seen.data,
        hidden=seen.hidden,
        tools=seen.tools,
        answers=_answered(envelope),
        error_code=code,
        tool_failed=has_failed,
        task_id=_task_id(result),
    )


def _answered(envelope: _Envelope) -> RequestId | None:
    """Return the id of the request that is answered; 1.0 is 1, as TypeScript reads it."""
    request_id = envelope.id
    return int(request_id) if isinstance(request_id, float) else request_id


def _code(error: Any) -> int | None:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def _holds_lists(result: _Result) -> bool:
    """Say whether *result* depends on who reads it."""
    return (
        result.tools is not _UNSET
        or result.prompts is not _UNSET
        or result.resources is not _UNSET
        or result.resource_templates is not _UNSET
        or result.tasks is not _UNSET
        or result.cache_scope is not _UNSET
    )


def _concerns(result: _Result) -> bool:
    """Say whether *result* is more than an answer that whoever asked may see as it is."""
    return (
        _holds_lists(result)
        or result.input_requests is not None
        or result.task is not None
        or result.result_type == "task"
    )


def _task_id(result: _Result) -> str | None:
    """Return the id of the task that was created in place of a result."""
    task_id = result.task.get("taskId") if isinstance(result.task, dict) else None
    if result.result_type == "task":
        task_id = result.task_id
    return task_id if isinstance(task_id, str) else None


def _refused(envelope: _Envelope, refusal: Refusal) -> Seen:
    """Return an error in place of a response that asks what it may not: the server would only ask again for the rest."""
    code = CODES[refusal.reason][1]
    return Seen(data=_error(envelope.id, refusal), answers=_answered(envelope), error_code=code, refusal=refusal)


# requests and notifications


def _request(data: bytes, envelope: _Envelope, method: str, reader: Reader, judge: Judge) -> Seen:
    request_id = envelope.id
    if isinstance(request_id, float) or (isinstance(request_id, int) and abs(request_id) > MAX_ID):
        # The client's answer to it would be refused by sidecar/core/message.py.
        refusal: Refusal | None = Refusal(Reason.MALFORMED, "id must be a string or a 64-bit integer")
    else:
        refusal = _why_not([(method, envelope.params, request_id)], reader, judge)
    return Seen(data=data) if refusal is None else Seen(data=b"", reply=_error(request_id, refusal), refusal=refusal)


def _notification(data: bytes, envelope: _Envelope, method: str, reader: Reader, judge: Judge) -> Seen:
    match method:
        case "notifications/resources/updated":
            (passes,) = reader.sees(Resource(uri=_notified.decode(envelope.params).uri))
        case "notifications/tasks" | "notifications/tasks/status":
            told = _notified.decode(envelope.params)
            passes = reader.owns(told.task_id) and _why_not(_asked(told.input_requests), reader, judge) is None
        case _:
            passes = method not in ASKS  # without an id: some client might act on it all the same
    return Seen(data=data if passes else b"")


def _asked(requests: Mapping[str, _InputRequest] | None) -> Iterator[_Asked]:
    return ((each.method, each.params, None) for each in (requests or {}).values())


def _why_not(asked: Iterable[_Asked], reader: Reader, judge: Judge) -> Refusal | None:
    """Return why one of *asked* may not pass; those behind it are not judged."""
    try:
        judged = (judge(read_ask(*each, reader.revision)) for each in asked)
        return next((refusal for refusal in judged if refusal is not None), None)
    except Refusal as unknown:
        return unknown


def _error(request_id: RequestId | float | None, refusal: Refusal) -> bytes:
    error = {"code": CODES[refusal.reason][1], "message": refusal.public, "data": {"reason": refusal.reason}}
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": error}).encode()  # an id of any size
