"""Structured log lines on standard error: one JSON object each, facts as fields; the audit trail is elsewhere.

One line for each message that was judged (LINE_FIELDS in sidecar/core/conventions.py), and one for each thing that
happens to the process. Lines of messages never hold a call up: they wait for a moment, and where the reader of a pipe
stalls they are dropped and counted. Both kinds go to an OTLP receiver as well, where one is asked for.
"""

import asyncio
import json
import logging
import os
import select
import sys
import time
from collections import deque
from typing import Any, Final

import orjson

from sidecar.config import LogLevel, RequestLines
from sidecar.core.message import Prompt, Tool
from sidecar.core.redaction import encode
from sidecar.errors import Reason
from sidecar.exchange import Exchange
from sidecar.record import cut, error_type, timestamp
from sidecar.shell.otlp import Receiver, attribute

LINGER_S: Final = 0.1  # from a line to its write: many lines, one system call
MAX_WAITING: Final = 10_000  # lines, about 4 MB
PIECE_BYTES: Final = select.PIPE_BUF  # a pipe that is writable takes so much without blocking (POSIX, write)
LOGGER: Final = "sidecar.requests"
_STDERR_FD: Final = 2
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OURS: Final = (Reason.UPSTREAM, Reason.FAULT, Reason.NOT_READY, Reason.PROVIDER)
# OpenTelemetry's severity numbers, by the level.
_SEVERITY: Final = {logging.DEBUG: 5, logging.INFO: 9, logging.WARNING: 13, logging.ERROR: 17, logging.CRITICAL: 21}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; what was given as `extra` becomes its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for *record*."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_extras(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, separators=(",", ":"))


def configure(level: str) -> None:
    """Send log records of *level* and above to standard error."""
    formatter = JsonFormatter()
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.getLogger("hpack").setLevel(logging.WARNING)  # at debug it writes ten lines for each header
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class OtlpHandler(logging.Handler):
    """Gives log records to *receiver* too; not those about delivering telemetry, which would breed more."""

    def __init__(self, receiver: Receiver) -> None:
        super().__init__()
        self._receiver = receiver

    def emit(self, record: logging.LogRecord) -> None:
        """Queue *record*."""
        if not self._receiver.is_on or record.name == "sidecar.shell.otlp":
            return
        fields = {"logger": record.name, **{name: str(value) for name, value in _extras(record).items()}}
        if record.exc_info:
            fields["exception.stacktrace"] = logging.Formatter().formatException(record.exc_info)
        self._receiver.put(_log_record(int(record.created * 1e9), record.levelno, record.getMessage(), fields, ""))


class RequestLog:
    """Writes a line for each exchange that *lines* wants. Mutated by `observe` and `flush`, on the loop.

    Attributes:
        dropped: lines that were not written, because nobody read.
    """

    def __init__(self, lines: RequestLines, level: LogLevel, receiver: Receiver, *, fd: int = _STDERR_FD) -> None:
        self._refused_only = lines is RequestLines.REFUSED
        self._least = getattr(logging, level.upper())
        self._is_on = lines is not RequestLines.OFF
        self._receiver = receiver
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._timer: asyncio.TimerHandle | None = None
        self.dropped = 0

    def observe(self, exchange: Exchange) -> None:
        """Queue the line of *exchange*."""
        refusal = exchange.refusal
        if not self._is_on or (self._refused_only and refusal is None):
            return
        level = logging.ERROR if refusal is not None and refusal.reason in _OURS else logging.INFO
        if level < self._least:
            return
        fields = line_fields(exchange)
        if self._receiver.is_on:
            self._send(exchange, level, fields)
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        self._waiting.append(line_of(exchange, level, fields))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.flush)

    def flush(self) -> None:
        """Write what waits, as far as somebody reads; the rest waits on."""
        self._timer = None
        while self._waiting:
            if not self._poll.poll(0):
                self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.flush)
                return
            piece = self._waiting.popleft()
            while self._waiting and len(piece) + len(self._waiting[0]) <= PIECE_BYTES:
                piece += self._waiting.popleft()
            try:
                os.write(self._fd, piece)
            except OSError:  # nobody is there to be told
                self.dropped += piece.count(b"\n")

    def close(self) -> None:
        """Write what can be written, and no more."""
        if self._waiting and self._poll.poll(0):
            self.flush()
        if self._timer is not None:
            self._timer.cancel()
        self._is_on = False

    def _send(self, exchange: Exchange, level: int, fields: dict[str, Any]) -> None:
        where = f'"traceId":"{exchange.trace_id}","spanId":"{exchange.span_id}",'
        told = {key: value for key, value in fields.items() if key not in ("trace_id", "span_id")} | {"logger": LOGGER}
        self._receiver.put(_log_record(_ended_ns(exchange), level, "request", told, where))


def line_fields(exchange: Exchange) -> dict[str, Any]:
    """Return what a line says of *exchange* beside time and level."""
    message, error = exchange.message, error_type(exchange)
    fields: dict[str, Any] = {
        "trace_id": exchange.trace_id,
        "span_id": exchange.span_id,
        "direction": "inbound" if exchange.outbound is None else "outbound",
    }
    if message is not None:
        fields["method"] = message.method
        if isinstance(message.target, Tool | Prompt):
            fields["target"] = cut(message.target.name)
    elif exchange.outbound is not None:
        fields["target"] = f"{exchange.outbound.host}:{exchange.outbound.port}"
    fields["http_status"] = exchange.status
    fields["decision"] = "allowed" if exchange.was_sent else "refused"
    if error:
        fields["error_type"] = error
    fields["judged_s"], fields["total_s"] = _microseconds(exchange.judged_s), _microseconds(exchange.total_s)
    return fields


def line_of(exchange: Exchange, level: int, fields: dict[str, Any]) -> bytes:
    """Return the line of *exchange* with these *fields*, its end included."""
    document = {
        "time": timestamp(_ended_ns(exchange))[:23] + "Z",
        "level": "info" if level == logging.INFO else "error",
        "logger": LOGGER,
        "message": "request",
        **fields,
    }
    try:
        return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate in a tool's name
        return encode(document) + b"\n"


def _log_record(at_ns: int, level: int, body: str, fields: dict[str, Any], where: str) -> bytes:
    """Return OTLP's LogRecord; *where* is the members that name the span, if there is one."""
    return (
        b'{"timeUnixNano":"%d","observedTimeUnixNano":"%d",%b"severityNumber":%d,"severityText":"%b","body":%b,"attributes":[%b]}'
        % (
            at_ns,
            at_ns,
            where.encode(),
            _SEVERITY.get(level, 9),
            logging.getLevelName(level).encode(),
            encode({"stringValue": body}),
            b",".join(_attribute(key, value) for key, value in fields.items()),
        )
    )


def _attribute(key: str, value: str | float) -> bytes:
    if isinstance(value, float):
        return encode({"key": key, "value": {"doubleValue": value}})
    return attribute(key, value)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _ended_ns(exchange: Exchange) -> int:
    return exchange.started_ns + int(exchange.total_s * 1e9)


def _microseconds(seconds: float) -> float:
    return int(seconds * 1e6) / 1e6
