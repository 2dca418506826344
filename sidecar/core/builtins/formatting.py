"""Go's fmt.Sprintf for the values of Rego: text, integers, fractions; whatever else is there is text, as Rego writes it.

Source: OPA, "sprintf"; Go, package fmt.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

from sidecar.core.builtins.values import Undefined, Unknown, text, write

MAX_WIDTH: Final = 1000
_VERB: Final = re.compile(
    r"%(?P<flags>[-+# 0]*)(?P<width>\d*)(?P<point>\.(?P<precision>\d*))?(?P<verb>.)?", re.DOTALL | re.ASCII
)
_ESCAPES: Final = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}
_INTEGERS: Final = {"d": "d", "v": "d", "b": "b", "o": "o", "x": "x", "X": "X"}


def sprintf(template: Any, values: Any) -> str:
    """Return *template* with its verbs filled in."""
    if not isinstance(values, list):
        raise Undefined
    rest = [
        value if isinstance(value, str | int | Decimal) and not isinstance(value, bool) else write(value)
        for value in values
    ]
    used = 0

    def fill(found: re.Match[str]) -> str:
        nonlocal used
        if found["verb"] is None:
            if found[0] == "%":
                return "%!(NOVERB)"
            raise Unknown(f"sprintf with {found[0]!r}")
        if found["verb"] == "%":
            return "%"
        if found["verb"] in "*[":
            raise Unknown(f"sprintf with {found[0]!r}")
        if used >= len(rest):
            return f"%!{found['verb']}(MISSING)" if not found["flags"] else _unknown(found)
        used += 1
        return _filled(found, rest[used - 1])

    done = _VERB.sub(fill, text(template))
    if used < len(rest):
        extra = ", ".join(f"{_type(value)}={_plain(value)}" for value in rest[used:])
        return f"{done}%!(EXTRA {extra})"
    return done


def _unknown(found: re.Match[str]) -> str:
    raise Unknown(f"sprintf with {found[0]!r}")


def _filled(found: re.Match[str], value: str | int | Decimal) -> str:
    width = int(found["width"] or 0)
    precision = None if found["point"] is None else int(found["precision"] or 0)
    if width > MAX_WIDTH or (precision or 0) > MAX_WIDTH:
        raise Unknown("sprintf with a width that large")
    flags, verb = found["flags"], found["verb"]
    match value:
        case str():
            filled = _text(flags, precision, verb, value)
        case int():
            filled = _integer(flags, precision, verb, value)
        case _:
            filled = _fraction(flags, precision, verb, value)
    if filled is None:
        if flags or width or precision is not None or verb in "pTwU":
            raise Unknown(f"sprintf with {found[0]!r}")
        return f"%!{verb}({_type(value)}={_plain(value)})"
    if "-" in flags:
        return filled.ljust(width)
    if "0" in flags and len(filled) < width:
        if isinstance(value, str) or (isinstance(value, int) and precision is not None):
            raise Unknown(f"sprintf with {found[0]!r}")
        sign = filled[:1] if filled[:1] in "+- " else ""
        return sign + filled[len(sign) :].rjust(width - len(sign), "0")
    return filled.rjust(width)


def _type(value: str | int | Decimal) -> str:
    match value:
        case str():
            return "string"
        case int():
            return "int64" if -(2**63) <= value < 2**63 else "*big.Int"
        case _:
            return "float64"


def _plain(value: str | int | Decimal) -> str:
    return _shortest(float(value)) if isinstance(value, Decimal) else str(value)


def _text(flags: str, precision: int | None, verb: str, value: str) -> str | None:
    cut = value if precision is None else value[:precision]
    match verb:
        case "s" | "v" if "#" not in flags:
            return cut
        case "q" if not set(flags) & set("#+"):
            return f'"{"".join(map(_quoted, cut))}"'
        case "x" | "X" if precision is None and not set(flags) & set("# "):
            digits = value.encode().hex()
            return digits.upper() if verb == "X" else digits
        case "s" | "v" | "q" | "x" | "X":
            raise Unknown(f"sprintf with %{flags}{verb}")
        case _:
            return None


def _quoted(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    if character.isascii():
        return f"\\x{ord(character):02x}"
    raise Unknown("sprintf %q of a character that does not print")  # which those are differs between Unicode versions


def _signed(flags: str, is_negative: bool, digits: str) -> str:
    return ("-" if is_negative else "+" if "+" in flags else " " if " " in flags else "") + digits


def _integer(flags: str, precision: int | None, verb: str, value: int) -> str | None:
    is_big = not -(2**63) <= value < 2**63
    if verb in _INTEGERS or (verb == "s" and is_big):
        if "#" in flags or (is_big and precision is not None):
            raise Unknown(f"sprintf with %{flags}{verb}")
        digits = f"{abs(value):{_INTEGERS.get(verb, 'd')}}".rjust(precision or 0, "0")
        return _signed(flags, value < 0, "" if precision == 0 and value == 0 else digits)
    if verb in "cqOU":
        if verb == "c" and not flags and 0 <= value < 0xD800:
            return chr(value)
        raise Unknown(f"sprintf with %{flags}{verb}")
    if is_big:
        raise Unknown(f"sprintf with %{flags}{verb} of an integer that large")
    return None


def _fraction(flags: str, precision: int | None, verb: str, value: Decimal) -> str | None:
    if "#" in flags:
        raise Unknown(f"sprintf with %{flags}{verb}")
    number = float(value)
    if number in (float("inf"), float("-inf")):
        raise Unknown("sprintf of a number that large")
    match verb:
        case "f" | "F" | "e" | "E":
            digits = f"{abs(number):.{6 if precision is None else precision}{verb}}"
        case "v" | "g" | "G":
            if precision is not None:
                raise Unknown(f"sprintf with %.{precision}{verb}")
            digits = _shortest(abs(number))
            digits = digits.upper() if verb == "G" else digits
        case "b" | "x" | "X":
            raise Unknown(f"sprintf with %{verb} of a fraction")
        case _:
            return None
    return _signed(flags, number < 0, digits)


def _shortest(number: float) -> str:
    """Return the fewest digits that are *number* again, with an exponent where Go writes one."""
    sign, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)  # noqa: S101 - for the type checker: it is finite
    point = len(digits) + exponent
    written = "".join(map(str, digits))
    scale = point - 1
    if number != 0 and not -4 <= scale < 6:
        plain = f"{written[0]}{'.' if len(written) > 1 else ''}{written[1:]}e{'-' if scale < 0 else '+'}{abs(scale):02}"
    elif point <= 0:
        plain = f"0.{'0' * -point}{written}" if number else "0"
    elif point >= len(written):
        plain = written.ljust(point, "0")
    else:
        plain = f"{written[:point]}.{written[point:]}"
    return ("-" if sign else "") + plain


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {"sprintf": sprintf}
