"""What the audit trail costs a call, written through to a file: CPU of this thread. `python -m bench.audit`.

The best of many blocks: what else the machine does only adds. Beside it, what cannot be saved (one hash and one write of
such a line), and the same facts by OpenTelemetry's SDK: emitted as a log record, encoded for its exporter, and neither
chained nor written anywhere. Its batch processor encodes on another thread of the same interpreter, under the same lock.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor, ReadWriteLogRecord

from sidecar.core.profile import Audit as AuditProfile
from sidecar.exchange import Exchange
from sidecar.record import line
from sidecar.shell.audit import Audit
from sidecar.shell.trail import File
from tests.sidecar.exchanges import a_call, a_profile, an_exchange

BLOCKS: Final = 80
CALLS: Final = 200
FULL: Final = AuditProfile()
HASHES: Final = AuditProfile(arguments="hash", results="hash", redact=())


class Encoding(LogRecordProcessor):
    """Encodes each record as the exporter would, and sends it nowhere."""

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        """Encode *log_record*."""
        encode_logs([log_record]).SerializeToString()

    def shutdown(self) -> None:
        """Do nothing."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:  # noqa: ARG002 - the SDK's signature
        """Do nothing."""
        return True


def exchanges(audit: AuditProfile) -> Sequence[Exchange]:
    """Return calls of one session: the same caller, session and tool, another id each."""
    profile = a_profile(audit=audit)
    calls = [a_call("query", {"table": "invoices", "limit": 10}, request_id=number) for number in range(CALLS)]
    made = [an_exchange(call, profile=profile, sent_s=0.000_2) for call in calls]
    first = made[0]
    for each in made:  # of one connection, with a token that was verified before
        each.connection, each.principal, each.permit = first.connection, first.principal, first.permit
    return made


def cost_us(observe: Callable[[Exchange], Any], audit: AuditProfile = FULL) -> float:
    """Return the CPU time of one call of *observe*."""
    calls, best_ns = exchanges(audit), 10**12
    for _ in range(BLOCKS):
        for each in calls:
            each.recorded = None  # what a call's first record keeps for its second
        started_ns = time.thread_time_ns()
        for each in calls:
            observe(each)
        best_ns = min(best_ns, time.thread_time_ns() - started_ns)
    return best_ns / CALLS / 1000


def sdk() -> Callable[[Exchange], None]:
    """Return how the SDK would be told of an exchange."""
    provider = LoggerProvider()
    provider.add_log_record_processor(Encoding())
    logger, body = provider.get_logger("sidegate"), orjson.loads(line(exchanges(FULL)[0]))

    def emit(exchange: Exchange) -> None:
        logger.emit(
            LogRecord(
                timestamp=exchange.started_ns,
                severity_number=SeverityNumber.INFO,
                event_name="sidegate.audit",
                body=body,
            )
        )

    return emit


def main() -> None:
    """Print."""
    gc.collect()
    gc.freeze()  # as the sidecar does
    with tempfile.TemporaryDirectory() as name:
        sizes = len(line(exchanges(FULL)[0])) + 110
        print(f"audit, a line of {sizes} bytes: us of CPU a call")

        def row(what: str, cost: float) -> None:
            print(f"  {what:58} {cost:8.2f}")

        text = b"x" * (sizes - 1) + b"\n"
        file = os.open(Path(name) / "bare", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        row("one SHA-256 of such a line", cost_us(lambda _: sha256(text).hexdigest()))
        row("one write of such a line", cost_us(lambda _: os.write(file, text)))
        row("the record as JSON", cost_us(line))
        row("the same, sizes and hashes only", cost_us(line, HASHES))
        for what, profile in (("written through", FULL), ("written through, sizes and hashes only", HASHES)):
            audit = Audit(File(str(Path(name) / what)))
            row(what, cost_us(audit.observe, profile))
        both = Audit(File(str(Path(name) / "both")))

        def twice(exchange: Exchange) -> None:
            both.begin((exchange,))
            both.observe(exchange)

        row("written before sending, and at the end", cost_us(twice))
        row("OpenTelemetry SDK: emitted and encoded, not written", cost_us(sdk()))
        os.close(file)


if __name__ == "__main__":
    main()
