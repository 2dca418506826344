"""MCP over standard input and output: one message a line.

Refuses a line that does not end, and knows what a server writes that is no message. Sans I/O; to whom a message belongs
is sidecar/core/correlation.py's to say. MCP 2024-11-05 to 2026-07-28, transports: stdio.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from sidecar.core.message import MAX_ID, RequestId, Shape

MAX_LINE_BYTES: Final = 16 * 2**20  # as of a JSON response over HTTP (sidecar/core/answer.py)
SUBSCRIPTION: Final = ("_meta", "io.modelcontextprotocol/subscriptionId")
_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")


class LineTooLong(Exception):  # noqa: N818 - names what was found
    """A line does not end within MAX_LINE_BYTES: what follows cannot be told from it."""


def one_line(document: bytes) -> bytes:
    """Return the JSON *document* without line breaks. They can stand between its parts only, never within a string."""
    return document.translate(_BREAKS).strip()


class Lines:
    """Collects bytes, gives lines without their end. One per process."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._pending = bytearray()
        self._max_bytes = max_bytes

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that *chunk* completes, empty ones left out; raises LineTooLong."""
        end = chunk.rfind(b"\n")
        if end < 0:
            self._pending += chunk
            whole: list[bytes] = []
        else:
            whole = (bytes(self._pending) + chunk[:end]).split(b"\n")
            self._pending = bytearray(chunk[end + 1 :])
        if len(self._pending) > self._max_bytes or any(len(line) > self._max_bytes for line in whole):
            raise LineTooLong(f"a line of more than {self._max_bytes} bytes")
        return [line for each in whole if (line := one_line(each))]


class Meta(msgspec.Struct):
    """`_meta` of a notification."""

    subscription_id: RequestId | None = msgspec.field(default=None, name=SUBSCRIPTION[1])


class Params(msgspec.Struct, rename="camel"):
    """Those members of a notification that name a request: by its progress token, its id, or as a subscription."""

    progress_token: RequestId | None = None
    request_id: RequestId | None = None
    meta: Meta | None = msgspec.field(default=None, name="_meta")


class _Error(msgspec.Struct):
    code: int = 0


class Line(msgspec.Struct):
    """What decides where a message of the server goes."""

    jsonrpc: str
    id: RequestId | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()

    @property
    def shape(self) -> Shape | None:
        """Return what it is; None when it is no message."""
        if self.method is not None:
            return Shape.NOTIFICATION if self.id is None else Shape.REQUEST
        return Shape.RESPONSE if self.id is not None and (self.result or self.error) else None

    @property
    def code(self) -> int | None:
        """Return the code of its error; None when it is none."""
        if not self.error:
            return None
        try:
            return _error.decode(self.error).code
        except msgspec.DecodeError:  # an error of another form is the client's to understand
            return 0

    def read_params(self) -> Params:
        """Return what its params name; nothing when they cannot be read."""
        try:
            return _params.decode(self.params) if self.params else Params()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return Params()


_line: Final = msgspec.json.Decoder(Line)
_params: Final = msgspec.json.Decoder(Params)
_error: Final = msgspec.json.Decoder(_Error)
_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_line(data: bytes) -> Line | None:
    """Return the message in *data*; None when it is none."""
    try:
        line = _line.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    is_id = not isinstance(line.id, int) or abs(line.id) <= MAX_ID  # one that we could not write is none
    return line if line.jsonrpc == "2.0" and is_id and line.shape is not None else None


def spliced(document: bytes, path: Sequence[str], value: object) -> bytes:
    """Return *document* with *value* in place of what is at *path*; every other value stays byte for byte."""
    members = _members.decode(document)
    rest = path[1:]
    new = spliced(bytes(members[path[0]]), rest, value) if rest else msgspec.json.encode(value)
    members[path[0]] = msgspec.Raw(new)
    return msgspec.json.encode(members)
