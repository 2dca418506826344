"""sidecar/core/builtins/moments.py: moments, dates and durations, as the real opa answers; and what we say that we do not know."""

from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
time.clock(1795350000123456789)
time.clock([1795350000123456789, "America/New_York"])
time.date([1795350000123456789, "Asia/Tokyo"])
time.weekday(1795350000123456789)
time.weekday([-1, "UTC"])
time.clock([1, "No/Where"])
time.clock(json.unmarshal("\"x\""))
time.clock(1.5)
time.add_date(1795350000123456789, 1, 2, 3)
time.add_date(1706659200000000000, 0, 1, 0)
time.add_date(json.unmarshal("[1743213600000000000, \"Europe/Paris\"]"), 0, 0, 1)
time.add_date(json.unmarshal("[1761433200000000000, \"Europe/Paris\"]"), 0, 0, 1)
time.add_date(1795350000123456789, 9999, 0, 0)
time.diff(1795350000123456789, 1700000000000000000)
time.diff([1709164800000000000, "America/Los_Angeles"], 1711756800000000000)
time.diff(1, 1)
time.format(1795350000123456789)
time.format([1795350000000000000, "America/New_York"])
time.format([1795350000123456789, "Asia/Kolkata", "RFC1123Z"])
time.format([1795350000123456789, "UTC", "Monday, Jan _2 3:04:05.000PM 06 MST -07:00 Z0700 002 __2 .999 ,000000"])
time.format([1795350000120000000, "Europe/Paris", "2006-1-2T15:4:5.999999999Z07:00:00 Jany January Mon pm 01 02 03"])
time.format([0, "", "RFC850"])
time.parse_ns("RFC3339", "2026-11-22T15:00:00.5+01:00")
time.parse_ns("2006-01-02", "2026-02-30")
time.parse_ns("2006-01-02", "2026-02-28")
time.parse_ns("Jan 2, 2006 at 3:04pm (MST)", "Feb 3, 2013 at 7:54pm (PST)")
time.parse_ns("02 Jan 06 15:04 -0700", "01 feb 70 12:00 +0130")
time.parse_ns("15:04:05", "12:00:00")
time.parse_ns("2006-01-02 15:04:05", "2026-01-02 15:04:05.123")
time.parse_ns("2006-01-02 15:04:05.000", "2026-01-02 15:04:05.12")
time.parse_ns("2006-01-02", "2026-01-02x")
time.parse_ns("2006  Jan", "2026   Feb")
time.parse_rfc3339_ns("2026-11-22T15:00:00Z")
time.parse_rfc3339_ns("2026-11-22T15:00:00.123456789-08:00")
time.parse_rfc3339_ns("2026-11-22 15:00:00Z")
time.parse_rfc3339_ns("2026-13-22T15:00:00Z")
time.parse_rfc3339_ns("1400-11-22T15:00:00Z")
time.parse_duration_ns("1h30m")
time.parse_duration_ns("-1.5s")
time.parse_duration_ns("1d12h")
time.parse_duration_ns("1.5w")
time.parse_duration_ns("1y")
time.parse_duration_ns("10us20ns")
time.parse_duration_ns("0")
time.parse_duration_ns("")
time.parse_duration_ns("5")
time.parse_duration_ns("1.s")
time.parse_duration_ns(".5m")
time.parse_duration_ns("9999999h")
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
        ("time.clock", [[1, "Local"]]),
        ("time.add_date", [1, 10**6, 0, 0]),
        ("time.parse_ns", ["002", "120"]),
        ("time.parse_ns", ["MST", "+03"]),
        ("time.parse_rfc3339_ns", ["2026-11-22T5:00:00Z"]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
