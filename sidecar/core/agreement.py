"""Holds the headers of a request against its body: a header that repeats the body must say the same.

Some clients' headers are read by servers and by whoever stands before us instead of the body, so a disagreement is
refused, never resolved. Headers are decoded to be compared only; they are forwarded byte for byte. MCP 2026-07-28,
Streamable HTTP, request metadata and server validation; SEP-2243.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import msgspec

from sidecar.core.connection import Connection, Headers
from sidecar.core.message import Message, Prompt, Resource, Shape, Task, Tool
from sidecar.errors import Reason, Refusal

METHOD: Final = b"mcp-method"
NAME: Final = b"mcp-name"
# Whose name or URI the header repeats, and must repeat from 2026-07-28 on; the tasks extension's is compared if there.
NAMED: Final = frozenset({"tools/call", "prompts/get", "resources/read"})
TASKED: Final = frozenset({"tasks/get", "tasks/update", "tasks/cancel"})
MAX_TOOLS: Final = 10_000  # whose annotations are known; the one listed longest ago goes first


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamHeader:
    """An argument that a header repeats: `x-mcp-header` at *path* of a tool's input schema."""

    header: bytes  # in lower case, with its prefix
    path: tuple[str, ...]  # members of `params.arguments`


@dataclass(slots=True)
class ParamHeaders:
    """What the tools' schemas say of headers, as far as tools/list was seen. Mutated by the pipeline only."""

    known: dict[str, tuple[ParamHeader, ...]] = field(default_factory=dict)

    def learn(self, tools: Iterable[tuple[str, msgspec.Raw]]) -> None:
        """Remember the annotations of *tools*, each a name and the item as the server wrote it."""
        for name, item in tools:
            self.known.pop(name, None)
            annotated = _annotated(item)
            if annotated:
                while len(self.known) >= MAX_TOOLS:
                    del self.known[next(iter(self.known))]
                self.known[name] = annotated


PREFIX: Final = b"mcp-param-"
ANNOTATION: Final = "x-mcp-header"


def _annotated(item: msgspec.Raw) -> tuple[ParamHeader, ...]:
    """Return what the input schema of *item* annotates; nothing of a schema that cannot be read."""
    if ANNOTATION.encode() not in bytes(item):  # most tools have none, and schemas are long
        return ()
    try:
        schema = msgspec.json.decode(item, type=dict[str, Any]).get("inputSchema")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # as deep as the server likes
        return ()
    found: list[ParamHeader] = []
    left: list[tuple[tuple[str, ...], Any]] = [((), schema)]
    while left:
        path, node = left.pop()
        if not isinstance(node, dict):
            continue
        header = node.get(ANNOTATION)
        if path and isinstance(header, str):
            found.append(ParamHeader(header=PREFIX + header.lower().encode(), path=path))
        properties = node.get("properties")
        if isinstance(properties, dict):
            left += [((*path, name), child) for name, child in properties.items()]
    return tuple(found)


def check(connection: Connection, message: Message, param_headers: ParamHeaders) -> None:
    """Hold the routing headers of *connection* against *message*; raises Refusal(HEADER_MISMATCH).

    In every revision, also where servers ignore them: somebody before us may have judged by them.
    """
    values = connection.values
    if len(values) < len(connection.headers):
        _refuse_repeated(connection)
    is_demanded = message.shape is Shape.REQUEST and message.revision.is_modern
    method = values.get(METHOD)
    if (method is not None or is_demanded) and not _says(method, message.method):
        raise _mismatch("Mcp-Method", method)
    target = message.target
    name = values.get(NAME)
    if name is not None or is_demanded:
        expected = _name(message)
        if expected is not None and not _says(name, expected) and (name is not None or message.method in NAMED):
            raise _mismatch("Mcp-Name", name)
    if isinstance(target, Tool):
        annotated = param_headers.known.get(target.name)
        if annotated is not None:
            _check_params(values, target, annotated, is_demanded=is_demanded)


def _name(message: Message) -> str | None:
    """Return what Mcp-Name repeats of *message*; None when it repeats nothing."""
    match message.target:
        case Tool(name=name) | Prompt(name=name) if message.method in NAMED:
            return name
        case Resource(uri=uri) if message.method in NAMED:
            return uri
        case Task(id=task_id) if message.method in TASKED:
            return task_id
    return None


def _check_params(
    values: Mapping[bytes, bytes], tool: Tool, annotated: Iterable[ParamHeader], *, is_demanded: bool
) -> None:
    for each in annotated:
        header, argument = values.get(each.header), _argument(tool, each.path)
        if header is None and (argument is None or not is_demanded):
            continue
        if not _repeats(header, argument):
            raise _mismatch(each.header.decode("ascii", "replace"), header)


def _argument(tool: Tool, path: tuple[str, ...]) -> Any:
    value: Any = tool.arguments
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _repeats(header: bytes | None, argument: Any) -> bool:
    if isinstance(argument, dict | list):  # what the server annotated there has no form in a header: its to judge
        return True
    if header is None or argument is None:
        return header is argument
    if isinstance(argument, str):
        return _says(header, argument)
    text = header.decode("latin-1")
    if isinstance(argument, bool):
        return text == ("true" if argument else "false")
    return bool(_NUMBER.fullmatch(text)) and Decimal(text) == Decimal(str(argument))


_NUMBER: Final = re.compile(r"-?\d{1,400}(\.\d{1,400})?([eE][+-]?\d{1,4})?", re.ASCII)  # as large as JSON's are here


def repeated(headers: Headers, changes: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return *headers* in which those that repeat an argument repeat what *changes* (before, after) made of it."""
    after: dict[bytes, bytes] = {}
    for old, new in changes:  # as many as a caller likes
        after.setdefault(old, new)
    made = list(headers)
    for number, (name, value) in enumerate(made):
        said = _read(value) if name.startswith(PREFIX) else None
        if said is not None and said in after:
            made[number] = (name, _written(after[said]))
    return made


def _written(text: bytes) -> bytes:
    """Return *text* as a header says it: in base64 where HTTP could not carry it."""
    is_plain = text.isascii() and text.decode().isprintable() and text.strip() == text and not _SENTINEL.fullmatch(text)
    return text if is_plain else b"=?base64?" + base64.b64encode(text) + b"?="


_SENTINEL: Final = re.compile(rb"=\?base64\?(.*)\?=", re.DOTALL)  # this very spelling, or it is plain text


def _says(header: bytes | None, text: str) -> bool:
    """Say whether *header* repeats *text*."""
    return header is not None and _read(header) == text.encode()


def _read(header: bytes) -> bytes | None:
    """Return the text that *header* repeats: as it is, or in base64 where HTTP could not carry it; None: neither.

    One client (Go's) writes what is not ASCII as it is; as long as the bytes are the same, so is what they say.
    """
    encoded = _SENTINEL.fullmatch(header)
    if encoded is None:
        return header
    try:
        decoded = base64.b64decode(encoded[1], validate=True)
    except binascii.Error:
        return None
    return decoded if base64.b64encode(decoded) == encoded[1] else None  # one spelling only


def _refuse_repeated(connection: Connection) -> None:
    """Refuse a routing header that is given twice: servers differ in which of the two they take."""
    seen: set[bytes] = set()
    for name, _ in connection.headers:
        if name in seen and name.startswith(b"mcp-"):
            raise _mismatch(name.decode("ascii", "replace"), None, what="is given more than once")
        seen.add(name)


def _mismatch(name: str, value: bytes | None, *, what: str = "") -> Refusal:
    what = what or ("is missing" if value is None else "and the body differ")
    return Refusal(Reason.HEADER_MISMATCH, f"{name} {what}", detail="" if value is None else str(value)[:256])
