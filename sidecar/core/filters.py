"""Decides what of the server's messages the principal may see: lists lose the items that the principal may not use.

Refuses a message that it cannot read. Every member and item that stays is kept as the very bytes that came, in order;
what was judged for one reader is marked private to them, hidden items or not (MCP 2026-07-28, caching), or a shared
cache would show it to others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, assert_never

import msgspec

from sidecar.core.authorise import Engine, Permit, visible
from sidecar.core.message import Listing, Prompt, Resource, Task, Tool
from sidecar.errors import Reason, Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A message of the server, as the client may see it."""

    data: bytes
    hidden: int = 0  # items that were taken out
    answers: bool = False  # it is the response to the request that the permit is for
    error_code: int | None = None  # of its JSON-RPC error
    tool_failed: bool = False  # result.isError


class _Result(msgspec.Struct, rename="camel"):
    is_error: Any = False
    cache_scope: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    tools: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompts: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    resources: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    resource_templates: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Envelope(msgspec.Struct):
    id: str | int | float | None = None
    method: str | None = None
    result: _Result | None = None
    error: Any = None  # an OAuth error has a string here


class _Item(msgspec.Struct, rename="camel"):
    name: str = ""
    uri: str = ""
    uri_template: str = ""
    task_id: str = ""


PRIVATE: Final = msgspec.Raw(b'"private"')

_envelope: Final = msgspec.json.Decoder(_Envelope)
_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items: Final = msgspec.json.Decoder(list[msgspec.Raw])
_item: Final = msgspec.json.Decoder(_Item)


def review(data: bytes, permit: Permit, engines: Sequence[Engine]) -> Seen:
    """Return *data*, one JSON-RPC message of the server, as the permit's principal may see it.

    Looked at by its form, not by what was asked: a replayed stream can carry any response. Raises Refusal(UPSTREAM).
    """
    try:
        envelope = _envelope.decode(data)
        result = envelope.result
        if result is None or not _concerns(result):
            hidden = 0
        else:
            data, hidden = _filtered(data, permit, engines)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail=str(error)) from error
    return Seen(
        data=data,
        hidden=hidden,
        answers=envelope.method is None and envelope.id == permit.question.message.id,
        error_code=_code(envelope.error),
        tool_failed=result is not None and result.is_error is True,
    )


def _code(error: Any) -> int | None:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def _concerns(result: _Result) -> bool:
    """Say whether *result* holds anything that depends on who reads it."""
    parts = (result.tools, result.prompts, result.resources, result.resource_templates, result.cache_scope)
    return any(each is not msgspec.UNSET for each in parts)


def _filtered(data: bytes, permit: Permit, engines: Sequence[Engine]) -> tuple[bytes, int]:
    """Return the message without the items that the principal may not use, and how many those were."""
    message = _members.decode(data)
    result = _members.decode(message["result"])
    hidden = 0
    for listing in Listing:
        if listing not in result:
            continue
        items = _items.decode(result[listing])
        shown = visible(permit, [_target(item, listing) for item in items], engines)
        kept = [bytes(item) for item, is_shown in zip(items, shown, strict=True) if is_shown]
        hidden += len(items) - len(kept)
        result[listing] = msgspec.Raw(b"[" + b",".join(kept) + b"]")
    is_shared = result.get("cacheScope", PRIVATE) != PRIVATE
    if not hidden and not is_shared:
        return data, 0
    if is_shared:
        result["cacheScope"] = PRIVATE
    message["result"] = msgspec.Raw(msgspec.json.encode(result))
    return msgspec.json.encode(message), hidden


def _target(raw: msgspec.Raw, listing: Listing) -> Tool | Prompt | Resource | Task:
    item = _item.decode(raw)
    none: dict[str, Any] = {}
    match listing:
        case Listing.TOOLS:
            return Tool(name=item.name, arguments=none)
        case Listing.PROMPTS:
            return Prompt(name=item.name, arguments=none)
        case Listing.RESOURCES:
            return Resource(uri=item.uri)
        case Listing.TEMPLATES:
            return Resource(uri=item.uri_template)
        case Listing.TASKS:
            return Task(id=item.task_id)
    assert_never(listing)
