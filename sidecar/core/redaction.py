"""Makes a call's content fit to be kept: named fields hidden at any depth, the rest cut to a size, and a hash of it.

Names are compared without regard to case, `_` and `-`, so `api_key` hides `apiKey` and `X-Api-Key` needs its own name.
JSON inside a string counts as depth: tools return their structured result a second time as text (MCP 2025-06-18, tools,
structured content). The hash is of what is left: a short secret could be guessed from a hash that covered it.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import orjson

REDACTED: Final = "[redacted]"
MAX_DEPTH: Final = 64  # as sidecar/core/message.py; JSON in a string may go deeper, and is then hidden whole

_SEPARATORS: Final = b"_-"
_LOWER: Final = bytes(range(256)).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A JSON document after redaction; *size_bytes* is that of the document before it."""

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
    folded = data.translate(_LOWER, _SEPARATORS)
    # Looking for the names as bytes costs 2 us for 4 KB where visiting each member costs 50. Only ASCII folds alike.
    if data.isascii() and not any(needle in folded for needle in needles):
        return Content(data=data, size_bytes=len(data), redacted=False)
    kept = encode(_hide(value, hidden, needles, MAX_DEPTH))
    return Content(data=kept, size_bytes=len(data), redacted=kept != data)


def encode(value: Any) -> bytes:
    """Return *value* as compact JSON, also where orjson gives up: integers beyond 64 bits, lone surrogates."""
    try:
        return orjson.dumps(value)
    except TypeError:
        # In JSON text a surrogate can only stand in a string, where Python's escape for it is JSON's as well.
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def _hide(value: Any, hidden: frozenset[str], needles: tuple[bytes, ...], depth: int) -> Any:
    if isinstance(value, dict):
        if depth == 0:
            return REDACTED
        return {
            key: REDACTED if _folded(key) in hidden else _hide(member, hidden, needles, depth - 1)
            for key, member in value.items()
        }
    if isinstance(value, list):
        return REDACTED if depth == 0 else [_hide(item, hidden, needles, depth - 1) for item in value]
    return _hide_in_text(value, hidden, needles, depth) if isinstance(value, str) else value


def _hide_in_text(text: str, hidden: frozenset[str], needles: tuple[bytes, ...], depth: int) -> str:
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    kept = redact_again(document, hidden, needles, depth)
    return text if kept == document else encode(kept).decode()


def redact_again(document: Any, hidden: frozenset[str], needles: tuple[bytes, ...], depth: int) -> Any:
    """Return the document found inside a string, redacted; hidden whole when it is nested too deep."""
    return REDACTED if depth == 0 else _hide(document, hidden, needles, depth - 1)


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


@lru_cache(maxsize=8)  # a bundle has one list; the one before it may still be in use
def _prepared(names: tuple[str, ...]) -> tuple[frozenset[str], tuple[bytes, ...]]:
    """Return the folded names, and how each looks inside a JSON text."""
    folded = frozenset(filter(None, map(_folded, names)))
    return folded, tuple(encode(name)[1:-1] for name in sorted(folded))
