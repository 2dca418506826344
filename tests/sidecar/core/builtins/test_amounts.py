"""sidecar/core/builtins/amounts.py: amounts with units, versions and ranges as the real opa answers; what we do not know is said."""

from decimal import Decimal
from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
units.parse("10Mi")
units.parse("200m")
units.parse("1.5k")
units.parse("-3Ki")
units.parse("1e3")
units.parse("0.1")
units.parse("12 k")
units.parse("k")
units.parse("1e")
units.parse_bytes("10MiB")
units.parse_bytes("1.5kb")
units.parse_bytes("\"3\"")
units.parse_bytes("100e-1")
units.parse_bytes("3 kb")
units.parse_bytes("x")
semver.compare("1.0.0", "1.0.0-rc.1")
semver.compare("1.2.3-alpha.10", "1.2.3-alpha.9")
semver.compare("1.2.3+a", "1.2.3+b")
semver.compare("v1.2.3", "1.2.3")
semver.compare("1.2", "1.2.3")
semver.compare("1.0.0-a.b", "1.0.0-a")
semver.is_valid("01.2.3")
semver.is_valid("1.2.3-01")
semver.is_valid("1.2.3-0a+b-c")
semver.is_valid(5)
numbers.range_step(0, 10, 3)
numbers.range_step(10, 0, 4)
numbers.range_step(0, 10, 0)
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
        ("units.parse", ["1e9999k"]),
        ("units.parse_bytes", ["0.99999999999999999999999999k"]),
        ("units.parse_bytes", ["1.0000000000000000000000001"]),
        ("semver.compare", ["1.0.0-99999999999999999999", "1.0.0-1"]),
        ("numbers.range_step", [0, 10**9, 1]),
        ("numbers.range_step", [0, Decimal("1e500"), 1]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
