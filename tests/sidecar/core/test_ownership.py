"""sidecar.core.ownership: a name is worth something only to the principal that it was given to."""

import pytest

from sidecar.core import ownership
from sidecar.core.ownership import MAX_NAME_CHARS, tasks
from sidecar.errors import Reason, Refusal
from tests.builders import a_principal


def test_the_owner_passes() -> None:
    """Whenever it asks."""
    owned = tasks()
    owned.open("t", a_principal("alice"))

    owned.require("t", a_principal("alice"))
    assert owned.owns("t", a_principal("alice"))


@pytest.mark.parametrize(
    ("name", "user", "detail"), [("t", "bob", "another principal"), ("u", "alice", "unknown"), ("", "alice", "unknown")]
)
def test_nobody_else_does(name: str, user: str, detail: str) -> None:
    """And the caller is not told why."""
    owned = tasks()
    owned.open("t", a_principal("alice"))

    with pytest.raises(Refusal) as caught:
        owned.require(name, a_principal(user))

    assert (caught.value.reason, caught.value.public) == (Reason.UNKNOWN_TASK, "task not found")
    assert detail in caught.value.detail


def test_a_name_keeps_its_first_owner() -> None:
    """A server that says another's name again gives nothing away."""
    owned = tasks()
    owned.open("t", a_principal("alice"))
    owned.open("t", a_principal("bob"))

    assert owned.owns("t", a_principal("alice"))
    assert not owned.owns("t", a_principal("bob"))


def test_a_closed_name_is_gone() -> None:
    """Closing twice is no error."""
    owned = tasks()
    owned.open("t", a_principal())
    owned.close("t")
    owned.close("t")

    assert not owned.owns("t", a_principal())


def test_a_name_without_end_is_not_kept() -> None:
    """Memory is bounded by names as by their number."""
    owned = tasks()
    owned.open("t" * (MAX_NAME_CHARS + 1), a_principal())

    assert owned.owners == {}


def test_the_name_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of names is bounded."""
    monkeypatch.setattr(ownership, "MAX_OWNED", 2)
    owned = tasks()
    for each in ("a", "b"):
        owned.open(each, a_principal())
    owned.require("a", a_principal())
    owned.open("c", a_principal())

    assert list(owned.owners) == ["a", "c"]
