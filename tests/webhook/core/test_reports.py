"""What sidecars report, and how replicas put it together."""

import pytest

from webhook.core import reports
from webhook.core.reports import EXPIRY_S, MAX_ERROR, MAX_REVISION, Report, Reports
from webhook.errors import BadReports

LEDGER = ("payments", "ledger-0")
OTHER = ("other", "ledger-0")


def test_the_last_report_of_a_pod_counts() -> None:
    """A sidecar that has activated a bundle says so with its next question."""
    heard = Reports()
    heard.note(LEDGER, "r1", "", 10.0)
    heard.note(LEDGER, "r2", "", 20.0)
    heard.note(OTHER, "r1", "older than the one in force", 20.0)

    assert heard.of("payments", 21.0) == {LEDGER: Report(revision="r2", error="", noted_s=20.0)}
    assert heard.alive(21.0)[OTHER].error == "older than the one in force"


def test_a_pod_that_no_longer_asks_is_forgotten() -> None:
    """It may be gone, or talk to another replica."""
    heard = Reports()
    heard.note(LEDGER, "r1", "", 0.0)
    heard.note(OTHER, "r1", "", 10.0)

    assert set(heard.alive(EXPIRY_S)) == {LEDGER, OTHER}
    assert set(heard.alive(EXPIRY_S + 5)) == {OTHER}
    heard.forget(OTHER)
    heard.forget(OTHER)
    assert not heard.alive(EXPIRY_S + 5)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pods that were silent longest make room."""
    monkeypatch.setattr(reports, "MAX_PODS", 2)
    heard = Reports()
    for number in range(3):
        heard.note(("a", str(number)), "r", "", float(number))

    assert set(heard.alive(3.0)) == {("a", "1"), ("a", "2")}


def test_what_a_pod_says_is_cut_and_made_printable() -> None:
    """It ends up in logs, on terminals and in the API."""
    heard = Reports()
    heard.note(LEDGER, "r" * 1000, "bad\r\n\x1b[2J" + "é" * 1000, 1.0)
    report = heard.alive(1.0)[LEDGER]

    assert report.revision == "r" * MAX_REVISION
    assert report.error.startswith("bad???[2J??")
    assert len(report.error) == MAX_ERROR


def test_replicas_exchange_what_they_heard() -> None:
    """Whatever was said last counts, whoever heard it."""
    ours, theirs = Reports(), Reports()
    ours.note(LEDGER, "r1", "", 10.0)
    theirs.note(LEDGER, "r2", "", 20.0)
    ours.note(OTHER, "r9", "", 30.0)
    theirs.note(OTHER, "r8", "", 20.0)
    merged = reports.newest([ours.alive(30.0), reports.decode(reports.encode(theirs.alive(30.0)))])

    assert {pod: report.revision for pod, report in merged.items()} == {LEDGER: "r2", OTHER: "r9"}


@pytest.mark.parametrize("data", [b"", b"{}", b'[["a","b"]]', b'[["a","b",["r","e","late"]]]'])
def test_reports_that_cannot_be_read_are_refused(data: bytes) -> None:
    """A replica of another version is left out of the sum, and said."""
    with pytest.raises(BadReports, match="another replica"):
        reports.decode(data)
