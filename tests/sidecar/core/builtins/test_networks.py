"""sidecar/core/builtins/networks.py: networks in CIDR notation, as the real opa answers; and what we say that we do not know."""

from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
net.cidr_is_valid("10.0.0.0/8")
net.cidr_is_valid("10.0.0.1/33")
net.cidr_is_valid("2001:db8::/32")
net.cidr_is_valid("10.0.0.01/8")
net.cidr_expand("10.0.0.8/30")
net.cidr_expand("2001:db8::/126")
net.cidr_expand("10.0.0.8")
net.cidr_merge(["10.0.0.0/24", "10.0.1.0/24", "10.0.3.0/24"])
net.cidr_merge({"2001:db8::/33", "2001:db8:8000::/33", "192.168.1.0"})
net.cidr_merge(["x"])
net.cidr_contains_matches("10.0.0.0/8", ["10.1.2.3", "11.0.0.0/8"])
net.cidr_contains_matches([["10.0.0.0/8", "x"], "192.168.0.0/16"], {"a": "10.1.0.0/16", "b": "192.168.1.1"})
net.cidr_contains_matches({"10.0.0.0/8"}, {"10.1.2.3"})
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
        ("net.cidr_expand", ["10.0.0.0/8"]),
        ("net.cidr_contains_matches", [["::ffff:10.0.0.0/104"], ["10.0.0.1"]]),
        ("net.cidr_contains_matches", [["10.0.0.0/8"] * 200, ["10.0.0.1"] * 200]),
        ("net.cidr_merge", [["::ffff:10.0.0.0/104"]]),
        ("net.cidr_merge", [["192.168.1.1"]]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
