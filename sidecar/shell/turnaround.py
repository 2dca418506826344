"""One HTTP request on its way through a process: its answer as JSON when that is all there is, in a stream otherwise.

Decides nothing; sidecar/core/correlation.py says what belongs to it. MCP 2025-03-26 to 2026-07-28, transports.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sidecar.core.message import Message, Shape
from sidecar.shell.upstream import Call, Sink

MAX_OWED_BYTES: Final = 8 * 2**20  # to a slow client of a process that serves others too
JSON: Final = (b"content-type", b"application/json")
EVENTS: Final = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)
# MCP 2026-07-28, transports; before, every answer is a 200.
MODERN_STATUS: Final = {-32700: 400, -32600: 400, -32602: 400, -32020: 400, -32021: 400, -32022: 400, -32601: 404}


class Owner(Protocol):
    """Who answers: a process and its correlation."""

    def leave(self, caller: "Turnaround") -> None:
        """Let go of *caller*."""
        ...

    def hold(self, caller: "Turnaround", *, hold: bool) -> None:
        """Know that *caller* cannot take more, or can again."""
        ...

    def close_session(self, session_id: str) -> None:
        """End a session."""
        ...


class Turnaround(Call):
    """One HTTP request on its way through a process, or a stream of what belongs to no request."""

    def __init__(
        self, sink: Sink, owner: Owner, message: Message, *, answers: int = 1, session_id: str | None = None
    ) -> None:
        """Expect so many *answers*, more than one to a batch; *session_id* is of the session that this request opens."""
        super().__init__(sink, b"")
        self._owner = owner
        self._message = message
        self._missing = answers
        self._opens = session_id
        self._is_begun = False
        self._is_over = False
        self._is_paused = False
        self._owed_bytes = 0
        self._early: list[Callable[[], None]] | None = []  # what came before the caller knew of the call

    def known(self) -> None:
        """Go on with what came too early."""
        early, self._early = self._early or (), None
        for act in early:
            act()

    def deliver(self, data: bytes, *, is_last: bool, code: int | None) -> None:
        """Pass on *data*, one message of the server: as JSON when it is all there is, in a stream otherwise."""
        self._once_known(lambda: self._deliver(data, is_last=is_last, code=code))

    def acknowledge(self, status: int) -> None:
        """Answer without a body."""
        self._once_known(lambda: self._acknowledge(status))

    def begin_stream(self) -> None:
        """Let the client know at once that it will be heard."""
        self._once_known(lambda: self._begin(200, EVENTS))

    def end_stream(self) -> None:
        """End what belongs to no request."""
        self._once_known(self._complete)

    def fail(self, detail: str) -> None:
        """Say that there will be no answer, or no rest of it."""
        self._once_known(lambda: self._fail(detail))

    @property
    def is_stream(self) -> bool:
        """Say whether it waits for no answer."""
        return self._message.shape is Shape.OPEN_STREAM

    # Call

    def abort(self) -> None:
        """Give the call up; whether the process hears of it depends on the revision."""
        if self.abandoned:
            return
        self.abandoned = True
        self._owner.leave(self)
        if self._opens is not None and not self._is_over:
            self._owner.close_session(self._opens)  # nobody will ever know its id

    def pause(self) -> None:
        """Take no more: the client is slow."""
        self._is_paused = True
        self._owner.hold(self, hold=True)

    def resume(self) -> None:
        """Take more."""
        self._is_paused, self._owed_bytes = False, 0
        self._owner.hold(self, hold=False)

    # towards the sink, which may abort this call from within

    def _once_known(self, act: Callable[[], None]) -> None:
        if self._early is None:
            act()
        else:
            self._early.append(act)

    def _acknowledge(self, status: int) -> None:
        self._begin(status, ())
        self._complete()

    def _deliver(self, data: bytes, *, is_last: bool, code: int | None) -> None:
        self._missing -= is_last
        is_last = is_last and not self._missing  # each answer to a batch is an event: none waits for the others
        if is_last and not self._is_begun:
            status = MODERN_STATUS.get(code or 0, 200) if self._message.revision.is_modern else 200
            self._begin(status, (JSON,) if code is not None else (JSON, *self._session()))
            self._feed(data)
        else:
            if not self._is_begun:
                self._begin(200, (*EVENTS, *self._session()))
            self._feed(b"event: message\ndata: %b\n\n" % data)
        if is_last:
            self._complete()
            if code is not None and self._opens is not None:
                self._owner.close_session(self._opens)

    def _fail(self, detail: str) -> None:
        if not self.abandoned and not self._is_over:
            self._is_over = True
            self.sink.failed(detail)

    def _begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._is_begun = True
        if not self.abandoned and not self._is_over:
            self.sink.begin(status, b"", headers)

    def _feed(self, data: bytes) -> None:
        if self.abandoned or self._is_over:
            return
        self._owed_bytes += len(data) if self._is_paused else 0
        if self._owed_bytes > MAX_OWED_BYTES:
            self._owner.leave(self)
            self._fail("the client reads too slowly")
        else:
            self.sink.feed(data)

    def _complete(self) -> None:
        if not self.abandoned and not self._is_over:
            self._is_over = True
            self.sink.complete()

    def _session(self) -> tuple[tuple[bytes, bytes], ...]:
        return () if self._opens is None else ((b"mcp-session-id", self._opens.encode()),)
