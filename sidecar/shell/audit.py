"""Writes the audit trail: one line for each exchange, handed to the kernel before the answer's last byte is.

Nothing is batched: a crash loses no record of what was answered, for 1.4 us a write. Writing blocks: a disk or log
reader that stalls holds the calls up, because the other choice would be to answer unrecorded. A sink that fails raises
nothing: its records wait here, up to a bound, and `failed` says so for readiness.
"""

import logging
import os
from collections import deque
from typing import Final

from sidecar.exchange import Exchange
from sidecar.record import line

log = logging.getLogger(__name__)

STDOUT: Final = "stdout"
MAX_WAITING: Final = 1000  # records while the sink fails, about 2 MB; then the oldest are lost, and counted
_STDOUT_FD: Final = 1
_MODE: Final = 0o640  # the shipping agent reads it through its group


class Audit:
    """Appends to *sink*: `stdout`, or the path of a file; raises OSError when it cannot be opened.

    Attributes:
        records: how many were written.
        failures: how often a write failed.
        lost: how many records were never written.
    """

    def __init__(self, sink: str) -> None:
        self._fd = _STDOUT_FD if sink == STDOUT else os.open(sink, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MODE)
        self._waiting: deque[bytes] = deque()
        self._is_torn = False  # the last line was written in part: the next must not be glued to it
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

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._fd != _STDOUT_FD:
            os.close(self._fd)

    def _write_waiting(self) -> None:
        while self._waiting:
            try:
                self._write(self._waiting[0])
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

    def _write(self, record: bytes) -> None:
        """Write *record* in one call; a full disk or pipe may take only a part, and then the rest is tried."""
        left = b"\n" + record if self._is_torn else record
        while left:
            written = os.write(self._fd, left)
            left = left[written:]
            self._is_torn = bool(left)
