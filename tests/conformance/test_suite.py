"""How two runs of the official suite are read and compared."""

import json
from pathlib import Path

import pytest

from tests.conformance.suite import Check, SuiteError, read, successes, worse

ONE = Check("ping", "pong", 1)


@pytest.mark.parametrize(
    ("direct", "through", "is_worse"),
    [
        ("SUCCESS", "SUCCESS", False),
        ("FAILURE", "SUCCESS", False),
        ("FAILURE", "FAILURE", False),
        ("SUCCESS", "FAILURE", True),
        ("SUCCESS", "WARNING", True),
        ("SUCCESS", "SKIPPED", True),
        ("WARNING", "FAILURE", True),
        ("SUCCESS", None, True),
        ("FAILURE", None, False),
        (None, "FAILURE", True),
        (None, "SUCCESS", False),
    ],
)
def test_a_verdict_is_worse_when_it_ranks_lower(direct: str | None, through: str | None, *, is_worse: bool) -> None:
    """A lost success is worse, and so is a failure that only the sidecar's run has."""
    runs = [{ONE: verdict} if verdict else {} for verdict in (direct, through)]

    assert worse(*runs) == ([f"ping/pong: {direct or 'absent'} -> {through or 'absent'}"] if is_worse else [])


def test_checks_of_one_id_are_told_apart_by_their_order(tmp_path: Path) -> None:
    """The second of two is compared with the second; what is no verdict is not counted."""
    directory = tmp_path / "server-tools-call-2026-11-22T15-45-15-646Z"
    directory.mkdir()
    statuses = ["SUCCESS", "INFO", "FAILURE"]
    checks = [{"id": "valid", "status": status} for status in statuses]
    (directory / "checks.json").write_text(json.dumps(checks))

    found = read(tmp_path)

    assert found == {Check("tools-call", "valid", 1): "SUCCESS", Check("tools-call", "valid", 2): "FAILURE"}
    assert (successes(found), str(list(found)[1])) == (1, "tools-call/valid#2")


def test_a_directory_that_names_no_scenario_is_an_error(tmp_path: Path) -> None:
    """Otherwise a change of the suite's layout would compare nothing with nothing."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "checks.json").write_text("[]")

    with pytest.raises(SuiteError, match="names no scenario"):
        read(tmp_path)
