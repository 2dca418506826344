"""sidecar.shell.turnaround: one HTTP response for one request, whatever comes and in whatever order."""

import orjson
import pytest

from sidecar.core.connection import Headers
from sidecar.core.message import Message, Shape
from sidecar.core.revision import Revision
from sidecar.shell import turnaround
from sidecar.shell.turnaround import Turnaround

DATA = orjson.dumps({"jsonrpc": "2.0", "id": 1, "result": {}})


class FakeSink:
    """Writes down what it is told; aborts the call when it hears *allergy*."""

    def __init__(self, allergy: str = "") -> None:
        self.told: list[str] = []
        self.call: Turnaround | None = None
        self._allergy = allergy

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if self.call is not None and what.startswith(self._allergy or "\0"):
            self.call.abort()

    def begin(self, status: int, reason: bytes, headers: Headers) -> None:
        """Take the head."""
        del reason
        names = dict(headers)
        self._tell(
            f"{status} {names.get(b'content-type', b'-').decode()} {names.get(b'mcp-session-id', b'-').decode()}"
        )

    def feed(self, piece: bytes) -> None:
        """Take a piece."""
        self._tell(f"feed {len(piece)}")

    def complete(self) -> None:
        """Know the end."""
        self._tell("complete")

    def failed(self, detail: str) -> None:
        """Know the other end."""
        self._tell(f"failed: {detail}")


class FakeOwner:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.left = 0
        self.held: list[bool] = []
        self.closed: list[str] = []

    def leave(self, caller: Turnaround) -> None:
        """Count it."""
        del caller
        self.left += 1

    def hold(self, caller: Turnaround, *, hold: bool) -> None:
        """Remember it."""
        del caller
        self.held.append(hold)

    def close_session(self, session_id: str) -> None:
        """Remember it."""
        self.closed.append(session_id)


def a_turnaround(
    *,
    answers: int = 1,
    opens: str | None = None,
    allergy: str = "",
    is_known: bool = True,
    revision: str = "2025-11-25",
) -> tuple[Turnaround, FakeSink, FakeOwner]:
    """One, with what it talks to."""
    sink, owner = FakeSink(allergy), FakeOwner()
    message = Message(shape=Shape.REQUEST, method="tools/call", id=1, params={}, revision=Revision(revision))
    call = sink.call = Turnaround(sink, owner, message, answers=answers, session_id=opens)
    if is_known:
        call.known()
    return call, sink, owner


def test_an_answer_alone_is_json() -> None:
    """Nothing came before it."""
    call, sink, _ = a_turnaround()
    call.deliver(DATA, is_last=True, code=None)

    assert sink.told == ["200 application/json -", f"feed {len(DATA)}", "complete"]


def test_an_answer_after_something_else_ends_a_stream() -> None:
    """What came before was sent at once."""
    call, sink, _ = a_turnaround()
    call.deliver(DATA, is_last=False, code=None)
    assert sink.told == ["200 text/event-stream -", f"feed {len(DATA) + 23}"]

    call.deliver(DATA, is_last=True, code=None)
    assert sink.told[2:] == [f"feed {len(DATA) + 23}", "complete"]


def test_nothing_is_told_before_the_caller_knows_the_call() -> None:
    """Then all of it, in order."""
    call, sink, _ = a_turnaround(is_known=False)
    call.deliver(DATA, is_last=False, code=None)
    call.fail("gone")
    assert sink.told == []

    call.known()
    assert sink.told == ["200 text/event-stream -", f"feed {len(DATA) + 23}", "failed: gone"]


@pytest.mark.parametrize("allergy", ["200", "feed"])
def test_a_caller_that_aborts_from_within_hears_no_more(allergy: str) -> None:
    """The way back refuses a message by aborting its call."""
    call, sink, owner = a_turnaround(allergy=allergy)
    call.deliver(DATA, is_last=True, code=None)
    call.deliver(DATA, is_last=True, code=None)
    call.fail("late")

    assert sink.told[-1].startswith(allergy)
    assert owner.left == 1


def test_an_end_is_told_once() -> None:
    """Whatever comes after it."""
    call, sink, _ = a_turnaround()
    call.deliver(DATA, is_last=True, code=None)
    for _ in range(2):
        call.fail("late")
        call.end_stream()
        call.acknowledge(202)

    assert sink.told[2:] == ["complete"]


@pytest.mark.parametrize(
    ("revision", "code", "status"),
    [
        ("2026-07-28", -32601, 404),
        ("2026-07-28", -32602, 400),
        ("2026-07-28", -32603, 200),
        ("2026-07-28", 7, 200),
        ("2026-07-28", None, 200),
        ("2025-11-25", -32601, 200),
    ],
)
def test_an_error_has_the_status_of_its_revision(revision: str, code: int | None, status: int) -> None:
    """Before 2026-07-28 every answer is a 200; a 4xx would end some clients."""
    call, sink, _ = a_turnaround(revision=revision)
    call.deliver(DATA, is_last=True, code=code)

    assert sink.told[0] == f"{status} application/json -"


def test_the_session_is_named_when_it_was_opened() -> None:
    """An error opens none, and its process is not needed any more."""
    call, sink, owner = a_turnaround(opens="s1")
    call.deliver(DATA, is_last=True, code=None)
    assert sink.told[0] == "200 application/json s1"
    assert owner.closed == []

    call, sink, owner = a_turnaround(opens="s2")
    call.deliver(DATA, is_last=True, code=-32602)
    assert sink.told[0] == "200 application/json -"
    assert owner.closed == ["s2"]


def test_a_session_that_nobody_waited_for_is_closed() -> None:
    """Its id was told to nobody."""
    call, _, owner = a_turnaround(opens="s1")
    call.abort()
    call.abort()

    assert (owner.left, owner.closed) == (1, ["s1"])


def test_a_batch_ends_with_its_last_answer() -> None:
    """None waits for the others."""
    call, sink, _ = a_turnaround(answers=2)
    call.deliver(DATA, is_last=True, code=None)
    assert "complete" not in sink.told

    call.deliver(DATA, is_last=True, code=-32602)
    assert sink.told[-1] == "complete"
    assert sink.told[0] == "200 text/event-stream -"


def test_a_slow_client_is_owed_a_bounded_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner holds back, where it can; where it cannot, the call is given up."""
    monkeypatch.setattr(turnaround, "MAX_OWED_BYTES", 3 * len(DATA))
    call, sink, owner = a_turnaround()
    call.pause()
    for _ in range(2):
        call.deliver(DATA, is_last=False, code=None)
    call.resume()
    call.pause()
    for _ in range(5):
        call.deliver(DATA, is_last=False, code=None)

    assert owner.held == [True, False, True]
    assert sink.told[-1] == "failed: the client reads too slowly"
    assert owner.left == 1
    assert sink.told.count("failed: the client reads too slowly") == 1
