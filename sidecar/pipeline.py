"""The path of a call: Connection -> Principal -> Message -> Permit -> Admission; nothing reaches the server without.

Each stage returns the next type or raises Refusal. One immutable Snapshot serves a whole request. GET and DELETE are
messages like any other, so there is no way around the stages; the messages of a batch go through them one by one, and
the batch is sent only when all of them passed. The way back is sidecar/core/answer.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final, Protocol

from sidecar.core import limits, metadata, resumption
from sidecar.core.agreement import ParamHeaders
from sidecar.core.agreement import check as check_agreement
from sidecar.core.authorise import Agent, Engine, Permit, Question, Shadow, authorise, differing
from sidecar.core.connection import RESERVED_PREFIX, Connection, forged_headers
from sidecar.core.content import compiled
from sidecar.core.document import malformed
from sidecar.core.identity import Trust, authenticate
from sidecar.core.limits import Admission, Judgement, Ledger, Reservation, admit, give_back
from sidecar.core.message import Message, Shape, Subscription, Task, parse, parse_any
from sidecar.core.origin import check_host, check_origin
from sidecar.core.origin import preflight as grant
from sidecar.core.ownership import Owned, tasks
from sidecar.core.pending import Pending
from sidecar.core.profile import Profile
from sidecar.core.replies import Response
from sidecar.core.resumption import Told
from sidecar.core.revision import CLIENT, UNSAID, Revision, of_header
from sidecar.core.scopes import require_scopes
from sidecar.core.screening import screen
from sidecar.core.session import Session, Sessions
from sidecar.core.trace import TraceContext, of_message
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange

SESSION: Final = b"mcp-session-id"
VERSION: Final = b"mcp-protocol-version"
CANCELLED: Final = "notifications/cancelled"
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
    shadows: tuple[Shadow, ...] = ()
    hosts: frozenset[str] = frozenset()  # authorities under which callers know us; empty: any Host, no Origin

    @property
    def is_sse(self) -> bool:
        """Say whether the server speaks HTTP+SSE of 2024-11-05."""
        return self.profile.server.transport == "sse"


@dataclass(slots=True, kw_only=True)
class Memory:
    """What outlives a request. Mutated by the functions of this module only."""

    sessions: Sessions = field(default_factory=Sessions)
    ledger: Ledger = field(default_factory=Ledger)
    tasks: Owned = field(default_factory=tasks)
    told: Told = field(default_factory=Told)  # events of streams
    asked: Pending = field(default_factory=Pending)  # requests of the server that were passed on to a client
    calls: Pending = field(default_factory=Pending)  # requests of clients without a session that are under way
    param_headers: ParamHeaders = field(default_factory=ParamHeaders)  # as the tools' schemas annotate them


class Observer(Protocol):
    """Told of every exchange once, at its end; never raises."""

    def observe(self, exchange: Exchange) -> None:
        """Record *exchange*."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The messages of one body, each with its own exchange; none is sent unless all may be."""

    exchanges: tuple[Exchange, ...]  # with its admission or reservation, or with its refusal
    # Of one of them, which stands for the body that holds all; None: some were refused.
    admission: Admission | Reservation | None


def judge(
    exchange: Exchange,
    snapshot: Snapshot,
    memory: Memory,
    *,
    now_s: float,
    clock_s: float,
    divide: Callable[[int], Sequence[Exchange]] | None = None,
) -> Admission | Reservation | Batch:
    """Return the admission of the exchange's message; raises Refusal. *exchange* is filled in on the way.

    A Reservation, alone or in a batch, becomes an admission by `settle`.

    *now_s* is Unix time (tokens, certificates, policies), *clock_s* the monotonic clock (limits). *divide* makes
    *exchange* the first of so many, one for each message of a batch; without it batches are refused.
    """
    connection = exchange.connection
    check_endpoint(connection, snapshot)
    exchange.removed = refuse_forgeries(connection)
    principal = exchange.principal = authenticate(connection, snapshot.trust, now_s)
    if resumption.HEADER in connection.values:
        connection = _resumable(exchange, memory)
    if snapshot.is_sse and connection.method == "POST":
        # The server told the reader of a stream to post there, and nobody else.
        memory.sessions.require(connection.target, principal)
        exchange.session_id = connection.target
    found = read(connection, snapshot)
    if isinstance(found, Message):
        exchange.message = found
        permit = _authorise(exchange, snapshot, memory)
        if snapshot.profile.content:
            _screen((exchange,), snapshot, memory)
            if exchange.refusal is not None:
                raise exchange.refusal
            permit = exchange.permit or permit
        return _admit(exchange, permit, snapshot, memory, clock_s)
    if divide is None:
        raise malformed("a batch is not accepted here: send one message per request")
    _session(exchange, memory)  # HTTP says that a session is over, once for all messages
    return _judge_batch(divide(len(found)), found, snapshot, memory, clock_s)


def _authorise(exchange: Exchange, snapshot: Snapshot, memory: Memory) -> Permit:
    """Return the permit of the exchange's message, which has been read; raises Refusal."""
    connection, principal, message = exchange.connection, exchange.principal, exchange.message
    assert principal is not None  # noqa: S101 - for the type checker: the stages before set both
    assert message is not None  # noqa: S101 - same
    adopt(exchange, of_message(message.params))
    version = connection.values.get(VERSION)  # known to be given once
    exchange.protocol_version = None if version is None else version.decode("latin-1")
    check_agreement(connection, message, memory.param_headers)
    agent = exchange.agent = _agent(exchange, message, memory)
    _check_owners(exchange, message, memory)
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
    try:
        permit = exchange.permit = authorise(question, snapshot.engines, snapshot.revision)
    finally:
        if snapshot.shadows:
            exchange.shadow = differing(question, snapshot.shadows, permitted=exchange.permit is not None)
    require_scopes(permit, snapshot.profile.identity)
    return permit


def adopt(exchange: Exchange, context: TraceContext | None) -> None:
    """Hang *exchange* under *context*, which its message carries itself; what the request said of it becomes a link."""
    if context is None:
        return
    if exchange.parent_id not in (None, context.parent_id):
        exchange.link = TraceContext(
            trace_id=exchange.trace_id, parent_id=exchange.parent_id or "", sampled=exchange.sampled
        )
    exchange.trace_id, exchange.parent_id, exchange.sampled = context.trace_id, context.parent_id, context.sampled


def _admit(
    exchange: Exchange, permit: Permit, snapshot: Snapshot, memory: Memory, clock_s: float
) -> Admission | Reservation:
    """Return the admission or reservation for *permit*; raises Refusal(THROTTLED)."""
    message = permit.question.message
    size_bytes = len(exchange.connection.body)  # of a batch: the whole, for each of its messages
    admission = admit(permit, snapshot.profile.limits, memory.ledger, clock_s, size_bytes)
    if isinstance(admission, Reservation):
        exchange.reservation = admission
    else:
        exchange.admission = admission
    if message.id is not None:
        if message.shape is Shape.RESPONSE:
            memory.asked.remove(scope(exchange), message.id)  # once answered, a second answer has nothing to answer
        elif _is_cancelled_by_id(exchange, message):
            memory.calls.add(scope(exchange), message.id)
    return admission


def _screen(exchanges: Sequence[Exchange], snapshot: Snapshot, memory: Memory) -> None:
    """Screen the content of what was authorised; what was masked is new, and authorised again. Sets refusals."""
    content = compiled(snapshot.profile.content)
    messages = [exchange.message for exchange in exchanges if exchange.message is not None]
    if content is None or not exchanges[0].connection.body:
        return
    sent = screen(exchanges[0].connection, messages, content)
    for exchange, found, refusal in zip(exchanges, sent.found, sent.refusals, strict=True):
        exchange.content, exchange.refusal = found, refusal
    if sent.connection is exchanges[0].connection or any(sent.refusals):
        return
    made = read(sent.connection, snapshot)
    for exchange, message in zip(exchanges, made if isinstance(made, tuple) else (made,), strict=True):
        exchange.connection, exchange.permit = sent.connection, None
        _take(exchange, message, snapshot, memory)


def _take(exchange: Exchange, found: Message | Refusal, snapshot: Snapshot, memory: Memory) -> None:
    """Authorise what was read for *exchange*; sets its message, and its refusal where there is one."""
    try:
        if isinstance(found, Refusal):
            raise found
        exchange.message = found
        _authorise(exchange, snapshot, memory)
    except Refusal as refusal:
        exchange.refusal = refusal


def _judge_batch(
    exchanges: Sequence[Exchange],
    found: Sequence[Message | Refusal],
    snapshot: Snapshot,
    memory: Memory,
    clock_s: float,
) -> Batch:
    """Return the batch of *exchanges*, one for each message or refusal in *found*; never raises Refusal."""
    first = exchanges[0]
    for exchange, each in zip(exchanges, found, strict=True):
        exchange.principal, exchange.removed = first.principal, first.removed
        _take(exchange, each, snapshot, memory)
    if snapshot.profile.content and all(exchange.refusal is None for exchange in exchanges):
        _screen(exchanges, snapshot, memory)
    if all(exchange.refusal is None for exchange in exchanges):
        _admit_all(exchanges, snapshot, memory, clock_s)
    if any(exchange.refusal is not None for exchange in exchanges):
        for exchange in exchanges:
            exchange.admission = exchange.reservation = None
            exchange.refusal = exchange.refusal or Refusal(
                Reason.NOT_SENT, "not sent: another message of the batch was refused"
            )
    waiting = next((each.reservation for each in exchanges if each.reservation is not None), None)
    return Batch(exchanges=tuple(exchanges), admission=waiting or first.admission)


def _admit_all(exchanges: Sequence[Exchange], snapshot: Snapshot, memory: Memory, clock_s: float) -> None:
    """Admit all *exchanges*, or leave no trace of those that came before the one that is refused."""
    for number, exchange in enumerate(exchanges):
        assert exchange.permit is not None  # noqa: S101 - for the type checker: all of them were authorised
        try:
            _admit(exchange, exchange.permit, snapshot, memory, clock_s)
        except Refusal as refusal:
            exchange.refusal = refusal
            for before in exchanges[:number]:
                undo(before, memory)
                release(before, memory)
            return


def settle(exchanges: Sequence[Exchange], judgements: Sequence[Judgement] | None, clock_s: float) -> Admission:
    """Return the admission of the first of *exchanges*, which are all of a body; raises Refusal(THROTTLED).

    *judgements* are the store's, of all that their reservations share; None: the store is away. When one is refused,
    nothing stays charged.
    """
    said = None if judgements is None else iter(judgements)
    try:
        for exchange in exchanges:
            reservation = exchange.reservation
            if reservation is not None:
                own = None if said is None else tuple(islice(said, len(reservation.shared)))
                exchange.admission = limits.settle(reservation, own, clock_s)
                exchange.reservation = None
    except Refusal:
        for exchange in exchanges:
            withdraw(exchange)
        raise
    admission = exchanges[0].admission
    assert admission is not None  # noqa: S101 - for the type checker: it was there, or has just come
    return admission


def withdraw(exchange: Exchange) -> None:
    """Give back what *exchange* was charged here: its message is not sent."""
    held = exchange.admission or exchange.reservation
    if held is not None:
        give_back(held.charges)


def undo(exchange: Exchange, memory: Memory) -> None:
    """Give back what *exchange* was charged here, and let what it answers wait on: it is not sent."""
    message = exchange.message
    if exchange.admission is None and exchange.reservation is None:
        return
    withdraw(exchange)
    if message is not None and message.shape is Shape.RESPONSE and message.id is not None:
        memory.asked.add(scope(exchange), message.id)


def check_endpoint(connection: Connection, snapshot: Snapshot) -> None:
    """Refuse what is not addressed to the MCP endpoint: NOT_FOUND, METHOD_NOT_ALLOWED, UNSUPPORTED_MEDIA."""
    server = snapshot.profile.server
    check_host(connection, snapshot.hosts)
    check_origin(connection, snapshot.hosts, server.origins)
    is_post = connection.method == "POST"
    # Where clients of 2024-11-05 post to is the server's to say: `judge` asks who was told so.
    if connection.path not in server.paths and not (is_post and snapshot.is_sse):
        raise Refusal(Reason.NOT_FOUND, "this path is not the MCP endpoint", detail=connection.path[:MAX_LABEL_CHARS])
    if connection.method not in ("POST", "GET", "DELETE"):
        raise Refusal(Reason.METHOD_NOT_ALLOWED, "MCP uses POST, GET and DELETE", detail=connection.method)
    if is_post:
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


def preflight(connection: Connection, snapshot: Snapshot) -> Response:
    """Return the answer to OPTIONS, which needs no identity and reaches nobody; raises Refusal."""
    server = snapshot.profile.server
    check_host(connection, snapshot.hosts)
    check_origin(connection, snapshot.hosts, server.origins)
    return grant(connection, server.origins)


def answered(connection: Connection, snapshot: Snapshot) -> Response | None:
    """Return what is answered here, to anybody: where to get a token, and preflights. None: the rest. Raises Refusal."""
    own = metadata.answer(connection, snapshot.profile)
    return preflight(connection, snapshot) if own is None and connection.method == "OPTIONS" else own


def refuse_forgeries(connection: Connection) -> tuple[str, ...]:
    """Return the names of headers that claim an identity and will not travel on; refuse those that only we may write."""
    forged = forged_headers(connection.headers)
    if forged and any(name.encode("latin-1").startswith(RESERVED_PREFIX) for name in forged):
        raise Refusal(
            Reason.FORBIDDEN_CALLER, "this header is the sidecar's own", detail=", ".join(forged)[:MAX_LABEL_CHARS]
        )
    return forged


def _resumable(exchange: Exchange, memory: Memory) -> Connection:
    """Return the exchange's connection without the event that it resumes after, where its principal was never told that."""
    connection, principal = exchange.connection, exchange.principal
    assert principal is not None  # noqa: S101 - for the type checker: the stage before set it
    connection.header(resumption.HEADER)  # refuses two: which one the server takes, nobody knows
    if not memory.told.has(principal.key, connection.values[resumption.HEADER]):
        headers = [pair for pair in connection.headers if pair[0] != resumption.HEADER]
        connection = exchange.connection = replace(connection, headers=headers)
        exchange.removed += (resumption.HEADER.decode("ascii"),)
    return connection


def read(connection: Connection, snapshot: Snapshot) -> Message | tuple[Message | Refusal, ...]:
    """Return the message that *connection* carries, or the messages of its batch; raises Refusal."""
    version = connection.header(VERSION)
    if connection.method == "POST":
        if snapshot.is_sse:
            return parse(connection.body, version, Revision.V2024_11_05)
        return parse_any(connection.body, version)
    if connection.body:
        raise malformed(f"{connection.method} has no body")
    revision = of_header(version, Revision.V2024_11_05 if snapshot.is_sse else UNSAID)
    if revision.is_modern or (snapshot.is_sse and connection.method == "DELETE"):
        refusal = Refusal(Reason.METHOD_NOT_ALLOWED, f"MCP {revision} does not use {connection.method}")
        refusal.revision = revision
        raise refusal
    shape = Shape.OPEN_STREAM if connection.method == "GET" else Shape.CLOSE_SESSION
    return Message(shape=shape, method=shape.value, params={}, revision=revision)


def _agent(exchange: Exchange, message: Message, memory: Memory) -> Agent:
    """Return what the caller says of itself, in this message or in the one that opened its session."""
    stamped = exchange.connection.header(AGENT_SESSION)
    session = None if message.revision.is_modern else _session(exchange, memory)
    if session is None or message.method == "initialize":
        return _described(message, stamped)
    return (
        session.agent if stamped is None else replace(session.agent, session=_label(stamped) or session.agent.session)
    )


def _session(exchange: Exchange, memory: Memory) -> Session | None:
    """Return the session that the request is in; raises Refusal(NOT_FOUND) when it is not the principal's."""
    session_id = exchange.session_id = exchange.session_id or exchange.connection.header(SESSION)
    if session_id is None:
        return None
    assert exchange.principal is not None  # noqa: S101 - for the type checker: the stage before set it
    return memory.sessions.require(session_id, exchange.principal)


def _described(message: Message, stamped: str | None) -> Agent:
    said: object = message.params
    member = "clientInfo"
    if message.method != "initialize":
        said, member = message.params.get("_meta"), CLIENT
    client = said.get(member) if isinstance(said, dict) else None
    if not isinstance(client, dict):
        return Agent(session=_label(stamped))
    return Agent(
        session=_label(stamped),
        client_name=_label(client.get("name")),
        client_version=_label(client.get("version")),
    )


def _check_owners(exchange: Exchange, message: Message, memory: Memory) -> None:
    """Refuse what concerns a task or a request that is not the caller's: UNKNOWN_TASK, UNSOLICITED."""
    target, principal = message.target, exchange.principal
    assert principal is not None  # noqa: S101 - for the type checker: the stage before set it
    if isinstance(target, Task):
        memory.tasks.require(target.id, principal)
    elif isinstance(target, Subscription):
        for task_id in target.tasks:
            memory.tasks.require(task_id, principal)
    elif message.shape is Shape.RESPONSE:
        if message.id is None or not memory.asked.has(scope(exchange), message.id):
            raise Refusal(Reason.UNSOLICITED, "no request waits for this response", detail=str(message.id))
    elif message.method == CANCELLED and exchange.session_id is None:
        request_id = message.params.get("requestId")
        is_true = isinstance(request_id, bool)  # to Python a number
        if is_true or not isinstance(request_id, str | int) or not memory.calls.has(scope(exchange), request_id):
            raise Refusal(Reason.UNSOLICITED, "no such request is under way", detail=str(request_id)[:MAX_LABEL_CHARS])


def _label(value: object) -> str | None:
    return value[:MAX_LABEL_CHARS] if isinstance(value, str) and value else None


def remember(exchange: Exchange, status: int, session_id: str | None, memory: Memory) -> bool:
    """Keep what the server's answer (*status*, its session id) says of sessions; say whether one was another's before."""
    message, principal = exchange.message, exchange.principal
    if message is None or principal is None:
        return False
    session_id = session_id or exchange.session_id
    if message.method == "initialize" and session_id is not None and status < 300:
        agent = exchange.agent  # without a session of its own, the MCP session stands in for it
        exchange.session_id = session_id
        if memory.sessions.open(session_id, principal, agent if agent.session else replace(agent, session=session_id)):
            memory.asked.forget(scope(exchange))
            return True
    elif exchange.session_id is not None and (status == 404 or (message.shape is Shape.CLOSE_SESSION and status < 300)):
        memory.sessions.close(exchange.session_id)
    return False


def release(exchange: Exchange, memory: Memory) -> None:
    """Forget what was kept while *exchange* was under way; it is over."""
    message, held = exchange.message, exchange.admission or exchange.reservation
    if held is None:
        return
    limits.release(held.charges)
    if message is None or message.id is None or message.shape is not Shape.REQUEST:
        return
    if _is_cancelled_by_id(exchange, message):
        memory.calls.remove(scope(exchange), message.id)


def _is_cancelled_by_id(exchange: Exchange, message: Message) -> bool:
    """Say whether a notification may cancel *message*, a request, by its id alone.

    Within a session its owner may, initialize nobody can cancel, and from 2026-07-28 on a closed response is the word.
    """
    return exchange.session_id is None and message.method != "initialize" and not message.revision.is_modern


def scope(exchange: Exchange) -> str:
    """Return within what the ids of requests are the exchange's own: its session, or its principal where it has none."""
    if exchange.session_id is not None:
        return f"session {exchange.session_id}"
    assert exchange.principal is not None  # noqa: S101 - asked of what was authenticated
    return f"principal {exchange.principal.key}"
