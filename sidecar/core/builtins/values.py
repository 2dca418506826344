"""Rego's values in Python, as policy.wasm writes and reads them: JSON, and beyond it sets and objects with any keys.

null, booleans, strings, arrays and objects are JSON's; numbers are int or Decimal, never float: Rego's are decimal.
Source: OPA documentation, "WebAssembly" (opa_value_dump, opa_value_parse).
"""

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final


class Undefined(Exception):  # noqa: N818 - Rego's word
    """The function has no value for these arguments: so says OPA."""


class Unknown(Exception):  # noqa: N818 - not a failure of the caller's
    """OPA has an answer here and we do not know it: the decision as a whole is a denial. The text says what."""


class Set(tuple[Any, ...]):
    """A set: its members, in no order that means anything."""

    __slots__ = ()


class Pairs(tuple[tuple[Any, Any], ...]):
    """An object with a key that is no string: its keys and values."""

    __slots__ = ()


MAX_WHOLE: Final = 10**100  # 1e999999 is an integer of a megabyte
_TOKEN: Final = re.compile(
    r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>-?[\d.][\d.eE+-]*)|(?P<word>[a-z]+)|(?P<sign>.))'
)
_WORDS: Final = {"true": True, "false": False, "null": None}


def read(text: bytes) -> Any:
    """Return the value that the module wrote as *text*; raises ValueError."""
    try:
        return json.loads(text, parse_float=Decimal)
    except ValueError:  # sets are not JSON, and an object whose keys are not strings is none either
        return _Reader(text.decode()).whole()


class _Reader:
    """A reader of one text; every value of Rego's is written in one way."""

    def __init__(self, text: str) -> None:
        self._tokens = [found for found in _TOKEN.finditer(text) if found.lastgroup]
        self._next = 0

    def whole(self) -> Any:
        try:
            value = self._value()
        except (IndexError, ArithmeticError) as error:
            raise ValueError("a value ends too soon, or is none") from error
        if self._next != len(self._tokens):
            raise ValueError("text behind a value")
        return value

    def _take(self) -> re.Match[str]:
        self._next += 1
        return self._tokens[self._next - 1]

    def _is_at(self, sign: str) -> bool:
        return self._tokens[self._next]["sign"] == sign

    def _expect(self, sign: str) -> None:
        if self._take()["sign"] != sign:
            raise ValueError(f"expected {sign}")

    def _value(self) -> Any:
        token = self._take()
        match token.lastgroup, token[0].strip():
            case "text", written:
                return json.loads(written)
            case "number", written:  # as it stands in the policy, such as .5
                return int(written) if written.lstrip("-").isdigit() else Decimal(written)
            case "word", "set":
                self._expect("(")
                self._expect(")")
                return Set()
            case "word", word if word in _WORDS:
                return _WORDS[word]
            case "sign", "[":
                return self._items("]")
            case "sign", "{":
                return self._braces()
        raise ValueError(f"unexpected {token[0]}")

    def _items(self, end: str) -> list[Any]:
        items: list[Any] = []
        while not self._is_at(end):
            items.append(self._value())
            if not self._is_at(end):
                self._expect(",")
        self._expect(end)
        return items

    def _braces(self) -> Any:
        if self._is_at("}"):
            self._expect("}")
            return {}
        first = self._value()
        if not self._is_at(":"):
            if self._is_at(","):
                self._expect(",")
            return Set([first, *self._items("}")])
        pairs = []
        key = first
        while True:
            self._expect(":")
            pairs.append((key, self._value()))
            if self._take()["sign"] == "}":
                return an_object(pairs)
            key = self._value()


def an_object(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any] | Pairs:
    """Return the object of *pairs*."""
    known = list(pairs)
    return dict(known) if all(isinstance(key, str) for key, _ in known) else Pairs(known)


def pairs_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return keys and values of an object, None for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, Pairs) else None


def write(value: Any) -> str:
    """Return *value* as the module reads it, and as Rego prints it: `{"a": [1, true]}`, members of sets in order."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int() | Decimal():
            return str(value)
        case list():
            return f"[{', '.join(map(write, value))}]"
        case Set():
            return f"{{{', '.join(map(write, ordered(value)))}}}" if value else "set()"
        case dict() | Pairs():
            pairs = sorted(pairs_of(value) or (), key=lambda pair: order(pair[0]))
            return f"{{{', '.join(f'{write(key)}: {write(member)}' for key, member in pairs)}}}"
    raise TypeError(type(value).__name__)


def identity(value: Any) -> Any:
    """Return what equal values have in common, and can be hashed: 1 is 1.0, and is not true."""
    match value:
        case None | bool() | str():
            return type(value), value
        case int() | Decimal():
            return Decimal, value
        case list():
            return list, tuple(map(identity, value))
        case Set():
            return Set, frozenset(map(identity, value))
        case _:
            return dict, frozenset((identity(key), identity(member)) for key, member in pairs_of(value) or ())


def is_equal(one: Any, other: Any) -> bool:
    """Return whether Rego holds the two for equal."""
    return bool(identity(one) == identity(other))


def order(value: Any) -> tuple[Any, ...]:
    """Return the key by which Rego sorts: null, booleans, numbers, strings, arrays, objects, sets."""
    match value:
        case None:
            return (0,)
        case bool():
            return (1, value)
        case int() | Decimal():
            return (2, value)
        case str():
            return (3, value.encode())
        case list():
            return (4, tuple(map(order, value)))
        case Set():
            return (6, tuple(sorted(map(order, value))))
        case _:
            pairs = sorted((order(key), order(member)) for key, member in pairs_of(value) or ())
            return (5, tuple(key for key, _ in pairs), tuple(member for _, member in pairs))


def ordered(values: Iterable[Any]) -> list[Any]:
    """Return *values* in Rego's order."""
    return sorted(values, key=order)


def text(value: Any) -> str:
    """Return *value*, a string; raises Undefined."""
    if not isinstance(value, str):
        raise Undefined
    return value


def number(value: Any) -> int | Decimal:
    """Return *value*, a number; raises Undefined."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise Undefined
    return value


def whole(value: Any) -> int:
    """Return *value*, an integer of any size (1.0 is one); raises Undefined."""
    exact = number(value)
    if not -MAX_WHOLE < exact < MAX_WHOLE:
        raise Unknown("a number that large")
    if exact != int(exact):
        raise Undefined
    return int(exact)


def integer(value: Any) -> int:
    """Return *value*, an integer of 64 bits; raises Undefined."""
    exact = whole(value)
    if not -(2**63) <= exact < 2**63:
        raise Undefined
    return exact


def strings(value: Any) -> list[str]:
    """Return the strings of an array or set; raises Undefined."""
    if not isinstance(value, list | Set):
        raise Undefined
    return [text(each) for each in value]
