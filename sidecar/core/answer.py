"""The return path: the server's response in, piece by piece; what the client may see out, piece by piece. Sans I/O.

A JSON response is held until it is whole, because its length can change; a stream passes event by event, none waiting
for the next; anything else passes as it comes, since no client reads MCP from it. Refuses a response that cannot be
judged. MCP 2025-03-26 and later, transports.
"""

import hashlib
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from sidecar.core.authorise import Engine, Permit
from sidecar.core.connection import Headers
from sidecar.core.filters import review
from sidecar.core.message import Listing, Shape
from sidecar.core.sse import BadStream, Splitter
from sidecar.errors import Reason, Refusal

MAX_HELD_BYTES: Final = 16 * 2**20  # of a JSON response that must be filtered; SDKs stop at 4 MiB
MAX_KEPT_BYTES: Final = 2**20  # of a result for the audit record; a longer one is known by size and hash


class Mode(Enum):
    """How a response is passed on."""

    WHOLE = auto()
    EVENTS = auto()
    AS_IT_COMES = auto()


class Answer:
    """One response. `begin`, then `feed` for each piece, then `end`; what they return is for the client."""

    def __init__(self, permit: Permit, engines: Sequence[Engine]) -> None:
        self._permit = permit
        self._engines = engines
        self._held = bytearray()
        self._splitter = Splitter()
        self._hash: hashlib._Hash | None = None
        self._is_result = False  # what comes as it comes is the answering message
        self.mode = Mode.AS_IT_COMES
        self.result: bytes | None = None  # the message that answers the request, if it was small enough to keep
        self.result_bytes = 0
        self.error_code: int | None = None
        self.tool_failed = False
        self.hidden = 0

    @property
    def result_sha256(self) -> str | None:
        """Return the hash of the answering message in hexadecimal; None when there was none."""
        return self._hash.hexdigest() if self._hash is not None and self.result_bytes else None

    def begin(self, status: int, headers: Headers) -> bytes:
        """Look at the response's *status* and *headers*; raises Refusal(UPSTREAM) when its body could not be judged.

        Nothing goes to the client yet. No client reads a list from an error status, and what stands there is often no
        JSON-RPC at all, so it passes.
        """
        if status >= 400:
            return b""
        # As lax as the laxest client, which looks for these names anywhere in the value.
        kinds = b",".join(value.lower() for name, value in headers if name == b"content-type")
        is_json, is_stream = b"application/json" in kinds, b"text/event-stream" in kinds
        if is_json and is_stream:
            raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail="two content types")
        if is_json or is_stream:
            if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
                raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail="encoded though not asked")
            self.mode = Mode.WHOLE if is_json else Mode.EVENTS
        return b""

    def feed(self, piece: bytes) -> bytes:
        """Return what may go to the client now that *piece* has come; raises Refusal(UPSTREAM)."""
        if self.mode is Mode.EVENTS:
            return self._events(piece)
        if self.mode is Mode.AS_IT_COMES:
            if self._is_result:
                self._count(piece)
            return piece
        self._held += piece
        if len(self._held) <= MAX_HELD_BYTES:
            return b""
        if isinstance(self._permit.question.message.target, Listing):
            raise Refusal(Reason.UPSTREAM, "the server's answer is too large", detail=f"> {MAX_HELD_BYTES}")
        self.mode = Mode.AS_IT_COMES  # a tool's result has nothing to filter: it need not be whole
        held = bytes(self._held)
        self._held.clear()
        self._is_result = True
        self._count(held)
        return held

    def end(self) -> bytes:
        """Return the rest, now that the response is complete; raises Refusal(UPSTREAM)."""
        if self.mode is Mode.EVENTS:
            try:
                self._splitter.end()
            except BadStream as error:
                raise _unreadable(error) from error
        if self.mode is not Mode.WHOLE or not self._held:
            return b""
        return self._review(bytes(self._held))

    def _events(self, piece: bytes) -> bytes:
        passed: list[bytes] = []
        try:
            events = self._splitter.feed(piece)
        except BadStream as error:
            raise _unreadable(error) from error
        for event in events:
            if event.data is None:
                passed.append(event.raw)
                continue
            data = self._review(event.data)
            passed.append(event.raw if data is event.data else event.replaced(data))
        return b"".join(passed)

    def _review(self, data: bytes) -> bytes:
        seen = review(data, self._permit, self._engines)
        self.hidden += seen.hidden
        if seen.answers and self._permit.question.message.shape is Shape.REQUEST:
            self.result_bytes, self._hash = len(seen.data), hashlib.sha256(seen.data)
            self.result = seen.data if len(seen.data) <= MAX_KEPT_BYTES else None
            self.error_code, self.tool_failed = seen.error_code, seen.tool_failed
        return seen.data

    def _count(self, piece: bytes) -> None:
        if self._hash is None:
            self._hash = hashlib.sha256()
        self.result_bytes += len(piece)
        self._hash.update(piece)


def _unreadable(error: BadStream) -> Refusal:
    return Refusal(Reason.UPSTREAM, "the server's stream cannot be read", detail=str(error))
