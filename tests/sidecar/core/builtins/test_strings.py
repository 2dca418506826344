"""sidecar/core/builtins/strings.py: affixes, occurrences and parts, as the real opa answers; and what we say that we do not know."""

import pytest

from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
strings.any_prefix_match("abc", ["b", "ab"])
strings.any_prefix_match({"abc", "x"}, "x")
strings.any_prefix_match([], ["x"])
strings.any_suffix_match(["abc", "x"], {"bc"})
strings.any_suffix_match("abc", [])
strings.count("aaaa", "aa")
strings.count("aéa", "")
strings.split_n("a,b,c", ",", 2)
strings.split_n("a,b,c", ",", -2)
strings.split_n("abc", "", 2)
strings.split_n("abc", ",", 0)
indexof_n("banana", "ana")
indexof_n("éaéa", "a")
indexof_n("a", "")
glob.quote_meta("*.[a-z]{x}?\\!")
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
