"""One process of a stdio server: behind a connection to the relay in its container, or started here by `sidegate run`.

Decides nothing. An end is gentle first: the end of its input, then SIGTERM, then SIGKILL, each to the whole process group;
the relay does the same for a connection that is closed (relay/relay.c). MCP, transports: stdio, shutdown.
"""

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol, cast

from sidecar.core.stdio import Lines, LineTooLong

log = logging.getLogger(__name__)

GRACE_S: Final = 2.0  # from one step of an end to the next
DRAIN_S: Final = 1.0  # for the last words of a process that has ended
MAX_LOG_LINE_BYTES: Final = 16 * 1024
LOOK_S: Final = 0.5  # between looks at a process; no signal of a child's end is the same on every loop and system
SOON_S: Final = 0.02  # while its end is waited for


class Owner(Protocol):
    """Who hears a process."""

    def heard(self, data: bytes) -> None:
        """Take *data* from its standard output."""
        ...

    def ended(self, detail: str) -> None:
        """Know that it is over, and why; the last call."""
        ...


class Pipe(Protocol):
    """A process, as its owner sees it."""

    @property
    def unread_bytes(self) -> int:
        """Return how much it has not taken yet of what was written."""
        ...

    def write(self, data: bytes) -> None:
        """Send *data* to its standard input."""
        ...

    def hold(self, *, hold: bool) -> None:
        """Stop listening, or listen again."""
        ...

    def end(self) -> None:
        """Bring it to its end; `ended` says when it is there."""
        ...


class Relayed(asyncio.Protocol):
    """A process behind the relay: it lives as long as the connection."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._is_held = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep *transport*."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it

    def data_received(self, data: bytes) -> None:
        """Hand *data* on."""
        self._owner.heard(data)

    def eof_received(self) -> None:
        """Let the transport close."""

    def connection_lost(self, error: Exception | None) -> None:
        """Say so."""
        self._transport = None
        self._owner.ended(f"the process is gone: {error or 'end of its output'}")

    @property
    def unread_bytes(self) -> int:
        """Return how much waits in the transport."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Send *data*, if the connection is still there."""
        if self._transport is not None:
            self._transport.write(data)

    def hold(self, *, hold: bool) -> None:
        """Stop reading, or read again."""
        if self._transport is not None and not self._transport.is_closing() and hold is not self._is_held:
            self._is_held = hold
            _hold(self._transport, hold=hold)

    def end(self) -> None:
        """Close; the relay ends the process. What a process that reads nothing leaves unsent is dropped in the end."""
        if self._transport is not None:
            self._transport.close()
            if self._transport.get_write_buffer_size():  # closing waits for it to be read
                asyncio.get_running_loop().call_later(GRACE_S, self._transport.abort)


class _Ear(asyncio.Protocol):
    """One output of a process."""

    def __init__(self, hear: Callable[[bytes], None], over: Callable[[], None]) -> None:
        self._hear = hear
        self._over = over

    def data_received(self, data: bytes) -> None:
        self._hear(data)

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._over()


class Started:
    """A process of our own, with a process group of its own; its standard error goes to our log.

    Not the loop's own subprocess: uvloop's has sockets where a server expects pipes, and lets it inherit them twice, so
    that the end of its output is not seen.
    """

    def __init__(self, command: Sequence[str], owner: Owner) -> None:
        """Start *command*; raises OSError. `listen` is to follow."""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(  # noqa: S603 - the command is the operator's own
            command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._said = Lines(MAX_LOG_LINE_BYTES)
        self._stdin: asyncio.WriteTransport | None = None
        self._outputs: list[asyncio.ReadTransport] = []  # standard output first
        self._next_look = self._loop.call_later(LOOK_S, self._look)
        self._next_step: asyncio.TimerHandle | None = None
        self._is_held = False
        self._is_heard = True  # its output has not ended
        self._is_over = False

    async def listen(self) -> None:
        """Connect its three pipes with the loop."""
        ears = (partial(_Ear, self._owner.heard, self._silent), partial(_Ear, self._log, lambda: None))
        for ear, file in zip(ears, (self._process.stdout, self._process.stderr), strict=True):
            transport, _ = await self._loop.connect_read_pipe(ear, file)
            self._outputs.append(transport)
        self._stdin, _ = await self._loop.connect_write_pipe(asyncio.BaseProtocol, self._process.stdin)

    @property
    def pid(self) -> int:
        """Return its process id, which is its group's, too."""
        return self._process.pid

    @property
    def unread_bytes(self) -> int:
        """Return how much waits in the pipe's transport."""
        return 0 if self._stdin is None else self._stdin.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Send *data*, if it still reads."""
        if self._stdin is not None and not self._stdin.is_closing():
            self._stdin.write(data)

    def hold(self, *, hold: bool) -> None:
        """Stop reading, or read again."""
        if self._is_heard and not self._is_over and hold is not self._is_held:
            self._is_held = hold
            _hold(self._outputs[0], hold=hold)

    def end(self) -> None:
        """Close its input; more only if that does not do."""
        if self._stdin is not None:
            self._stdin.close()
        if not self._is_over and self._next_step is None:
            self._next_step = self._loop.call_later(GRACE_S, self._terminate)
            self._look()

    def _terminate(self) -> None:
        self._signal(signal.SIGTERM)
        self._next_step = self._loop.call_later(GRACE_S, self._signal, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # nobody of the group is left; macOS says so by the second
            log.debug("no process to signal", extra={"pid": self.pid})

    def _log(self, data: bytes) -> None:
        try:
            said = self._said.feed(data)
        except LineTooLong:
            said, self._said = [data[:MAX_LOG_LINE_BYTES]], Lines(MAX_LOG_LINE_BYTES)
        for line in said:
            log.info("the server says", extra={"pid": self.pid, "stderr": line.decode(errors="replace")})

    def _silent(self) -> None:
        """End it when it closes its output: nothing more can come of it."""
        self._is_heard = False
        self.end()
        self._look()

    def _look(self) -> None:
        """See whether it is still there; when it is not, wait for its last words, but not for what it left behind."""
        self._next_look.cancel()
        if self._is_over:
            return
        if self._process.poll() is None:
            self._next_look = self._loop.call_later(SOON_S if self._next_step else LOOK_S, self._look)
        elif self._is_heard:
            self._is_heard = False
            self._next_look = self._loop.call_later(DRAIN_S, self._look)
        else:
            self._finish()

    def _finish(self) -> None:
        self._is_over = True
        if self._next_step is not None:
            self._next_step.cancel()
        self._signal(signal.SIGKILL)  # what it started and left behind
        for transport in (self._stdin, *self._outputs):
            if transport is not None:
                transport.close()
        self._owner.ended(f"the process is gone: exit status {self._process.returncode}")


def _hold(transport: asyncio.ReadTransport, *, hold: bool) -> None:
    if hold:
        transport.pause_reading()
    else:
        transport.resume_reading()


async def connect(host: str, port: int, owner: Owner) -> Pipe:
    """Return a new process of the relay at *host* and *port*; raises OSError."""
    _, pipe = await asyncio.get_running_loop().create_connection(lambda: Relayed(owner), host, port)
    return pipe


async def start(command: Sequence[str], owner: Owner) -> Pipe:
    """Return a new process that runs *command*; raises OSError."""
    pipe = Started(command, owner)
    await pipe.listen()
    return pipe
