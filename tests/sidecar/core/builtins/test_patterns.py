"""sidecar/core/builtins/patterns.py: regular expressions, as the real opa answers; and what we say that we do not know."""

from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
regex.find_n("a.", "abacad", 2)
regex.find_n("a*", "baaac", -1)
regex.find_n("x", "abc", -1)
regex.find_n("(", "abc", -1)
regex.split("a", "banana")
regex.split("a*", "baaac")
regex.split(",", "")
regex.split("", "abc")
regex.split("x", "abc")
regex.replace("banana", "a(n)?", "<$1>")
regex.replace("banana", "a(?P<it>n)", "${it}$$$it_$2x")
regex.replace("abc", "", "-")
regex.replace("baaac", "a*", "x")
regex.replace("foo", "^[a-z]", "F")
regex.replace("héé", "é", "e")
regex.replace("a", "(?i)A", "$0$0")
regex.template_match("urn:foo:{.*}", "urn:foo:bar:baz", "{", "}")
regex.template_match("a.<[0-9]{2}>x", "a.12x", "<", ">")
regex.template_match("a.<[0-9]{2}>x", "ab12x", "<", ">")
regex.template_match("a{", "a", "{", "}")
regex.template_match("a", "a", "{{", "}")
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
        ("regex.find_n", ["\\C", "a", 1]),
        ("regex.replace", ["a" * 5000, "a", "b" * 5000]),
        ("regex.find_n", ["b?", "a" * 100_000, -1]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
