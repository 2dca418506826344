"""Parts are built once, whole or not at all, and what is missing is named."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests import parts

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass
class Recipe:
    """A recipe that writes one file and counts how often it was asked to; it fails when told so."""

    fails: bool = False
    builds: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def inputs(self) -> str:
        """Always the same key."""
        return "fixed"

    def build(self, tree: Path, final: Path) -> None:
        """Write a file that names the final directory; half of it when told to fail."""
        with self.lock:
            self.builds += 1
        (tree / "half").touch()
        if self.fails:
            raise parts.PartError("no compiler")
        (tree / "program").write_text(final.name)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEGATE_CACHE", str(tmp_path))


def test_callers_at_the_same_time_share_one_build() -> None:
    """Eight callers get the same directory, built once."""
    recipe = Recipe()

    with ThreadPoolExecutor(8) as pool:
        trees = set(pool.map(lambda _: parts.made(recipe, "thing"), range(8)))

    assert len(trees) == 1
    assert recipe.builds == 1
    assert (trees.pop() / "program").read_text().startswith("thing-")


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    """After a failure no directory is there to be taken for a part, and the next caller builds again."""
    with pytest.raises(parts.PartError, match="part thing: no compiler"):
        parts.made(Recipe(fails=True), "thing")

    assert [path for path in (tmp_path / "parts").iterdir() if path.is_dir()] == []
    assert parts.made(Recipe(), "thing").is_dir()


def test_an_unknown_part_is_refused_with_the_names_there_are() -> None:
    """A misspelt name tells the right ones."""
    with pytest.raises(parts.PartError, match=r"no part 'oppa'; there are: go, node, opa, "):
        parts.part("oppa")


def test_a_missing_tool_is_named() -> None:
    """One line says which program is not on PATH."""
    with pytest.raises(parts.PartError, match="no-such-tool is needed to get the test parts, and is not on PATH"):
        parts.run("no-such-tool", "--version")


def test_a_failing_tool_is_quoted() -> None:
    """The end of its output and its exit status are in the error."""
    with pytest.raises(parts.PartError, match=r"(?s)exit 3\nlast words"):
        parts.run("sh", "-c", "echo last words; exit 3")
