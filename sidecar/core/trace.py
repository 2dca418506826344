"""Reads a W3C trace context: where a message's span hangs in the caller's trace.

Refuses nothing: a malformed context is as good as none. W3C Trace Context, 3.2; in MCP the one in `params._meta`
comes before the HTTP header, because a message can travel in another request's connection (SEP-414).
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

# A later version may append fields behind another dash; 00 may not, and ff is no version.
_TRACEPARENT: Final = re.compile(r"(?!ff|00.{53}.)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_OTHER_DIGIT: Final = dict(zip("0123456789abcdef", "1032547698badcfe", strict=True))


class TraceContext(msgspec.Struct, frozen=True, kw_only=True):  # read for every call that has one
    """The caller's trace, and its span in it."""

    trace_id: str
    parent_id: str
    sampled: bool


def parse(text: Any) -> TraceContext | None:
    """Return the context in *text*, a `traceparent`; None when there is none."""
    found = _TRACEPARENT.fullmatch(text) if isinstance(text, str) else None
    if found is None or not found[1].strip("0") or not found[2].strip("0"):
        return None
    return TraceContext(trace_id=found[1], parent_id=found[2], sampled=bool(int(found[3], 16) & 1))


def of_message(params: Mapping[str, Any]) -> TraceContext | None:
    """Return the context that a message carries itself."""
    meta = params.get("_meta")
    return parse(meta.get("traceparent")) if isinstance(meta, dict) else None


def traceparent(trace_id: str, span_id: str, *, sampled: bool) -> bytes:
    """Return the header that names a span as the parent."""
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}".encode()


def sent_id(span_id: str) -> str:
    """Return the id of our span toward the server, by that of the one toward the client: its last bit turned.

    As unique as the other, and nobody has to draw or to keep it.
    """
    return span_id[:-1] + _OTHER_DIGIT[span_id[-1]]
