"""Makes batches of audit lines fit to be sent: as they stand, or as log records of OTLP.

A line stays what it was, byte for byte, in either form, so that who has received it can still verify the chain. What is
no whole line of ours (it was cut short by a kill or a full disk) is left out, and counted. OTLP 1.x, logs, in JSON;
OpenTelemetry's semantic conventions, `log.record.uid`. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson

from sidecar.core.chain import FAMILY

INFO: Final = 9  # opentelemetry.proto.logs.v1.SeverityNumber
WARN: Final = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Whole lines, each with its newline, and what they say."""

    lines: tuple[bytes, ...]
    documents: tuple[Mapping[str, Any], ...]
    places: tuple[tuple[int, int], ...]  # of the bytes behind each line, and how many before it were left out
    torn: int  # lines that were left out
    size_bytes: int  # of all that was read, which is how far the next batch is

    def half(self) -> "Batch":
        """Return the first half, for a receiver to which all of it was too large."""
        count = max(1, len(self.lines) // 2)
        if count == len(self.lines):
            return self
        size_bytes, torn = self.places[count - 1]
        return Batch(
            lines=self.lines[:count],
            documents=self.documents[:count],
            places=self.places[:count],
            torn=torn,
            size_bytes=size_bytes,
        )


def read(data: bytes, *, is_last: bool) -> Batch:
    """Return the batch of whole lines in *data*; the rest of a file that is not added to any more is left out."""
    end = len(data) if is_last else data.rfind(b"\n") + 1
    lines, documents, places, behind, torn = [], [], [], 0, 0
    for line in data[:end].splitlines(keepends=True):
        document = _read(line)
        behind += len(line)
        if document is None:
            torn += line != b"\n"
        else:
            lines.append(line)
            documents.append(document)
            places.append((behind, torn))
    return Batch(lines=tuple(lines), documents=tuple(documents), places=tuple(places), torn=torn, size_bytes=end)


def otlp(batch: Batch, resource: Mapping[str, str]) -> bytes:
    """Return an ExportLogsServiceRequest of *batch*, whose sender *resource* describes."""
    records = [_log_record(*each) for each in zip(batch.lines, batch.documents, strict=True)]
    scope = {"scope": {"name": "sidegate"}, "logRecords": records}
    described = {"attributes": [_attribute(key, value) for key, value in resource.items()]}
    return orjson.dumps({"resourceLogs": [{"resource": described, "scopeLogs": [scope]}]})


def rejected(answer: bytes) -> int:
    """Return how many log records a receiver that took the rest says it did not take."""
    try:
        document = orjson.loads(answer)
        return int(document["partialSuccess"]["rejectedLogRecords"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return 0


def _read(line: bytes) -> Mapping[str, Any] | None:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    match document:
        case {"schema": str(schema), "time": str(), "chain": {"id": str(), "seq": int()}} if schema.startswith(FAMILY):
            return dict(document)
    return None


def _log_record(line: bytes, document: Mapping[str, Any]) -> dict[str, Any]:
    chain, decision = document["chain"], document.get("decision")
    is_refused = isinstance(decision, dict) and decision.get("outcome") == "refused"
    record: dict[str, Any] = {
        "timeUnixNano": str(unix_ns(document["time"])),
        "severityNumber": WARN if is_refused else INFO,
        "severityText": "WARN" if is_refused else "INFO",
        "eventName": FAMILY,
        "body": {"stringValue": line.decode().rstrip("\n")},
        "attributes": [_attribute("log.record.uid", f"{chain['id']}:{chain['seq']}")],
    }
    if isinstance(document.get("trace_id"), str) and isinstance(document.get("span_id"), str):
        record |= {"traceId": document["trace_id"], "spanId": document["span_id"]}
    return record


def _attribute(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value}}


def unix_ns(time: str) -> int:
    """Return the moment that a record's *time* says; 0 for what is none."""
    try:
        second = datetime.fromisoformat(time[:19] + "+00:00")
        return int(second.timestamp()) * 1_000_000_000 + int(time[20:29])
    except ValueError:
        return 0
