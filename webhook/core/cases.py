"""Questions written down: test cases for policies, one format for both languages, and records of the audit trail.

A file of cases is TOML: a table `[[case]]` for each, with `name`, what is asked and what must come of it; `[default]` holds
what they have in common. Refuses unknown fields, wrong types and two targets, naming the case and the field.
"""

import tomllib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from certs.errors import BadSpiffeId
from certs.spiffe import SpiffeId
from sidecar.core.authorise import Agent, Question
from sidecar.core.claims import User
from sidecar.core.identity import Principal
from sidecar.core.message import Message, Prompt, Resource, Shape, Tool
from sidecar.core.profile import Server
from webhook.errors import BadPolicy

FAR_FUTURE_S: Final = 2**40  # when a written-down identity expires: never
METHODS: Final = {Tool: "tools/call", Prompt: "prompts/get", Resource: "resources/read"}


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: by keyword, nothing unknown."""


class Human(Record, frozen=True, kw_only=True):
    """The user who asks."""

    id: str = "someone"
    issuer: str = "https://id.example"
    email: str | None = None
    role: str | None = None
    roles: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    claims: dict[str, Any] = {}


class Place(Record, frozen=True, kw_only=True):
    """The server that is asked."""

    namespace: str = "default"
    workload: str = "server"
    name: str = "server"
    version: str = ""


class Asked(Record, frozen=True, kw_only=True):
    """What is asked: one of tool, prompt and resource."""

    user: Human | None = None
    workload: str | None = None  # a SPIFFE ID
    server: Place = Place()
    tool: str | None = None
    prompt: str | None = None
    resource: str | None = None
    args: dict[str, Any] = {}
    time: int = 1_750_000_000_000_000_000


class Case(Asked, frozen=True, kw_only=True):
    """What is asked, and what must come of it."""

    name: str
    allow: bool
    policies: tuple[str, ...] | None = None  # that decided, where that matters


def read(file: str, text: str) -> list[Case]:
    """Return the cases in *text*; raises BadPolicy naming file, case and field."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadPolicy(file, f"not TOML: {error}") from error
    unknown = tables.keys() - {"case", "default"}
    if unknown or not isinstance(tables.get("case"), list):
        raise BadPolicy(file, f"expected [[case]] and [default], found {', '.join(sorted(unknown)) or 'no [[case]]'}")
    cases = []
    for number, table in enumerate(tables["case"]):
        name = table.get("name", f"number {number + 1}") if isinstance(table, dict) else f"number {number + 1}"
        try:
            case = msgspec.convert(_merged(tables.get("default", {}), table), type=Case)
            question(case)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadPolicy(file, f"case {name!r}: {error}") from error
        cases.append(case)
    return cases


def _merged(default: Any, own: Any) -> Any:
    if not isinstance(default, dict) or not isinstance(own, dict):
        return own
    return {**default, **{key: _merged(default.get(key), value) for key, value in own.items()}}


def question(asked: Asked) -> Question:
    """Return the question of *asked*; raises ValueError for what nobody can ask."""
    targets: list[Tool | Prompt | Resource] = []
    if asked.tool is not None:
        targets.append(Tool(name=asked.tool, arguments=asked.args))
    if asked.prompt is not None:
        targets.append(Prompt(name=asked.prompt, arguments=asked.args))
    if asked.resource is not None:
        targets.append(Resource(uri=asked.resource))
    if len(targets) != 1:
        raise ValueError("one of tool, prompt and resource must be given")
    (target,) = targets
    try:
        workload = None if asked.workload is None else SpiffeId.parse(asked.workload)
    except BadSpiffeId as error:
        raise ValueError(f"workload: {error}") from error
    return Question(
        principal=Principal(workload=workload, user=_user(asked.user), expires_at_s=FAR_FUTURE_S),
        message=Message(shape=Shape.REQUEST, method=METHODS[type(target)], id=1, target=target, params={}),
        server=Server(**msgspec.structs.asdict(asked.server), port=1),
        agent=Agent(),
        time_ns=asked.time,
    )


def _user(human: Human | None) -> User | None:
    if human is None:
        return None
    return User(provider="written down", expires_at_s=FAR_FUTURE_S, **msgspec.structs.asdict(human))


def of_record(record: Mapping[str, Any]) -> Asked | str:
    """Return what was asked in an audit record, or why that cannot be known any more."""
    decision = record.get("decision") or {}
    if any(each.get("action") == "deny" and each.get("mode") == "enforce" for each in decision.get("content") or ()):
        return "a content rule decided"
    message, who, server = record.get("message") or {}, record.get("who") or {}, record.get("server") or {}
    targets = {each: message.get(each) for each in ("tool", "prompt", "resource") if message.get(each) is not None}
    if message.get("method") not in METHODS.values() or len(targets) != 1:
        return "no rule was asked"
    arguments = record.get("arguments") or {}
    if arguments.get("truncated") or arguments.get("redacted") or (arguments and arguments.get("content") is None):
        return "its arguments were not kept whole"
    human = {key: value for key, value in (who.get("user") or {}).items() if key != "provider"}
    try:
        return msgspec.convert(
            {
                **targets,
                "args": arguments.get("content") or {},
                "user": human or None,
                "workload": who.get("workload"),
                "server": {key: server.get(key, "") for key in ("namespace", "workload", "name")},
            },
            type=Asked,
        )
    except msgspec.ValidationError as error:
        return f"it cannot be read: {error}"
