"""An image archive says what it holds, and says the same each time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.cluster import images

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEGATE_CACHE", str(tmp_path / "cache"))


def blobs_of(archive: Path) -> dict[str, bytes]:
    """Every file of the archive by name."""
    with tarfile.open(archive) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def members_of(layer: bytes) -> dict[str, tarfile.TarInfo]:
    """What a layer lists, by name, in its order."""
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        return {member.name: member for member in tar}


def blob(files: dict[str, bytes], descriptor: dict[str, str]) -> bytes:
    """The blob a descriptor points to."""
    return files["blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")]


def test_an_archive_holds_its_layers_under_its_reference(tmp_path: Path) -> None:
    """Index, manifest, configuration and layers refer to one another by the right digests and sizes."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "name").write_text("from a tree")
    link = images.Link("name")

    made = images.image("localhost/thing:1", {"": tree}, {"etc/name": b"over it", "etc/link": link}, user="15100")

    files = blobs_of(made.archive)
    (entry,) = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(blob(files, entry))
    assert entry["annotations"]["io.containerd.image.name"] == "localhost/thing:1"
    assert json.loads(blob(files, manifest["config"]))["config"]["User"] == "15100"
    for name, content in files.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(content).hexdigest() == name.rpartition("/")[2]
    lower, upper = (members_of(blob(files, layer)) for layer in manifest["layers"])
    assert list(lower) == ["etc", "etc/name"]
    assert upper["etc/link"].linkname == "name"
    assert {member.uid for member in (*lower.values(), *upper.values())} == {0}


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    """Times of files do not count: a rebuilt image is found in the cache."""
    file = tmp_path / "program"
    file.write_text("same")
    first = images.image("localhost/thing:1", {"program": file})
    file.unlink()
    file.write_text("same")

    assert images.image("localhost/thing:1", {"program": file}).archive == first.archive

    file.write_text("other")
    assert images.image("localhost/thing:1", {"program": file}).archive != first.archive


def test_archives_that_nobody_uses_are_removed() -> None:
    """A changed image takes the place of the old one once that has gone unused for an hour; other images stay."""
    old, recent = (images.image("localhost/thing:1", {"program": text}).archive for text in (b"old", b"recent"))
    other = images.image("localhost/other:1", {"program": b"old"}).archive
    for archive in (old, other):
        os.utime(archive, (0, 0))

    new = images.image("localhost/thing:1", {"program": b"new"}).archive

    assert not old.exists()
    assert recent.exists()
    assert other.exists()
    assert new.exists()
