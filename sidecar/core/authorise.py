"""Decides whether a principal may send a message: every engine present must allow, and one must be present.

Refuses on an engine's error, on an undefined result and on anything else but a clean allow. Only this module makes a
Permit (tests/architecture). The document that both engines see is versioned: its fields are the contract with authors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

import msgspec

from sidecar.core.identity import Principal
from sidecar.core.message import Ask, Listing, Message, Prompt, Resource, Subscription, Task, Tool
from sidecar.core.profile import Server
from sidecar.errors import Reason, Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """What the caller says of itself: never verified, and named so in the document."""

    session: str | None = None
    client_name: str | None = None
    client_version: str | None = None


class Question(
    msgspec.Struct, frozen=True, kw_only=True
):  # made for every call, eight times as fast as a frozen dataclass
    """May *principal* send *message* to *server*? `time_ns` is Unix time."""

    principal: Principal
    message: Message
    server: Server
    agent: Agent
    time_ns: int
    session_id: str | None = None  # the server's own, and proven to be the principal's; None in stateless MCP
    protocol_version: str | None = None
    trace_id: str | None = None

    def document(self) -> dict[str, Any]:
        """Return `input`, as Rego sees it; Cedar's entities and context are made from the same fields."""
        return {name: part(self) for name, part in PARTS.items()}


def _user(question: Question) -> dict[str, Any] | None:
    user = question.principal.user
    if user is None:
        return None
    return {
        "id": user.id,
        "issuer": user.issuer,
        "email": user.email,
        "role": user.role,
        "roles": list(user.roles),
        "groups": list(user.groups),
        "claims": user.claims,
    }


def _workload(question: Question) -> dict[str, Any] | None:
    workload = question.principal.workload
    if workload is None:
        return None
    return {
        "spiffe_id": str(workload),
        "trust_domain": str(workload.trust_domain),
        "path": workload.path,
        "namespace": workload.namespace,
        "service_account": workload.service_account,
    }


def _agent(question: Question) -> dict[str, Any]:
    workload, agent = question.principal.workload, question.agent
    return {
        "id": None if workload is None else str(workload),
        "session": agent.session,
        "client": {"name": agent.client_name, "version": agent.client_version},
    }


def _server(question: Question) -> dict[str, Any]:
    server = question.server
    return {
        "namespace": server.namespace,
        "workload": server.workload,
        "name": server.name,
        "version": server.version,
    }


def _tool(question: Question) -> dict[str, Any] | None:
    target = question.message.target
    return {"name": target.name, "args": target.arguments} if isinstance(target, Tool) else None


def _prompt(question: Question) -> dict[str, Any] | None:
    target = question.message.target
    return {"name": target.name, "args": target.arguments} if isinstance(target, Prompt) else None


def _resource(question: Question) -> dict[str, Any] | None:
    target = question.message.target
    return {"uri": target.uri} if isinstance(target, Resource) else None


def _elicitation(question: Question) -> dict[str, Any] | None:
    target = question.message.target
    is_one = isinstance(target, Ask) and target.method == "elicitation/create"
    return {"mode": target.mode, "url": target.url} if is_one and isinstance(target, Ask) else None


def _request(question: Question) -> dict[str, Any]:
    return {
        "time": question.time_ns,
        "protocol_version": question.protocol_version,
        "trace_id": question.trace_id,
    }


def _delegation(question: Question) -> list[dict[str, Any]]:
    user = question.principal.user
    return [] if user is None else [{"sub": each.sub, "actor": each.actor} for each in user.delegation]


# Each made by itself: what no policy reads is not made at all (sidecar/core/projection.py).
PARTS: Final[Mapping[str, Callable[[Question], Any]]] = {
    "user": _user,
    "workload": _workload,
    "agent": _agent,
    "server": _server,
    "method": lambda question: question.message.method,
    "tool": _tool,
    "prompt": _prompt,
    "resource": _resource,
    "elicitation": _elicitation,
    "request": _request,
    "delegation": _delegation,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One engine's answer. *policies* decided it; any of *errors* makes it a denial."""

    allowed: bool
    policies: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class Engine(Protocol):
    """A policy engine with its policies loaded; `decide` never raises and never blocks beyond its deadline."""

    name: str

    def decide(self, question: Question) -> Verdict:
        """Return the verdict on *question*."""
        ...


class Named:
    """An engine of one policy among several: its verdicts say which."""

    def __init__(self, engine: Engine, policy: str) -> None:
        self.name = f"{policy}: {engine.name}"
        self._engine, self._policy = engine, policy

    def decide(self, question: Question) -> Verdict:
        """Return the engine's verdict, each policy and error with the name in front."""
        verdict = self._engine.decide(question)
        is_short = not verdict.errors and len("\n".join(verdict.policies)) <= MAX_CACHED_CHARS
        return (_named if is_short else _named.__wrapped__)(verdict, self._policy)


MAX_CACHED_CHARS: Final = 1024  # of a verdict's policies; what a rule makes of its input may be of any length


@lru_cache(maxsize=256)  # few rules decide most calls
def _named(verdict: Verdict, policy: str) -> Verdict:
    return Verdict(
        allowed=verdict.allowed,
        policies=tuple(f"{policy}: {each}" for each in verdict.policies) or (policy,),
        errors=tuple(f"{policy}: {each}" for each in verdict.errors),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A policy that is asked and not heeded."""

    name: str
    engines: tuple[Engine, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A shadow that would have decided otherwise than what was enforced."""

    policy: str
    allowed: bool  # by the shadow


class Permit(msgspec.Struct, frozen=True, kw_only=True):  # as Question is
    """Proof that a message was authorised; *policies* are those that allowed it."""

    question: Question
    policies: tuple[str, ...]
    revision: str


def judge(question: Question, engines: Sequence[Engine]) -> Verdict:
    """Return the verdict of all *engines* together: each must allow; with none, nothing is allowed."""
    policies: list[str] = []
    for engine in engines:
        verdict = engine.decide(question)
        if verdict.errors or not verdict.allowed:
            return Verdict(allowed=False, policies=verdict.policies, errors=verdict.errors)
        policies.extend(verdict.policies)
    return Verdict(allowed=bool(engines), policies=tuple(policies))


def authorise(question: Question, engines: Sequence[Engine], revision: str) -> Permit:
    """Return the permit for *question*; raises Refusal(DENIED).

    A lifecycle message (initialize, ping, a client's answer, opening a stream …) needs no rule: it does nothing by
    itself, and refusing it would demote or kill clients (MCP 2026-07-28, versioning). A listing needs none either: its
    items are judged one by one on the way back (sidecar/core/filters.py). The right to a task is to own it.
    """
    message = question.message
    target = message.target
    if target is None or isinstance(target, _NEEDS_NO_RULE):
        return Permit(question=question, policies=(), revision=revision)
    if isinstance(target, Subscription):
        return _subscribe(question, target, engines, revision)
    verdict = judge(question, engines)
    if not verdict.allowed:
        raise _denied(message.method, target.label, verdict)
    return Permit(question=question, policies=verdict.policies, revision=revision)


def differing(question: Question, shadows: Sequence[Shadow], *, permitted: bool) -> tuple[Difference, ...]:
    """Return which of *shadows* would have decided otherwise than *permitted*, what the enforced policies said."""
    found: list[Difference] = []
    for shadow in shadows:
        try:
            authorise(question, shadow.engines, "")
        except Refusal:
            allowed = False
        else:
            allowed = True
        if allowed != permitted:
            found.append(Difference(policy=shadow.name, allowed=allowed))
    return tuple(found)


_NEEDS_NO_RULE: Final = (Listing, Task)


def _subscribe(question: Question, wanted: Subscription, engines: Sequence[Engine], revision: str) -> Permit:
    """Return the permit for a subscription: to be told of a resource takes the right to read it."""
    policies: list[str] = []
    for uri in wanted.resources:
        resource = Resource(uri=uri)
        verdict = judge(msgspec.structs.replace(question, message=question.message.about(resource)), engines)
        if not verdict.allowed:
            raise _denied(question.message.method, resource.label, verdict)
        policies.extend(verdict.policies)
    return Permit(question=question, policies=tuple(dict.fromkeys(policies)), revision=revision)


def _denied(method: str, label: str, verdict: Verdict) -> Refusal:
    detail = "; ".join((*verdict.errors, *verdict.policies)) or "no rule allows it"
    return Refusal(Reason.DENIED, f"policy does not allow {method} on {label}", detail=detail)


def visible(
    permit: Permit, targets: Sequence[Tool | Prompt | Resource | Task], engines: Sequence[Engine]
) -> Sequence[bool]:
    """Return, for each of *targets*, whether the permit's principal could call it with some arguments.

    The arguments are empty: a rule that forbids some arguments must not hide the tool from those who call it without.
    A task is nobody's here: whose it is, no engine knows.
    """
    asked = permit.question
    return [
        not isinstance(target, Task)
        and judge(msgspec.structs.replace(asked, message=asked.message.about(target)), engines).allowed
        for target in targets
    ]
