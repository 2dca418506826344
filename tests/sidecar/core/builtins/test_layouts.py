"""sidecar/core/builtins/layouts.py: what is written in a layout is read again in it; the rest is tried with moments."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.builtins.layouts import format_moment, parse_moment
from sidecar.core.builtins.values import Undefined

LAYOUTS = [
    "2006-01-02T15:04:05.999999999Z07:00",
    "Jan _2 06 03:04:05PM -0700",
    "Monday, January 2 2006 3:4:5 pm .000000000",
]


@given(st.datetimes(datetime(1990, 1, 1), datetime(2050, 1, 1)), st.integers(0, 10**9 - 1), st.sampled_from(LAYOUTS))  # noqa: DTZ001 - made aware below
def test_what_is_written_is_read_again(moment: datetime, ns: int, layout: str) -> None:
    """To the precision that the layout has."""
    written = format_moment(layout, moment.replace(tzinfo=UTC), ns)

    fields = parse_moment(layout, written)
    assert (fields.year, fields.month, fields.day) == (moment.year, moment.month, moment.day)
    assert (fields.hour, fields.minute, fields.second) == (moment.hour, moment.minute, moment.second)
    assert fields.ns == (ns if "000000000" in layout or "999999999" in layout else 0)
    assert timedelta(seconds=fields.offset_s) == timedelta(0)


@pytest.mark.parametrize(
    ("layout", "written"),
    [
        ("2006", "20x6"), ("Jan", "Foo"), ("Mon", "Foo"), ("PM", "XM"), ("15", "24"), ("-0700", "-2500"),
        ("-07:00", "-0100"), (".000", ".12"), ("a b", "ab"), ("a", "b"), ("2006", "20261"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_layout_has_no_answer(layout: str, written: str) -> None:
    """Go's reader fails, and so the call is undefined."""
    with pytest.raises(Undefined):
        parse_moment(layout, written)
