"""sidecar/core/builtins/documents.py: patches, subsets and paths, as the real opa answers; and what we say that we do not know."""

from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Pairs, Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
object.subset({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}})
object.subset({"a": {"b": 1}}, {"a": {"b": 1.0, "c": 2}})
object.subset({1: 2, 3: 4}, {1: 2})
object.subset([1, 2, 3], [2, 3])
object.subset([1, 1, 2], [1, 2])
object.subset([1, 2, 3], {3, 1})
object.subset([], set())
object.subset([1], set())
object.subset({1, 2}, {2})
object.subset({1, 2}, [2])
object.subset({"a": [1, 2]}, {"a": [2]})
object.subset({"a": 1}, {"a": true})
json.patch({"a": {"b": 1}}, [{"op": "add", "path": "/a/c", "value": [1]}, {"op": "remove", "path": "a/b"}])
json.patch({"a": [1, 2]}, [{"op": "add", "path": "/a/-", "value": 3}, {"op": "replace", "path": ["a", 0], "value": 9}])
json.patch([1, 2], [{"op": "move", "from": "/0", "path": "/1"}])
json.patch({"a": 1}, [{"op": "copy", "from": "/a", "path": "/b~1c~0"}])
json.patch({"a": 1}, [{"op": "test", "path": "/a", "value": 2}])
json.patch({"a": 1}, [{"op": "test", "path": "/a", "value": 1.0}])
json.patch({"a": 1}, [{"op": "replace", "path": "/b", "value": 2}])
json.patch({"a": 1}, [{"op": "add", "path": "", "value": 2}])
json.patch({"a": 1}, [{"op": "add", "path": "/", "value": 2}])
json.patch([1], [{"op": "remove", "path": "/01"}])
json.patch([1], [{"op": "remove", "path": "/1"}])
json.patch({"a": {1, 2}}, [{"op": "add", "path": ["a", 3], "value": 3}, {"op": "remove", "path": ["a", 1]}])
json.patch({"a": 1}, [{"op": "nonsense", "path": "/a"}])
json.patch({"a": 1}, json.unmarshal("[\"x\"]"))
graph.reachable_paths({"a": ["b", "c"], "b": ["a"], "c": []}, ["a"])
graph.reachable_paths({"a": ["a"], "b": ["x"]}, {"a", "b", "z"})
"""
LINES = EXPRESSIONS.strip().splitlines()


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What the real opa says of each expression, and what we say."""
    return Answers.to(LINES)


@pytest.mark.parametrize("line", LINES)
def test_a_function_answers_as_opa_does(answers: Answers, line: str) -> None:
    """The same value, or undefined in both."""
    assert is_same(line, answers.ours[line], answers.theirs[line])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("json.patch", [[1], [{"op": "remove", "path": "/1.0"}]]),
        ("json.patch", [[1], [{"op": "remove", "path": ""}]]),
        ("json.patch", [Pairs([(1, 2)]), [{"op": "remove", "path": [1]}]]),
        ("json.patch", [{}, [{"op": "add", "path": [1], "value": 1}]]),
        ("json.patch", [list(range(10_000)), [{"op": "test", "path": "/0", "value": 0}] * 10_000]),
        ("object.subset", [list(range(10_000)), list(range(5_000, 15_000))]),
        ("graph.reachable_paths", [{str(n): [str(m) for m in range(12)] for n in range(12)}, ["0"]]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
