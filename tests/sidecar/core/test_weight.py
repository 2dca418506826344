"""sidecar.core.weight: nobody pays less by writing nonsense."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.message import parse
from sidecar.core.profile import ArgumentWeight, Weight
from sidecar.core.weight import asked, weighing
from tests.builders import a_call, a_request

ROWS = ArgumentWeight(tool="query", path="filter.rows", per=100, maximum=50)
WEIGHT = Weight(default=2, tools={"query": 3, "drop": 9}, arguments=(ROWS,))


def test_without_weights_there_is_nothing_to_weigh() -> None:
    """Each message costs one unit, at no cost of its own."""
    assert weighing(Weight()) is None


@pytest.mark.parametrize(
    ("body", "units"),
    [
        (a_call("query", {"filter": {"rows": 1}}), 3),
        (a_call("query", {"filter": {"rows": 1000}}), 10),
        (a_call("drop", {"filter": {"rows": 1000}}), 9),
        (a_call("other"), 2),
        (a_request("tools/list"), 2),
    ],
)
def test_a_message_costs_its_tool_or_its_argument(body: bytes, units: int) -> None:
    """Whichever is more; other tools and messages cost the default."""
    weigh = weighing(WEIGHT)

    assert weigh is not None
    assert weigh(parse(body)) == units


@pytest.mark.parametrize(
    ("rows", "units"),
    [
        (0, 1),
        (100, 1),
        (100.5, 2),
        (101, 2),
        (5000, 50),
        ([1] * 250, 3),
        ([], 1),
        (5001, 50),
        (10**400, 50),
        (1e308, 50),
        (-1, 50),
        (-0.1, 50),
        (True, 50),
        ("1", 50),
        (None, 50),
        ({}, 50),
        (float("nan"), 50),
    ],
)
def test_an_argument_that_makes_no_sense_costs_the_maximum(rows: Any, units: int) -> None:
    """Too large, negative, no number; a list counts by its length."""
    assert asked(ROWS, {"filter": {"rows": rows}}) == units


@pytest.mark.parametrize("arguments", [{}, {"filter": {}}, {"filter": 7}, {"filter.rows": 1}, {"rows": 1}])
def test_an_argument_that_is_absent_costs_the_maximum(arguments: dict[str, Any]) -> None:
    """Servers have defaults of their own, and nobody knows them here."""
    assert asked(ROWS, arguments) == 50


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_whatever_an_argument_is_it_costs_between_one_and_the_maximum(rows: Any) -> None:
    """As JSON has it."""
    assert 1 <= asked(ROWS, {"filter": {"rows": rows}}) <= 50
