"""What all inbound connections share: the snapshot in force, the memory, the way to the server, the observers.

Hands a message to the server only by way of the pipeline. A request whose token names a key that is not known yet
waits for one look at the provider, and is then judged afresh; so does one whose token only the provider understands.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from sidecar.core import trace
from sidecar.core.answer import Answer
from sidecar.core.authorise import Permit
from sidecar.core.connection import Connection, Headers
from sidecar.core.content import compiled
from sidecar.core.filters import Reader
from sidecar.core.identity import UnknownToken, Unresolved
from sidecar.core.limits import Admission, Charge, Judgement, Reservation
from sidecar.core.message import Message, Shape
from sidecar.core.profile import Identity, Server
from sidecar.core.replies import Response
from sidecar.core.review import Seen
from sidecar.core.workload import HEADER
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import (
    Batch,
    Memory,
    Observer,
    Snapshot,
    answered,
    judge,
    release,
    remember,
    settle,
    undo,
)
from sidecar.record import fingerprint
from sidecar.return_path import judge_ask, note, open_endpoint
from sidecar.shell import tracing
from sidecar.shell.streams import Stream
from sidecar.shell.upstream import Call, Sink
from sidecar.shell.ways import Way

log = logging.getLogger(__name__)

DRAIN_STEP_S = 0.05
NOT_READY_RETRY_S = 2  # a first bundle or SVID takes seconds
DEFAULT_MAX_BODY_BYTES = 4 * 2**20


class Requester(Sink, Protocol):
    """Who asked: learns of the call, or of the refusal."""

    is_over: bool  # nobody waits for the answer any more
    exchanges: Sequence[Exchange]  # of all messages of the body

    def forward(self, call: Call) -> None:
        """Know the call that carries the message."""
        ...

    def divide(self, count: int) -> Sequence[Exchange]:
        """Return an exchange for each of so many messages of the body; all of them are answered for from now on."""
        ...

    def refuse(self, refusal: Refusal | None) -> None:
        """Answer with *refusal*; None: each exchange has its own."""
        ...

    def respond(self, response: Response) -> None:
        """Answer with *response*, which nobody had to be asked for."""
        ...


class CredentialsSource(Protocol):
    """Says what the server gets of the user (sidecar/shell/credentials.py)."""

    def at_hand(self, exchange: Exchange, identity: Identity, server: Server) -> Headers | None:
        """Return the header fields for an admitted call; None when they must be fetched. Raises Refusal."""
        ...

    async def fetch(self, exchange: Exchange, identity: Identity) -> Headers:
        """Return the header fields that had to be fetched; raises Refusal."""
        ...


class LimitsStore(Protocol):
    """Judges limits of scope global for all replicas (sidecar/shell/quota.py)."""

    is_up: bool  # it answered lately; otherwise nobody waits for it

    async def ask(self, charges: Sequence[Charge], namespace: str) -> tuple[Judgement, ...] | None:
        """Return what it says of *charges*; None when it does not answer in time."""
        ...

    def give_back(self, charges: Sequence[Charge], namespace: str) -> None:
        """Return what it took for *charges*."""
        ...

    def end(self, charges: Sequence[Charge]) -> None:
        """Know that the messages of *charges* are no longer under way."""
        ...


def _has_lost(stream: Exchange, exchange: Exchange) -> bool:
    """Say whether *stream* is in the session that *exchange* has just opened, and another principal's."""
    owner, opener = stream.principal, exchange.principal
    if owner is None or opener is None or stream.session_id != exchange.session_id:
        return False
    return owner.key != opener.key


def _fault() -> Refusal:
    return Refusal(Reason.FAULT, "internal error", detail="see the sidecar's log")


class Serving:
    """Owned by sidecar/shell/app.py, which sets `snapshot`; mutated by the inbound connections."""

    def __init__(  # noqa: PLR0913 - what every call passes through
        self,
        *,
        upstream: Way,
        observers: Sequence[Observer],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        resolve: Callable[[Unresolved], Coroutine[Any, Any, Refusal | None]],
        why_not_ready: Callable[[], str | None],
        credentials: CredentialsSource | None = None,
        store: LimitsStore | None = None,
        announce: Callable[[Sequence[Exchange]], None] = lambda _: None,
        context: Callable[[Exchange], bytes] = tracing.traceparent,
    ) -> None:
        """*resolve* asks a provider; *credentials* None: the server learns nothing of the user; *store* None: it is away.

        *announce* is told of exchanges of one body before it is sent, and raises Refusal where it must not be.
        *context* makes the `traceparent` for the server; empty: it gets none.
        """
        self.snapshot: Snapshot | None = None
        self.memory = Memory()
        self.connections: set[Any] = set()
        self.draining = False
        self.in_flight = 0
        self._streams: dict[str, Stream] = {}  # of 2024-11-05, by the endpoint they announced
        self._upstream = upstream
        self._observers = tuple(observers)
        self._spawn = spawn
        self._resolve = resolve
        self._credentials = credentials
        self._store = store
        self.context = context
        self.announce = announce
        self._why_not_ready = why_not_ready

    clock = staticmethod(time.monotonic)

    @property
    def max_body_bytes(self) -> int:
        """Return the cap of a request's body."""
        return DEFAULT_MAX_BODY_BYTES if self.snapshot is None else self.snapshot.profile.server.max_body_bytes

    def demands_svid(self, names: Sequence[bytes]) -> bool:
        """Say whether a caller without certificate is refused whatever it asks; *names* are those of its headers."""
        if self.snapshot is None:
            return False
        identity = self.snapshot.profile.identity
        return identity.mtls == "strict" and (identity.jwt_svid == "off" or HEADER not in names)

    def begin(self, connection: Connection) -> Exchange:
        """Return the record of a request that has just come."""
        self.in_flight += 1
        context = trace.parse(connection.values.get(b"traceparent", b"").decode("latin-1"))
        if context is None:
            return self._exchange(connection, self.snapshot, tracing.new_trace_id(), None, sampled=True)
        return self._exchange(connection, self.snapshot, context.trace_id, context.parent_id, sampled=context.sampled)

    @staticmethod
    def _exchange(
        connection: Connection, snapshot: Snapshot | None, trace_id: str, parent_id: str | None, *, sampled: bool
    ) -> Exchange:
        return Exchange(
            connection=connection,
            profile=None if snapshot is None else snapshot.profile,
            revision="" if snapshot is None else snapshot.revision,
            started_ns=time.time_ns(),
            clock_s=time.monotonic(),
            trace_id=trace_id,
            span_id=tracing.new_span_id(),
            parent_id=parent_id,
            sampled=sampled,
        )

    def admit(self, exchange: Exchange, requester: Requester) -> None:
        """Judge and send, or refuse; at once unless a key must be fetched first."""
        self._admit(exchange, requester, may_wait=True)

    def _admit(self, exchange: Exchange, requester: Requester, *, may_wait: bool) -> None:
        try:
            self._judge_and_send(exchange, requester)
        except Refusal as refusal:
            if may_wait and isinstance(refusal, Unresolved):
                self._spawn(self._resolve_and_admit(exchange, requester, refusal))
            else:
                self._refuse(exchange, requester, refusal)
        except Exception:
            # The last resort: a defect in judging must refuse, never pass and never hang.
            log.exception("judging failed")
            exchange.judged_s = time.monotonic() - exchange.clock_s
            self._not_sent(requester.exchanges, requester, _fault())

    async def _resolve_and_admit(self, exchange: Exchange, requester: Requester, missing: Unresolved) -> None:
        try:
            refusal = await self._resolve(missing)  # without an answer the second judgement refuses
        except Exception:
            # The last resort, as in `_admit`: this task is one of the process's root.
            log.exception("asking a provider failed")
            refusal = _fault()
        if requester.is_over:  # the client may have gone while we waited
            return
        if refusal is not None:
            self._refuse(exchange, requester, refusal)
            return
        # What was learnt is gone when keys or rules changed meanwhile.
        is_stale = isinstance(missing, UnknownToken) and (
            self.snapshot is None or self.snapshot.trust is not missing.trusted
        )
        self._admit(exchange, requester, may_wait=is_stale)

    def _judge_and_send(self, exchange: Exchange, requester: Requester) -> None:
        snapshot, why = self.snapshot, self._why_not_ready()
        if snapshot is None or why is not None:
            raise Refusal(
                Reason.NOT_READY, "not ready to judge calls", detail=why or "no bundle", retry_after_s=NOT_READY_RETRY_S
            )
        own = answered(exchange.connection, snapshot)
        if own is not None:
            requester.respond(own)
            return
        found = judge(
            exchange, snapshot, self.memory, now_s=time.time(), clock_s=time.monotonic(), divide=requester.divide
        )
        exchange.judged_s = time.monotonic() - exchange.clock_s
        if isinstance(found, Batch):
            for each in found.exchanges:
                each.judged_s = exchange.judged_s
            admission = found.admission
            if admission is None:
                requester.refuse(None)
                return
        else:
            admission = found
        exchanges = found.exchanges if isinstance(found, Batch) else (exchange,)
        if not isinstance(admission, Reservation):
            self._prepare_and_send(admission, exchanges, requester, snapshot)
        elif self._store is not None and self._store.is_up:
            self._spawn(self._ask_and_send(self._store, exchanges, requester, snapshot))
        else:
            self._settle_and_send(None, exchanges, requester, snapshot)

    async def _ask_and_send(
        self, store: LimitsStore, exchanges: Sequence[Exchange], requester: Requester, snapshot: Snapshot
    ) -> None:
        """Settle by what the store says, and send; or refuse."""
        shared = [charge for each in exchanges if each.reservation is not None for charge in each.reservation.shared]
        namespace = snapshot.profile.server.namespace
        try:
            self._settle_and_send(await store.ask(shared, namespace), exchanges, requester, snapshot)
        except Exception:
            # The last resort, as in `_admit`.
            log.exception("asking the limits store failed")
            self._not_sent(exchanges, requester, _fault())

    def _settle_and_send(
        self,
        judgements: Sequence[Judgement] | None,
        exchanges: Sequence[Exchange],
        requester: Requester,
        snapshot: Snapshot,
    ) -> None:
        try:
            admission = settle(exchanges, judgements, time.monotonic())
        except Refusal as refusal:
            self._not_sent(exchanges, requester, refusal)
            return
        for each in exchanges:
            each.judged_s = time.monotonic() - each.clock_s
        if requester.is_over:  # the client may have gone while we waited
            self._take_back(exchanges)
        else:
            self._prepare_and_send(admission, exchanges, requester, snapshot)

    def _prepare_and_send(
        self, admission: Admission, exchanges: Sequence[Exchange], requester: Requester, snapshot: Snapshot
    ) -> None:
        """Send what was admitted with what the server gets of the user; or refuse."""
        exchange = exchanges[0]
        if self._credentials is not None:
            profile = snapshot.profile
            try:
                credentials = self._credentials.at_hand(exchange, profile.identity, profile.server)
            except Refusal as refusal:
                self._not_sent(exchanges, requester, refusal)
                return
            if credentials is None:
                self._spawn(self._fetch_and_send(admission, exchanges, requester, profile.identity))
                return
            exchange.credentials = credentials
        try:
            self._send(admission, exchanges, requester)
        except Refusal as refusal:  # the way is barred: a process has ended, too many processes, no record
            self._not_sent(exchanges, requester, refusal)

    async def _fetch_and_send(
        self, admission: Admission, exchanges: Sequence[Exchange], requester: Requester, identity: Identity
    ) -> None:
        """Send what was admitted once there is what the server gets of the user; refuse without."""
        first = exchanges[0]
        try:
            assert self._credentials is not None  # noqa: S101 - it asked for this
            first.credentials = await self._credentials.fetch(first, identity)
            if requester.is_over:  # the client may have gone while we waited
                self._take_back(exchanges)
            else:
                self._send(admission, exchanges, requester)
        except Refusal as refusal:
            self._not_sent(exchanges, requester, refusal)
        except Exception:
            # The last resort, as in `_admit`.
            log.exception("fetching credentials failed")
            self._not_sent(exchanges, requester, _fault())

    def _not_sent(self, exchanges: Sequence[Exchange], requester: Requester, refusal: Refusal) -> None:
        """Refuse what had been admitted: nothing of it reaches the server."""
        self._take_back(exchanges)
        if requester.is_over:
            return
        for each in exchanges:
            release(each, self.memory)
            each.refusal, each.admission, each.reservation, each.sent_s = refusal, None, None, None
        requester.refuse(refusal if len(exchanges) == 1 else None)

    def _take_back(self, exchanges: Sequence[Exchange]) -> None:
        """Give back what *exchanges* were charged, here and in the store: nothing of them reaches the server."""
        for each in exchanges:
            undo(each, self.memory)
            if self._store is not None and each.admission is not None:
                self._store.give_back(each.admission.charges, each.admission.permit.question.server.namespace)

    def _send(self, admission: Admission, exchanges: Sequence[Exchange], requester: Requester) -> None:
        exchange, now_s = exchanges[0], time.monotonic()
        for each in exchanges:
            each.sent_s = now_s - each.clock_s
        self.announce(exchanges)
        stream = self._stream_of(exchange)
        if stream is not None:
            stream.expect(exchange)
        traceparent = self.context(exchange)
        requester.forward(self._upstream.send(admission, exchange, requester, traceparent=traceparent))

    def _refuse(self, exchange: Exchange, requester: Requester, refusal: Refusal) -> None:
        exchange.judged_s = time.monotonic() - exchange.clock_s
        requester.refuse(refusal)

    def remember(self, exchange: Exchange, status: int, session_id: str | None) -> None:
        """Keep what the server's answer says of sessions; a stream in one that is another's now must not hear of it."""
        if remember(exchange, status, session_id, self.memory):
            log.warning(
                "the server gave a session to two principals", extra={"session": fingerprint(exchange.session_id or "")}
            )
            for connection in tuple(self.connections):
                if any(_has_lost(each, exchange) for each in connection.streams):
                    connection.end_streams("its session is another's")

    def told(self, exchange: Exchange, event_ids: Sequence[bytes]) -> None:
        """Keep that these events are told to whom *exchange* comes from."""
        assert exchange.principal is not None  # noqa: S101 - nothing comes back without
        for each in event_ids:
            self.memory.told.add(exchange.principal.key, each)

    def answer(self, exchange: Exchange) -> Answer:
        """Return what judges the way back of *exchange*, which was sent."""
        assert exchange.permit is not None  # noqa: S101 - nothing is sent without
        question = exchange.permit.question
        reader = self._reader(exchange.permit)
        is_announcing = question.server.transport == "sse" and question.message.shape is Shape.OPEN_STREAM
        stream_path = exchange.connection.path if is_announcing else None
        return Answer(reader, partial(self._ask, exchange), stream_path=stream_path)

    def _reader(self, permit: Permit) -> Reader:
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - it was there when the message was judged
        content = compiled(snapshot.profile.content)
        return Reader(
            permit=permit,
            engines=snapshot.engines,  # in force now: a listing under way when they changed is filtered by the new ones
            tasks=self.memory.tasks,
            screen=None if content is None else content.answered(permit.question.message),
            denied=snapshot.profile.denied,
        )

    def note(self, seen: Seen, exchange: Exchange, stream: Stream | None = None) -> None:
        """Keep what *seen* says, a message on the way back of *exchange*; answer the server where it does not pass."""
        note(seen, exchange, self.memory)
        if seen.reply:
            self._upstream.reply(exchange, seen.reply, target=None if stream is None else stream.endpoint)

    # 2024-11-05: posted here, answered there

    def open_stream(self, endpoint: str, exchange: Exchange, say: Callable[[bytes], None]) -> Stream:
        """Return the stream whose client is told to post to *endpoint*; raises Refusal(UPSTREAM) if that is another's."""
        assert exchange.principal is not None  # noqa: S101 - the stream was admitted
        open_endpoint(endpoint, exchange, self.memory)
        stream = self._streams[endpoint] = Stream(endpoint, exchange.principal, say)
        return stream

    def close_stream(self, stream: Stream) -> None:
        """Know that *stream* is over, and with it what waited for an answer on it."""
        if self._streams.get(stream.endpoint) is stream:
            del self._streams[stream.endpoint]
            self.memory.sessions.close(stream.endpoint)
        for exchange in stream.end():
            exchange.aborted = "the stream ended"
            self._conclude(exchange)

    def answered(self, seen: Seen, stream: Stream) -> bool:
        """Keep what *seen* says where it answers what was posted; say whether it does."""
        if seen.answers is None:
            return False
        exchange, is_over = stream.answered(seen.answers)
        if exchange is None:
            return False
        exchange.upstream_s = exchange.total_s = time.monotonic() - exchange.clock_s
        self.note(seen, exchange, stream)
        if is_over:
            self._conclude(exchange)
        return True

    def deliver(self, exchange: Exchange, response: Response) -> Response:
        """Return what a POST gets: *response*, or an acknowledgement where that went by the stream."""
        stream = self._stream_of(exchange)
        if stream is None or exchange.request_id is None or response.status not in (200, 400):
            return response
        stream.say(response.body)
        return Response(status=202, headers=(), body=b"")

    def _stream_of(self, exchange: Exchange) -> Stream | None:
        """Return the stream on which the exchange's message is answered, if it is its sender's."""
        if not self._streams or exchange.connection.method != "POST" or exchange.principal is None:
            return None
        stream = self._streams.get(exchange.connection.target)
        return stream if stream is not None and stream.owner == exchange.principal.key else None

    def _ask(self, carrier: Exchange, message: Message) -> Refusal | None:
        """Return why the server may not ask *message* of the client that *carrier* comes from; recorded either way."""
        snapshot = self.snapshot
        assert snapshot is not None  # noqa: S101 - it was there when the carrier was judged
        asked = self._exchange(carrier.connection, snapshot, carrier.trace_id, carrier.span_id, sampled=carrier.sampled)
        asked.session_id, asked.agent, asked.principal = carrier.session_id, carrier.agent, carrier.principal
        asked.protocol_version = carrier.protocol_version
        try:
            judge_ask(asked, message, carrier, snapshot, self.memory, clock_s=asked.clock_s)
        except Refusal as refusal:
            asked.refusal = refusal
        asked.judged_s = asked.total_s = time.monotonic() - asked.clock_s
        if message.target is not None:
            self._tell(asked)
        return asked.refusal

    def observe(self, exchange: Exchange) -> None:
        """Tell every observer that *exchange* is over; once, and not before its answer has come by the stream."""
        stream = self._stream_of(exchange)
        if stream is None or stream.settle(exchange):
            self._conclude(exchange)

    async def drain(self, patience_s: float) -> int:
        """Let calls finish, then end streams; cut what is left after *patience_s*, and return how many connections.

        Until the last call is over, a stream may carry what it needs: its progress, a question to the client.
        """
        self.draining = True
        for connection in tuple(self.connections):
            connection.drain()
        deadline_s = time.monotonic() + patience_s
        while self.connections and time.monotonic() < deadline_s:
            if not any(connection.is_busy for connection in self.connections):
                for connection in tuple(self.connections):
                    connection.end_streams("drained")
            await asyncio.sleep(DRAIN_STEP_S)
        left = tuple(self.connections)
        for connection in left:
            connection.abort()
        return len(left)

    def forget(self, exchange: Exchange) -> None:
        """Drop the record of what was no message."""
        del exchange
        self.in_flight -= 1

    def _conclude(self, exchange: Exchange) -> None:
        self.in_flight -= 1
        release(exchange, self.memory)
        self._end(exchange)
        self._tell(exchange)

    def _end(self, exchange: Exchange) -> None:
        """Tell the store that *exchange* is no longer under way."""
        if self._store is not None and exchange.admission is not None:
            self._store.end(exchange.admission.charges)

    def _tell(self, exchange: Exchange) -> None:
        for observer in self._observers:
            try:
                observer.observe(exchange)
            except Exception:
                # The last resort of observing: the client's answer must not hang on a defect of ours.
                log.exception("observing failed")
