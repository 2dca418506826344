"""Reads the one JSON document in a body, in the one way in which every reader understands it.

Refuses what two readers could understand differently: two documents, trailing garbage, a BOM, UTF-16, NaN, lone
surrogates, duplicate members; and what is nested deeper than readers go. RFC 8259, 4, 8 and 9.
"""

import json
from typing import Any, Final

import orjson

from sidecar.errors import Reason, Refusal

MAX_DEPTH: Final = 64  # nesting levels; SDKs' own parsers stop between 100 and 1000, engines at about 120


def malformed(what: str) -> Refusal:
    """Return the refusal of a message that is not well formed in *what*."""
    return Refusal(Reason.MALFORMED, what)


def read_json(body: bytes) -> Any:
    """Return the one JSON document in *body*; raises Refusal(MALFORMED) where readers could disagree.

    orjson refuses NaN, numbers beyond doubles, lone surrogates and all that is not UTF-8. What it writes back to the very
    same bytes has neither duplicate keys nor integers that it rounded; everything else is read again, four times slower,
    by a reader that looks at each pair and keeps integers exact.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise malformed("the body is not one JSON document in UTF-8") from error
    if _may_be_deep(body) and _depth(document) > MAX_DEPTH:
        raise malformed(f"the message is nested deeper than {MAX_DEPTH} levels")
    return document if orjson.dumps(document) == body else json.loads(body.decode(), object_pairs_hook=_unique)


def _may_be_deep(body: bytes) -> bool:
    """Say whether *body* opens more than MAX_DEPTH objects or arrays; stops looking there (`count` is ten times slower)."""
    enough = MAX_DEPTH + 1
    return len(body.split(b"[", enough)) + len(body.split(b"{", enough)) - 2 > MAX_DEPTH


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise malformed("an object names the same member twice")  # every SDK's server takes the last one
    return members


_CONTAINERS: Final = frozenset({dict, list})  # what orjson makes; twice as fast as isinstance


def _depth(document: Any) -> int:
    """Return how deep *document* is nested, without recursion: the depth is the caller's choice."""
    deepest, layer = 0, [document]
    while layer:
        deepest += 1
        layer = [
            child
            for parent in layer
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) in _CONTAINERS
        ]
    return deepest
