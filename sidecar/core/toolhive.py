r"""Makes Cedar's request and entities in ToolHive's vocabulary, so that policies written for ToolHive load unchanged.

principal  Client::"<id>", in THVGroup:: of groups and roles; attributes claim_<name>
action     Action::"call_tool", "get_prompt", "read_resource"
resource   Tool::"<name>", Prompt::"<name>" or Resource::"<URI>", in MCP::"<server>"; attributes name, operation, feature, uri
           and arg_<name>; in a URI each of :/\?&=#. and the space is an underscore
context    claim_<name>, arg_<name>; of arguments that are arrays or objects only arg_<name>_present

Numbers are decimals with four places. Refuses questions without a user, and on anything else than the three methods,
as ToolHive has no word for them. Source: ToolHive, "Authorization policy reference" and pkg/authz/authorizers/cedar.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from sidecar.core.cedar import Json, Unspeakable, written

_ACTIONS: Final = {
    "tools/call": ("call_tool", "tool", "call"),
    "prompts/get": ("get_prompt", "prompt", "get"),
    "resources/read": ("read_resource", "resource", "read"),
}
_URI: Final = str.maketrans(dict.fromkeys(":/\\?&=#. ", "_"))
_PLACES: Final = Decimal("0.0001")
MAX_DECIMAL: Final = Decimal(2**63 - 1) / 10_000
MAX_DEPTH: Final = 10  # of claims; deeper ones are left out there, and refused here


def translate(document: Mapping[str, Any]) -> tuple[Json, tuple[str, ...]]:
    """Return request and entities for *document*: JSON of each, the caller first. Raises Unspeakable."""
    user, method = document.get("user"), str(document.get("method"))
    if user is None:
        raise Unspeakable("ToolHive's vocabulary has no principal without a user")
    if method not in _ACTIONS:
        raise Unspeakable(f"ToolHive's vocabulary has no action for {method}")
    action, feature, operation = _ACTIONS[method]
    target = document.get(feature) or {}
    name = str(target.get("uri") if feature == "resource" else target.get("name"))
    claims = {f"claim_{key}": _value(value) for key, value in user.get("claims", {}).items() if value is not None}
    arguments = dict(_argument(key, value) for key, value in target.get("args", {}).items())
    described = {**arguments, "name": name, "operation": operation, "feature": feature}
    if feature == "resource":
        described["uri"] = name
    principal = {"type": "Client", "id": str(user.get("id"))}
    resource = {"type": feature.title(), "id": name.translate(_URI) if feature == "resource" else name}
    server = {"type": "MCP", "id": str((document.get("server") or {}).get("name"))}
    groups = dict.fromkeys([*user.get("groups", ()), *user.get("roles", ())])
    entities = [
        {"uid": principal, "attrs": claims, "parents": [{"type": "THVGroup", "id": group} for group in groups]},
        {"uid": resource, "attrs": described, "parents": [server]},
    ]
    context = written({**claims, **arguments})
    request = {
        "principal": principal,
        "action": {"type": "Action", "id": action},
        "resource": resource,
        "context": context,
    }
    return request, tuple([written([each]) for each in entities])


def _argument(name: str, value: Any) -> tuple[str, Any]:
    if isinstance(value, dict | list) or value is None:
        return f"arg_{name}_present", True
    return f"arg_{name}", _value(value)


def _value(value: Any, depth: int = 0) -> Any:
    """Return *value* in Cedar's JSON form; raises Unspeakable."""
    match value:
        case bool() | str():
            return value
        case int() | float():
            exact = Decimal(str(value))
            if not exact.is_finite() or abs(exact) > MAX_DECIMAL:
                raise Unspeakable("a number beyond Cedar's decimals")
            return {"__extn": {"fn": "decimal", "arg": f"{exact.quantize(_PLACES):f}"}}
        case list() if depth <= MAX_DEPTH:
            return [_value(each, depth + 1) for each in value if each is not None]
        case dict() if depth <= MAX_DEPTH:
            # A member of this name would be read as an entity: it is no claim that ToolHive knows either.
            if any(name.startswith("__") for name in value):
                raise Unspeakable("a claim has a member that Cedar's JSON form reserves")
            return {name: _value(each, depth + 1) for name, each in value.items() if each is not None}
    raise Unspeakable("a claim that is nested that deeply")
