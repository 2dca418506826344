"""sidecar.core.session: an id is worth something only to the principal that opened it."""

import pytest

from sidecar.core import session
from sidecar.core.authorise import Agent
from sidecar.core.session import Session, Sessions
from sidecar.errors import Reason, Refusal
from tests.builders import a_principal

AGENT = Agent(client_name="planner")


def test_the_owner_gets_the_session() -> None:
    """With what the client said of itself when it opened it."""
    sessions = Sessions()
    sessions.open("s", a_principal("alice"), AGENT)

    assert sessions.require("s", a_principal("alice")) == Session(owner=a_principal("alice").key, agent=AGENT)


@pytest.mark.parametrize(
    ("session_id", "user", "detail"),
    [
        ("s", "bob", "another principal"),
        ("s", None, "another principal"),
        ("t", "alice", "unknown"),
        ("", "alice", "unknown"),
    ],
)
def test_nobody_else_does(session_id: str, user: str | None, detail: str) -> None:
    """And the caller is not told why, which would say what ids exist."""
    sessions = Sessions()
    sessions.open("s", a_principal("alice"), AGENT)

    with pytest.raises(Refusal) as caught:
        sessions.require(session_id, a_principal(user))

    assert (caught.value.reason, caught.value.public) == (Reason.NOT_FOUND, "this session is not open")
    assert detail in caught.value.detail


def test_the_same_user_on_another_workload_is_another_principal() -> None:
    """A leaked id is worthless to another workload."""
    sessions = Sessions()
    sessions.open("s", a_principal("alice"), AGENT)

    with pytest.raises(Refusal, match="not open"):
        sessions.require("s", a_principal("alice", workload=None))


def test_the_server_may_give_an_id_to_another() -> None:
    """It was restarted and counts from 1: who had the id before must not enter what is another's now."""
    sessions = Sessions()
    taken = [sessions.open("1", a_principal(user), AGENT) for user in ("alice", "alice", "bob")]

    assert taken == [False, False, True]
    assert sessions.require("1", a_principal("bob"))
    with pytest.raises(Refusal, match="not open"):
        sessions.require("1", a_principal("alice"))


def test_a_closed_session_is_gone() -> None:
    """Closing twice is no error."""
    sessions = Sessions()
    sessions.open("s", a_principal(), AGENT)
    sessions.close("s")
    sessions.close("s")

    with pytest.raises(Refusal, match="not open"):
        sessions.require("s", a_principal())


def test_the_session_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of sessions is bounded."""
    monkeypatch.setattr(session, "MAX_SESSIONS", 2)
    sessions = Sessions()
    for each in ("a", "b"):
        sessions.open(each, a_principal(), AGENT)
    sessions.require("a", a_principal())
    sessions.open("c", a_principal(), AGENT)

    assert list(sessions.opened) == ["a", "c"]
