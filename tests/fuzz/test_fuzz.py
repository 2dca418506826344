"""Every reader of foreign bytes: its seeds, what was ever found, and a short run."""

import json
import random
import time
from pathlib import Path

import pytest

from tests.fuzz.engine import Finding, Session, Target, attempt, shrunk
from tests.fuzz.targets import ANSWERS, TARGETS, _as_browsers, _as_go, _check_shown

FOUND = sorted((Path(__file__).parent / "found").iterdir())
BY_NAME = {target.name: target for target in TARGETS}
FAR_S = 3600.0  # the number of inputs ends the run, not the clock


@pytest.mark.parametrize("target", TARGETS, ids=BY_NAME)
def test_no_input_leads_to_anything_but_a_refusal(target: Target) -> None:
    """Seeds and three hundred inputs made of them, the same each time: `make fuzz` looks for others."""
    session = Session(target=target, source=random.Random(target.name))  # noqa: S311 - no secret
    session.begin()
    session.work(time.monotonic() + FAR_S, inputs=300)

    assert [(each.data, each.why) for each in session.findings.values()] == []
    assert len(session.outcomes) > 1, "all inputs lead to the same: the target does not read them"


@pytest.mark.parametrize("path", FOUND, ids=[path.name for path in FOUND])
def test_what_was_found_stays_mended(path: Path) -> None:
    """An input that once led to what must not happen."""
    _, finding = attempt(BY_NAME[path.name.rpartition("-")[0]], path.read_bytes())

    assert finding is None, finding and finding.why


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("message", "tools/call"), ("identity", "taken 0"), ("svid", "taken"), ("keys", "1 0"), ("dpop", "taken"),
        ("oauth", "taken"), ("endpoint", "taken"), ("bundle", "taken"), ("profile", "taken"), ("engines", "rego True "),
        ("http", "1 [] b''"), ("agreement", "tools/call"),
        ("opening", "named"),
    ],
)  # fmt: skip
def test_a_good_input_is_taken(name: str, outcome: str) -> None:
    """Or the mutations would never come past the first check."""
    assert BY_NAME[name].run(BY_NAME[name].seeds[0]) == outcome


def test_a_planted_defect_is_found_and_made_small() -> None:
    """The engine finds what one byte in the middle does, and tells it without the rest."""

    def run(data: bytes) -> str:
        assert b"\x00" not in data
        return str(len(data))

    planted = Target(name="planted", run=run, seeds=[b"a" * 100])
    session = Session(target=planted, source=random.Random(1))  # noqa: S311 - no secret
    session.begin()
    session.work(time.monotonic() + FAR_S, inputs=2_000)

    assert [each.data for each in session.findings.values()] == [b"\x00"]


def test_a_finding_stays_the_same_while_it_shrinks() -> None:
    """Another defect on the way is not mistaken for it."""

    def run(data: bytes) -> str:
        if len(data) < 4:
            raise KeyError
        assert b"x" not in data
        return ""

    target = Target(name="two", run=run, seeds=[])
    where, found = attempt(target, b"abcdefxghij")

    assert found == Finding(target="two", data=b"abcdefxghij", why=found.why if found else "")
    assert found is not None
    assert len(shrunk(target, found, where).data) == 4


@pytest.mark.parametrize(
    ("stream", "by_the_letter", "as_go"),
    [
        (b"data: x\n\n", ["x"], ["x"]),
        (b"data: x\n", [], ["x"]),
        (b"data: x\r\r", ["x"], ["x"]),
        (b"\xef\xbb\xbfdata: x\n\n", ["x"], []),
        (b"event: other\ndata: x\n\n", [], []),
        (b"data: {}\rdata: x\n\n", ["{}\nx"], ["{}\rdata: x"]),
    ],
)
def test_streams_are_read_as_clients_do(stream: bytes, by_the_letter: list[str], as_go: list[str]) -> None:
    """Clients differ in line ends, in a byte order mark and in the last event: what is hidden is hidden from each."""
    assert (_as_browsers(stream), _as_go(stream)) == (by_the_letter, as_go)


def test_an_item_that_is_shown_by_mistake_is_told() -> None:
    """A list with what the reader may not use."""
    with pytest.raises(AssertionError):
        _check_shown(json.loads(ANSWERS[0]), ANSWERS[0])
