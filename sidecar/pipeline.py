"""The path of a call: Connection -> Principal -> Message -> Permit -> Admission; nothing reaches the server without.

Each stage returns the next type or raises Refusal. One immutable Snapshot serves a whole request. GET and DELETE are
messages like any other, so there is no way around the stages. The way back is sidecar/core/answer.py.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from sidecar.core.agreement import ParamHeaders
from sidecar.core.authorise import Agent, Engine, Question, authorise
from sidecar.core.connection import Connection, check_origin
from sidecar.core.identity import Trust, authenticate
from sidecar.core.limits import Admission, Buckets, admit
from sidecar.core.message import Message, Shape, parse
from sidecar.core.ownership import Owned, endpoints, tasks
from sidecar.core.pending import Pending
from sidecar.core.profile import Profile
from sidecar.core.session import Sessions
from sidecar.core.trace import of_message
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange

SESSION: Final = b"mcp-session-id"
AGENT_SESSION: Final = b"sidegate-agent-session"
# With another charset some servers (body-parser) would decode other text from the bytes than the one that was judged.
_JSON: Final = re.compile(r'application/json[ \t]*(;[ \t]*charset=("utf-8"|utf-8)[ \t]*)?', re.IGNORECASE | re.ASCII)
MAX_LABEL_CHARS: Final = 256  # of what a caller says of itself; it ends in audit records and spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that judges, of one bundle; swapped whole."""

    profile: Profile
    revision: str
    engines: tuple[Engine, ...]
    trust: Trust
    hosts: frozenset[str] = frozenset()  # authorities under which callers know us; empty: any Host, no Origin


@dataclass(slots=True, kw_only=True)
class Memory:
    """What outlives a request. Mutated by the functions of this module only."""

    sessions: Sessions = field(default_factory=Sessions)
    buckets: Buckets = field(default_factory=Buckets)
    tasks: Owned = field(default_factory=tasks)
    endpoints: Owned = field(default_factory=endpoints)  # path and query, while their stream lasts (2024-11-05)
    asked: Pending = field(default_factory=Pending)  # requests of the server that were passed on to a client
    calls: Pending = field(default_factory=Pending)  # requests of clients without a session that are under way
    param_headers: ParamHeaders = field(default_factory=ParamHeaders)  # as the tools' schemas annotate them


class Observer(Protocol):
    """Told of every exchange once, at its end; never raises."""

    def observe(self, exchange: Exchange) -> None:
        """Record *exchange*."""
        ...


def judge(exchange: Exchange, snapshot: Snapshot, memory: Memory, *, now_s: float, clock_s: float) -> Admission:
    """Return the admission of the exchange's message; raises Refusal. *exchange* is filled in on the way.

    *now_s* is Unix time (tokens, certificates, policies), *clock_s* the monotonic clock (limits).
    """
    connection = exchange.connection
    check_endpoint(connection, snapshot)
    principal = exchange.principal = authenticate(connection, snapshot.trust, now_s)
    message = exchange.message = read(connection)
    context = of_message(message.params)
    if context is not None:
        exchange.trace_id, exchange.parent_id, exchange.sampled = context.trace_id, context.parent_id, context.sampled
    exchange.protocol_version = connection.header(b"mcp-protocol-version")
    agent = exchange.agent = _agent(exchange, message, memory)
    question = Question(
        principal=principal,
        message=message,
        server=snapshot.profile.server,
        agent=agent,
        time_ns=exchange.started_ns,
        session_id=exchange.session_id,
        protocol_version=exchange.protocol_version,
        trace_id=exchange.trace_id,
    )
    permit = exchange.permit = authorise(question, snapshot.engines, snapshot.revision)
    admission = exchange.admission = admit(permit, snapshot.profile.limits, memory.buckets, clock_s)
    if exchange.session_id is None and message.shape is Shape.REQUEST and message.id is not None:
        memory.calls.add(scope(exchange), message.id)
    return admission


def check_endpoint(connection: Connection, snapshot: Snapshot) -> None:
    """Refuse what is not addressed to the MCP endpoint: NOT_FOUND, METHOD_NOT_ALLOWED, UNSUPPORTED_MEDIA."""
    host = connection.header(b"host")
    if host is None or (snapshot.hosts and host not in snapshot.hosts):
        raise Refusal(Reason.FORBIDDEN_CALLER, "this Host is not served here", detail=str(host)[:MAX_LABEL_CHARS])
    check_origin(connection, snapshot.hosts)
    if connection.path not in snapshot.profile.server.paths:
        raise Refusal(Reason.NOT_FOUND, "this path is not the MCP endpoint", detail=connection.path[:MAX_LABEL_CHARS])
    if connection.method not in ("POST", "GET", "DELETE"):
        raise Refusal(Reason.METHOD_NOT_ALLOWED, "MCP uses POST, GET and DELETE", detail=connection.method)
    if connection.method == "POST":
        kind = connection.header(b"content-type") or ""
        if not _JSON.fullmatch(kind):
            raise Refusal(
                Reason.UNSUPPORTED_MEDIA,
                "Content-Type must be application/json, in UTF-8",
                detail=kind[:MAX_LABEL_CHARS],
            )
        if connection.header(b"content-encoding") not in (None, "identity"):
            # Some servers inflate and execute what we would have judged deflated.
            raise Refusal(Reason.UNSUPPORTED_MEDIA, "an encoded body is not accepted")


def read(connection: Connection) -> Message:
    """Return the message that *connection* carries; raises Refusal(MALFORMED or UNKNOWN_METHOD)."""
    if connection.method == "POST":
        return parse(connection.body)
    if connection.body:
        raise Refusal(Reason.MALFORMED, f"{connection.method} has no body")
    shape = Shape.OPEN_STREAM if connection.method == "GET" else Shape.CLOSE_SESSION
    return Message(shape=shape, method=shape.value, params={})


def _agent(exchange: Exchange, message: Message, memory: Memory) -> Agent:
    """Return what the caller says of itself, from this message or from the one that opened its session."""
    connection, principal = exchange.connection, exchange.principal
    assert principal is not None  # noqa: S101 - for the type checker: the stage before set it
    stamped = connection.header(AGENT_SESSION)
    session_id = connection.header(SESSION)
    exchange.session_id = session_id
    session = None if session_id is None else memory.sessions.require(session_id, principal)
    if message.method == "initialize":
        info = message.params.get("clientInfo")
        client = info if isinstance(info, dict) else {}
        return Agent(
            session=_label(stamped),
            client_name=_label(client.get("name")),
            client_version=_label(client.get("version")),
        )
    if session is None:
        return Agent(session=_label(stamped))
    return (
        session.agent if stamped is None else replace(session.agent, session=_label(stamped) or session.agent.session)
    )


def _label(value: object) -> str | None:
    return value[:MAX_LABEL_CHARS] if isinstance(value, str) and value else None


def remember(exchange: Exchange, status: int, session_id: str | None, memory: Memory) -> None:
    """Keep what the server's answer (*status*, its session id) says of sessions."""
    message, principal = exchange.message, exchange.principal
    if message is None or principal is None:
        return
    if message.method == "initialize" and session_id is not None and status < 300:
        agent = exchange.agent  # without a session of its own, the MCP session stands in for it
        memory.sessions.open(session_id, principal, agent if agent.session else replace(agent, session=session_id))
        exchange.session_id = session_id
    elif exchange.session_id is not None and (status == 404 or (message.shape is Shape.CLOSE_SESSION and status < 300)):
        memory.sessions.close(exchange.session_id)


def release(exchange: Exchange, memory: Memory) -> None:
    """Forget what was kept while *exchange* was under way; it is over."""
    message, principal = exchange.message, exchange.principal
    if exchange.admission is None or message is None or principal is None or message.id is None:
        return
    if exchange.session_id is None and message.shape is Shape.REQUEST:
        memory.calls.remove(scope(exchange), message.id)


def scope(exchange: Exchange) -> str:
    """Return within what the ids of requests are the exchange's own: its session, or its principal where it has none."""
    if exchange.session_id is not None:
        return f"session {exchange.session_id}"
    assert exchange.principal is not None  # noqa: S101 - asked of what was authenticated
    return f"principal {exchange.principal.key}"
