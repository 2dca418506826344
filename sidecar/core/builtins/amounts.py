"""Amounts with units, semantic versions, ranges of numbers. Sources: OPA, "Units", "SemVer", "Numbers"; semver.org 2.0."""

import re
from collections.abc import Callable, Mapping
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

from sidecar.core.builtins.values import Undefined, Unknown, text, whole

MAX_EXPONENT_DIGITS: Final = 6  # OPA's own limit
MAX_EXPONENT: Final = 400  # ours: 10**999999 is minutes of arithmetic
MAX_NUMBERS: Final = 100_000  # of a range; a decision that needs more is none

_DECIMAL: Final = {letter: 1000 ** (power + 1) for power, letter in enumerate("kmgtpe")}
_BINARY: Final = {letter: 1024 ** (power + 1) for power, letter in enumerate("kmgtpe")}
_AMOUNT: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE](?P<exponent>[+-]?[0-9]+))?", re.ASCII)
_EXPONENT: Final = re.compile(r"[eE][-+0-9]", re.ASCII)
_FRACTION_PLACES: Final = Decimal("1e-10")
_INTEGER: Final = r"(?:0|[1-9][0-9]*)"
_LABELS: Final = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION: Final = re.compile(
    rf"(?P<core>{_INTEGER}\.{_INTEGER}\.{_INTEGER})(?:-(?P<before>{_LABELS}))?(?:\+{_LABELS})?", re.ASCII
)


def _amount(written: str) -> tuple[Fraction, str]:
    """Return number and unit; raises Undefined."""
    if " " in written:
        raise Undefined
    end = _end_of_number(written)
    exact = _AMOUNT.fullmatch(written[:end])
    if exact is None:
        raise Undefined
    exponent = exact["exponent"] or "0"
    if len(exponent.lstrip("+-")) > MAX_EXPONENT_DIGITS:
        raise Undefined
    if abs(int(exponent)) > MAX_EXPONENT:
        raise Unknown("an exponent that large")
    return Fraction(exact[0]), written[end:]


def _end_of_number(written: str) -> int:
    """Return where the unit begins: an e is one unless an exponent follows."""
    for at, sign in enumerate(written):
        if sign in "eE" and not _EXPONENT.match(written, at):
            return at
        if sign not in "0123456789.+-eE":
            return at
    return len(written)


def parse_units(written: Any) -> int | Decimal:
    """Return the amount of *written*, such as 10Mi or 200m."""
    number, unit = _amount(text(written).replace('"', ""))
    unit = unit[:1] + unit[1:].lower()
    match unit:
        case "":
            factor: int | Fraction = 1
        case "m":
            factor = Fraction(1, 1000)
        case "k" | "K" | "M" | "g" | "G" | "t" | "T" | "p" | "P" | "e" | "E":
            factor = _DECIMAL[unit.lower()]
        case _ if unit[1:] == "i" and unit[0].lower() in _BINARY:
            factor = _BINARY[unit[0].lower()]
        case _:
            raise Undefined
    exact = number * factor
    if unit == "m":
        exact = number * Fraction(0.001)  # OPA's factor is this float, exactly
    if exact.denominator == 1:
        return exact.numerator
    digits = Context(prec=MAX_EXPONENT * 3)
    quotient = digits.divide(Decimal(exact.numerator), Decimal(exact.denominator))
    try:
        return quotient.quantize(_FRACTION_PLACES, rounding="ROUND_HALF_UP", context=digits)
    except InvalidOperation:
        raise Unknown("an amount that large") from None


def parse_bytes(written: Any) -> int:
    """Return the bytes of *written*, such as 10MiB or 1.5kb."""
    number, unit = _amount(text(written).lower().replace('"', ""))
    if unit == "":
        factor = 1
    elif (unit[0] in _DECIMAL) and unit[1:] in ("", "b"):
        factor = _DECIMAL[unit[0]]
    elif (unit[0] in _BINARY) and unit[1:] in ("i", "ib"):
        factor = _BINARY[unit[0]]
    else:
        raise Undefined
    exact = number * factor
    if number.denominator != 1 and number.numerator.bit_length() > 64:
        raise Unknown("an amount with that many digits")  # OPA computes it with 64 bits of precision
    nearest = round(exact)
    if exact != nearest and abs(exact - nearest) < Fraction(1, 1000):
        raise Unknown("an amount that close to the next byte")  # its rounding would decide
    return int(exact)


def compare_versions(one: Any, other: Any) -> int:
    """Return -1, 0 or 1: which of two semantic versions comes first."""
    first, second = _version(one), _version(other)
    return (first > second) - (first < second)


def is_version(written: Any) -> bool:
    """Return whether *written* is a semantic version."""
    try:
        _version(written)
    except Undefined:
        return False
    return True


def _version(written: Any) -> tuple[Any, ...]:
    found = _VERSION.fullmatch(text(written).removeprefix("v"))
    if found is None:
        raise Undefined
    core = [int(part) for part in found["core"].split(".")]
    before = found["before"]
    if any(part >= 2**63 for part in core):
        raise Undefined
    if before is None:
        return (*core, 1)
    return (*core, 0, tuple(_identifier(part) for part in before.split(".")))


def _identifier(part: str) -> tuple[int, int, str]:
    if part.isdecimal():
        if len(part) > 1 and part[0] == "0":
            raise Undefined
        if int(part) >= 2**63:
            raise Unknown("a version with a number that large")
        return (0, int(part), "")
    return (1, 0, part)


def numbers(start: Any, end: Any, step: Any) -> list[int]:
    """Return the integers from *start* to *end*, both included, in either direction."""
    first, last, width = whole(start), whole(end), whole(step)
    if width <= 0:
        raise Undefined
    if abs(last - first) // width > MAX_NUMBERS:
        raise Unknown("a range that long")
    return list(range(first, last + 1, width) if first <= last else range(first, last - 1, -width))


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "numbers.range_step": numbers,
    "semver.compare": compare_versions,
    "semver.is_valid": is_version,
    "units.parse": parse_units,
    "units.parse_bytes": parse_bytes,
}
