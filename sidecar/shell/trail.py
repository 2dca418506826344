"""Where the lines of the audit trail go: standard output, or a file that is rotated and bounded in size.

A rotated file keeps its name for good: `audit.jsonl.000001` and so on, the newest being `audit.jsonl` itself, so that who
ships them can say how far it came. Files that were shipped, or that nobody ships, make room for new lines, oldest first;
others only where the profile says that records may be dropped. A file that somebody else moved away is begun anew. The
chain (sidecar/core/chain.py) goes on from file to file. Raises OSError where a line cannot be kept; writes none in part
without ending that part.
"""

import contextlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import orjson

from sidecar.core.chain import NOTHING, hash_of

log = logging.getLogger(__name__)

STDOUT: Final = "stdout"
FILES: Final = 8  # into which the bytes that may be kept are divided: so many are deleted at a time
RESERVE: Final = 8  # a full trail takes this part more: what was under way, and that others were refused
LOOK_S: Final = 1.0  # between looks whether the file was moved away
MAX_LAST_LINE_BYTES: Final = 2**20  # of a file that is gone on with; a record is a few tens of kilobytes at most
POSITION: Final = ".position"
_STDOUT_FD: Final = 1
_MODE: Final = 0o640  # the shipping agent reads it through its group
_NUMBER: Final = re.compile(r"\.([0-9]{6,})\Z")


class FullError(OSError):
    """The trail is as large as it may be, and nothing in it may be deleted."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Position:
    """Up to where lines were shipped: *offset* bytes of the file with this *number*."""

    number: int
    offset: int


class Sink(Protocol):
    """Takes whole lines."""

    last_hash: str
    expired: int

    @property
    def is_full(self) -> bool:
        """Say whether there is room only for the end of what is under way."""
        ...

    def write(self, line: bytes, *, may_drop: bool) -> int:
        """Keep *line*; return how many lines were dropped for it. Raises OSError."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Output:
    """Standard output: what reads it keeps the lines."""

    last_hash = NOTHING
    expired = 0

    @property
    def is_full(self) -> bool:
        """Say that there is room."""
        return False

    def __init__(self) -> None:
        self.fd = _STDOUT_FD
        self._is_torn = False  # the last line was written in part: the next must not be glued to it

    def write(self, line: bytes, *, may_drop: bool) -> int:
        """Write *line* in one call; a full pipe may take only a part, and then the rest is tried."""
        del may_drop
        self._put(line)
        return 0

    def _put(self, line: bytes) -> None:
        left = b"\n" + line if self._is_torn else line
        while left:
            left = left[os.write(self.fd, left) :]
            self._is_torn = bool(left)

    def close(self) -> None:
        """Leave it open: others may write to it."""


class File(Output):
    """The file *path* and those it was before. Mutated by `write`, and by `shipped`.

    Attributes:
        last_hash: of the line that stands before the first one written here.
        expired: lines that were deleted to make room, having been shipped or being for nobody to ship.
    """

    def __init__(self, path: str, *, keep_bytes: int = 0, age_s: float = 0.0, is_shipped: bool = False) -> None:
        """Keep *keep_bytes* at most (0: all, in one file), and a file no longer than *age_s* (0: any time).

        Raises OSError when it cannot be opened.
        """
        super().__init__()
        self.path = Path(path)
        self.expired = 0
        self._keep_bytes = keep_bytes
        self._age_s = age_s
        self._rotated = _rotated(self.path)
        self._rotated_bytes = sum(self._rotated.values())
        self.position = _position(self.path) if is_shipped else None
        if is_shipped and self.position is None:
            self.position = Position(number=min(self._rotated, default=1), offset=0)
        after = 0 if self.position is None else self.position.number - 1
        self.number = max([after, *self._rotated]) + 1  # of the newest file
        self._look_at_s = 0.0
        self._open()
        if self.last_hash == NOTHING and self._rotated:
            self.last_hash = _last_line(self._name(max(self._rotated)))[0]
        if keep_bytes and self._is_regular and self._size > keep_bytes // FILES:  # what is newest is never deleted
            self._rotate()

    def write(self, line: bytes, *, may_drop: bool) -> int:
        """Keep *line*; return how many lines that nobody had shipped were deleted for it. Raises OSError."""
        now_s = time.monotonic()
        if now_s >= self._look_at_s:
            self._look(now_s)
        dropped = 0
        if self._keep_bytes and self._is_regular:
            if self._size and self._size + len(line) > self._keep_bytes // FILES:
                self._rotate()
            if self.kept_bytes + len(line) > self._keep_bytes:
                dropped = self._make_room(len(line), may_drop=may_drop)
        self._put(line)
        self._size += len(line)
        return dropped

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)
        self.fd = -1

    @property
    def kept_bytes(self) -> int:
        """Return the size of all files."""
        return self._size + self._rotated_bytes

    @property
    def is_full(self) -> bool:
        """Say whether there is room only for the end of what is under way: nothing that is kept may be deleted."""
        if not self._keep_bytes or self.kept_bytes < self._keep_bytes - self._keep_bytes // FILES:
            return False
        return not any(self._is_shipped(number) for number in self._rotated)

    # for who ships

    def open_at(self, position: Position) -> int | None:
        """Return a descriptor of the file that *position* is in; None when it is gone. For reading; raises OSError."""
        path = self._name(position.number) if position.number in self._rotated else self.path
        if position.number not in self._rotated and position.number != self.number:
            return None
        return os.open(path, os.O_RDONLY)

    def next_file(self, number: int) -> int:
        """Return the number of the oldest file that is newer than *number*."""
        return min((each for each in self._rotated if each > number), default=self.number)

    def shipped(self, position: Position) -> None:
        """Know, also after a restart, that all lines before *position* have arrived. Raises OSError."""
        self.position = position
        kept = self.path.with_name(self.path.name + POSITION)
        made = kept.with_name(kept.name + ".new")
        made.write_text(json.dumps({"number": position.number, "offset": position.offset}))
        made.replace(kept)

    @property
    def waiting_bytes(self) -> int:
        """Return how many bytes are still to be shipped; 0 where nobody ships."""
        if self.position is None:
            return 0
        newer = sum(size for number, size in self._rotated.items() if number >= self.position.number)
        return max(0, newer + self._size - self.position.offset)

    # files

    def _open(self) -> None:
        self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MODE)
        held = os.fstat(self.fd)
        self._inode, self._size, self._is_regular = held.st_ino, held.st_size, stat.S_ISREG(held.st_mode)
        self._opened_s, self._is_torn = time.monotonic(), False
        if self._is_regular and self._size:  # a pipe or a device would be read for ever
            found, self._is_torn = _last_line(self.path)
            self.last_hash = found if found != NOTHING else self.last_hash

    def _look(self, now_s: float) -> None:
        """Begin a new file where the old one was moved away, or has become too old."""
        self._look_at_s = now_s + LOOK_S
        if not self._is_regular:
            return
        try:
            is_moved = self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            is_moved = True
        if is_moved:
            old = self.fd
            self._open()
            os.close(old)
            if self.position is not None:  # who ships must begin the new file at its beginning
                self.number += 1
                log.error("audit file moved away: what was not shipped of it will not be")
        elif self._age_s and self._size and now_s - self._opened_s > self._age_s:
            self._rotate()

    def _rotate(self) -> None:
        old, size_bytes = self.fd, self._size
        with contextlib.suppress(FileNotFoundError):  # it was renamed, and then a new one could not be opened
            self.path.rename(self._name(self.number))
        self._open()
        os.close(old)
        self._rotated[self.number] = size_bytes
        self._rotated_bytes += size_bytes
        self.number += 1

    def _make_room(self, size_bytes: int, *, may_drop: bool) -> int:
        """Delete old files until *size_bytes* fit; return how many lines are lost by that. Raises FullError."""
        dropped = 0
        while self._rotated and self.kept_bytes + size_bytes > self._keep_bytes:
            oldest = min(self._rotated)
            if not self._is_shipped(oldest):
                if not may_drop:
                    break
                dropped += self._lines_left(oldest)
            else:
                self.expired += _count(self._name(oldest), 0)
            with contextlib.suppress(FileNotFoundError):
                self._name(oldest).unlink()
            self._rotated_bytes -= self._rotated.pop(oldest)
        if self.kept_bytes + size_bytes > self._keep_bytes + self._keep_bytes // RESERVE:
            raise FullError(f"{self.kept_bytes} bytes of the audit trail wait to be shipped")
        return dropped

    def _is_shipped(self, number: int) -> bool:
        return self.position is None or number < self.position.number

    def _lines_left(self, number: int) -> int:
        assert self.position is not None  # noqa: S101 - asked of what is to be shipped
        return _count(self._name(number), self.position.offset if number == self.position.number else 0)

    def _name(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number:06d}")


def files(path: Path) -> list[Path]:
    """Return the files of the trail *path*, oldest first."""
    rotated = [path.with_name(f"{path.name}.{number:06d}") for number in sorted(_rotated(path))]
    return [*rotated, *([path] if path.exists() else [])]


def _rotated(path: Path) -> dict[int, int]:
    """Return the sizes of the files that *path* was before, by number."""
    found: dict[int, int] = {}
    if path.parent.is_dir() and not path.is_char_device():
        for each in path.parent.glob(f"{path.name}.*"):
            number = _NUMBER.fullmatch(each.name.removeprefix(path.name))
            if number is not None:
                found[int(number[1])] = each.stat().st_size
    return found


def _position(path: Path) -> Position | None:
    """Return up to where *path* was shipped; None when that is not known: then all of it is shipped again."""
    try:
        document = orjson.loads(path.with_name(path.name + POSITION).read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    match document:
        case {"number": int(number), "offset": int(offset)} if number > 0 and offset >= 0:
            return Position(number=number, offset=offset)
    return None


def _last_line(path: Path) -> tuple[str, bool]:
    """Return the hash of the last whole line of *path*, and whether a line behind it was cut short. Raises OSError."""
    with path.open("rb") as kept:
        kept.seek(max(0, path.stat().st_size - MAX_LAST_LINE_BYTES))
        lines = kept.read(MAX_LAST_LINE_BYTES).splitlines(keepends=True)
    is_torn = bool(lines) and not lines[-1].endswith(b"\n")
    for line in reversed(lines):
        try:
            document = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(document, Mapping) and "chain" in document:
            return hash_of(line), is_torn
    return NOTHING, is_torn


def _count(path: Path, offset: int) -> int:
    """Return the lines of *path* behind *offset*."""
    try:
        with path.open("rb") as kept:
            kept.seek(offset)
            return sum(1 for _ in kept)
    except FileNotFoundError:
        return 0
