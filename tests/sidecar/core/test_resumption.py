"""sidecar.core.resumption: an event's id is worth something only to whom it was told."""

import pytest

from sidecar.core import resumption
from sidecar.core.resumption import MAX_ID_BYTES, Told


def test_only_who_was_told_an_event_is_known_to_have_it() -> None:
    """Each principal for itself: servers may count the events of each session from 1."""
    told = Told()
    told.add("alice", b"1")

    assert [told.has("alice", b"1"), told.has("bob", b"1"), told.has("alice", b"2")] == [True, False, False]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told longest ago goes first, and an id without end is not kept at all."""
    monkeypatch.setattr(resumption, "MAX_EVENTS", 2)
    told = Told()
    for event_id in (b"1", b"2", b"1", b"3", b"x" * (MAX_ID_BYTES + 1)):
        told.add("alice", event_id)

    assert list(told.events) == [("alice", b"1"), ("alice", b"3")]
