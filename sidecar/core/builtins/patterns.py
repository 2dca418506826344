"""Regular expressions by RE2, whose syntax Go has and whose time is linear: no pattern and no text can stop a decision.

Source: OPA, "Regex"; RE2, "Syntax".
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import re2

from sidecar.core.builtins.values import Undefined, Unknown, integer, text

MAX_PATTERNS: Final = 256  # compiled and kept; patterns are the policy's, seldom the caller's
MAX_RESULT_CHARS: Final = 2**22  # of a text with replacements
MAX_SCANNED: Final = 20_000_000  # characters in all; each match may look at the whole rest, and a search is not counted
_OPTIONS: Final = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 2**21
_REFERENCE: Final = re.compile(r"\$(?:\$|\{(?P<braced>[A-Za-z0-9_]+)\}|(?P<plain>[A-Za-z0-9_]+))", re.ASCII)


@functools.lru_cache(MAX_PATTERNS)
def _compiled(pattern: str) -> Any:
    """Return *pattern*, ready; raises Undefined for what is none, Unknown for what Go would take and this does not."""
    if "\0" in pattern or "\\C" in pattern:
        raise Unknown("a pattern that RE2 and Go read differently")
    try:
        return re2.compile(pattern, _OPTIONS)
    except re2.error as error:
        if "too large" in str(error):
            raise Unknown("a pattern that large") from None
        raise Undefined from None


def _matches(pattern: Any, searched: Any) -> Iterator[Any]:
    """Yield every match as Go finds them: none that is empty directly behind another."""
    compiled, whole = _compiled(text(pattern)), text(searched)
    at, last_end, scanned = 0, -1, 0
    while at <= len(whole):
        scanned += len(whole) - at
        if scanned > MAX_SCANNED:
            raise Unknown("a text with that many matches")
        found = compiled.search(whole, at)
        if found is None:
            return
        start, end = found.span()
        if end > start or start != last_end:
            yield found
        at, last_end = (end, end) if end > at else (at + 1, end if end > start or start != last_end else last_end)


def find_n(pattern: Any, searched: Any, amount: Any) -> list[str]:
    """Return the first *amount* matches, all with a negative one."""
    limit = integer(amount)
    found: list[str] = []
    for match in _matches(pattern, searched):
        if 0 <= limit <= len(found):
            break
        found.append(match.group())
    return found


def split(pattern: Any, whole: Any) -> list[str]:
    """Return what is between the matches."""
    parts, start = [], 0
    searched = text(whole)
    if text(pattern) and not searched:
        _compiled(pattern)
        return [""]
    for match in _matches(pattern, searched):
        if match.end() == 0:
            continue
        if match.start() == len(searched) and match.end() == match.start():
            continue
        parts.append(searched[start : match.start()])
        start = match.end()
    return [*parts, searched[start:]]


def replace(whole: Any, pattern: Any, replacement: Any) -> str:
    """Return *whole* with each match replaced; $1, $name and ${name} stand for groups, $$ for a dollar sign."""
    searched, template = text(whole), text(replacement)
    parts, start, size = [], 0, 0
    for match in _matches(pattern, searched):
        filled = _REFERENCE.sub(functools.partial(_group, match), template)
        parts += [searched[start : match.start()], filled]
        start = match.end()
        size += len(filled)
        if size > MAX_RESULT_CHARS:
            raise Unknown("a text that large")
    return "".join([*parts, searched[start:]])


def _group(match: Any, reference: re.Match[str]) -> str:
    name = reference["braced"] or reference["plain"]
    if name is None:
        return "$"
    if name.isdecimal():
        number = int(name) if len(name) < 9 else len(match.groups()) + 1
        return (match.group(number) or "") if number <= len(match.groups()) else ""
    return (match.groupdict().get(name)) or ""


def template_match(template: Any, searched: Any, start: Any, end: Any) -> bool:
    """Return whether *searched* is *template*, where patterns stand between *start* and *end*."""
    opening, closing = text(start), text(end)
    if len(opening.encode()) != 1 or len(closing.encode()) != 1:
        raise Undefined
    parts, literal, level, begin = ["^"], 0, 0, 0
    for at, sign in enumerate(text(template)):
        if sign == opening:
            level += 1
            begin = at if level == 1 else begin
        elif sign == closing:
            level -= 1
            if level < 0:
                raise Undefined
            if level == 0:
                pattern = template[begin + 1 : at]
                _compiled(f"^{pattern}$")
                parts.append(f"{re2.escape(template[literal:begin])}({pattern})")
                literal = at + 1
    if level:
        raise Undefined
    return _compiled("".join([*parts, re2.escape(template[literal:]), "$"])).search(text(searched)) is not None


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "regex.find_n": find_n,
    "regex.replace": replace,
    "regex.split": split,
    "regex.template_match": template_match,
}
