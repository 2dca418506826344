"""sidecar/core/builtins.py: Go's verbs as OPA fills them in; what is not ours to know is undefined."""

from typing import Any

import pytest

from sidecar.core.builtins import Undefined, sprintf


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("plain", [], "plain"),
        ("%s and %v", ["a", 1], "a and 1"),
        ("%v", [{"a": [True, None]}], '{"a": [true, null]}'),
        ("%d%%", [5], "5%"),
        ("%05d|%-4s|%x", [7, "a", 255], "00007|a   |ff"),
        ("%.2f", [1.005], "1.00"),
        ("%f", [2], "2.000000"),
        ("%t", [True], "true"),
        ("%q", ['say "é"'], '"say \\"é\\""'),
    ],
)
def test_verbs_are_filled_in(template: str, values: list[Any], expected: str) -> None:
    """The verbs that policies use."""
    assert sprintf(template, values) == expected


@pytest.mark.parametrize(
    ("template", "values"),
    [
        (1, []),
        ("x", "y"),
        ("%s", []),
        ("%s", ["a", "b"]),
        ("%d", ["a"]),
        ("%d", [True]),
        ("%d", [1.5]),
        ("%f", [True]),
        ("%t", [1]),
        ("%q", [1]),
        ("%p", [1]),
        ("%9999d", [1]),
        ("50%", [1]),
    ],
)
def test_what_go_would_complain_of_is_undefined(template: Any, values: Any) -> None:
    """A wrong type, too few or too many values, an unknown verb and a width that is an attack have no value."""
    with pytest.raises(Undefined):
        sprintf(template, values)
