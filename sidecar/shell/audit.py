"""Writes the audit trail: one line for each exchange, handed to the kernel before the answer's last byte is.

Nothing is batched: a crash loses no record of what was answered, for 1.4 us a write. Writing blocks: a disk or log
reader that stalls holds the calls up, because the other choice would be to answer unrecorded. A sink that fails raises
nothing: its records wait here, up to a bound, and `failed` says so for readiness. Lines are chained, and the chain is
signed now and then (sidecar/core/chain.py); what was lost for want of space is said in the chain, not hidden by it.
"""

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sidecar.core.chain import NOTHING, Chain, Event, event_line, hash_of
from sidecar.exchange import Exchange
from sidecar.record import line, timestamp

log = logging.getLogger(__name__)

STDOUT: Final = "stdout"
MAX_WAITING: Final = 1000  # records while the sink fails, about 2 MB; then the oldest are lost, and counted
CHECKPOINT_LINES: Final = 1000  # a signature costs as much as ten records
CHECKPOINT_S: Final = 60.0  # with the next record after that; what is not written needs no cover
MAX_LAST_LINE_BYTES: Final = 2**20  # of a file that is gone on with; a record is a few tens of kilobytes at most
_STDOUT_FD: Final = 1
_MODE: Final = 0o640  # the shipping agent reads it through its group

Signer = Callable[[dict[str, Any]], str | None]


class Audit:
    """Appends to *sink*: `stdout`, or the path of a file; raises OSError when it cannot be opened.

    *sign* makes the JWS of a checkpoint's claims, or None when there is no key at the moment.

    Attributes:
        records: how many were written.
        failures: how often a write failed.
        lost: how many records were never written.
    """

    def __init__(self, sink: str, *, sign: Signer = lambda _: None) -> None:
        after = NOTHING if sink == STDOUT else _last_hash(sink)
        self._fd = _STDOUT_FD if sink == STDOUT else os.open(sink, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MODE)
        self._sign = sign
        self._chain = Chain(secrets.token_hex(16), after=after)
        self._waiting: deque[bytes] = deque()
        self._is_torn = False  # the last line was written in part: the next must not be glued to it
        self._since_checkpoint = 0
        self._checkpoint_at_s = time.monotonic() + CHECKPOINT_S
        self.records = 0
        self.failures = 0
        self.lost = 0

    @property
    def failed(self) -> bool:
        """Return whether records wait, after trying again: who is not ready gets no calls that would try."""
        self._write_waiting()
        return bool(self._waiting)

    def observe(self, exchange: Exchange) -> None:
        """Write the record of *exchange*."""
        self._waiting.append(line(exchange))
        self._write_waiting()
        if self._since_checkpoint >= CHECKPOINT_LINES or time.monotonic() >= self._checkpoint_at_s:
            self._mark(Event.CHECKPOINT)

    def close(self) -> None:
        """Close the chain, and the file; standard output stays open."""
        self._mark(Event.CLOSED)
        if self._fd != _STDOUT_FD:
            os.close(self._fd)

    def _mark(self, event: Event) -> None:
        """Sign what was written, unless records wait or nobody can sign."""
        self._since_checkpoint, self._checkpoint_at_s = 0, time.monotonic() + CHECKPOINT_S
        if self._waiting or self._chain.link.seq == 1:
            return
        now = timestamp(time.time_ns())
        signature = self._sign(self._chain.link.claims(event, now, self.lost))
        if signature is None:
            return
        try:
            self._pass(event_line(event, now, self.lost, signature))
        except OSError as error:
            self.failures += 1
            log.error("audit sink fails", extra={"error": str(error)})  # noqa: TRY400 - the sink's fault: no traceback

    def _write_waiting(self) -> None:
        while self._waiting:
            try:
                self._pass(self._waiting[0])
            except OSError as error:
                self.failures += 1
                if len(self._waiting) > MAX_WAITING:
                    self._waiting.popleft()
                    self.lost += 1
                if len(self._waiting) == 1:
                    log.error("audit sink fails", extra={"error": str(error)})  # noqa: TRY400 - the sink's fault: no traceback
                return
            self._waiting.popleft()
            self.records += 1
            self._since_checkpoint += 1

    def _pass(self, text: bytes) -> None:
        """Write *text* with its place in the chain; it takes the place only when it was written whole."""
        sealed = self._chain.sealed(text)
        self._write(sealed)
        self._chain.passed(sealed)

    def _write(self, record: bytes) -> None:
        """Write *record* in one call; a full disk or pipe may take only a part, and then the rest is tried."""
        left = b"\n" + record if self._is_torn else record
        while left:
            written = os.write(self._fd, left)
            left = left[written:]
            self._is_torn = bool(left)


def _last_hash(path: str) -> str:
    """Return the hash of the last line of *path*, which a new chain is begun behind; raises OSError."""
    file = Path(path)
    if not file.is_file():  # there is none yet, or it is a pipe or a device, which would be read for ever
        return NOTHING
    with file.open("rb") as kept:
        kept.seek(max(0, file.stat().st_size - MAX_LAST_LINE_BYTES))
        lines = kept.read(MAX_LAST_LINE_BYTES).splitlines()
    return hash_of(lines[-1]) if lines else NOTHING
