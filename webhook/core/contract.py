"""The contract with authors of policies as data: every field of `input`, a JSON Schema of it, and Cedar's schema.

One table says it all; that the document which engines see (sidecar/core/authorise.py) has these fields and no others is
tested. Decides nothing. The page docs/reference/policy-input.md is made of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

VERSION: Final = "sidegate.input/v1"

# Path, type, meaning. `?`: null when there is none; Cedar has no null, so there it is absent. `[]`: an array of them.
# A row of type object is followed by its members; `any` members are the caller's or the identity provider's own.
FIELDS: Final[tuple[tuple[str, str, str], ...]] = (
    ("user", "object?", "The human who asks, by a verified token."),
    ("user.id", "string", "The claim that the profile names; `sub` by default. Unique within the issuer."),
    ("user.issuer", "string", "The provider's issuer URL."),
    ("user.email", "string?", "E-mail address."),
    ("user.role", "string?", "Role."),
    ("user.roles", "string[]", "Roles."),
    ("user.groups", "string[]", "Groups."),
    ("user.claims", "any", "All claims of the token."),
    ("workload", "object?", "The program that asks, by the SVID of its connection."),
    ("workload.spiffe_id", "string", "Its SPIFFE ID."),
    ("workload.trust_domain", "string", "The trust domain in it."),
    ("workload.path", "string", "The path in it."),
    ("workload.namespace", "string?", "Kubernetes namespace, when the path is /ns/…/sa/…."),
    ("workload.service_account", "string?", "Kubernetes service account, likewise."),
    ("agent", "object", "The agent; what it says of itself is never verified."),
    ("agent.id", "string?", "The SPIFFE ID, verified."),
    ("agent.session", "string?", "Its session, self-reported."),
    ("agent.client", "object", "Its client, self-reported."),
    ("agent.client.name", "string?", "Name."),
    ("agent.client.version", "string?", "Version."),
    ("server", "object", "The MCP server behind the sidecar."),
    ("server.namespace", "string", "Kubernetes namespace."),
    ("server.workload", "string", "Deployment, StatefulSet …"),
    ("server.name", "string", "Name, as the profile has it."),
    ("server.version", "string", "Version, as the profile has it."),
    ("method", "string", "`tools/call`, `prompts/get`, `resources/read`; of the server: `sampling/createMessage` …"),
    ("tool", "object?", "The tool, of `tools/call`."),
    ("tool.name", "string", "Its exact name."),
    ("tool.args", "any", "Its arguments, the caller's own. Empty when a list is filtered."),
    ("prompt", "object?", "The prompt, of `prompts/get`."),
    ("prompt.name", "string", "Its exact name."),
    ("prompt.args", "any", "Its arguments."),
    ("resource", "object?", "The resource, of `resources/read`."),
    ("resource.uri", "string", "Its exact URI."),
    ("elicitation", "object?", "What the server asks the user for, of `elicitation/create`."),
    ("elicitation.mode", "string?", "`form` or `url`."),
    ("elicitation.url", "string?", "Where it sends the user."),
    ("request", "object", "This request. Rules that read it are never answered from memory."),
    ("request.time", "integer", "Unix time in nanoseconds."),
    ("request.protocol_version", "string?", "`MCP-Protocol-Version`."),
    ("request.trace_id", "string?", "W3C trace id."),
    ("delegation", "object[]", "On whose behalf, when the token says so: the nearest actor first."),
    ("delegation.sub", "string", "For whom."),
    ("delegation.actor", "string", "Who acts."),
)
ACTIONS: Final[Mapping[str, str]] = {
    "tools/call": "Tool",
    "prompts/get": "Prompt",
    "resources/read": "Resource",
    "sampling/createMessage": "Server",
    "elicitation/create": "Server",
    "roots/list": "Server",
}
_KINDS: Final = {"string": "String", "integer": "Long", "string[]": "Set<String>"}


def _members(path: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of what is directly below *path*."""
    for name, kind, meaning in FIELDS:
        parent, _, last = name.rpartition(".")
        if parent == path:
            yield last, kind, meaning


def json_schema(*, nulls: bool = True) -> dict[str, Any]:
    """Return the JSON Schema of `input`: nothing unknown but in what callers and identity providers write.

    Without *nulls* a field that may be null is not said to: OPA's type checker knows no alternatives.
    """
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": VERSION, **_object("", nulls=nulls)}


def _object(path: str, *, nulls: bool) -> dict[str, Any]:
    properties = {
        name: {"description": meaning, **_schema(f"{path}.{name}".lstrip("."), kind, nulls=nulls)}
        for name, kind, meaning in _members(path)
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _schema(path: str, kind: str, *, nulls: bool) -> dict[str, Any]:
    plain = kind.rstrip("?").removesuffix("[]")
    if plain == "any":
        return {}
    schema: dict[str, Any] = _object(path, nulls=nulls) if plain == "object" else {"type": plain}
    if kind.endswith("[]"):
        schema = {"type": "array", "items": schema}
    return {"anyOf": [schema, {"type": "null"}]} if nulls and kind.endswith("?") else schema


def cedar_schema(arguments: str = "{}", claims: str = "{}") -> str:
    """Return Cedar's schema; *arguments* and *claims* are the record types of what the contract leaves open."""
    context = ", ".join(
        [
            f"args: {arguments}",
            f"claims: {claims}",
            "method: String",
            *(f"{name}{'?' if kind.endswith('?') else ''}: {_type(name, kind)}" for name, kind in _PARTS),
        ]
    )
    user = _record("user", leave_out=("claims",))
    lines = [
        "entity Role;",
        "entity Group;",
        f"entity User in [Role, Group] {user};",
        f"entity Workload {_record('workload')};",
        "entity Anonymous;",
        f"entity Server {_record('server')};",
        "entity Tool in [Server] {name: String};",
        "entity Prompt in [Server] {name: String};",
        "entity Resource in [Server] {uri: String};",
    ]
    lines += [
        f'action "{name}" appliesTo {{principal: [User, Workload, Anonymous], resource: [{resource}], '
        f"context: {{{context}}}}};"
        for name, resource in ACTIONS.items()
    ]
    return "\n".join(lines) + "\n"


_PARTS: Final = tuple(
    (name, kind) for name, kind, _ in FIELDS if name in ("workload", "agent", "request", "delegation", "elicitation")
)


def _type(path: str, kind: str) -> str:
    return f"Set<{_record(path)}>" if kind.endswith("[]") else _record(path)


def _record(path: str, *, leave_out: tuple[str, ...] = ()) -> str:
    members = []
    for name, kind, _ in _members(path):
        if name in leave_out:
            continue
        inner = _record(f"{path}.{name}") if kind.startswith("object") else _KINDS[kind.rstrip("?")]
        members.append(f"{name}{'?' if kind.endswith('?') else ''}: {inner}")
    return f"{{{', '.join(members)}}}"
