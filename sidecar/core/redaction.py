"""Makes a call's content fit to be kept: named fields hidden at any depth, the rest cut to a size, and a hash of it.

Names are compared without regard to case, `_` and `-`: `api_key` hides `apiKey` too, but not `x-api-key`. JSON inside a
string counts as depth, because tools return their structured result a second time as text (MCP 2025-06-18, tools,
structured content); other text is kept as it is. The hash is of what is left: one that covered a short secret would
let it be guessed.
"""

import json
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import msgspec
import orjson

REDACTED: Final = "[redacted]"
TOO_DEEP: Final = b'"[nested too deeply]"'
LARGE_BYTES: Final = 1024
FEW_QUOTES: Final = 64  # of 32 names and strings
MAX_DEPTH: Final = 64  # as sidecar/core/message.py; what JSON inside strings nests deeper is hidden whole

_LOWER: Final = bytes(range(256)).lower()


class Content(msgspec.Struct, frozen=True):  # made twice for every call: five times cheaper than a frozen dataclass
    """A JSON document after redaction; `size_bytes` is that of the document before it."""

    data: bytes
    size_bytes: int
    redacted: bool

    @property
    def sha256(self) -> str:
        """Return the hash of `data`, in hex."""
        return sha256(self.data).hexdigest()

    def cut(self, max_bytes: int) -> str:
        """Return the first *max_bytes* of the document's text, whole characters only."""
        return self.data[:max_bytes].decode(errors="ignore")


def redact(value: Any, names: tuple[str, ...]) -> Content:
    """Return the JSON document *value* without what stands under one of *names*."""
    data = encode(value)
    hidden, needles = _prepared(names)
    if len(data) > LARGE_BYTES and len(data.split(b'"', FEW_QUOTES)) <= FEW_QUOTES:
        return _visited(value, data, hidden)  # a few long strings: cheaper than reading them six times over
    # Looking for the names in the JSON text costs 2 us for 4 KB, visiting every member 50. Only ASCII folds to the same bytes,
    # and an escape (in JSON inside a string) could spell a name in another way.
    if data.isascii() and b"\\u" not in data:
        folded = data.translate(_LOWER, b"_-").decode("ascii")  # `in` costs half as much on text as on bytes
        for needle in needles:
            if needle in folded:
                break
        else:
            return Content(data, len(data), redacted=False)
    return _visited(value, data, hidden)


def _visited(value: Any, data: bytes, hidden: frozenset[str]) -> Content:
    kept = encode(_hide(value, hidden, MAX_DEPTH))
    return Content(kept, len(data), redacted=kept != data)


def encode(value: Any) -> bytes:
    """Return *value* as compact JSON, also where orjson gives up: integers beyond 64 bits, lone surrogates."""
    try:
        return orjson.dumps(value)
    except TypeError:
        # In JSON text a surrogate can only stand in a string, where Python's escape for it is JSON's as well.
        try:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        except RecursionError:  # a server's answer may be nested deeper than anything that a caller may send
            return TOO_DEEP
        return text.encode(errors="backslashreplace")


def _hide(value: Any, hidden: frozenset[str], depth: int) -> Any:
    if isinstance(value, str):
        return _hide_in_text(value, hidden, depth)
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        return REDACTED
    if isinstance(value, list):
        return [_hide(item, hidden, depth - 1) for item in value]
    return {
        key: REDACTED if _folded(key) in hidden else _hide(member, hidden, depth - 1) for key, member in value.items()
    }


def _hide_in_text(text: str, hidden: frozenset[str], depth: int) -> str:
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError):  # a member named twice, a number of 5,000 digits, 1,000 levels
        return REDACTED
    kept = _hide(document, hidden, depth)
    return text if kept == document else encode(kept).decode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member named twice would be judged once and kept twice")
    return members


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


@lru_cache(maxsize=8)  # a bundle has one list; the one before it may still be in use
def _prepared(names: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the folded names, and how each looks inside a JSON text."""
    folded = frozenset(filter(None, map(_folded, names)))
    return folded, tuple(encode(name)[1:-1].decode() for name in sorted(folded))
