"""Decides what of the server's answer the principal may see: lists lose the items that the principal may not use.

Refuses an answer that it cannot read where it must filter. Order, pages, `_meta` and unknown fields stay; a filtered
list is marked private to its reader (MCP 2026-07-28, caching), or a shared cache would show it to others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from sidecar.core.authorise import Engine, Permit, visible
from sidecar.core.message import Listing, Prompt, Resource, Tool, read_json
from sidecar.errors import Reason, Refusal

_NAMED: Final = {Listing.RESOURCES: "uri", Listing.TEMPLATES: "uriTemplate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A message of the server as the client may see it, and what became of the call if it answers it."""

    data: bytes
    changed: bool = False
    hidden: int = 0
    answers: bool = False  # it is the response to the request that the permit is for
    error_code: int | None = None  # of a JSON-RPC error
    tool_failed: bool = False  # result.isError


def review(data: bytes, permit: Permit, engines: Sequence[Engine]) -> Outcome:
    """Return *data*, one message of the server, as the permit's principal may see it.

    Raises Refusal(UPSTREAM) when the message cannot be read: what cannot be judged does not pass.
    """
    document = _read(data)
    answers = document.get("id") == permit.question.message.id and "method" not in document
    result = document.get("result")
    error = document.get("error")
    hidden = 0
    if isinstance(result, dict):
        hidden = sum(_filter(result, listing, permit, engines) for listing in Listing if listing in result)
    code = error.get("code") if isinstance(error, dict) else None
    return Outcome(
        data=orjson.dumps(document) if hidden else data,
        changed=bool(hidden),
        hidden=hidden,
        answers=answers,
        error_code=code if isinstance(code, int) else None,
        tool_failed=isinstance(result, dict) and result.get("isError") is True,
    )


def _read(data: bytes) -> dict[str, Any]:
    try:
        document = read_json(data)
    except Refusal as refusal:
        raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail=refusal.public) from refusal
    if not isinstance(document, dict):
        raise Refusal(Reason.UPSTREAM, "the server's answer cannot be read", detail="not an object")
    return document


def _filter(result: dict[str, Any], listing: Listing, permit: Permit, engines: Sequence[Engine]) -> int:
    """Take out of *result* the items that the principal may not use; return how many."""
    items = result[listing]
    if not isinstance(items, list):
        raise Refusal(Reason.UPSTREAM, "the server's list cannot be read", detail=f"result.{listing} is no array")
    shown = visible(permit, [_target(item, listing) for item in items], engines)
    kept = [item for item, is_shown in zip(items, shown, strict=True) if is_shown]
    if len(kept) < len(items):
        result[listing] = kept
        if "cacheScope" in result:
            result["cacheScope"] = "private"
    return len(items) - len(kept)


def _target(item: Any, listing: Listing) -> Tool | Prompt | Resource:
    name = item.get(_NAMED.get(listing, "name")) if isinstance(item, Mapping) else None
    if not isinstance(name, str):
        raise Refusal(Reason.UPSTREAM, "the server's list cannot be read", detail=f"an item of {listing} has no name")
    match listing:
        case Listing.TOOLS:
            return Tool(name=name, arguments={})
        case Listing.PROMPTS:
            return Prompt(name=name, arguments={})
        case Listing.RESOURCES | Listing.TEMPLATES:
            return Resource(uri=name)
