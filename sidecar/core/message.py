"""Reads MCP messages from the bytes of an HTTP request; the same bytes are forwarded, so nothing may be ambiguous.

Refuses what two JSON readers could understand differently: duplicate keys, a BOM, UTF-16, NaN, lone surrogates, two
documents, a message that is both request and response, ids that are neither string nor integer, batches where the
revision has none. Refuses every method that the table below does not name. JSON-RPC 2.0; RFC 8259; MCP 2024-11-05 to
2026-07-28, server and client features, and the tasks extension. Differences between real servers are why
(docs/explanation/threat-model.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from sidecar.core.document import malformed, read_json
from sidecar.core.revision import CAPABILITIES, TASKS, UNSAID, VERSION, Revision, of_call, of_header
from sidecar.errors import Reason, Refusal

MAX_ID_CHARS: Final = 256  # a request id is echoed in every refusal; SDKs use counters and UUIDs
MAX_ID: Final = 2**63 - 1  # what every JSON writer can echo; TypeScript's SDK stops at 2**53
MAX_BATCH: Final = 64  # messages in one body, each of them judged and recorded; SDKs send single ones
MAX_SUBSCRIBED: Final = 256  # resources and tasks in one subscription, each of them judged


class Shape(StrEnum):
    """What a message is on the wire."""

    REQUEST = "request"
    NOTIFICATION = "notification"
    RESPONSE = "response"
    OPEN_STREAM = "open_stream"  # HTTP GET: server-to-client stream (2025-03-26 and later)
    CLOSE_SESSION = "close_session"  # HTTP DELETE


class Tool(msgspec.Struct, frozen=True, kw_only=True):  # made for every call, as Message is
    """A tool, by its exact name: no trimming, no case folding, no Unicode normalisation."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Return what a refusal calls it."""
        return f"tool {self.name!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, by its exact name."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Return what a refusal calls it."""
        return f"prompt {self.name!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A resource or a resource template, by its exact URI."""

    uri: str

    @property
    def label(self) -> str:
        """Return what a refusal calls it."""
        return f"resource {self.uri!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the server's, by its id; the right to it is to own it (sidecar/core/ownership.py)."""

    id: str

    @property
    def label(self) -> str:
        """Return what a refusal calls it."""
        return f"task {self.id!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """What a client wants to be told of: each resource as if it were read, each task as if it were got."""

    resources: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def label(self) -> str:
        """Return what a refusal calls it."""
        return "this subscription"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request of the server's to the client: sampling, elicitation, roots. *mode* and *url* are an elicitation's."""

    method: str
    mode: str | None = None
    url: str | None = None

    @property
    def label(self) -> str:
        """Return what a refusal calls it."""
        return "the client"


class Listing(StrEnum):
    """A listing, named after the member of its result that holds the items."""

    TOOLS = "tools"
    PROMPTS = "prompts"
    RESOURCES = "resources"
    TEMPLATES = "resourceTemplates"
    TASKS = "tasks"


Target = Tool | Prompt | Resource | Task | Subscription | Ask | Listing | None
RequestId = str | int


class Message(
    msgspec.Struct, frozen=True, kw_only=True
):  # made for every call, eight times as fast as a frozen dataclass
    """One MCP message. *target* is what it must be authorised on; None for lifecycle messages."""

    shape: Shape
    method: str
    id: RequestId | None = None
    target: Target = None
    params: Mapping[str, Any]
    revision: Revision = UNSAID
    body: bytes = b""  # that carried it; a batch's, for each of its messages

    def about(self, target: Tool | Prompt | Resource | Ask) -> "Message":
        """Return the message by which a client would use *target*, or by which the server asks the client."""
        method = target.method if isinstance(target, Ask) else _USE[type(target)]
        return Message(shape=Shape.REQUEST, method=method, target=target, params={}, revision=self.revision)


_USE: Final = {Tool: "tools/call", Prompt: "prompts/get", Resource: "resources/read"}


def _arguments(params: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = params.get("arguments")
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise malformed("params.arguments must be an object")
    return arguments


def _text(params: Mapping[str, Any], key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str):
        raise malformed(f"params.{key} must be a string")
    return value


def _tool(params: Mapping[str, Any]) -> Target:
    return Tool(name=_text(params, "name"), arguments=_arguments(params))


def _prompt(params: Mapping[str, Any]) -> Target:
    return Prompt(name=_text(params, "name"), arguments=_arguments(params))


def _resource(params: Mapping[str, Any]) -> Target:
    return Resource(uri=_text(params, "uri"))


def _reference(params: Mapping[str, Any]) -> Target:
    """Completion leaks the values of a prompt's or a template's arguments, so it needs the same right as using it."""
    reference = params.get("ref")
    if isinstance(reference, dict):
        _refuse_lookalikes(reference, _PARAMS, PARAMS)
        match reference.get("type"):
            case "ref/prompt":
                return Prompt(name=_text(reference, "name"), arguments={})
            case "ref/resource":
                return Resource(uri=_text(reference, "uri"))
    raise malformed("params.ref must be a ref/prompt or a ref/resource")


def _task(params: Mapping[str, Any]) -> Target:
    return Task(id=_text(params, "taskId"))


def _subscription(params: Mapping[str, Any]) -> Target:
    wanted = params.get("notifications", {})
    if not isinstance(wanted, dict):
        raise malformed("params.notifications must be an object")
    _refuse_lookalikes(wanted, _WANTED, WANTED)
    return Subscription(resources=_texts(wanted, "resourceSubscriptions"), tasks=_texts(wanted, "taskIds"))


def _texts(wanted: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = wanted.get(key, [])
    if (
        not isinstance(values, list)
        or len(values) > MAX_SUBSCRIBED
        or not all(isinstance(each, str) for each in values)
    ):
        raise malformed(f"params.notifications.{key} must be at most {MAX_SUBSCRIBED} strings")
    return tuple(values)


def _nothing(_: Mapping[str, Any]) -> Target:
    return None


def _listing(listing: Listing) -> Callable[[Mapping[str, Any]], Target]:
    return lambda _: listing


# Every request that a client may send, and what it is authorised on. A method that is not here is refused.
REQUESTS: Final[Mapping[str, Callable[[Mapping[str, Any]], Target]]] = {
    "initialize": _nothing,
    "ping": _nothing,
    "server/discover": _nothing,
    "logging/setLevel": _nothing,
    "tools/list": _listing(Listing.TOOLS),
    "prompts/list": _listing(Listing.PROMPTS),
    "resources/list": _listing(Listing.RESOURCES),
    "resources/templates/list": _listing(Listing.TEMPLATES),
    "tools/call": _tool,
    "prompts/get": _prompt,
    "resources/read": _resource,
    "resources/subscribe": _resource,
    "resources/unsubscribe": _resource,
    "completion/complete": _reference,
    "subscriptions/listen": _subscription,
    "tasks/list": _listing(Listing.TASKS),
    "tasks/get": _task,
    "tasks/result": _task,
    "tasks/cancel": _task,
    "tasks/update": _task,
}
# What 2026-07-28 has no longer, and what of it belongs to an extension.
GONE: Final = frozenset(
    {"ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe", "tasks/list", "tasks/result"}
)
EXTENSION: Final = frozenset({"tasks/get", "tasks/cancel", "tasks/update"})
NOTIFICATIONS: Final = frozenset(
    {
        "notifications/initialized",
        "notifications/cancelled",
        "notifications/progress",
        "notifications/roots/list_changed",
        "notifications/tasks/status",
    }
)


# The members that something is judged by.
ENVELOPE: Final = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})
PARAMS: Final = frozenset(
    {"name", "arguments", "uri", "ref", "type", "_meta", "taskId", "notifications", "requestId", "protocolVersion"}
)
META: Final = frozenset({VERSION, CAPABILITIES})
WANTED: Final = frozenset({"resourceSubscriptions", "taskIds"})
_ENVELOPE, _PARAMS, _META, _WANTED = (
    frozenset(name.casefold() for name in names) for names in (ENVELOPE, PARAMS, META, WANTED)
)


def _refuse_lookalikes(members: Mapping[str, Any], folded: frozenset[str], names: frozenset[str]) -> None:
    """Refuse a member that a reader without regard to case takes for one of *names*: Go's encoding/json, CVE-2026-27896."""
    for member in members:
        if member not in names and member.casefold() in folded:
            raise malformed("a member's name differs from the protocol's only in case")


def parse(body: bytes, version: str | None = None, unsaid: Revision = UNSAID) -> Message:
    """Return the one message in *body*, whose MCP-Protocol-Version is *version*; *unsaid* is meant without it.

    Raises Refusal, carrying no part of the content: MALFORMED, UNKNOWN_METHOD, HEADER_MISMATCH, UNSUPPORTED_VERSION.
    """
    found = parse_any(body, version, unsaid)
    if isinstance(found, tuple):
        raise malformed("a batch is not accepted here: send one message per request")
    return found


def parse_any(
    body: bytes, version: str | None = None, unsaid: Revision = UNSAID
) -> Message | tuple[Message | Refusal, ...]:
    """Return the message in *body*, or those of a batch: a refused request has its refusal in its place. Raises Refusal."""
    document = read_json(body)
    if isinstance(document, list):
        return _batch(document, body, version, unsaid)
    return _message(document, body, version, unsaid)


def _batch(documents: list[Any], body: bytes, version: str | None, unsaid: Revision) -> tuple[Message | Refusal, ...]:
    if not of_header(version, unsaid).has_batches:
        raise malformed("a batch is not accepted here: send one message per request")
    if not 0 < len(documents) <= MAX_BATCH:
        raise malformed(f"a batch has 1 to {MAX_BATCH} messages")
    found: list[Message | Refusal] = []
    for document in documents:
        try:
            found.append(_message(document, body, version, unsaid))
        except Refusal as refusal:
            if refusal.id is None and refusal.reason is not Reason.UNKNOWN_METHOD:
                raise  # there is nobody to tell it to but the sender of the whole
            found.append(refusal)
    if any(isinstance(each, Message) and each.method == "initialize" for each in found):
        raise malformed("initialize is not accepted in a batch")
    asked = [each.id for each in found if each.id is not None and _is_request(each)]
    if len(set(asked)) < len(asked):
        raise malformed("two requests of a batch have the same id")
    return tuple(found)


def _is_request(found: Message | Refusal) -> bool:
    return isinstance(found, Refusal) or found.shape is Shape.REQUEST


def _message(document: Any, body: bytes, version: str | None, unsaid: Revision) -> Message:
    if not isinstance(document, dict):
        raise malformed("a JSON-RPC message is an object")
    _refuse_lookalikes(document, _ENVELOPE, ENVELOPE)
    if document.get("jsonrpc") != "2.0":
        raise malformed('jsonrpc must be "2.0"')
    answers = "result" in document or "error" in document
    if "method" in document:
        if answers:
            raise malformed("a message is a request or a response, not both")
        return _call(document, body, version, unsaid)
    if not answers:
        raise malformed("a message has a method, a result or an error")
    if "result" in document and "error" in document:
        raise malformed("a response has a result or an error, not both")
    revision = of_header(version, unsaid)
    if revision.is_modern:
        raise malformed(f"a client sends no response in {revision}")
    return Message(shape=Shape.RESPONSE, method="response", id=_id(document), params={}, revision=revision, body=body)


def _call(document: Mapping[str, Any], body: bytes, version: str | None, unsaid: Revision) -> Message:
    method, params = document["method"], document.get("params", {})
    if not isinstance(method, str):
        raise malformed("method must be a string")
    if not isinstance(params, dict):
        raise malformed("params must be an object")
    _refuse_lookalikes(params, _PARAMS, PARAMS)
    meta = params.get("_meta")
    if isinstance(meta, dict):
        _refuse_lookalikes(meta, _META, META)
    if "id" not in document:
        return _notification(method, params, body, version, unsaid)
    request_id, read_target = _id(document), REQUESTS.get(method)
    revision = None
    try:
        revision = of_call(version, method, params, unsaid=unsaid, is_request=True)
        if read_target is None or (revision.is_modern and method in GONE):
            raise Refusal(  # noqa: TRY301 - gets the id below, like those that read_target raises
                Reason.UNKNOWN_METHOD, "this method is not known here", detail=method[:MAX_ID_CHARS]
            )
        if revision.is_modern and method in EXTENSION:
            _refuse_undeclared(params)
        target = read_target(params)
    except Refusal as refusal:
        refusal.id = request_id  # the caller's SDK finds its call again only by the id
        refusal.revision = refusal.revision or revision
        raise
    return Message(
        shape=Shape.REQUEST, method=method, id=request_id, target=target, params=params, revision=revision, body=body
    )


def _refuse_undeclared(params: Mapping[str, Any]) -> None:
    """Refuse a method of the tasks extension to a client that did not declare it. SEP-2663, required capabilities."""
    extensions = params["_meta"][CAPABILITIES].get("extensions")
    if not isinstance(extensions, dict) or TASKS not in extensions:
        refusal = Refusal(Reason.UNDECLARED, "the client did not declare the tasks extension")
        refusal.data = {"requiredCapabilities": {"extensions": {TASKS: {}}}}
        raise refusal


def _notification(
    method: str, params: Mapping[str, Any], body: bytes, version: str | None, unsaid: Revision
) -> Message:
    revision = of_call(version, method, params, unsaid=unsaid, is_request=False)
    if method not in NOTIFICATIONS:
        raise Refusal(Reason.UNKNOWN_METHOD, "this notification is not known here", detail=method[:MAX_ID_CHARS])
    return Message(shape=Shape.NOTIFICATION, method=method, params=params, revision=revision, body=body)


def _id(document: Mapping[str, Any]) -> RequestId:
    value = document.get("id")
    # bool is an int in Python; a server may read true as 1, so it is no id.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_ID:
        return value
    if isinstance(value, str) and len(value) <= MAX_ID_CHARS:
        return value
    raise malformed(f"id must be a string of at most {MAX_ID_CHARS} characters or a 64-bit integer")
