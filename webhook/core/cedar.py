"""Reads Cedar policies: whether they parse and validate, and what of the document they can read.

What is read is proven on the syntax tree, where `context` stands by name. Runs in a child of its own for each question
(webhook/shell/cedar_parser.py), which a policy's author and ten thousand sidecars wait for: so it imports little.
"""

import bisect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import cedarpy

from webhook.errors import BadPolicy

# Cedar's entities are made of these whatever the policies say (sidecar/core/cedar.py).
ENTITIES: Final = (
    *(("user", name) for name in ("id", "issuer", "email", "role", "roles", "groups")),
    *(("workload",), ("server",), ("method",), ("tool", "name"), ("prompt", "name"), ("resource",)),
)
TOOLHIVE_READS: Final = frozenset({("user",), ("method",), ("tool",), ("prompt",), ("resource",), ("server", "name")})
_TOKEN: Final = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|\w+|&&|\|\||::|[=!<>]=|\S')
# `context.<member>` of Cedar is found here in the document.
CONTEXT: Final = {
    "args": ("tool.args", "prompt.args"),
    "claims": ("user.claims",),
    "workload": ("workload",),
    "agent": ("agent",),
    "request": ("request",),
    "delegation": ("delegation",),
    "method": ("method",),
    "elicitation": ("elicitation",),
}


def read_paths(
    policies: Mapping[str, str], schema: str | None = None, *, vocabulary: str = "sidegate"
) -> frozenset[tuple[str, ...]] | None:
    """Return what *policies*, file name -> text, read: the member names that lead to it, None when nothing is proven.

    Raises BadPolicy for what does not parse or validate. The parser is native code that can be made to crash (deep
    nesting): run this in a child (webhook/shell/cedar.py).
    """
    reads = set(ENTITIES)
    is_proven = True
    parsed_schema = None if schema is None else _parsed(schema)
    for name, text in policies.items():
        try:
            parsed = json.loads(cedarpy.policies_to_json_str(text))
        except ValueError as error:
            raise BadPolicy(name, str(error), **_place(text, str(error))) from error
        if parsed["templates"]:
            raise BadPolicy(name, "a template (?principal, ?resource) is linked to nobody and decides nothing")
        if parsed_schema is not None:
            _validate(name, text, parsed_schema)
        for path in _context_paths(parsed["staticPolicies"]):
            if path and path[0] in CONTEXT:
                reads |= {(*base.split("."), *path[1:]) for base in CONTEXT[path[0]]}
            else:
                is_proven = is_proven and bool(path)  # a member that is not there reads nothing; context itself, all
    if vocabulary == "toolhive":  # whose entities hold all claims and arguments, in attributes of their own
        return TOOLHIVE_READS
    return frozenset(reads) if is_proven else None


def _parsed(schema: str) -> cedarpy.Schema:
    try:
        return cedarpy.Schema.from_str(schema)
    except ValueError as error:
        raise BadPolicy("schema.cedarschema", str(error)) from error


def _validate(name: str, text: str, schema: cedarpy.Schema) -> None:
    result = cedarpy.validate_policies(text, schema)
    if not result.validation_passed:
        raise BadPolicy(name, "; ".join(error.error for error in result.errors))


def _context_paths(node: Any) -> Iterator[tuple[str, ...]]:
    """Yield the member names behind each `context` in Cedar's JSON form of policies."""
    if isinstance(node, list):
        for child in node:
            yield from _context_paths(child)
    elif isinstance(node, dict):
        path = context_path(node)
        if path is not None:
            yield path
        else:
            yield from _context_paths(list(node.values()))


def context_path(node: Any) -> tuple[str, ...] | None:
    """Return the member names when *node* is `context`, or a member of it, or asks whether it has one."""
    match node:
        case {"Var": "context"}:
            return ()
        case {".": {"left": left, "attr": str(name)}} | {"has": {"left": left, "attr": str(name)}}:
            path = context_path(left)
            return None if path is None else (*path, name)
        case _:
            return None


def tokens(text: str) -> list[re.Match[str]]:
    """Return the tokens of a Cedar *text*, comments among them."""
    return list(_TOKEN.finditer(text))


def _place(text: str, message: str) -> dict[str, int]:
    """Return line and column of what Cedar's *message* is about: the parser names neither.

    A text cut before the offending token fails for its sudden end, one cut behind it for the token; the parser may look
    one token or, for a name, the rest of the policy further, so the last one that the message quotes is taken.
    """
    found = tokens(text)
    number = bisect.bisect_left(found, True, key=lambda token: not _ends_early(text[: token.end()]))
    quoted = {*re.findall(r"`([^`]+)`", message), message.rpartition(" ")[2]}
    start = found[number].start() if number < len(found) else len(text)
    start = next((token.start() for token in reversed(found[: number + 1]) if token[0] in quoted), start)
    return {"line": text.count("\n", 0, start) + 1, "column": start - text.rfind("\n", 0, start)}


def _ends_early(text: str) -> bool:
    try:
        cedarpy.PolicySet.from_str(text)
    except ValueError as error:
        return "unexpected end" in str(error)
    return True
