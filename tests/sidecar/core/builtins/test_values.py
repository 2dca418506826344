"""sidecar/core/builtins/values.py: what the module writes is read, and what is written it reads."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.builtins import values
from sidecar.core.builtins.values import Set

RegoValue = st.recursive(
    st.none() | st.booleans() | st.integers() | st.decimals(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(Set)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.lists(st.tuples(st.integers(), inner), max_size=3, unique_by=lambda pair: pair[0]).map(values.an_object)
    ),
    max_leaves=8,
)


@given(RegoValue)
def test_a_value_that_is_written_is_read_again(value: Any) -> None:
    """What goes to the module comes back the same, sets and odd keys included."""
    assert values.is_equal(values.read(values.write(value).encode("utf-8", "surrogatepass")), value)


@pytest.mark.parametrize("text", ["", "{1", "{1:}", "[1,", "nonsense", "set(", "{1, 2} 3", "{1: 2, 3", "@"])
def test_a_text_that_is_no_value_is_refused(text: str) -> None:
    """The module is OPA's; whatever else is no value."""
    with pytest.raises(ValueError, match=r"."):
        values.read(text.encode())


def test_rego_orders_values_by_kind() -> None:
    """Null, booleans, numbers, strings, arrays, objects, sets."""
    kinds = [None, False, True, -1, Decimal("2.5"), "a", [1], {"a": 1}, Set([1])]

    assert values.ordered(reversed(kinds)) == kinds
    assert values.write(Set([3, 1, "x"])) == '{1, 3, "x"}'
