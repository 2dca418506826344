"""To which exchange each message of a stdio server belongs: HTTP keeps a request and its answer together, a pipe does not.

What a client sent goes to a process of its own as the very bytes that were judged. In a process that serves many, ids and
progress tokens are made unique on the way in and restored on the way out; nothing else is changed, nobody is asked, and
what cannot be told to be somebody's goes to nobody. Sans I/O: each method returns what is to be done, in order.
MCP 2025-03-26 to 2026-07-28, transports, progress, cancellation.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Generic, TypeVar

import msgspec

from sidecar.core.message import Message, RequestId, Shape
from sidecar.core.stdio import SUBSCRIPTION, Line, one_line, read_line, spliced
from sidecar.errors import Reason, Refusal

MAX_HELD: Final = 64  # messages of the server for which no stream is open yet; it cannot know that
MAX_HELD_BYTES: Final = 2**20
MAX_ABANDONED: Final = 1024  # requests whose client is gone and whose answer may still come
METHOD_NOT_FOUND: Final = -32601
CONCERNS_ALL: Final = frozenset(
    {
        "notifications/tools/list_changed",
        "notifications/prompts/list_changed",
        "notifications/resources/list_changed",
        "notifications/resources/updated",  # the way back judges the URI for each reader
    }
)

C = TypeVar("C")
"""What the shell knows a caller by: whoever waits for an answer, or reads a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver(Generic[C]):
    """*data* goes to *caller*, whose request it answers when *is_last*; *code* is then that of its error."""

    caller: C
    data: bytes
    is_last: bool = False
    code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """*data*, a line without its end, goes to the process."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """The line goes nowhere, for the reason *why*."""

    why: str


Action = Deliver[C] | Write | Drop


@dataclass(slots=True, kw_only=True)
class Waiting(Generic[C]):
    """A request in the process. *caller* is None when its client is gone."""

    caller: C | None
    message: Message
    scope: str  # within which the client's id is its own

    @property
    def token(self) -> RequestId | None:
        """Return the token by which the client wants to hear of progress."""
        meta = self.message.params.get("_meta")
        token = meta.get("progressToken") if isinstance(meta, Mapping) else None
        return token if isinstance(token, str | int) and not isinstance(token, bool) else None


@dataclass(slots=True)
class Own(Generic[C]):
    """Whose is what in the process of one session. Bytes pass as they are."""

    waiting: dict[RequestId, Waiting[C]] = field(default_factory=dict)
    streams: list[C] = field(default_factory=list)
    held: deque[bytes] = field(default_factory=deque)
    held_bytes: int = 0

    def check(self, message: Message) -> None:
        """Raise Refusal(MALFORMED) when a request with the message's id is under way: whose would the answer be?"""
        if message.shape is Shape.REQUEST and message.id in self.waiting:
            raise Refusal(Reason.MALFORMED, "a request with this id is under way")

    def ask(self, caller: C, message: Message, scope: str) -> list[Action[C]]:
        """Take a client's request, which was checked."""
        assert message.id is not None  # noqa: S101 - a request has one
        _make_room(self.waiting)
        self.waiting[message.id] = Waiting(caller=caller, message=message, scope=scope)
        return [Write(data=one_line(message.body)), *self._released(caller)]

    def tell(self, message: Message, scope: str) -> list[Action[C]]:
        """Take a client's notification or response."""
        del scope
        return [Write(data=one_line(message.body))]

    def open_stream(self, caller: C) -> list[Action[C]]:
        """Let *caller* hear what belongs to no request."""
        self.streams.append(caller)
        return self._released(caller)

    def leave(self, caller: C) -> list[Action[C]]:
        """Let go of *caller*, who is gone: in the stateless revisions that is a cancellation, in the older it is not."""
        if caller in self.streams:
            self.streams.remove(caller)
        return _left(self.waiting, caller)

    def hear(self, data: bytes) -> list[Action[C]]:
        """Return where the server's line *data* goes."""
        line = read_line(data)
        if line is None:
            return [Drop(why="not a JSON-RPC message")]
        if line.shape is Shape.RESPONSE:
            assert line.id is not None  # noqa: S101 - a response has one
            return [_answer(self.waiting.pop(line.id, None), data, line)]
        if line.method == "notifications/progress":
            token = line.read_params().progress_token
            for waiting in self.waiting.values():
                if token is not None and _same(waiting.token, token) and waiting.caller is not None:
                    return [Deliver(caller=waiting.caller, data=data)]
        listener = self._listener()
        if listener is not None:
            return [Deliver(caller=listener, data=data)]
        if line.method == "notifications/progress":
            return [Drop(why="progress of nothing that is under way")]
        if len(self.held) >= MAX_HELD or self.held_bytes + len(data) > MAX_HELD_BYTES:
            why = "no stream is open, and too much is waiting for one"
            refusal = [Write(data=_error(line.id, "the client hears no requests"))] if line.id is not None else []
            return [*refusal, Drop(why=why)]
        self.held.append(data)
        self.held_bytes += len(data)
        return []

    def callers(self) -> list[C]:
        """Return everybody who waits or reads."""
        return [*_callers(self.waiting), *self.streams]

    def _listener(self) -> C | None:
        """Return who hears what belongs to nobody: the newest open stream, else the newest request."""
        return next(reversed([*_callers(self.waiting), *self.streams]), None)

    def _released(self, caller: C) -> list[Action[C]]:
        released: list[Action[C]] = [Deliver(caller=caller, data=data) for data in self.held]
        self.held.clear()
        self.held_bytes = 0
        return released


@dataclass(slots=True)
class Common(Generic[C]):
    """Whose is what in a process that serves many: stateless requests, or all sessions of a shared one."""

    waiting: dict[RequestId, Waiting[C]] = field(default_factory=dict)  # by the id that the process knows
    streams: list[C] = field(default_factory=list)
    ids: "count[int]" = field(default_factory=lambda: count(1))
    welcome: bytes | None = None  # the result of the first initialize
    joining: list[Waiting[C]] = field(default_factory=list)  # those that wait for it too
    is_initialized: bool = False

    def check(self, message: Message) -> None:
        """Pass: ids are made unique here."""

    def ask(self, caller: C, message: Message, scope: str) -> list[Action[C]]:
        """Take a client's request."""
        waiting = Waiting(caller=caller, message=message, scope=scope)
        if message.method == "initialize":
            if self.welcome is not None:
                return [self._welcomed(waiting)]
            if any(each.message.method == "initialize" for each in self.waiting.values()):
                self.joining.append(waiting)
                return []
        _make_room(self.waiting)
        wire_id = next(self.ids)
        self.waiting[wire_id] = waiting
        data = spliced(one_line(message.body), ["id"], wire_id)
        if waiting.token is not None:
            data = spliced(data, ["params", "_meta", "progressToken"], wire_id)
        return [Write(data=data)]

    def tell(self, message: Message, scope: str) -> list[Action[C]]:
        """Take a client's notification or response: what concerns others too goes no further."""
        if message.method == "notifications/initialized" and not self.is_initialized:
            self.is_initialized = True
            return [Write(data=one_line(message.body))]
        if message.method == "notifications/cancelled":
            cancelled = message.params.get("requestId")
            for wire_id, waiting in self.waiting.items():
                if waiting.scope == scope and _same(waiting.message.id, cancelled):
                    return [Write(data=spliced(one_line(message.body), ["params", "requestId"], wire_id))]
        return [Drop(why="of no use to a process that serves many")]

    def open_stream(self, caller: C) -> list[Action[C]]:
        """Let *caller* hear what concerns every session."""
        self.streams.append(caller)
        return []

    def leave(self, caller: C) -> list[Action[C]]:
        """Let go of *caller*, who is gone."""
        if caller in self.streams:
            self.streams.remove(caller)
        self.joining = [each for each in self.joining if each.caller is not caller]
        return _left(self.waiting, caller)

    def hear(self, data: bytes) -> list[Action[C]]:
        """Return where the server's line *data* goes."""
        line = read_line(data)
        if line is None:
            return [Drop(why="not a JSON-RPC message")]
        match line.shape:
            case Shape.RESPONSE:
                return self._answered(data, line)
            case Shape.REQUEST:
                return [Write(data=_refusal_to_ask(line))]
            case _:
                return self._notified(data, line)

    def callers(self) -> list[C]:
        """Return everybody who waits or reads."""
        joining = [each.caller for each in self.joining if each.caller is not None]
        return [*_callers(self.waiting), *joining, *self.streams]

    def _answered(self, data: bytes, line: Line) -> list[Action[C]]:
        assert line.id is not None  # noqa: S101 - a response has one
        waiting = self.waiting.pop(line.id, None)
        if waiting is None:
            return [Drop(why="an answer to nothing that is under way")]
        data = spliced(data, ["id"], waiting.message.id)
        if waiting.message.method == "subscriptions/listen":
            data = _restored(data, ("result", *SUBSCRIPTION), waiting.message.id)
        actions: list[Action[C]] = [_answer(waiting, data, line)]
        if waiting.message.method == "initialize":
            joining, self.joining = self.joining, []
            if not line.error:
                self.welcome = bytes(line.result)
                actions += [self._welcomed(each) for each in joining]
            else:
                actions += [_answer(each, spliced(data, ["id"], each.message.id), line) for each in joining]
        return actions

    def _notified(self, data: bytes, line: Line) -> list[Action[C]]:
        """Return where a notification goes: to the request that it names, or to all when it holds nobody's secrets."""
        params = line.read_params()
        if line.method == "notifications/progress" and (waiting := self._known(params.progress_token)) is not None:
            data = spliced(data, ["params", "progressToken"], waiting.token)
        elif line.method == "notifications/cancelled" and (waiting := self._known(params.request_id)) is not None:
            data = spliced(data, ["params", "requestId"], waiting.message.id)
        elif params.meta is not None and (waiting := self._known(params.meta.subscription_id)) is not None:
            data = spliced(data, ["params", *SUBSCRIPTION], waiting.message.id)
        elif line.method in CONCERNS_ALL:
            return [Deliver(caller=caller, data=data) for caller in self.streams]
        else:
            return [Drop(why="nobody can be told to be meant")]
        return [Drop(why="its client is gone") if waiting.caller is None else Deliver(caller=waiting.caller, data=data)]

    def _known(self, wire_id: RequestId | None) -> Waiting[C] | None:
        return None if wire_id is None else self.waiting.get(wire_id)

    def _welcomed(self, waiting: Waiting[C]) -> Action[C]:
        """Return the answer to another client's initialize: the result of the first, under its own id."""
        assert self.welcome is not None  # noqa: S101 - who calls has seen it
        answer = {"jsonrpc": "2.0", "id": waiting.message.id, "result": msgspec.Raw(self.welcome)}
        if waiting.caller is None:
            return Drop(why="its client is gone")
        return Deliver(caller=waiting.caller, data=msgspec.json.encode(answer), is_last=True)


def _answer(waiting: Waiting[C] | None, data: bytes, line: Line) -> Action[C]:
    if waiting is None:
        return Drop(why="an answer to nothing that is under way")
    if waiting.caller is None:
        return Drop(why="its client is gone")
    return Deliver(caller=waiting.caller, data=data, is_last=True, code=line.code)


def _left(waiting: dict[RequestId, Waiting[C]], caller: C) -> list[Action[C]]:
    """Let go of *caller* in *waiting*; return the cancellation, where leaving is one."""
    actions: list[Action[C]] = []
    for wire_id, each in tuple(waiting.items()):
        if each.caller is not caller:
            continue
        each.caller = None
        if each.message.revision.is_modern:
            del waiting[wire_id]
            params = {"requestId": wire_id, "reason": "the client disconnected"}
            note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
            actions.append(Write(data=msgspec.json.encode(note)))
    return actions


def _make_room(waiting: dict[RequestId, Waiting[C]]) -> None:
    """Forget the oldest request without client when there are too many: its answer never came."""
    if len(waiting) >= MAX_ABANDONED:
        abandoned = [wire_id for wire_id, each in waiting.items() if each.caller is None]
        for wire_id in abandoned[:1]:
            del waiting[wire_id]


def _callers(waiting: Mapping[RequestId, Waiting[C]]) -> list[C]:
    return [each.caller for each in waiting.values() if each.caller is not None]


def _same(one: object, other: object) -> bool:
    """Say whether two ids are the same: 1 and "1" are not, and true is none."""
    return type(one) is type(other) and one == other


def _restored(data: bytes, path: Sequence[str], value: object) -> bytes:
    try:
        return spliced(data, path, value)
    except (KeyError, msgspec.DecodeError):
        return data  # an error, or a result that names no subscription


def _refusal_to_ask(line: Line) -> bytes:
    if line.method == "ping":
        return msgspec.json.encode({"jsonrpc": "2.0", "id": line.id, "result": {}})
    return _error(line.id, "a process that serves many cannot ask one of them")


def _error(request_id: RequestId | None, text: str) -> bytes:
    error: dict[str, Any] = {"code": METHOD_NOT_FOUND, "message": text}
    return msgspec.json.encode({"jsonrpc": "2.0", "id": request_id, "error": error})
