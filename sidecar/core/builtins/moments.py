"""Moments in nanoseconds of Unix time, with Go's layouts and the IANA time zones.

Refuses the machine's own zone ("Local"): a verdict depends on the question. Sources: OPA, "Time"; Go, package time.
"""

import re
from calendar import monthrange
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Final
from zoneinfo import ZoneInfo

from sidecar.core.builtins.layouts import DAYS, Fields, format_moment, parse_moment
from sidecar.core.builtins.values import Undefined, Unknown, integer, text

NS: Final = 10**9
MAX_STEP: Final = 100_000  # years, months or days that are added at once
_NAMED: Final = {
    "ANSIC": "Mon Jan _2 15:04:05 2006",
    "UnixDate": "Mon Jan _2 15:04:05 MST 2006",
    "RubyDate": "Mon Jan 02 15:04:05 -0700 2006",
    "RFC822": "02 Jan 06 15:04 MST",
    "RFC822Z": "02 Jan 06 15:04 -0700",
    "RFC850": "Monday, 02-Jan-06 15:04:05 MST",
    "RFC1123": "Mon, 02 Jan 2006 15:04:05 MST",
    "RFC1123Z": "Mon, 02 Jan 2006 15:04:05 -0700",
    "RFC3339": "2006-01-02T15:04:05Z07:00",
    "RFC3339Nano": "2006-01-02T15:04:05.999999999Z07:00",
}
_RFC3339: Final = re.compile(
    r"(\d{4})-(\d{2})-(\d{2})T(\d{2}):(\d{2}):(\d{2})(?:\.(\d+))?(?:Z|([+-])(\d{2}):(\d{2}))", re.ASCII
)
_UNITS_NS: Final = {
    "ns": 1,
    "us": 10**3,
    "\u00b5s": 10**3,
    "\u03bcs": 10**3,
    "ms": 10**6,
    "s": NS,
    "m": 60 * NS,
    "h": 3600 * NS,
}
_HOURS: Final = {"d": 24, "w": 7 * 24, "y": 365 * 24}
_PART: Final = re.compile(r"(?P<whole>\d*)(?:\.(?P<rest>\d*))?(?P<unit>[^\d.]+)", re.ASCII)
_LONG: Final = re.compile(r"(?P<digits>\d+(?:\.\d+)?)(?P<unit>ns|us|µs|μs|ms|s|m|h|d|w|y)", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment as a clock in its zone shows it."""

    shown: datetime
    ns: int  # of the second


def _zone(name: str) -> tzinfo:
    if name in ("", "UTC"):
        return UTC
    if name == "Local":
        raise Unknown("the machine's own time zone")
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # no such name, or one that is no zone's
        raise Undefined from None


def _read(value: Any) -> tuple[Moment, str]:
    """Return the moment and layout of *value*: nanoseconds, or an array of them with zone and layout."""
    zone: tzinfo = UTC
    layout = ""
    if isinstance(value, list):
        if not value:
            raise Undefined
        zone = _zone(text(value[1])) if len(value) > 1 else UTC
        layout = text(value[2]) if len(value) > 2 else ""
        value = value[0]
    seconds, ns = divmod(integer(value), NS)
    return Moment((_EPOCH + timedelta(seconds=seconds)).astimezone(zone), ns), layout


def _in_range(ns: int) -> int:
    if not -(2**63) <= ns < 2**63:
        raise Undefined
    return ns


def clock(value: Any) -> list[int]:
    """Return hour, minute and second."""
    shown = _read(value)[0].shown
    return [shown.hour, shown.minute, shown.second]


def date(value: Any) -> list[int]:
    """Return year, month and day."""
    shown = _read(value)[0].shown
    return [shown.year, shown.month, shown.day]


def weekday(value: Any) -> str:
    """Return the day's name in English."""
    return DAYS[_read(value)[0].shown.weekday()]


def add_date(value: Any, years: Any, months: Any, days: Any) -> int:
    """Return the moment so much later by the calendar, its clock unchanged; the 31st of a shorter month overflows."""
    moment = _read(value)[0]
    steps = [integer(each) for each in (years, months, days)]
    if any(abs(step) > MAX_STEP for step in steps):
        raise Unknown("a step that large")
    shown = moment.shown
    month = shown.month - 1 + steps[1]
    year = shown.year + steps[0] + month // 12
    if not 1 < year < 9999:
        raise Undefined
    try:
        first = datetime(year, month % 12 + 1, 1, shown.hour, shown.minute, shown.second, tzinfo=UTC)
        wall = first + timedelta(days=shown.day - 1 + steps[2])
        guess = _offset(wall, shown.tzinfo)
        exact = wall - _offset(wall - guess, shown.tzinfo)
    except OverflowError:
        raise Undefined from None
    return _in_range(_seconds(exact) * NS + moment.ns)


def _offset(moment: datetime, zone: tzinfo | None) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


def _seconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(seconds=1)


def diff(one: Any, other: Any) -> list[int]:
    """Return years, months, days, hours, minutes and seconds between two moments, by the calendar of the first's zone."""
    first, second = _read(one)[0], _read(other)[0]
    second = Moment(second.shown.astimezone(first.shown.tzinfo), second.ns)
    early, late = sorted((first, second), key=lambda moment: (moment.shown.astimezone(UTC), moment.ns))
    parts = [
        getattr(late.shown, unit) - getattr(early.shown, unit)
        for unit in ("year", "month", "day", "hour", "minute", "second")
    ]
    lengths = [0, 12, monthrange(early.shown.year, early.shown.month)[1], 24, 60, 60]
    for unit in range(5, 0, -1):  # a negative part borrows from the next larger
        if parts[unit] < 0:
            parts[unit] += lengths[unit]
            parts[unit - 1] -= 1
    return parts


def format_ns(value: Any) -> str:
    """Return the moment in the layout that *value* names, by default RFC 3339 with nanoseconds."""
    moment, layout = _read(value)
    return format_moment(_NAMED.get(layout, layout) or _NAMED["RFC3339Nano"], moment.shown, moment.ns)


def parse_ns(layout: Any, written: Any) -> int:
    """Return the moment that *written* is in *layout*."""
    return _ns_of(parse_moment(_NAMED.get(text(layout), text(layout)), text(written)))


def parse_rfc3339_ns(written: Any) -> int:
    """Return the moment that *written* is in RFC 3339."""
    found = _RFC3339.fullmatch(text(written))
    if found is None:
        if re.match(r"\d{4}-\d{2}-\d{2}T", written):
            raise Unknown("a moment that is nearly RFC 3339") if _is_nearly(written) else Undefined
        raise Undefined
    year, month, day, hour, minute, second = (int(found[group]) for group in range(1, 7))
    offset_s = 0
    if found[8]:
        hours, minutes = int(found[9]), int(found[10])
        if hours > 24 or minutes > 59:
            raise Undefined
        offset_s = (1 if found[8] == "+" else -1) * (hours * 3600 + minutes * 60)
    ns = int((found[7] or "")[:9].ljust(9, "0"))
    return _ns_of(
        Fields(year=year, month=month, day=day, hour=hour, minute=minute, second=second, ns=ns, offset_s=offset_s)
    )


def _is_nearly(written: str) -> bool:
    """Return whether Go's own reader is more lenient than the RFC here: a comma, one digit for the hour."""
    return "," in written or re.search(r"T\d:", written) is not None


def _ns_of(fields: Fields) -> int:
    if not 1 < fields.year < 9999:
        raise Undefined
    try:
        shown = datetime(fields.year, fields.month, fields.day, fields.hour, fields.minute, fields.second, tzinfo=UTC)
    except ValueError:
        raise Undefined from None
    return _in_range((_seconds(shown) - fields.offset_s) * NS + fields.ns)


def parse_duration_ns(written: Any) -> int:
    """Return nanoseconds of a duration such as 1h30m; d, w and y are 24 hours, 7 and 365 days."""
    whole = text(written)
    if any(unit in whole for unit in _HOURS):
        whole = _in_hours(whole)
    negative = whole.startswith("-")
    rest = whole[1:] if whole[:1] in ("-", "+") and whole else whole
    if rest == "0":
        return 0
    total, at = 0, 0
    while at < len(rest):
        found = _PART.match(rest, at)
        if found is None or not (found["whole"] or found["rest"]) or found["unit"] not in _UNITS_NS:
            raise Undefined
        unit = _UNITS_NS[found["unit"]]
        total += int(found["whole"] or 0) * unit
        fraction = (found["rest"] or "")[:18]
        total += int(int(fraction or 0) * (unit / 10.0 ** len(fraction)))  # as Go: in binary fractions
        at = found.end()
    if not rest or total > 2**63 - (0 if negative else 1):
        raise Undefined
    return -total if negative else total


def _in_hours(written: str) -> str:
    sign = written[:1] if written[:1] in ("-", "+") else ""
    at, parts = len(sign), []
    while at < len(written):
        found = _LONG.match(written, at)
        if found is None:
            raise Undefined
        hours = _HOURS.get(found["unit"])
        if hours is None:
            parts.append(found[0])
        else:
            parts.append(f"{Decimal(repr(float(found['digits']) * hours)):f}h")
        at = found.end()
    return sign + "".join(parts)


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "time.add_date": add_date,
    "time.clock": clock,
    "time.date": date,
    "time.diff": diff,
    "time.format": format_ns,
    "time.parse_duration_ns": parse_duration_ns,
    "time.parse_ns": parse_ns,
    "time.parse_rfc3339_ns": parse_rfc3339_ns,
    "time.weekday": weekday,
}
