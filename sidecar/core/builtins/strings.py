"""Text: affixes, occurrences, parts. Source: OPA, "Strings", "Glob"."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sidecar.core.builtins.values import Undefined, integer, strings, text

_GLOB_SIGNS: Final = re.compile(r"[*?\\\[\]{}]")


def any_prefix_match(searched: Any, prefixes: Any) -> bool:
    """Return whether one of *searched* starts with one of *prefixes*; each is a string, an array or a set."""
    wanted = tuple(_one_or_more(prefixes))
    return any(each.startswith(wanted) for each in _one_or_more(searched))


def any_suffix_match(searched: Any, suffixes: Any) -> bool:
    """Return whether one of *searched* ends with one of *suffixes*."""
    wanted = tuple(_one_or_more(suffixes))
    return any(each.endswith(wanted) for each in _one_or_more(searched))


def _one_or_more(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else strings(value)


def count(searched: Any, part: Any) -> int:
    """Return how often *part* is in *searched*, without overlaps."""
    return text(searched).count(text(part))


def indexof_n(searched: Any, part: Any) -> list[int]:
    """Return every place, in characters, where *part* begins, overlaps included."""
    whole, wanted = text(searched), text(part)
    if not wanted:
        raise Undefined
    places = []
    at = whole.find(wanted)
    while at >= 0:
        places.append(at)
        at = whole.find(wanted, at + 1)
    return places


def split_n(whole: Any, delimiter: Any, amount: Any) -> list[str]:
    """Return the first *amount* parts of *whole*, or with a negative amount the last."""
    parts = text(whole).split(text(delimiter)) if text(delimiter) else list(text(whole))
    limit = integer(amount)
    return parts[:limit] if limit >= 0 else parts[max(len(parts) + limit, 0) :]


def quote_meta(pattern: Any) -> str:
    """Return *pattern* with every sign that means something in a glob escaped."""
    return _GLOB_SIGNS.sub(r"\\\g<0>", text(pattern))


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "glob.quote_meta": quote_meta,
    "indexof_n": indexof_n,
    "strings.any_prefix_match": any_prefix_match,
    "strings.any_suffix_match": any_suffix_match,
    "strings.count": count,
    "strings.split_n": split_n,
}
