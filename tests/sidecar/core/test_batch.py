"""Audit lines on their way to a receiver stay what they are; what is no whole line is left out, and counted."""

import base64
import json

from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from sidecar.core.batch import INFO, WARN, otlp, read, rejected, unix_ns
from sidecar.core.chain import Chain, Event, event_line, verify
from sidecar.record import line
from tests.sidecar.exchanges import STARTED_NS, a_refused_exchange, an_exchange


def lines() -> list[bytes]:
    """Return a chain of two records and a checkpoint."""
    chain, made = Chain("c1"), []
    event = event_line(Event.CHECKPOINT, "2026-11-22T12:20:01.000000000Z", 0, "signature")
    for text in (line(an_exchange()), line(a_refused_exchange()), event):
        made.append(chain.sealed(text))
        chain.passed(made[-1])
    return made


def test_only_whole_lines_are_taken() -> None:
    """The rest is read again once there is more of it."""
    whole = lines()
    taken = read(b"".join(whole)[:-10], is_last=False)

    assert taken.lines == tuple(whole[:2])
    assert taken.size_bytes == len(whole[0]) + len(whole[1])
    assert taken.torn == 0


def test_what_was_cut_short_is_left_out_and_counted() -> None:
    """A kill left half a line, which would make the whole request unreadable; an empty line is nothing."""
    whole = lines()
    data = whole[0] + whole[1][:100] + b"\n\n" + whole[1] + b'{"level":"info"}\n' + whole[2][:30]

    taken = read(data, is_last=True)

    assert taken.lines == tuple(whole[:2])
    assert (taken.torn, taken.size_bytes) == (3, len(data))


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_batch(data: bytes, is_last: bool) -> None:
    """And never more of them than there are."""
    taken = read(data, is_last=is_last)

    assert taken.size_bytes <= len(data)
    assert taken.size_bytes == len(data) or not is_last


def test_halves_end_at_one_line() -> None:
    """A receiver to which a batch is too large gets less, and then what follows."""
    taken = read(b"".join(lines()), is_last=False)
    half = taken.half()

    assert half.lines == taken.lines[:1]
    assert half.size_bytes == len(taken.lines[0])
    assert half.half() == half


def test_half_counts_what_was_left_out_of_it() -> None:
    """The next batch begins at a line, behind what was cut short as well; nothing is sent twice."""
    first, second, third = lines()
    data = first[:50] + b"\n\n" + first + second[:50] + b"\n" + second + third[:50] + b"\n" + third
    half = read(data, is_last=False).half()
    rest = read(data[half.size_bytes :], is_last=False)

    assert (half.lines, half.torn) == ((first,), 1)
    assert (rest.lines, rest.torn) == ((second, third), 2)
    assert rest.half().lines == (second,)
    assert read(first[:50] + b"\n" + first + third[:50] + b"\n", is_last=False).half().torn == 2


def test_otlp_is_what_the_protocol_says_and_holds_the_lines_themselves() -> None:
    """Read by the protocol's own messages; the chain can still be verified behind the receiver."""
    whole = lines()
    body = otlp(read(b"".join(whole), is_last=False), {"service.name": "billing"})

    request = json_format.Parse(_with_base64_ids(body), ExportLogsServiceRequest())
    (resource,) = request.resource_logs
    assert {each.key: each.value.string_value for each in resource.resource.attributes} == {"service.name": "billing"}
    records = resource.scope_logs[0].log_records
    assert [each.severity_number for each in records] == [INFO, WARN, INFO]
    assert records[0].time_unix_nano == STARTED_NS
    assert records[0].trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert records[0].span_id.hex() == "b7ad6b7169203331"
    assert records[2].trace_id == b""
    assert [each.attributes[0].value.string_value for each in records] == ["c1:1", "c1:2", "c1:3"]
    arrived = [each.body.string_value.encode() for each in records]
    assert arrived == [each.rstrip(b"\n") for each in whole]
    assert verify(arrived, None).is_sound


def _with_base64_ids(body: bytes) -> str:
    """Return *body* with ids as protobuf's own JSON has them; OTLP's has them in hex."""
    document = json.loads(body)
    for record in document["resourceLogs"][0]["scopeLogs"][0]["logRecords"]:
        for key in ("traceId", "spanId"):
            if key in record:
                record[key] = base64.b64encode(bytes.fromhex(record[key])).decode()
    return json.dumps(document)


def test_a_receiver_says_what_it_did_not_take() -> None:
    """OTLP/HTTP: a partial success; anything else is a whole one."""
    assert rejected(b'{"partialSuccess":{"rejectedLogRecords":"3"}}') == 3
    for answer in (b"", b"{}", b"[]", b'{"partialSuccess":{}}', b'{"partialSuccess":{"rejectedLogRecords":"x"}}'):
        assert rejected(answer) == 0


def test_a_time_that_is_none_is_zero() -> None:
    """A line of a later version is sent on, too."""
    assert unix_ns("2026-11-22T12:20:00.123456789Z") == STARTED_NS
    assert unix_ns("yesterday") == 0
