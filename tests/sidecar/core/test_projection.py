"""sidecar/core/projection.py: what is left out, and that a remembered verdict is a fresh one."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import projection
from sidecar.core.authorise import Agent, Question, Verdict, judge
from sidecar.core.claims import Delegated
from sidecar.core.message import Ask, Prompt, Resource, Tool
from sidecar.core.projection import WHOLE, Projection, Remembering, pointer, steps
from tests.sidecar.questions import WORKLOAD, a_question, a_user

DOCUMENT = {
    "user": {"id": "u", "role": "a"},
    "tool": {"name": "t", "args": {"x": 1, "l": [1, {"y": 2}]}},
    "prompt": None,
}
NAMES = st.text(st.sampled_from("ab~/01"), max_size=4)


class Echo:
    """An engine that sees the projected document and nothing else, and counts its decisions."""

    name = "echo"

    def __init__(self, seen: Projection) -> None:
        self.seen, self.decisions = seen, 0

    def decide(self, question: Question) -> Verdict:
        """Allow what hashes to an even number; put what was seen into the policies."""
        self.decisions += 1
        document = self.seen.narrow(question.document())
        assert document == self.seen.part_of(question)
        text = repr(document)
        return Verdict(allowed=sum(text.encode()) % 2 == 0, policies=(text,))


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (None, DOCUMENT),
        ([""], DOCUMENT),
        (["", "/user"], DOCUMENT),
        ([], {}),
        (["/user/role"], {"user": {"role": "a"}}),
        (["/user/role", "/user"], {"user": {"id": "u", "role": "a"}}),
        (["/tool/args/x", "/tool/args", "/tool/args/z"], {"tool": {"args": {"x": 1, "l": [1, {"y": 2}]}}}),
        (["/tool/args/l/0", "/tool/args/l/9"], {"tool": {"args": {"l": [1, {"y": 2}]}}}),
        (["/prompt/name"], {"prompt": None}),
        (["/nothing/here"], {}),
    ],
)  # fmt: skip
def test_only_what_is_read_is_left(reads: list[str] | None, expected: Any) -> None:
    """A path stands for its subtree; lists are whole; null stays null; what is absent stays absent."""
    assert Projection(reads).narrow(DOCUMENT) == expected


@given(st.lists(NAMES, max_size=4))
def test_a_pointer_leads_back_to_its_names(names: list[str]) -> None:
    """Names may hold the signs that a pointer is made of."""
    assert steps(pointer(names)) == tuple(names)


def test_what_is_no_pointer_is_refused() -> None:
    """A path in another notation would silently read nothing."""
    with pytest.raises(ValueError, match=r"'user\.role' is no JSON pointer"):
        Projection(["user.role"])


VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2**70, 0.0, 1.0, 1.5, "", "1", "\u00e9"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=3)
PATHS = st.sampled_from([
    "/user", "/user/role", "/user/claims/a", "/user/groups", "/workload", "/workload/path", "/agent", "/agent/session",
    "/server/name", "/method", "/tool", "/tool/name", "/tool/args", "/tool/args/a", "/tool/args/a/b", "/tool/args/a~1/0",
    "/prompt", "/prompt/name", "/prompt/args/a", "/resource", "/resource/uri", "/elicitation", "/elicitation/mode",
    "/request/protocol_version", "/delegation", "/delegation/0", "/nothing",
])  # fmt: skip
READS = st.none() | st.lists(PATHS | st.lists(NAMES, max_size=2).map(lambda names: pointer(("tool", "args", *names))), max_size=4)  # fmt: skip # noqa: E501
USERS = st.sampled_from(
    [
        *(a_user(role, claims=claims, groups=groups) for role in (None, "r") for claims in ({}, {"a": 1}) for groups in ((), ("g",))),
        a_user("r", id="u-2", delegation=(Delegated(sub="s", actor="t"),)),
        None,
    ]
)  # fmt: skip
TARGETS = st.one_of(
    st.builds(Tool, name=st.sampled_from(["a", "b", "null"]), arguments=ARGUMENTS),
    st.builds(Prompt, name=st.sampled_from(["a", "b"]), arguments=ARGUMENTS),
    st.builds(Resource, uri=st.sampled_from(["a", "b"])),
    st.builds(Ask, method=st.sampled_from(["roots/list", "elicitation/create"]), mode=st.sampled_from([None, "url"])),
)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """Anybody, about anything; equal users are not always the same object."""
    user = draw(USERS)
    if user is not None and draw(st.booleans()):
        user = replace(user)
    asked = a_question("x", user=user, nobody=user is None, workload=draw(st.sampled_from([None, WORKLOAD])))
    target = draw(TARGETS)
    agent, version = Agent(session=draw(st.sampled_from([None, "s"]))), draw(st.sampled_from([None, "v"]))
    return msgspec.structs.replace(asked, message=asked.message.about(target), agent=agent, protocol_version=version)


@given(READS, st.lists(questions(), min_size=1, max_size=8))
def test_a_remembered_verdict_is_a_fresh_one(reads: list[str] | None, asked: list[Question]) -> None:
    """Whatever was asked before, the answer is the one that the engine would give now."""
    seen = Projection(reads)
    remembering = Remembering([Echo(seen)], seen)

    for question in [*asked, *asked]:
        assert remembering.decide(question) == judge(question, [Echo(seen)])


def test_who_asks_is_written_once_and_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another caller is never taken for one of before, whose place in memory it may have got."""
    monkeypatch.setattr(projection, "MAX_CALLERS", 2)
    seen = Projection(["/user/role"])
    remembering = Remembering([Echo(seen)], seen)

    for number in range(9):
        question = a_question(user=a_user(f"role-{number % 3}"))
        assert remembering.decide(question) == judge(question, [Echo(seen)])
    assert len(remembering._keys._callers) == 2


def test_a_question_that_differs_only_in_what_nobody_reads_is_not_asked_again() -> None:
    """That is what it is for."""
    seen = Projection(["/tool/name", "/user/role"])
    engine = Echo(seen)
    remembering = Remembering([engine], seen)

    for count in range(5):
        remembering.decide(a_question("x", {"n": count}, time_ns=count))
    remembering.decide(a_question("y"))
    assert engine.decisions == 2


def test_the_one_longest_unused_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(projection, "MAX_VERDICTS", 2)
    engine = Echo(WHOLE)
    remembering = Remembering([engine], WHOLE)

    for tool in ("a", "b", "a", "c", "a", "b"):
        remembering.decide(a_question(tool))
    assert engine.decisions == 4


def test_large_keys_and_numbers_beyond_64_bits_are_asked_again() -> None:
    """They are decided, not remembered."""
    engine = Echo(WHOLE)
    remembering = Remembering([engine], WHOLE)

    for arguments in ({"t": "x" * projection.MAX_KEY_BYTES}, {"n": 2**70}):
        for _ in range(2):
            remembering.decide(a_question("a", arguments))
    assert engine.decisions == 4


def test_an_error_is_not_remembered() -> None:
    """Memory that ran out once may be there the next time."""

    class Failing:
        name = "failing"

        def __init__(self) -> None:
            self.decisions = 0

        def decide(self, _: Question) -> Verdict:
            self.decisions += 1
            return Verdict(allowed=False, errors=("out of memory",))

    engine = Failing()
    remembering = Remembering([engine], WHOLE)
    remembering.decide(a_question())
    remembering.decide(a_question())
    assert (remembering.name, engine.decisions) == ("failing", 2)
