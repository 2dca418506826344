"""Splits a server-sent event stream into events without waiting for the next one; sans I/O.

Refuses what clients read differently: a lone CR, a BOM, an event larger than the cap. WHATWG HTML, 9.2.6. An event is
handed on as the very bytes that came, unless a filter replaced its data.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

MAX_EVENT_BYTES: Final = 16 * 2**20  # as a JSON response that is held (sidecar/core/answer.py): both carry results

_USUAL: Final = frozenset({b"", b":", b"data:", b"event: message"})  # lines that say nothing
_END: Final = re.compile(rb"\n\r?\n")  # begins with a literal byte: thirty times as fast as with an optional one


class BadStream(Exception):  # noqa: N818 - names what was found
    """The stream cannot be read unambiguously; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event: its bytes, and its data when it is a `message` with any."""

    raw: bytes
    data: bytes | None
    endpoint: bytes | None = None  # where to post, when it is 2024-11-05's announcement
    id: bytes = b""  # by which a client asks for what came after it; empty: the one before holds

    def replaced(self, data: bytes) -> bytes:
        """Return the event's bytes with *data* in place of its own; ids, retry and comments stay."""
        lines = [line for line in self.raw.replace(b"\r\n", b"\n").split(b"\n") if line and not _is_data(line)]
        lines += [b"data: " + line for line in data.split(b"\n")]
        return b"\n".join([*lines, b"", b""])

    def pruned(self, keeps: Callable[[bytes], object], *, has_message: bool) -> "Event":
        """Return the event with a bare colon, which means nothing, for each line that *keeps* does not want.

        It is not asked for the data of an event that *has_message*, judged elsewhere, nor for ids: like a cursor, one is
        the server's to read again. An event that is no message could become one without its kind: all of it is left out.
        """
        lines = self.raw.replace(b"\r\n", b"\n").split(b"\n")
        kept = [
            line if line in _USUAL or _is_id(line) or (has_message and _is_data(line)) or keeps(line) else b":"
            for line in lines
        ]
        if kept == lines:
            return self
        if self.data is None and any(new != old and _is_kind(old) for new, old in zip(kept, lines, strict=True)):
            return replace(self, raw=b"", endpoint=None)
        return replace(self, raw=b"\n".join(kept))


def _is_id(line: bytes) -> bool:
    return line == b"id" or line.startswith(b"id:")


def _is_kind(line: bytes) -> bool:
    return line == b"event" or line.startswith(b"event:")


def _is_data(line: bytes) -> bool:
    return line == b"data" or line.startswith(b"data:")


class Splitter:
    """Collects bytes, gives events. One per stream."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that *chunk* completes, in order; raises BadStream."""
        seen = max(0, len(self._pending) - 2)  # an end that began in the chunk before has at most 2 bytes there
        self._pending += chunk
        events: list[Event] = []
        start = 0
        for end in _END.finditer(self._pending, seen):
            events.append(_event(bytes(self._pending[start : end.end()])))
            start = end.end()
        del self._pending[:start]
        if len(self._pending) > MAX_EVENT_BYTES:
            raise BadStream(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def end(self) -> None:
        """Say that the stream is over; raises BadStream when an event was left unfinished with data in it.

        Go's client would dispatch it, the others drop it, so it was never judged and does not pass.
        """
        if any(_is_data(line) for line in bytes(self._pending).split(b"\n")):
            raise BadStream("the stream ended within an event")


def _event(raw: bytes) -> Event:
    unified = raw.replace(b"\r\n", b"\n")
    if b"\r" in unified:
        raise BadStream("a carriage return that ends no line")
    data: list[bytes] = []
    kind, event_id = b"message", b""
    for line in unified.split(b"\n"):
        name, _, value = line.partition(b":")
        if name.startswith(b"\xef"):  # in any line: what stands before it may be filtered away
            raise BadStream("byte order mark")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
        elif name == b"id":
            event_id = value.strip()
    text = b"\n".join(data)
    kind = kind.strip()  # as Go's client does
    if kind == b"endpoint":
        return Event(raw=raw, data=None, endpoint=text, id=event_id)
    # An event without data primes a client for resumption (MCP 2025-11-25).
    is_message = kind in (b"message", b"") and bool(text.strip())
    return Event(raw=raw, data=text if is_message else None, id=event_id)


def message(data: bytes) -> bytes:
    """Return an event of our own that carries *data*, which has no line breaks."""
    return b"event: message\ndata: " + data + b"\n\n"
