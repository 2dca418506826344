"""The trail goes on from file to file, never grows beyond its bound, and loses nothing without saying so."""

import os
from pathlib import Path

import pytest

from sidecar.core.chain import Chain, verify
from sidecar.shell import trail
from sidecar.shell.trail import FILES, File, FullError, Position, files

LINE = b'{"time":"2026-11-22T10:00:00Z","schema":"sidegate.audit/v1","n":"' + b"x" * 100 + b'"}\n'
KEEP_BYTES = 8000  # a file holds a few lines


class Writer:
    """Writes chained lines to a file, as sidecar/shell/audit.py does."""

    def __init__(self, file: File, chain_id: str = "c1") -> None:
        self.file = file
        self.chain = Chain(chain_id, after=file.last_hash)
        self.dropped = 0

    def write(self, count: int = 1, *, may_drop: bool = False) -> None:
        """Write *count* lines."""
        for _ in range(count):
            sealed = self.chain.sealed(LINE)
            self.dropped += self.file.write(sealed, may_drop=may_drop)
            self.chain.passed(sealed)


def kept(path: Path) -> list[bytes]:
    """Return the lines of all files, oldest first."""
    return [line for each in files(path) for line in each.read_bytes().splitlines()]


def test_the_chain_goes_on_from_file_to_file(tmp_path: Path) -> None:
    """Each a part of the same chain; the newest has the plain name."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), keep_bytes=KEEP_BYTES))
    writer.write(20)

    names = [each.name for each in files(path)]
    assert names == [*(f"audit.jsonl.{number:06d}" for number in range(1, len(names))), "audit.jsonl"]
    assert len(names) > 3
    assert verify(kept(path), None).is_sound
    assert len(kept(path)) == 20
    assert max(each.stat().st_size for each in files(path)) <= KEEP_BYTES // FILES


def test_a_restart_goes_on_with_the_numbers_and_behind_the_last_line(tmp_path: Path) -> None:
    """Also where the newest file is empty: the line before is in the one before."""
    path = tmp_path / "audit.jsonl"
    for life in ("c1", "c2", "c3"):
        writer = Writer(File(str(path), keep_bytes=KEEP_BYTES), life)
        writer.write(7)
        if life == "c2":
            writer.file._rotate()
        writer.file.close()

    report = verify(kept(path), None)
    assert report.is_sound
    assert len(report.chains) == 3
    numbers = [int(each.name[-6:]) for each in files(path)[:-1]]
    assert numbers == list(range(1, len(numbers) + 1))


def test_files_that_nobody_ships_make_room(tmp_path: Path) -> None:
    """Oldest first, and counted; there are never more bytes than may be kept."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), keep_bytes=KEEP_BYTES))
    for _ in range(100):
        writer.write()

        assert sum(each.stat().st_size for each in files(path)) <= KEEP_BYTES
    assert writer.file.expired == 100 - len(kept(path))
    assert (writer.dropped, writer.file.is_full) == (0, False)


def test_lines_that_wait_for_a_receiver_are_never_deleted_unless_they_may_be_dropped(tmp_path: Path) -> None:
    """The bound is met by refusing calls, and behind a reserve by refusing lines."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), keep_bytes=KEEP_BYTES, is_shipped=True))
    with pytest.raises(FullError, match="wait to be shipped"):
        writer.write(100)

    assert writer.file.is_full
    assert kept(path)[0].endswith(b'"prev":"' + b"0" * 64 + b'"}}')
    assert KEEP_BYTES < writer.file.waiting_bytes <= KEEP_BYTES + KEEP_BYTES // 8

    before = len(kept(path))
    writer.write(10, may_drop=True)

    assert writer.dropped == before + 10 - len(kept(path)) > 0
    assert writer.file.expired == 0


def test_a_file_from_before_there_was_a_bound_makes_room(tmp_path: Path) -> None:
    """A full trail refuses calls, and a sidecar that is not ready gets none by which it would be rotated."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path)))
    writer.write(1000)
    writer.file.close()
    again = File(str(path), keep_bytes=KEEP_BYTES)

    assert not again.is_full
    assert again.last_hash == writer.chain.link.prev


def test_what_was_shipped_makes_room(tmp_path: Path) -> None:
    """The receiver has it."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), keep_bytes=KEEP_BYTES, is_shipped=True))
    for _ in range(100):
        writer.write()
        writer.file.shipped(Position(number=writer.file.number, offset=writer.file._size))

    assert writer.file.expired == 100 - len(kept(path)) > 0
    assert (writer.dropped, writer.file.is_full, writer.file.waiting_bytes) == (0, False, 0)


def test_the_position_outlives_a_restart_and_all_its_files(tmp_path: Path) -> None:
    """A new file must not get the number of one that was shipped, or its lines would be taken for shipped."""
    path = tmp_path / "audit.jsonl"
    file = File(str(path), keep_bytes=KEEP_BYTES, is_shipped=True)
    file.shipped(Position(number=7, offset=10))
    file.close()

    again = File(str(path), keep_bytes=KEEP_BYTES, is_shipped=True)
    assert again.position == Position(number=7, offset=10)
    assert again.number == 7


@pytest.mark.parametrize("text", ["", "{", '{"number":0,"offset":1}', '{"number":"1"}', "[]"])
def test_a_position_that_cannot_be_read_ships_all_again(tmp_path: Path, text: str) -> None:
    """Twice is better than never."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), keep_bytes=KEEP_BYTES))
    writer.write(20)
    (tmp_path / "audit.jsonl.position").write_text(text)

    assert File(str(path), keep_bytes=KEEP_BYTES, is_shipped=True).position == Position(number=1, offset=0)


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As logrotate does it; no signal is needed, and the chain goes on."""
    monkeypatch.setattr(trail, "LOOK_S", 0.0)
    path, moved = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl-20261122"
    writer = Writer(File(str(path)))
    writer.write(3)
    path.rename(moved)
    writer.write(2)

    assert [len(each.read_bytes().splitlines()) for each in (moved, path)] == [3, 2]
    assert verify(moved.read_bytes().splitlines() + kept(path), None).is_sound


def test_a_file_is_ended_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it can be shipped or locked away."""
    monkeypatch.setattr(trail, "LOOK_S", 0.0)
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), age_s=0.000_001))
    writer.write(3)

    assert [len(each.read_bytes().splitlines()) for each in files(path)] == [1, 1, 1]


def test_a_line_behind_a_torn_one_starts_anew_after_a_restart(tmp_path: Path) -> None:
    """A kill in the middle of a write must not spoil the next life's first line."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path)))
    writer.write(2)
    path.write_bytes(path.read_bytes() + LINE.replace(b"10:00", b"10:01")[:50])
    Writer(File(str(path)), "c2").write(2)

    report = verify(kept(path), None)
    assert report.is_sound
    assert report.torn == [3]
    assert [state.lines for state in report.chains.values()] == [2, 2]


def test_no_new_file_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is written to until there is one; no descriptor is used that is not ours."""
    path = tmp_path / "audit.jsonl"
    writer = Writer(File(str(path), keep_bytes=KEEP_BYTES))
    writer.write(4)
    real, failing = os.open, [True]

    def open_or_fail(*arguments: object) -> int:
        if failing[0]:
            raise OSError(28, "No space left on device")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trail.os, "open", open_or_fail)
    with pytest.raises(OSError, match="No space left"):
        writer.write(3)
    failing[0] = False
    writer.write(3)

    assert verify(kept(path), None).is_sound
    assert len(kept(path)) == writer.chain.link.seq - 1


def test_a_device_is_never_rotated() -> None:
    """Nor read, which would have no end."""
    file = File("/dev/null", keep_bytes=KEEP_BYTES)
    Writer(file).write(100)

    assert not Path("/dev/null.000001").exists()
    file.close()
