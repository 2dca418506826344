"""Holds the headers of a request against its body: a header that repeats the body must say the same.

Some clients' headers are read by servers and by whoever stands before us instead of the body, so a disagreement is
refused, never resolved. Headers are decoded to be compared only; they are forwarded byte for byte. MCP 2026-07-28,
Streamable HTTP, request metadata and server validation; SEP-2243.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

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
