"""The audit sink keeps every line whole, never raises, and says when it fails."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.chain import verify
from sidecar.core.message import Message, parse
from sidecar.core.profile import Audit as AuditProfile
from sidecar.errors import Reason, Refusal
from sidecar.shell.audit import Audit
from sidecar.shell.trail import File, Output
from tests.sidecar.exchanges import a_call, a_profile, a_refused_exchange, an_exchange

CALL = a_call()
LIST = parse(b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}')
NOTICE = parse(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def test_each_exchange_is_on_disk_when_observe_returns(tmp_path: Path) -> None:
    """Nothing is batched: a crash right after loses nothing."""
    sink = tmp_path / "audit.jsonl"
    audit = Audit(File(str(sink)))

    for count, exchange in enumerate((an_exchange(), a_refused_exchange()), start=1):
        audit.observe(exchange)

        assert count == len(_lines(sink)) == audit.records
    audit.close()


def test_restart_appends(tmp_path: Path) -> None:
    """A file that is there is kept."""
    sink = tmp_path / "audit.jsonl"
    for _ in range(2):
        audit = Audit(File(str(sink)))
        audit.observe(an_exchange())
        audit.close()

    assert len(_lines(sink)) == 2


def test_file_is_not_for_everybody(tmp_path: Path) -> None:
    """Records hold arguments: others must not read them."""
    Audit(File(str(tmp_path / "audit.jsonl"))).close()

    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o007 == 0


def test_stdout_gets_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The default sink; closing leaves standard output open."""
    audit = Audit(Output())
    audit.observe(an_exchange())
    audit.close()
    os.write(1, b"still open\n")

    record, rest = capfd.readouterr().out.splitlines()
    assert json.loads(record)["message"]["tool"] == "read_schema"
    assert rest == "still open"


def test_full_disk_is_counted_and_shown_and_never_raised() -> None:
    """/dev/full answers every write with ENOSPC."""
    audit = Audit(File("/dev/full"))

    audit.observe(an_exchange())

    assert (audit.failures, audit.records) == (1, 0)
    assert audit.failed
    audit.close()


def test_records_wait_for_the_sink_to_recover(tmp_path: Path) -> None:
    """Asking for `failed` tries again: a sidecar that is not ready gets no calls that would."""
    audit = Audit(File("/dev/full"))
    audit.observe(an_exchange(status=200))
    audit.observe(an_exchange(status=201))
    _redirect(audit, tmp_path / "audit.jsonl")

    assert not audit.failed
    assert [json.loads(text)["http"]["status"] for text in _lines(tmp_path / "audit.jsonl")] == [200, 201]
    assert (audit.records, audit.lost) == (2, 0)
    audit.close()


def test_records_that_wait_are_written_at_the_end(tmp_path: Path) -> None:
    """The sink may be well again while nobody calls any more."""
    audit = Audit(File("/dev/full"))
    audit.observe(an_exchange(status=200))
    _redirect(audit, tmp_path / "audit.jsonl")
    audit.close()

    assert [json.loads(text)["http"]["status"] for text in _lines(tmp_path / "audit.jsonl")] == [200]
    assert (audit.records, audit.lost) == (1, 0)


def test_records_that_cannot_be_written_at_the_end_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """They are gone with the process, and that is said."""
    audit = Audit(File("/dev/full"))
    audit.observe(an_exchange())
    audit.close()

    assert audit.lost == 1
    assert "audit records lost with the process" in caplog.text


def test_waiting_records_are_bounded_and_losses_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that is gone for good must not fill the memory."""
    monkeypatch.setattr("sidecar.shell.audit.MAX_WAITING", 3)
    audit = Audit(File("/dev/full"))

    for _ in range(5):
        audit.observe(an_exchange())

    assert (audit.lost, len(audit._waiting)) == (2, 3)
    audit.close()


def _descriptor(audit: Audit) -> int:
    assert isinstance(audit._sink, Output)
    return audit._sink.fd


def _redirect(audit: Audit, path: Path) -> None:
    """Let the sink's descriptor lead to *path*, as when space is made on a full disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, _descriptor(audit))
    os.close(file)


def test_line_after_a_torn_one_starts_anew(tmp_path: Path) -> None:
    """A sink that took half a line must not make the next one unreadable."""
    audit = Audit(File(str(tmp_path / "audit.jsonl")))
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    os.dup2(write_end, _descriptor(audit))
    _leave_one_page(read_end, write_end)

    audit.observe(an_exchange(a_call("t", {"a": "x" * 7000}), status=500))

    assert audit.failed
    _drain(read_end)
    audit.observe(an_exchange(status=201))
    rest, *whole = _drain(read_end).splitlines()
    assert rest == b""  # ends the torn line
    assert [json.loads(text)["http"]["status"] for text in whole] == [500, 201]
    audit.close()
    os.close(read_end)
    os.close(write_end)


def _leave_one_page(read_end: int, write_end: int) -> None:
    """Fill the pipe but for 4,096 bytes: a longer line is then taken in part."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.read(read_end, 4096)


def _drain(read_end: int) -> bytes:
    return os.read(read_end, 2**20)


def test_sink_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    """A path that is wrong is the operator's to correct, at once."""
    with pytest.raises(FileNotFoundError):
        File(str(tmp_path / "missing" / "audit.jsonl"))


def test_a_life_is_a_chain_that_begins_behind_the_last(tmp_path: Path) -> None:
    """So that a whole life cannot be taken out of a file."""
    sink = tmp_path / "audit.jsonl"
    for _ in range(2):
        audit = Audit(File(str(sink)), sign=lambda _: "signature")
        audit.observe(an_exchange())
        audit.close()

    report = verify(sink.read_bytes().splitlines(), None)
    assert report.is_sound
    assert [state.closed for state in report.chains.values()] == [True, True]
    assert not verify(_lines(sink)[2:], None).is_sound


def test_checkpoints_are_signed_after_so_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none without a key, nor where nothing was written since."""
    monkeypatch.setattr("sidecar.shell.audit.CHECKPOINT_LINES", 2)
    sink = tmp_path / "audit.jsonl"
    key: list[str] = []
    audit = Audit(File(str(sink)), sign=lambda _: key[0] if key else None)
    for _ in range(4):
        audit.observe(an_exchange())
    key.append("signature")
    for _ in range(4):
        audit.observe(an_exchange())
    audit.close()

    events = [json.loads(line).get("event") for line in _lines(sink)]
    assert events == [None, None, None, None, None, None, "checkpoint", None, None, "checkpoint", "closed"]


def test_lost_records_are_said_in_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap would look like tampering, and silence like completeness."""
    monkeypatch.setattr("sidecar.shell.audit.MAX_WAITING", 2)
    audit = Audit(File("/dev/full"), sign=lambda _: "signature")
    for _ in range(4):
        audit.observe(an_exchange())
    _redirect(audit, tmp_path / "audit.jsonl")
    assert not audit.failed
    audit.close()

    report = verify(_lines(tmp_path / "audit.jsonl"), None)
    assert report.is_sound
    assert [state.lost for state in report.chains.values()] == [2]


def test_a_call_is_on_disk_before_it_is_sent(tmp_path: Path) -> None:
    """And again when it is over; the two are joined by their span."""
    sink = tmp_path / "audit.jsonl"
    audit = Audit(File(str(sink)))
    exchange = an_exchange(a_call("drop_table", {"name": "invoices", "token": "secret"}))

    audit.begin([exchange])

    (begun,) = map(json.loads, _lines(sink))
    assert (begun["phase"], begun["outcome"], begun["result"]) == ("begin", "pending", None)
    assert begun["arguments"]["content"] == {"name": "invoices", "token": "[redacted]"}
    assert (begun["decision"]["outcome"], begun["decision"]["policies"]) == ("allowed", ["analysts-read"])
    audit.observe(exchange)
    audit.close()
    ended = json.loads(_lines(sink)[1])
    assert (ended["phase"], ended["outcome"]) == ("end", "success")
    assert (ended["span_id"], ended["arguments"]) == (begun["span_id"], begun["arguments"])
    assert verify(_lines(sink), None).begun == {}


@pytest.mark.parametrize(
    ("before", "body", "records"),
    [
        ("changes", CALL, 1),
        ("changes", LIST, 0),
        ("changes", NOTICE, 0),
        ("all", LIST, 1),
        ("all", NOTICE, 1),
        ("off", CALL, 0),
    ],
)
def test_the_profile_says_what_is_recorded_before_it_is_sent(
    tmp_path: Path, before: Any, body: Message, records: int
) -> None:
    """A tool's call may change something, whatever the server says of the tool."""
    audit = Audit(File(str(tmp_path / "audit.jsonl")))

    audit.begin([an_exchange(body, profile=a_profile(audit=AuditProfile(before=before)))])

    assert audit.records == records
    audit.close()


@pytest.mark.parametrize("before", ["off", "changes"])
def test_what_cannot_be_recorded_is_not_sent(before: Any) -> None:
    """The caller is told to come again, also where the failure is older than the call and only its end is recorded."""
    audit = Audit(File("/dev/full"))
    profile = a_profile(audit=AuditProfile(before=before))
    if before == "off":
        audit.begin([an_exchange(profile=profile)])
        audit.observe(an_exchange(profile=profile))

    with pytest.raises(Refusal) as refused:
        audit.begin([an_exchange(profile=profile)])

    assert (refused.value.reason, refused.value.retry_after_s) == (Reason.NOT_READY, 5)
    assert audit.failed == (before == "off")  # nothing waits of a call that was not sent
    audit.close()


def test_what_cannot_be_recorded_is_sent_where_the_profile_says_so() -> None:
    """Counted, and no reason to get no calls."""
    audit = Audit(File("/dev/full"))
    profile = a_profile(audit=AuditProfile(when_full="drop"))

    for _ in range(3):
        audit.begin([an_exchange(profile=profile)])

    assert (audit.failed, audit.records, len(audit._waiting)) == (False, 0, 3)
    audit.close()


def test_all_messages_of_a_body_are_recorded_before_it_is_sent(tmp_path: Path) -> None:
    """A batch is sent as one."""
    audit = Audit(File(str(tmp_path / "audit.jsonl")))

    audit.begin([an_exchange(CALL), an_exchange(LIST), an_exchange(CALL)])

    assert audit.records == 2
    audit.close()
