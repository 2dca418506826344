"""Takes out of the server's lists what their reader may not use.

Every member and item that stays is kept as the very bytes that came, in order; what was judged for one reader is marked
private to them, hidden items or not (MCP 2026-07-28, caching), or a shared cache would show it to others. Raises
msgspec.DecodeError for what it cannot read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, assert_never

import msgspec

from sidecar.core.authorise import Engine, Permit, visible
from sidecar.core.content import Screen
from sidecar.core.message import Listing, Prompt, Resource, Tool
from sidecar.core.ownership import Owned
from sidecar.core.replies import Denied
from sidecar.core.revision import Revision


class Reader(msgspec.Struct, frozen=True, kw_only=True):  # one for each call; made faster than a frozen dataclass
    """For whom the server's messages are judged: the sender of the permitted message that they come back to."""

    permit: Permit
    engines: Sequence[Engine]  # in force now, which may be newer than the permit
    tasks: Owned
    screen: Screen | None = None  # of content rules; None: none looks at what comes back
    denied: Denied = "error"

    @property
    def revision(self) -> Revision:
        """Return the revision that the reader speaks."""
        return self.permit.question.message.revision

    def sees(self, *targets: Tool | Prompt | Resource) -> Sequence[bool]:
        """Say of each of *targets* whether the reader may use it."""
        return visible(self.permit, targets, self.engines)

    def owns(self, task_id: str) -> bool:
        """Say whether the task is the reader's."""
        return self.tasks.owns(task_id, self.permit.question.principal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """A message whose lists were judged."""

    data: bytes
    hidden: int = 0  # items that were taken out
    tools: Sequence[tuple[str, msgspec.Raw]] = ()  # all that were listed, as the server wrote them


class _Item(msgspec.Struct, rename="camel"):
    name: str = ""
    uri: str = ""
    uri_template: str = ""
    task_id: str = ""


PRIVATE: Final = msgspec.Raw(b'"private"')

_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items: Final = msgspec.json.Decoder(list[msgspec.Raw])
_item: Final = msgspec.json.Decoder(_Item)


def filtered(data: bytes, reader: Reader) -> Filtered:
    """Return the response in *data* without the items that the reader may not use."""
    message = _members.decode(data)
    result = _members.decode(message["result"])
    hidden = 0
    tools: Sequence[tuple[str, msgspec.Raw]] = ()
    for listing in Listing:
        if listing not in result:
            continue
        items = _items.decode(result[listing])
        read = [_item.decode(item) for item in items]
        shown = _shown(read, listing, reader)
        kept = [bytes(item) for item, is_shown in zip(items, shown, strict=True) if is_shown]
        hidden += len(items) - len(kept)
        result[listing] = msgspec.Raw(b"[" + b",".join(kept) + b"]")
        if listing is Listing.TOOLS:
            tools = [(each.name, item) for each, item in zip(read, items, strict=True)]
    is_shared = result.get("cacheScope", PRIVATE) != PRIVATE
    if not hidden and not is_shared:
        return Filtered(data=data, tools=tools)
    if is_shared:
        result["cacheScope"] = PRIVATE
    message["result"] = msgspec.Raw(msgspec.json.encode(result))
    return Filtered(data=msgspec.json.encode(message), hidden=hidden, tools=tools)


def _shown(items: Sequence[_Item], listing: Listing, reader: Reader) -> Sequence[bool]:
    none: dict[str, Any] = {}
    match listing:
        case Listing.TOOLS:
            return reader.sees(*[Tool(name=item.name, arguments=none) for item in items])
        case Listing.PROMPTS:
            return reader.sees(*[Prompt(name=item.name, arguments=none) for item in items])
        case Listing.RESOURCES:
            return reader.sees(*[Resource(uri=item.uri) for item in items])
        case Listing.TEMPLATES:
            return reader.sees(*[Resource(uri=item.uri_template) for item in items])
        case Listing.TASKS:
            return [reader.owns(item.task_id) for item in items]
    assert_never(listing)
