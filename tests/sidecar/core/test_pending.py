"""sidecar.core.pending: which requests wait for an answer, by scope and id."""

import pytest

from sidecar.core import pending
from sidecar.core.pending import Pending


def test_a_request_waits_until_it_is_removed() -> None:
    """Once answered, a second answer has nothing to answer."""
    waiting = Pending()
    waiting.add("s", 1)
    assert waiting.has("s", 1)
    waiting.remove("s", 1)

    assert not waiting.has("s", 1)


def test_scopes_and_types_of_ids_are_told_apart() -> None:
    """1 and "1" are two ids, and each session has its own."""
    waiting = Pending()
    waiting.add("s", 1)

    assert not waiting.has("s", "1")
    assert not waiting.has("t", 1)


def test_a_scope_can_be_forgotten() -> None:
    """When it becomes another's."""
    waiting = Pending()
    for scope in ("s", "s", "t"):
        waiting.add(scope, 1)
    waiting.forget("s")

    assert waiting.waiting == {("t", 1): 1}


def test_the_same_id_may_wait_twice() -> None:
    """Two clients of one principal both count from 0; the end of one call is not the end of the other."""
    waiting = Pending()
    waiting.add("s", 0)
    waiting.add("s", 0)
    waiting.remove("s", 0)

    assert waiting.has("s", 0)


def test_removing_what_does_not_wait_is_no_error() -> None:
    """It may have been dropped for the bound."""
    waiting = Pending()
    waiting.remove("s", 0)

    assert waiting.waiting == {}


def test_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is bounded, whatever a server asks."""
    monkeypatch.setattr(pending, "MAX_PENDING", 2)
    waiting = Pending()
    for each in (1, 2, 3):
        waiting.add("s", each)

    assert list(waiting.waiting) == [("s", 2), ("s", 3)]
