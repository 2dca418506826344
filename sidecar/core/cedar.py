"""Decides by Cedar: makes entities and context of the document that Rego sees; any error in evaluating is a denial.

Cedar skips a policy that fails, so a forbid on a missing attribute would permit; hence the rule. Refuses values that
Cedar has not (null, fractions, integers beyond 64 bits) and members that its JSON form takes for something else: no part
of a caller's arguments becomes an entity. Source: Cedar policy language guide, JSON formats.

principal  User::"<issuer>#<id>", without a user Workload::"<SPIFFE ID>", without either Anonymous::"anonymous";
           in Role:: and Group::; attributes id, issuer, email, role, roles, groups, or those of `input.workload`
action     Action::"tools/call" and the like
resource   Tool::"<server>/<name>", Prompt::"<server>/<name>" or Resource::"<uri>", in Server::"<server>"; the server
           itself for what it asks of the client; attributes name or uri, and on the server namespace, workload, name,
           version
context    args (of the tool or prompt), claims (of the user), elicitation, delegation, workload, agent, request, method;
           null ones left out
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Literal

import cedarpy
import orjson

from sidecar.core.authorise import Question, Verdict
from sidecar.core.projection import WHOLE, Projection
from sidecar.errors import BundleError

Json = dict[str, Any]
ESCAPES: Final = frozenset({"__entity", "__extn", "__expr"})  # Cedar's JSON reads these as entities and calls
MAX_INTEGER: Final = 2**63 - 1
MAX_ENTITIES: Final = 512  # callers, and callers at things, kept in Cedar's own form; about 2 KB each
MAX_ENTITIES_CHARS: Final = 8192  # of what is kept
_POLICY: Final = re.compile(r"policy\d+")


class Unspeakable(ValueError):  # noqa: N818 - not a failure: the value exists, Cedar has no word for it
    """A value that Cedar cannot express, and where it was."""


class CedarEngine:
    """An Engine over parsed policies. Mutated by decide only."""

    name = "cedar"

    def __init__(
        self,
        policies: Mapping[str, str],
        *,
        projection: Projection = WHOLE,
        vocabulary: Literal["sidegate", "toolhive"] = "sidegate",
    ) -> None:
        """Parse *policies*, file name -> text, which speak *vocabulary*. Raises BundleError naming the file."""
        self._projection = projection
        self._entities: OrderedDict[tuple[str, ...], cedarpy.Entities] = OrderedDict()
        self._translate = translate
        if vocabulary == "toolhive":
            from sidecar.core import toolhive  # noqa: PLC0415 - which needs this module, and few need it

            self._translate = toolhive.translate
        self._labels: dict[str, str] = {}  # Cedar numbers the policies; authors know files and @id
        for name in sorted(policies):
            for label in _labels(name, policies[name]):
                self._labels[f"policy{len(self._labels)}"] = label
        self._policies = cedarpy.PolicySet.from_str("\n".join(policies[name] for name in sorted(policies)))

    def decide(self, question: Question) -> Verdict:
        """Return the verdict; policies are those that decided, by @id or `<file>#<number>`."""
        try:
            request, entities = self._translate(self._projection.part_of(question))
        except (Unspeakable, RecursionError) as error:
            return Verdict(allowed=False, errors=(f"cedar: {error}",))
        try:
            result = cedarpy.is_authorized(request, self._policies, self._parsed(entities))
        except BaseException as error:  # a panic in the engine's native code is none of Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return Verdict(allowed=False, errors=(f"cedar: {type(error).__name__}",))
        diagnostics = result.diagnostics
        return Verdict(
            allowed=result.decision is cedarpy.Decision.Allow and not diagnostics.errors,
            policies=tuple(sorted(self._labels.get(reason, reason) for reason in diagnostics.reasons)),
            errors=tuple(f"cedar: {self._named(error)}" for error in diagnostics.errors),
        )

    def forget(self) -> None:
        """Keep no entities."""
        self._entities.clear()

    def _parsed(self, entities: tuple[str, ...]) -> cedarpy.Entities:
        """Return *entities* in Cedar's own form: a caller at another tool has all but the last of them already."""
        kept = self._entities.get(entities)
        if kept is not None:
            self._entities.move_to_end(entities)
            return kept
        *before, last = entities
        made = self._parsed(tuple(before)).with_added_json_str(last) if before else cedarpy.Entities.from_json_str(last)
        if sum(map(len, entities)) <= MAX_ENTITIES_CHARS:
            if len(self._entities) >= MAX_ENTITIES:
                self._entities.popitem(last=False)
            self._entities[entities] = made
        return made

    def _named(self, error: str) -> str:
        return _POLICY.sub(lambda found: self._labels.get(found[0], found[0]), error)


def _labels(name: str, text: str) -> list[str]:
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except ValueError as error:
        raise BundleError(f"{name}: {error}") from error
    if parsed["templates"]:
        raise BundleError(f"{name}: a template is linked to nobody and decides nothing")
    found = parsed["staticPolicies"]
    annotations = [found[f"policy{number}"].get("annotations", {}) for number in range(len(found))]
    return [each.get("id") or f"{name}#{number}" for number, each in enumerate(annotations)]


def translate(document: Mapping[str, Any]) -> tuple[Json, tuple[str, ...]]:
    """Return request and entities for *document*: JSON of each, what changes least first. Raises Unspeakable."""
    principal, attributes, parents = _principal(document)
    resource, described, server = _resource(document)
    entities = [
        {"uid": server, "attrs": _without_null(document.get("server") or {}), "parents": []},
        {"uid": principal, "attrs": attributes, "parents": parents},
    ]
    if resource != server:
        entities.append({"uid": resource, "attrs": described, "parents": [server]})
    request = {
        "principal": principal,
        "action": {"type": "Action", "id": str(document.get("method"))},
        "resource": resource,
        "context": written(_context(document)),
    }
    return request, tuple([written([each]) for each in entities])


def written(value: Any) -> str:
    """Return *value* as JSON; raises Unspeakable for what is no text in UTF-8."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise Unspeakable(str(error)) from error


def _uid(kind: str, name: Any) -> Json:
    return {"type": kind, "id": str(name)}


def _principal(document: Mapping[str, Any]) -> tuple[Json, Json, list[Json]]:
    user, workload = document.get("user"), document.get("workload")
    if user is not None:
        attributes = {name: value for name, value in _without_null(user).items() if name != "claims"}
        roles = dict.fromkeys([*attributes.get("roles", ()), *filter(None, [attributes.get("role")])])
        parents = [
            *(_uid("Role", role) for role in roles),
            *(_uid("Group", each) for each in attributes.get("groups", ())),
        ]
        # An issuer is a URL without fragment (OpenID Connect Discovery), so the first # divides the two.
        return _uid("User", f"{user.get('issuer')}#{user.get('id')}"), attributes, parents
    if workload is not None:
        return _uid("Workload", workload.get("spiffe_id")), _without_null(workload), []
    return _uid("Anonymous", "anonymous"), {}, []


def _resource(document: Mapping[str, Any]) -> tuple[Json, Json, Json]:
    server = _uid("Server", (document.get("server") or {}).get("name"))
    for kind in ("tool", "prompt"):
        named = document.get(kind)
        if named is not None:
            return _uid(kind.title(), f"{server['id']}/{named.get('name')}"), {"name": str(named.get("name"))}, server
    if document.get("resource") is None:  # what the server asks of the client is about the server itself
        return server, {}, server
    uri = document["resource"].get("uri")
    return _uid("Resource", uri), {"uri": str(uri)}, server


def _context(document: Mapping[str, Any]) -> Json:
    target = document.get("tool") or document.get("prompt") or {}
    context = {"method": document.get("method"), "args": target.get("args", {})}
    context["claims"] = (document.get("user") or {}).get("claims", {})
    for part in ("args", "claims"):
        if context[part]:
            _check(context[part], part)
    for part in ("workload", "agent", "request", "delegation", "elicitation"):
        if part in document:
            context[part] = document[part]
    return _without_null(context)


def _without_null(record: Mapping[str, Any]) -> Json:
    """Return *record*, a part of the document whose shape is ours, without null members: Cedar asks `has`."""
    return {
        name: _without_null(value) if type(value) is dict and name not in ("args", "claims") else value
        for name, value in record.items()
        if value is not None
    }


def _check(value: Any, where: str) -> None:
    """Refuse what Cedar cannot express in a value that callers or identity providers wrote. Raises Unspeakable."""
    match value:
        case dict():
            for name, member in value.items():
                if name in ESCAPES:
                    raise Unspeakable(f"{where} has a member {name}, which Cedar's JSON form reserves")
                _check(member, f"{where}.{name}")
        case list():
            for item in value:
                _check(item, where)
        case bool() | str():
            pass
        case int() if -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
            pass
        case _:
            raise Unspeakable(f"{where}: Cedar has no null, no fractions and no integers beyond 64 bits")
