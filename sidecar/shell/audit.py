"""Writes the audit trail: one line for each exchange, handed to the kernel before the answer's last byte is.

Nothing is batched: a crash loses no record of what was answered, for 1.4 us a write. Writing blocks: a disk or log
reader that stalls holds the calls up, because the other choice would be to answer unrecorded.
A failing sink never raises; it is counted, and `failed` says so for readiness.
"""

import logging
import os
from typing import Final

from sidecar.exchange import Exchange
from sidecar.record import line

log = logging.getLogger(__name__)

STDOUT: Final = "stdout"
_STDOUT_FD: Final = 1
_MODE: Final = 0o640  # the shipping agent reads it through its group


class Audit:
    """Appends to *sink*: `stdout`, or the path of a file; raises OSError when it cannot be opened."""

    def __init__(self, sink: str) -> None:
        self._fd = _STDOUT_FD if sink == STDOUT else os.open(sink, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MODE)
        self._is_torn = False  # the last line was written in part: the next must not be glued to it
        self.failed = False
        self.records = 0
        self.failures = 0

    def observe(self, exchange: Exchange) -> None:
        """Write the record of *exchange*."""
        try:
            self._write(line(exchange))
        except OSError as error:
            self.failures += 1
            if not self.failed:
                log.error("audit sink failed", extra={"error": str(error)})  # noqa: TRY400 - the sink's fault, no defect of ours
            self.failed = True
            return
        self.records += 1
        if self.failed:
            log.info("audit sink works again", extra={"lost": self.failures})
        self.failed = False

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._fd != _STDOUT_FD:
            os.close(self._fd)

    def _write(self, record: bytes) -> None:
        """Write *record* in one call; a full disk or pipe may take only a part, and then the rest is tried."""
        left = b"\n" + record if self._is_torn else record
        while left:
            written = os.write(self._fd, left)
            left = left[written:]
            self._is_torn = bool(left)
