"""Go's layouts of dates and times: an example of the reference time, 2006-01-02 15:04:05 -0700, says what stands where.

Source: Go, package time (Time.Format, Parse).
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sidecar.core.builtins.values import Undefined, Unknown

MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# In the order in which Go looks for them; a name is one only where no small letter follows.
_MARK: Final = re.compile(
    r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|002|0[1-6]|15|1|2006|2|_2006|__2|_2|3|4|5|PM|pm"
    r"|[Z-]07(?::00:00|0000|:00|00)?|[.,](?:0+|9+)(?![0-9])"
)
_ZONE: Final = {
    "07": r"([+-])(\d\d)",
    "0700": r"([+-])(\d\d)(\d\d)",
    "07:00": r"([+-])(\d\d):(\d\d)",
    "070000": r"([+-])(\d\d)(\d\d)(\d\d)",
    "07:00:00": r"([+-])(\d\d):(\d\d):(\d\d)",
}


@dataclass(slots=True, kw_only=True)
class Fields:
    """What was read of a moment."""

    year: int = 0
    month: int = 1
    day: int = 1
    hour: int = 0
    minute: int = 0
    second: int = 0
    ns: int = 0
    offset_s: int = 0
    half: str = ""  # AM or PM
    day_of_year: int = 0


def _parts(layout: str) -> list[tuple[bool, str]]:
    """Return the layout as (is a mark, text)."""
    parts: list[tuple[bool, str]] = []
    at = 0
    for found in _MARK.finditer(layout):
        mark, start = found[0], found.start()
        if mark == "_2006":  # an underscore, then the year
            mark, start = "2006", start + 1
        parts += [(False, layout[at:start]), (True, mark)]
        at = found.end()
    return [part for part in (*parts, (False, layout[at:])) if part[1]]


def format_moment(layout: str, moment: datetime, ns: int) -> str:
    """Return *moment*, plus *ns*, in *layout*."""
    return "".join(_shown(part, moment, ns) if is_mark else part for is_mark, part in _parts(layout))


def _shown(mark: str, moment: datetime, ns: int) -> str:
    if mark[0] in "Z-":
        return _shown_offset(mark, moment.utcoffset() or timedelta())
    if mark[0] in ".,":
        digits = f"{ns:09}".ljust(len(mark) - 1, "0")[: len(mark) - 1]
        if mark[1] == "9":
            digits = digits.rstrip("0")
        return mark[0] + digits if digits else ""
    twelve = moment.hour % 12 or 12
    half = "PM" if moment.hour >= 12 else "AM"
    table = {
        "2006": f"{moment.year:04}", "06": f"{moment.year % 100:02}",
        "January": MONTHS[moment.month - 1], "Jan": MONTHS[moment.month - 1][:3],
        "01": f"{moment.month:02}", "1": f"{moment.month}",
        "Monday": DAYS[moment.weekday()], "Mon": DAYS[moment.weekday()][:3],
        "02": f"{moment.day:02}", "_2": f"{moment.day:2}", "2": f"{moment.day}",
        "002": f"{moment.timetuple().tm_yday:03}", "__2": f"{moment.timetuple().tm_yday:3}",
        "15": f"{moment.hour:02}", "03": f"{twelve:02}", "3": f"{twelve}", "PM": half, "pm": half.lower(),
        "04": f"{moment.minute:02}", "4": f"{moment.minute}", "05": f"{moment.second:02}", "5": f"{moment.second}",
        "MST": moment.tzname() or "",
    }  # fmt: skip
    return table[mark]


def _shown_offset(mark: str, offset: timedelta) -> str:
    seconds = round(offset.total_seconds())
    if mark[0] == "Z" and seconds == 0:
        return "Z"
    sign, seconds = "-" if seconds < 0 else "+", abs(seconds)
    colon = ":" if ":" in mark else ""
    shown = [f"{seconds // 3600:02}", f"{seconds // 60 % 60:02}", f"{seconds % 60:02}"]
    return sign + colon.join(shown[: len(re.findall(r"\d\d", mark))])


def parse_moment(layout: str, written: str) -> Fields:
    """Return what *written* says in *layout*; raises Undefined."""
    fields, rest = Fields(), written
    parts = _parts(layout)
    for number, (is_mark, part) in enumerate(parts):
        if is_mark:
            following = parts[number + 1][1] if number + 1 < len(parts) and parts[number + 1][0] else ""
            rest = _Reader(fields, rest).read(part, following)
        else:
            rest = _skip(rest, part)
    if rest:
        raise Undefined
    if fields.day_of_year:
        raise Unknown("time.parse_ns of a day of the year")
    if fields.half == "PM" and fields.hour < 12:
        fields.hour += 12
    elif fields.half == "AM" and fields.hour == 12:
        fields.hour = 0
    return fields


def _skip(rest: str, literal: str) -> str:
    """Return what is behind *literal*, where a run of spaces is any run of spaces."""
    for part in re.findall(r" +|[^ ]+", literal):
        if part[0] == " ":
            if rest and rest[0] != " ":
                raise Undefined
            rest = rest.lstrip(" ")
        elif rest.startswith(part):
            rest = rest[len(part) :]
        else:
            raise Undefined
    return rest


class _Reader:
    """Reads one mark off the text and writes it into the fields."""

    def __init__(self, fields: Fields, rest: str) -> None:
        self.fields, self.rest = fields, rest

    def read(self, mark: str, following: str) -> str:  # noqa: C901, PLR0912 - one line a mark, as in Go's table
        fields = self.fields
        match mark:
            case "2006":
                fields.year = self._digits(4, 4)
            case "06":
                year = self._digits(2, 2)
                fields.year = year + (1900 if year >= 69 else 2000)
            case "January" | "Jan":
                fields.month = self._name(MONTHS if mark == "January" else [name[:3] for name in MONTHS]) + 1
            case "01" | "1":
                fields.month = self._between(1, 12, mark)
            case "Monday" | "Mon":
                self._name(DAYS if mark == "Monday" else [name[:3] for name in DAYS])
            case "02" | "2" | "_2":
                if mark == "_2":
                    self.rest = self.rest.removeprefix(" ")
                fields.day = self._number(mark)
            case "002" | "__2":
                raise Unknown("time.parse_ns of a day of the year")
            case "15":
                fields.hour = self._between(0, 23, "1")
            case "03" | "3":
                fields.hour = self._between(0, 12, mark)
            case "04" | "4":
                fields.minute = self._between(0, 59, mark)
            case "05" | "5":
                fields.second = self._between(0, 59, mark)
                if following[:1] not in (".", ","):
                    self._fraction()  # Go takes one here though the layout has none
            case "PM" | "pm":
                fields.half = self._one_of(("AM", "PM") if mark == "PM" else ("am", "pm")).upper()
            case "MST":
                self._abbreviation()
            case _ if mark[0] in "Z-":
                fields.offset_s = self._offset(mark)
            case _ if mark[1] == "0":
                found = self._match(rf"[.,]\d{{{len(mark) - 1}}}")
                fields.ns = int(found[1:10].ljust(9, "0"))
            case _:
                self._fraction()
        return self.rest

    def _match(self, pattern: str) -> str:
        found = re.match(pattern, self.rest, re.ASCII)
        if found is None:
            raise Undefined
        self.rest = self.rest[found.end() :]
        return found[0]

    def _digits(self, fewest: int, most: int) -> int:
        return int(self._match(rf"\d{{{fewest},{most}}}"))

    def _number(self, mark: str) -> int:
        return self._digits(2 if mark[0] == "0" else 1, 2)

    def _between(self, low: int, high: int, mark: str) -> int:
        value = self._number(mark)
        if not low <= value <= high:
            raise Undefined
        return value

    def _name(self, names: list[str] | tuple[str, ...]) -> int:
        for number, name in enumerate(names):
            if self.rest[: len(name)].lower() == name.lower():
                self.rest = self.rest[len(name) :]
                return number
        raise Undefined

    def _one_of(self, names: tuple[str, ...]) -> str:
        found = self.rest[:2]
        if found not in names:
            raise Undefined
        self.rest = self.rest[2:]
        return found

    def _fraction(self) -> None:
        found = re.match(r"[.,](\d+)", self.rest, re.ASCII)
        if found:
            self.fields.ns = int(found[1][:9].ljust(9, "0"))
            self.rest = self.rest[found.end() :]

    def _abbreviation(self) -> None:
        """Read a zone's abbreviation: to Go, any but UTC is a zone without offset."""
        found = re.match(r"[A-Z]+", self.rest)
        if found is None or len(found[0]) != 3 or re.match(r"GMT[+-]", self.rest):
            raise Unknown("time.parse_ns of such a zone's abbreviation")
        self.rest = self.rest[3:]

    def _offset(self, mark: str) -> int:
        if mark[0] == "Z" and self.rest.startswith("Z"):
            self.rest = self.rest[1:]
            return 0
        found = re.match(_ZONE[mark[1:]], self.rest, re.ASCII)
        if found is None:
            raise Undefined
        self.rest = self.rest[found.end() :]
        hours, minutes, seconds = (*map(int, found.groups()[1:]), 0, 0)[:3]
        if hours > 24 or minutes > 59 or seconds > 59:
            raise Undefined
        return (1 if found[1] == "+" else -1) * (hours * 3600 + minutes * 60 + seconds)
