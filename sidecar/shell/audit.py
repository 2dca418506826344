"""Writes the audit trail: one line for each exchange, handed to the kernel before the answer's last byte is.

And one more for each call that may change something, before it is sent (`begin`); a call that cannot be recorded is not
sent, unless the profile says otherwise. Nothing is batched: a crash loses no record of what was answered. Writing blocks:
a disk or log reader that stalls holds the calls up, because the other choice would be to answer unrecorded. A sink that
fails raises nothing at the end of a call: its records wait here, up to a bound. Lines are chained, and the chain is signed
now and then (sidecar/core/chain.py); what was lost for want of space is said in the chain, not hidden by it.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from sidecar.core.chain import Chain, Event, event_line
from sidecar.core.message import Message, Shape
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.record import Phase, line, timestamp
from sidecar.shell.trail import Sink

log = logging.getLogger(__name__)

MAX_WAITING: Final = 1000  # records while the sink fails, about 2 MB; then the oldest are lost, and counted
CHECKPOINT_LINES: Final = 1000  # a signature costs as much as ten records
CHECKPOINT_S: Final = 60.0  # with the next record after that; what is not written needs no cover
RETRY_S: Final = 5  # what a caller is told to wait for: disks are cleaned and receivers restarted in minutes

Signer = Callable[[dict[str, Any]], str | None]


class Audit:
    """Appends to *sink*. *sign* makes the JWS of a checkpoint's claims, or None when there is no key at the moment.

    Attributes:
        records: how many were written.
        failures: how often a write failed.
        lost: how many records were never written, or deleted before anybody had them.
    """

    def __init__(self, sink: Sink, *, sign: Signer = lambda _: None) -> None:
        self._sink = sink
        self._sign = sign
        self._chain = Chain(secrets.token_hex(16), after=sink.last_hash)
        self._waiting: deque[bytes] = deque()
        self._since_checkpoint = 0
        self._checkpoint_at_s = time.monotonic() + CHECKPOINT_S
        self._may_drop = False  # as the profile says that judged last
        self.records = 0
        self.failures = 0
        self.lost = 0

    @property
    def failed(self) -> bool:
        """Return whether calls are refused for want of a record, after trying again: who is not ready gets none."""
        self._write_waiting()
        return self._is_stuck and not self._may_drop

    @property
    def _is_stuck(self) -> bool:
        return bool(self._waiting) or self._sink.is_full

    def begin(self, exchanges: Sequence[Exchange]) -> None:
        """Write that *exchanges*, all of one body, are about to be sent, those of which the profile wants it.

        Raises Refusal(NOT_READY) where that fails or their end could not be written, unless records may be dropped.
        """
        profile = exchanges[0].profile
        audit = None if profile is None else profile.audit
        self._may_drop = audit is not None and audit.when_full == "drop"
        if self._is_stuck and self.failed:
            raise _unrecorded()
        for exchange in exchanges:
            if audit is not None and _is_begun(exchange.message, audit.before):
                self._waiting.append(line(exchange, Phase.BEGIN))
                self._write_waiting()
                if self._waiting and not self._may_drop:
                    self._waiting.pop()  # it is not sent; that it was refused is recorded at its end
                    raise _unrecorded()

    def observe(self, exchange: Exchange) -> None:
        """Write the record of *exchange*."""
        self._waiting.append(line(exchange))
        self._write_waiting()
        if self._since_checkpoint >= CHECKPOINT_LINES or time.monotonic() >= self._checkpoint_at_s:
            self._mark(Event.CHECKPOINT)

    def close(self) -> None:
        """Write what waits, if that can be done now, close the chain, and the sink."""
        self._write_waiting()
        if self._waiting:
            self.lost += len(self._waiting)
            log.error("audit records lost with the process", extra={"records": len(self._waiting)})
        self._mark(Event.CLOSED)
        self._sink.close()

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
        dropped = self._sink.write(sealed, may_drop=self._may_drop)
        self._chain.passed(sealed)
        if dropped:
            self.lost += dropped
            log.error("audit records deleted before they were shipped", extra={"records": dropped})


def _is_begun(message: Message | None, before: str) -> bool:
    """Say whether a message is recorded before it is sent; what a server says of its tools is not believed."""
    if message is None or before == "off":
        return False
    return before == "all" or (message.method == "tools/call" and message.shape is Shape.REQUEST)


def _unrecorded() -> Refusal:
    return Refusal(
        Reason.NOT_READY, "the call cannot be recorded", detail="the audit sink fails", retry_after_s=RETRY_S
    )
