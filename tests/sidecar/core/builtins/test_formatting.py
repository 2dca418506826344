"""sidecar/core/builtins/formatting.py: Go's verbs, as the real opa answers; and what we say that we do not know."""

from decimal import Decimal
from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
sprintf("plain", [])
sprintf("%s and %v, %d%%", ["a", 1, 5])
sprintf("%v %v %v", [{"a": [true, null]}, {1, 2}, set()])
sprintf("%05d|%-4s|%x|%X|%o|%b|%c|%+d|% d|%5d|%.3d", [7, "a", 255, 255, 8, 5, 65, 3, 3, -4, 7])
sprintf("%.2f|%f|%8.3f|%e|%g|%v|%-8.1f|%08.2f", [1.5, 2.25, 3.14159, 12345.678, 0.00001, 1234567.5, 2.5, -3.14159])
sprintf("%q|%5q|%x|%.2s|%6.2s|%s", ["say \"é\"\n\t", "a", "hi", "abcdef", "xyz", "å"])
sprintf("%d", ["a"])
sprintf("%s", [5])
sprintf("%t %s", [true, false])
sprintf("%s %s", ["a"])
sprintf("%s", ["a", "b", 3, 2.5])
sprintf("%z", [1])
sprintf("50%", [])
sprintf("%v %s %d", [123456789012345678901234567890, 123456789012345678901234567890, 123456789012345678901234567890])
sprintf("%v|%v|%v|%v|%v", [0.1, 100000.5, 1000000.5, 0.0001, 0.00001234])
sprintf("%f", [5])
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
        ("sprintf", ["%*d", [1]]),
        ("sprintf", ["%[1]d", [1]]),
        ("sprintf", ["%9999d", [1]]),
        ("sprintf", ["%#x", [1]]),
        ("sprintf", ["%U", [1]]),
        ("sprintf", ["%05s", ["a"]]),
        ("sprintf", ["%#v", ["a"]]),
        ("sprintf", ["%5t", [True]]),
        ("sprintf", ["%.3g", [Decimal("1.5")]]),
        ("sprintf", ["%#f", [Decimal("1.5")]]),
        ("sprintf", ["%b", [Decimal("1.5")]]),
        ("sprintf", ["%v", [Decimal("1e999")]]),
        ("sprintf", ["%q", ["\u200b"]]),
        ("sprintf", ["%5", [1]]),
        ("sprintf", ["%-s", []]),
        ("sprintf", ["%t", [2**70]]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
