"""One line for each message, with fields that are documented; a reader that stalls costs lines, never calls."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from sidecar.config import LogLevel, RequestLines
from sidecar.core.conventions import LINE_FIELDS
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell import logs
from sidecar.shell.logs import JsonFormatter, OtlpHandler, RequestLog
from tests.fakes import eventually
from tests.sidecar.exchanges import a_call, a_refused_exchange, an_exchange, an_unreadable_exchange
from tests.sidecar.receivers import Kept, values


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return both ends of a pipe."""
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def _written(
    pipe: tuple[int, int], *exchanges: Exchange, lines: RequestLines = RequestLines.ALL, level: LogLevel = LogLevel.INFO
) -> list[dict[str, Any]]:
    """Return what is logged of *exchanges*."""

    async def write() -> None:
        log = RequestLog(lines, level, Kept(is_on=False), fd=pipe[1])
        for exchange in exchanges:
            log.observe(exchange)
        log.close()

    asyncio.run(write())
    os.set_blocking(pipe[0], False)
    try:
        return [json.loads(line) for line in os.read(pipe[0], 2**20).splitlines()]
    except BlockingIOError:
        return []


def test_line_says_what_happened(pipe: tuple[int, int]) -> None:
    """When, what, how it ended, how long it took, and by which ids to find the rest; nothing of who and with what."""
    (line,) = _written(pipe, an_exchange(a_call("read_schema", {"sql": "select"})))

    assert line == {
        "time": "2026-11-22T12:20:00.127Z",
        "level": "info",
        "logger": "sidecar.requests",
        "message": "request",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "span_id": "b7ad6b7169203331",
        "direction": "inbound",
        "method": "tools/call",
        "target": "read_schema",
        "http_status": 200,
        "decision": "allowed",
        "judged_s": 0.000123,
        "total_s": 0.0045,
    }


def test_every_field_is_documented(pipe: tuple[int, int]) -> None:
    """Whatever the message was."""
    lines = _written(pipe, an_exchange(tool_failed=True), a_refused_exchange(), an_unreadable_exchange())
    documented = {name: kind for name, kind, _ in LINE_FIELDS}

    assert all(set(line) <= set(documented) for line in lines)
    assert all({name for name, kind in documented.items() if not kind.endswith("?")} <= set(line) for line in lines)
    assert [line.get("error_type") for line in lines] == ["tool_error", "denied", "malformed"]


def test_fault_of_ours_is_an_error(pipe: tuple[int, int]) -> None:
    """What a caller did wrong is not."""
    ours = an_exchange(refusal=Refusal(Reason.UPSTREAM, ""))

    assert [line["level"] for line in _written(pipe, ours, a_refused_exchange())] == ["error", "info"]


@pytest.mark.parametrize(
    ("lines", "level", "expected"),
    [
        (RequestLines.ALL, LogLevel.INFO, 3),
        (RequestLines.REFUSED, LogLevel.INFO, 2),
        (RequestLines.OFF, LogLevel.DEBUG, 0),
        (RequestLines.ALL, LogLevel.WARNING, 1),
    ],
)
def test_lines_can_be_fewer_or_off(pipe: tuple[int, int], lines: RequestLines, level: LogLevel, expected: int) -> None:
    """SIDEGATE_REQUEST_LOG and SIDEGATE_LOG_LEVEL."""
    exchanges = (an_exchange(), a_refused_exchange(), an_exchange(refusal=Refusal(Reason.FAULT, "")))

    assert len(_written(pipe, *exchanges, lines=lines, level=level)) == expected


def test_odd_name_breaks_no_line(pipe: tuple[int, int]) -> None:
    """A lone surrogate, a line end."""
    message = a_call("x")
    odd = msgspec.structs.replace(message, target=type(message.target)(name="\ud800\n", arguments={}))  # type: ignore[call-arg, misc]

    assert len(_written(pipe, an_exchange(odd))) == 1


async def test_reader_that_stalls_costs_lines_and_not_calls(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound they are dropped and counted; when it reads again, the rest comes."""
    monkeypatch.setattr(logs, "MAX_WAITING", 500)
    monkeypatch.setattr(logs, "LINGER_S", 0.0)
    log = RequestLog(RequestLines.ALL, LogLevel.INFO, Kept(is_on=False), fd=pipe[1])
    for _ in range(3000):  # 1 MB; a pipe takes 64 KB
        log.observe(an_exchange())
        if not log.dropped:
            await asyncio.sleep(0)
    came = bytearray()
    os.set_blocking(pipe[0], False)

    def drained() -> bool:
        try:
            came.extend(os.read(pipe[0], 2**16))
        except BlockingIOError:
            return not log._waiting
        return False

    await eventually(drained, what="the lines that wait")
    log.close()

    assert 0 < log.dropped < 3000
    assert came.count(b"\n") == 3000 - log.dropped
    assert all(json.loads(line) for line in came.splitlines())


def test_writing_fails_and_nobody_is_held_up() -> None:
    """The other end is gone: counted."""
    read, write = os.pipe()

    async def run() -> int:
        log = RequestLog(RequestLines.ALL, LogLevel.INFO, Kept(is_on=False), fd=write)
        os.close(read)
        log.observe(an_exchange())
        log.flush()
        return log.dropped

    assert asyncio.run(run()) == 1
    os.close(write)


async def test_lines_go_to_a_receiver_with_their_trace(pipe: tuple[int, int]) -> None:
    """OTLP log records with severity, ids and the same fields."""
    kept = Kept()
    log = RequestLog(RequestLines.ALL, LogLevel.INFO, kept, fd=pipe[1])
    log.observe(an_exchange(a_call("read_schema")))
    log.close()
    (item,) = kept.items

    assert item["traceId"] == "0af7651916cd43dd8448eb211c80319c"
    assert item["spanId"] == "b7ad6b7169203331"
    assert (item["severityNumber"], item["body"]) == (9, {"stringValue": "request"})
    assert values(item)["target"] == "read_schema"
    assert values(item)["total_s"] == 0.0045


def _record(**changes: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "sidecar.x", "levelno": 30, "levelname": "WARNING", "msg": "held"} | changes)


def test_other_records_go_there_too_but_not_those_about_going_there() -> None:
    """A record about a batch that failed would be in the next batch, for ever."""
    kept = Kept()
    handler = OtlpHandler(kept)
    handler.emit(_record(seconds=3))
    handler.emit(_record(name="sidecar.shell.otlp"))
    kept.is_on = False
    handler.emit(_record())
    (item,) = kept.items

    assert item["severityText"] == "WARNING"
    assert values(item) == {"logger": "sidecar.x", "seconds": "3"}


def test_record_with_a_traceback_is_one_line() -> None:
    """Extra facts are fields."""
    try:
        int("no")
    except ValueError as error:
        record = _record(exc_info=(ValueError, error, error.__traceback__), port=1)
    line = json.loads(JsonFormatter().format(record))
    kept = Kept()
    OtlpHandler(kept).emit(record)

    assert (line["message"], line["port"]) == ("held", 1)
    assert "ValueError: invalid literal" in line["exception"]
    assert "ValueError: invalid literal" in values(kept.items[0])["exception.stacktrace"]
