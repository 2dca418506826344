"""The return path: the server's response in, piece by piece; what the client may see out, piece by piece. Sans I/O.

A JSON response is held until it is whole, because its length can change; a stream passes event by event, none waiting
for the next; anything else passes as it comes, since no client reads MCP from it. Refuses a response that cannot be
judged. MCP 2024-11-05 to 2026-07-28, transports.
"""

import hashlib
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from sidecar.core.connection import Headers
from sidecar.core.content import MAX_SCREENED_BYTES, Screen
from sidecar.core.detectors import Looks
from sidecar.core.endpoint import target_of
from sidecar.core.filters import Reader
from sidecar.core.message import Listing
from sidecar.core.review import Judge, Seen, review
from sidecar.core.sse import BadStream, Event, Splitter
from sidecar.errors import Reason, Refusal

MAX_SCREENED_LINES: Final = 10_000  # of an event, beside its message; each takes some microseconds
MAX_HELD_BYTES: Final = 16 * 2**20  # of a JSON response that must be filtered; SDKs stop at 4 MiB


class Mode(Enum):
    """How a response is passed on."""

    WHOLE = auto()
    EVENTS = auto()
    AS_IT_COMES = auto()


class Answer:
    """One response. `begin`, then `feed` for each piece, then `end`; what they return is for the client.

    Attributes:
        seen: the messages that have come since the last `take`.
        event_ids: of the events of a stream that have passed; whoever remembers them empties it.
        endpoint: where the client of a 2024-11-05 stream was told to post, once it was.
    """

    def __init__(self, reader: Reader, judge: Judge, *, stream_path: str | None = None) -> None:
        """Prepare to judge what *reader* gets; *stream_path* is that of a 2024-11-05 stream."""
        self._reader = reader
        self._judge = judge
        self._stream_path = stream_path
        self._held = bytearray()
        self._splitter = Splitter()
        self.seen: list[Seen] = []
        self.event_ids: list[bytes] = []
        self._is_error = False
        self._is_whole_answer = False  # not an acknowledgement, whose answer comes on another stream
        self._passed_bytes = 0  # of a message too large to be held
        self._hash: hashlib._Hash | None = None
        self.mode = Mode.AS_IT_COMES
        self.endpoint: str | None = None

    def begin(self, status: int, headers: Headers) -> Mode:
        """Return how the response passes; raises Refusal(UPSTREAM) when its body could not be judged.

        No client reads a list from an error status, and what stands there is often no JSON-RPC at all, so it passes.
        """
        # As lax as the laxest client, which looks for these names anywhere in the value.
        kinds, is_encoded = b"", False
        for name, value in headers:
            if name == b"content-type":
                kinds += b"," + value.lower()
            elif name == b"content-encoding" and value.lower() != b"identity":
                is_encoded = True
        is_json, is_stream = b"application/json" in kinds, b"text/event-stream" in kinds
        self._is_whole_answer = status == 200
        if status >= 400:
            self._is_error = True
            is_stream, is_json = False, is_json and not is_encoded
        elif is_json and is_stream:
            raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail="two content types")
        elif is_encoded and (is_json or is_stream):
            raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail="encoded though not asked")
        if is_json or is_stream:
            self.mode = Mode.WHOLE if is_json else Mode.EVENTS
        return self.mode

    def feed(self, piece: bytes) -> bytes:
        """Return what may go to the client now that *piece* has come; raises Refusal(UPSTREAM)."""
        if self.mode is Mode.EVENTS:
            return self._events(piece)
        if self.mode is Mode.AS_IT_COMES:
            if self._hash is not None:
                return self._counted(piece)
            if self._is_screened and not self._is_whole_answer:
                return b""  # the status says it all; nobody can say what stands here
            # Some client might look at no type.
            if piece and self._is_whole_answer and (self._is_screened or self._may_hold_lists()):
                raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail="content type")
            return piece
        self._held += piece
        if len(self._held) <= MAX_HELD_BYTES:
            return b""
        if (
            self._may_hold_lists() or self._is_screened or self._reader.revision.is_modern
        ):  # which asks the client in results
            raise Refusal(Reason.UPSTREAM, "the server's answer is too large", detail=f"> {MAX_HELD_BYTES}")
        self.mode = Mode.AS_IT_COMES  # a tool's result has nothing to filter: it need not be whole
        held = bytes(self._held)
        self._held.clear()
        self._hash = hashlib.sha256()
        return self._counted(held)

    @property
    def _is_screened(self) -> bool:
        """Say whether content rules hold for the answer itself."""
        screen = self._reader.screen
        return screen is not None and not screen.is_beside

    def _may_hold_lists(self) -> bool:
        """Say whether the answer must be read to be passed: that of a listing, or of a batch, which may hold one."""
        asked = self._reader.permit.question.message
        return isinstance(asked.target, Listing) or asked.body.lstrip(b" \t\r\n")[:1] == b"["

    def end(self) -> bytes:
        """Return the rest, now that the response is complete; raises Refusal(UPSTREAM)."""
        if self.mode is Mode.EVENTS:
            try:
                self._splitter.end()
            except BadStream as error:
                raise _unreadable(error) from error
        if self.mode is not Mode.WHOLE or not self._held:
            return b""
        held = bytes(self._held)
        try:
            rest = self._review(held)
        except Refusal:
            if self._is_error:
                return b"" if self._is_screened else held
            raise
        if not rest:
            raise Refusal(Reason.UPSTREAM, "the server did not answer", detail="nothing of its answer may pass")
        return rest

    def take(self) -> Sequence[Seen]:
        """Return the messages that were seen since the last time."""
        seen, self.seen = self.seen, []
        return seen

    @property
    def passed(self) -> tuple[int, str] | None:
        """Return size and SHA-256 of a result that was too large to be held; None when there was none."""
        return None if self._hash is None else (self._passed_bytes, self._hash.hexdigest())

    def _events(self, piece: bytes) -> bytes:
        try:
            events = self._splitter.feed(piece)
        except BadStream as error:
            raise _unreadable(error) from error
        passed = [self._event(event) for event in events]
        self.event_ids += [event.id for event, told in zip(events, passed, strict=True) if event.id and told]
        return b"".join(passed)

    def _event(self, event: Event) -> bytes:
        if self._reader.screen is not None:
            event = self._pruned(event, self._reader.screen)
        if event.data is not None:
            data = self._review(event.data)
            if data is event.data:
                return event.raw
            return event.replaced(data) if data else b""
        if event.endpoint is not None and self._stream_path is not None:
            self.endpoint = target_of(event.endpoint, self._stream_path)
            told = self.endpoint.encode()
            return event.raw if told == event.endpoint else event.replaced(told)
        return event.raw

    def _pruned(self, event: Event, screen: Screen) -> Event:
        """Return *event* without what content rules find in it beside its message, and note that. Raises Refusal."""
        looks = {each: Looks() for each in screen.rules}
        lines = size_bytes = 0

        def keeps(line: bytes) -> bytes:
            nonlocal lines, size_bytes
            lines, size_bytes = lines + 1, size_bytes + len(line)
            if lines > MAX_SCREENED_LINES or size_bytes > MAX_SCREENED_BYTES:
                raise Refusal(Reason.UPSTREAM, "the server's answer is too large", detail="an event to be screened")
            looked = screen.look(line, looks)
            if looked.found:
                self.seen.append(Seen(data=b"", found=looked.found))
            return looked.data

        is_told = event.endpoint is not None and self._stream_path is not None
        return event.pruned(keeps, has_message=event.data is not None or is_told)

    def _review(self, data: bytes) -> bytes:
        """Return *data* as the client may see it; the very object when nothing was changed."""
        passed, seen = review(data, self._reader, self._judge)
        self.seen += seen
        return passed

    def _counted(self, piece: bytes) -> bytes:
        assert self._hash is not None  # noqa: S101 - for the type checker
        self._passed_bytes += len(piece)
        self._hash.update(piece)
        return piece


def _unreadable(error: BadStream) -> Refusal:
    return Refusal(Reason.UPSTREAM, "the server's stream cannot be read", detail=str(error))
