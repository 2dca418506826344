"""Streamable HTTP outside, a stdio server's processes inside: what `Upstream` is for servers that speak HTTP.

A session has a process of its own, or all share one, as the profile says; stateless requests (MCP 2026-07-28) always share
one. Refuses sessions that it did not open, and more processes than the setting allows. A process that ends takes its
sessions along: what waits for it is answered for, and the next request of a session finds none.
MCP 2025-03-26 to 2026-07-28, transports.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import msgspec

from sidecar.core.connection import Connection
from sidecar.core.correlation import Action, Common, Deliver, Drop, Own, Write
from sidecar.core.limits import Admission
from sidecar.core.message import Message, Shape, parse_any
from sidecar.core.stdio import Lines, LineTooLong, one_line
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import VERSION
from sidecar.shell import process
from sidecar.shell.process import GRACE_S, Pipe
from sidecar.shell.turnaround import Turnaround
from sidecar.shell.upstream import CONNECT_S, Call, Sink

log = logging.getLogger(__name__)

MAX_UNREAD_BYTES: Final = 16 * 2**20  # that a process has not read yet; four of the largest messages
MAX_SESSIONS: Final = 10_000  # of a shared process; the one that was opened first goes first
MAX_TOLD: Final = 20  # dropped lines of one process that are logged; the rest is counted
MAX_TOLD_CHARS: Final = 200
RETRY_S: Final = 5


class Process:
    """One process and everybody who has to do with it."""

    def __init__(self, whose: Own[Turnaround] | Common[Turnaround], home: "Stdio", idle_s: float) -> None:
        self.whose = whose
        self.pipe: Pipe | None = None  # the process itself, once there is one
        self._home = home
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._early = bytearray()  # what was written before there was a pipe
        self._lines = Lines()
        self._dropped = 0
        self._slow: set[Turnaround] = set()
        self._is_over = False
        self._used_s = self._loop.time()
        self._watch = self._loop.call_later(idle_s, self._end_if_idle)

    # Owner of the pipe

    def heard(self, data: bytes) -> None:
        """Take *data* from the process and see to whom it goes."""
        try:
            lines = self._lines.feed(data)
        except LineTooLong as error:
            self.end(str(error))
            return
        for line in lines:
            if not self._is_over:
                self._do(self.whose.hear(line), line)

    def ended(self, detail: str) -> None:
        """Know that there is no process any more."""
        self._settle(detail)
        self._home.forget(self)

    # for Stdio

    def use(self, pipe: Pipe) -> None:
        """Go on with *pipe*, which is the process."""
        self.pipe = pipe
        if self._is_over:
            pipe.end()
        else:
            pipe.write(bytes(self._early))
        self._early.clear()

    def end(self, detail: str) -> None:
        """Bring the process to its end; everybody who waits for it is told now."""
        self._settle(detail)
        if self.pipe is not None:
            self.pipe.end()

    def ask(self, caller: Turnaround, message: Message, scope: str) -> None:
        """Send a request."""
        self._do(self.whose.ask(caller, message, scope))

    def tell(self, message: Message, scope: str) -> None:
        """Send a notification or a response."""
        self._do(self.whose.tell(message, scope))

    def write(self, line: bytes) -> None:
        """Send *line*."""
        self._used_s = self._loop.time()
        if self.pipe is None:
            self._early += line + b"\n"
        else:
            self.pipe.write(line + b"\n")

    def open_stream(self, caller: Turnaround) -> None:
        """Let *caller* hear what belongs to no request."""
        caller.begin_stream()
        self._do(self.whose.open_stream(caller))

    def check(self, messages: Sequence[Message]) -> None:
        """Raise Refusal when *messages* cannot be sent: the process does not read, or an id is taken."""
        if len(self._early) + (0 if self.pipe is None else self.pipe.unread_bytes) > MAX_UNREAD_BYTES:
            raise Refusal(Reason.UPSTREAM, "the server did not answer", detail="it does not read its input")
        for message in messages:
            self.whose.check(message)

    # for Turnaround

    def leave(self, caller: Turnaround) -> None:
        """Let go of *caller*."""
        self._used_s = self._loop.time()
        self.hold(caller, hold=False)
        self._do(self.whose.leave(caller))

    def hold(self, caller: Turnaround, *, hold: bool) -> None:
        """Listen no further while *caller* cannot take more; but others must not wait for it."""
        if isinstance(self.whose, Common):
            return
        if hold:
            self._slow.add(caller)
        else:
            self._slow.discard(caller)
        if self.pipe is not None:
            self.pipe.hold(hold=bool(self._slow))

    def close_session(self, session_id: str) -> None:
        """End a session; a process of its own ends with it."""
        self._home.close_session(session_id)

    def _settle(self, detail: str) -> None:
        """Answer for the process to everybody who waits for it. Once."""
        if self._is_over:
            return
        self._is_over = True
        self._watch.cancel()
        log.info("a process of the server ends", extra={"detail": detail, "dropped_lines": self._dropped})
        self._home.disown(self)
        for caller in self.whose.callers():
            if caller.is_stream:
                caller.end_stream()
            else:
                caller.fail(detail)

    def _do(self, actions: Sequence[Action[Turnaround]], line: bytes = b"") -> None:
        for action in actions:
            match action:
                case Deliver(caller=caller, data=data, is_last=is_last, code=code):
                    caller.deliver(data, is_last=is_last, code=code)
                case Write(data=data):
                    self.write(data)
                case Drop(why=why):
                    self._drop(why, line)

    def _drop(self, why: str, line: bytes) -> None:
        if not line:  # a client's, answered already
            return
        self._dropped += 1
        if self._dropped <= MAX_TOLD:
            text = line[:MAX_TOLD_CHARS].decode(errors="replace")
            log.warning("dropped a line of the server's output", extra={"why": why, "line": text})

    def _end_if_idle(self) -> None:
        left_s = self._used_s + self._idle_s - self._loop.time()
        if self.whose.callers():
            left_s = self._idle_s
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._end_if_idle)
        else:
            self.end(f"unused for {self._idle_s:g} s")


class Stdio:
    """The way to one stdio server. Processes are started by *command*, or else by the relay at *host*."""

    def __init__(
        self,
        host: str,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        *,
        command: Sequence[str] = (),
        max_processes: int,
        idle_s: float,
    ) -> None:
        self._host = host
        self._spawn = spawn
        self._command = tuple(command)
        self._max_processes = max_processes
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[str, Process] = {}
        self._common: dict[str, Process] = {}
        self._processes: set[Process] = set()  # those that are ending, too
        self._all_gone = asyncio.Event()

    def send(self, admission: Admission, exchange: Exchange, sink: Sink, *, traceparent: bytes) -> Call:
        """Send the message that was admitted; *sink* receives the response. Raises Refusal."""
        del traceparent  # a pipe has no headers, and the message stays as it is
        question = admission.permit.question
        message, server = question.message, question.server
        _check_accept(exchange.connection, message)
        if message.revision.is_modern or message.method == "initialize":
            is_own = server.processes == "session" and not message.revision.is_modern
            kept = server.processes if server.processes == "shared" else "stateless"
            owner = self._new(Own(), server.port) if is_own else self._shared(kept, server.port)
        else:
            owner = self._session(exchange.session_id)
        parts = _parts(message, exchange.connection)
        owner.check(parts)
        opens = self._open_session(owner) if message.method == "initialize" else None
        answers = sum(each.shape is Shape.REQUEST for each in parts)
        call = Turnaround(sink, owner, message, answers=answers, session_id=opens)
        for each in parts:
            self._hand_over(call, owner, each, scope=opens or exchange.session_id or question.principal.key)
        if not answers and message.shape in (Shape.NOTIFICATION, Shape.RESPONSE):
            call.acknowledge(202)
        self._loop.call_soon(call.known)
        return call

    def _hand_over(self, call: Turnaround, owner: Process, message: Message, scope: str) -> None:
        match message.shape:
            case Shape.REQUEST:
                owner.ask(call, message, scope)
            case Shape.OPEN_STREAM:
                owner.open_stream(call)
            case Shape.CLOSE_SESSION:
                call.acknowledge(200)
                self.close_session(scope)
            case _:
                owner.tell(message, scope)

    def reply(self, exchange: Exchange, body: bytes, *, target: str | None = None) -> None:
        """Tell the server that a request of its own does not pass: *body* is an error of ours, in the exchange's session."""
        del target  # a pipe has one end
        owner = self._sessions.get(exchange.session_id or "")
        if owner is not None:
            owner.write(one_line(body))

    # sessions and processes

    def _open_session(self, owner: Process) -> str:
        session_id = secrets.token_hex(16)
        while len(self._sessions) >= MAX_SESSIONS:
            self.close_session(next(iter(self._sessions)))
        self._sessions[session_id] = owner
        return session_id

    def _session(self, session_id: str | None) -> Process:
        if session_id is None:
            raise Refusal(Reason.MALFORMED, "Mcp-Session-Id is missing: a session begins with initialize")
        owner = self._sessions.get(session_id)
        if owner is None:  # closed by its process; a client begins another (MCP 2025-03-26, session management)
            raise Refusal(Reason.NOT_FOUND, "this session is not open", detail="its process has ended")
        return owner

    def _shared(self, name: str, port: int) -> Process:
        owner = self._common.get(name)
        if owner is None:
            owner = self._common[name] = self._new(Common(), port)
        return owner

    def _new(self, whose: Own[Turnaround] | Common[Turnaround], port: int) -> Process:
        if len(self._processes) >= self._max_processes:
            raise Refusal(
                Reason.THROTTLED,
                "no more sessions can be opened now",
                detail=f"{self._max_processes} processes of the server are running (SIDEGATE_MAX_PROCESSES)",
                retry_after_s=RETRY_S,
            )
        made = Process(whose, self, self._idle_s)
        self._processes.add(made)
        self._spawn(self._open(made, port))
        return made

    async def _open(self, made: Process, port: int) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                if self._command:
                    pipe = await process.start(self._command, made)
                else:
                    pipe = await process.connect(self._host, port, made)
        except (OSError, TimeoutError) as error:
            made.ended(f"cannot start: {error or 'timed out'}")
            return
        made.use(pipe)

    def close_session(self, session_id: str) -> None:
        """Forget a session; a process of its own ends with it."""
        owner = self._sessions.pop(session_id, None)
        if owner is not None and isinstance(owner.whose, Own):
            owner.end("its session was closed")

    def disown(self, owner: Process) -> None:
        """Forget whatever *owner*, which is ending, was there for."""
        self._sessions = {name: each for name, each in self._sessions.items() if each is not owner}
        self._common = {name: each for name, each in self._common.items() if each is not owner}

    def forget(self, gone: Process) -> None:
        """Know that a process is no more."""
        self._processes.discard(gone)
        if not self._processes:
            self._all_gone.set()

    async def close(self) -> None:
        """End every process; return when none is left."""
        for each in tuple(self._processes):
            each.end("shutting down")
        self._all_gone.clear()
        try:
            async with asyncio.timeout(3 * GRACE_S):
                while self._processes:
                    await self._all_gone.wait()
        except TimeoutError:
            log.warning("processes of the server do not end", extra={"count": len(self._processes)})


def _parts(message: Message, connection: Connection) -> list[Message]:
    """Return *message*, or the messages of the batch that stands for, each with its own bytes: a line is one message."""
    if not message.body.lstrip().startswith(b"["):
        return [message]
    found = parse_any(message.body, connection.header(VERSION))
    raws = msgspec.json.decode(message.body, type=list[msgspec.Raw])
    assert isinstance(found, tuple)  # noqa: S101 - it begins like a batch and was admitted
    return [
        msgspec.structs.replace(each, body=bytes(raw))
        for each, raw in zip(found, raws, strict=True)
        if isinstance(each, Message)
    ]


def _check_accept(connection: Connection, message: Message) -> None:
    """Refuse a client that could not read the answer, as servers do; what it must list is the transport's rule."""
    if message.shape not in (Shape.REQUEST, Shape.OPEN_STREAM):
        return
    accepted = connection.values.get(b"accept", b"*/*").lower()
    wanted = (
        [b"text/event-stream"] if message.shape is Shape.OPEN_STREAM else [b"application/json", b"text/event-stream"]
    )
    if b"*/*" not in accepted and not all(kind in accepted for kind in wanted):
        raise Refusal(Reason.MALFORMED, f"Accept must list {b' and '.join(wanted).decode()}")
