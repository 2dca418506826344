"""sidecar.shell.serving: what is not ready refuses, what waits for a key is judged afresh, what is told is told."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sidecar.core import limits
from sidecar.core.connection import Connection
from sidecar.core.identity import UnknownKey, UnknownToken, Unresolved, learn
from sidecar.core.limits import Charge, Judgement
from sidecar.core.profile import Client, Identity, Limit, Provider
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import Snapshot, scope
from sidecar.shell.audit import Audit
from sidecar.shell.serving import DEFAULT_MAX_BODY_BYTES, NOT_READY_RETRY_S, Serving
from sidecar.shell.trail import File
from tests.builders import (
    STREAM,
    a_call,
    a_connection,
    a_principal,
    a_question,
    a_request,
    a_snapshot,
    an_exchange,
)
from tests.fakes import FakeObserver, allowing

PROVIDER = Provider(name="p", issuer="https://id.test", audiences=("a",))
RULES = Identity(mtls="permissive", providers=(PROVIDER,))
# Its key is not known, and it is not signed: what is looked at first is which key it names.
UNSIGNED = b"Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.eyJpc3MiOiJodHRwczovL2lkLnRlc3QifQ.eHg"


class FakeUpstream:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Exchange] = []

    def send(self, _admission: object, exchange: Exchange, _sink: object, *, traceparent: bytes) -> object:
        """Keep *exchange*."""
        assert traceparent
        self.sent.append(exchange)
        return object()


class FakeRequester:
    """Keeps what it is told."""

    def __init__(self, serving: Serving, exchange: Exchange) -> None:
        self.serving = serving
        self.exchanges: Sequence[Exchange] = (exchange,)
        self.is_over = False
        self.calls: list[object] = []
        self.refusals: list[Refusal] = []
        self.responses: list[Any] = []

    def divide(self, count: int) -> Sequence[Exchange]:
        """Begin an exchange for each further message."""
        (first,) = self.exchanges
        self.exchanges = (first, *(self.serving.begin(first.connection) for _ in range(count - 1)))
        return self.exchanges

    def leave(self) -> None:
        """Be gone, as a client that closes its connection."""
        self.is_over = True
        for exchange in self.exchanges:
            self.serving.observe(exchange)

    def respond(self, response: Any) -> None:
        """Keep *response*."""
        self.responses.append(response)

    def forward(self, call: object) -> None:
        """Keep *call*."""
        self.calls.append(call)

    def refuse(self, refusal: Refusal) -> None:
        """Keep *refusal*; whoever asked has an answer."""
        self.refusals.append(refusal)
        self.leave()


class Bench:
    """A Serving with fakes around it; coroutines are kept until the test runs them."""

    def __init__(
        self, snapshot: Snapshot | None, *, why: str | None = None, credentials: Any = None, store: Any = None
    ) -> None:
        self.upstream, self.observer = FakeUpstream(), FakeObserver()
        self.spawned: list[Coroutine[Any, Any, None]] = []
        self.missing: list[Unresolved] = []
        self.why = why
        self.serving = Serving(
            upstream=self.upstream,  # type: ignore[arg-type]
            observers=[self.observer],
            spawn=self.spawned.append,
            resolve=self.find,
            why_not_ready=lambda: self.why,
            credentials=credentials,
            store=store,
        )
        self.answer: Refusal | None = None  # what a question to the provider ends in
        self.serving.snapshot = snapshot

    async def find(self, missing: Unresolved) -> Refusal | None:
        """Find nothing."""
        self.missing.append(missing)
        return self.answer

    def ask(self, *headers: tuple[bytes, bytes]) -> tuple[Exchange, FakeRequester]:
        """Begin and admit one call."""
        return self.send(a_connection(a_call(), headers=headers))

    def send(self, connection: Connection) -> tuple[Exchange, FakeRequester]:
        """Begin and admit what *connection* carries."""
        exchange = self.serving.begin(connection)
        requester = FakeRequester(self.serving, exchange)
        self.serving.admit(exchange, requester)  # type: ignore[arg-type]
        return exchange, requester


def test_an_admitted_call_is_sent() -> None:
    """And who asked knows the call."""
    bench = Bench(a_snapshot(allowing()))
    exchange, requester = bench.ask()

    assert bench.upstream.sent == [exchange]
    assert (len(requester.calls), requester.refusals) == (1, [])
    assert exchange.judged_s >= 0


@pytest.mark.parametrize(
    ("snapshot", "why", "detail"),
    [(None, None, "no bundle"), (None, "identity: none", "identity: none"), (a_snapshot(allowing()), "stale", "stale")],
)
def test_what_is_not_ready_refuses(snapshot: Snapshot | None, why: str | None, detail: str) -> None:
    """Nothing may be judged, so nothing passes."""
    bench = Bench(snapshot, why=why)
    _, requester = bench.ask()
    (refusal,) = requester.refusals

    assert (refusal.reason, refusal.detail, refusal.retry_after_s) == (Reason.NOT_READY, detail, NOT_READY_RETRY_S)
    assert bench.upstream.sent == []


def test_a_denied_call_is_not_sent() -> None:
    """The refusal is all that comes."""
    bench = Bench(a_snapshot(allowing("other")))
    _, requester = bench.ask()

    assert [each.reason for each in requester.refusals] == [Reason.DENIED]
    assert bench.upstream.sent == []


def test_a_defect_refuses() -> None:
    """It must neither pass nor hang."""

    class Broken:
        name = "broken"

        def decide(self, _: object) -> Any:
            raise RuntimeError("boom")

    _, requester = Bench(a_snapshot(Broken())).ask()
    (refusal,) = requester.refusals

    assert (refusal.reason, refusal.public) == (Reason.FAULT, "internal error")
    assert "boom" not in refusal.detail


def test_an_unknown_key_is_looked_for_once() -> None:
    """And then the call is judged afresh, by what is in force then."""
    bench = Bench(a_snapshot(allowing(), identity=RULES))
    _, requester = bench.ask((b"authorization", UNSIGNED))
    assert requester.refusals == []
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert [each.provider for each in bench.missing] == [PROVIDER]
    assert [type(each) for each in requester.refusals] == [UnknownKey]
    assert bench.spawned == []


def test_what_was_missing_may_have_come_with_a_new_snapshot() -> None:
    """The second judgement uses the newest."""
    bench = Bench(a_snapshot(allowing(), identity=RULES))
    exchange, requester = bench.ask((b"authorization", UNSIGNED))
    bench.serving.snapshot = None
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert [each.reason for each in requester.refusals] == [Reason.NOT_READY]
    assert exchange.judged_s >= 0


def test_nobody_is_served_who_has_gone_meanwhile() -> None:
    """Neither a call nor an answer."""
    bench = Bench(a_snapshot(allowing(), identity=RULES))
    _, requester = bench.ask((b"authorization", UNSIGNED))
    requester.is_over = True
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert (requester.calls, requester.refusals, bench.upstream.sent) == ([], [], [])


def test_a_defect_after_the_wait_refuses_too() -> None:
    """An error there would end the whole process."""
    bench = Bench(a_snapshot(allowing(), identity=RULES))
    _, requester = bench.ask((b"authorization", UNSIGNED))
    bench.serving._why_not_ready = lambda: 1 / 0  # type: ignore[assignment,return-value]
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert [each.reason for each in requester.refusals] == [Reason.FAULT]


ASKED = Provider(name="p", issuer="https://id.test", audiences=("a",), introspection=True, client=Client())
OPAQUE = Identity(mtls="permissive", providers=(ASKED,), resource="https://mcp.test/mcp")


def test_a_provider_that_cannot_be_asked_refuses() -> None:
    """With the refusal that whoever asked it gives."""
    bench = Bench(a_snapshot(allowing(), identity=OPAQUE))
    bench.answer = Refusal(Reason.NOT_READY, "away")
    _, requester = bench.ask((b"authorization", b"Bearer opaque"))
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert requester.refusals == [bench.answer]


def test_what_was_learnt_under_rules_of_before_is_asked_again() -> None:
    """A rotation in between must not refuse a good token."""
    bench = Bench(a_snapshot(allowing(), identity=OPAQUE))
    _, requester = bench.ask((b"authorization", b"Bearer opaque"))
    bench.serving.snapshot = a_snapshot(allowing(), identity=OPAQUE)
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]
    assert requester.refusals == []
    missing = bench.missing[-1]
    assert isinstance(missing, UnknownToken)
    again = UnknownToken(ASKED, missing.token, bench.serving.snapshot.trust)
    learn(again, {"active": True, "sub": "alice", "aud": "a"}, time.time())
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert (len(bench.missing), len(requester.calls)) == (2, 1)


class FakeCredentials:
    """Has them at hand, or fetches them, or fails."""

    def __init__(self, at_hand: Any, fetched: Any = ()) -> None:
        self.held, self.fetched = at_hand, fetched

    def at_hand(self, *_: object) -> Any:
        """What needs no waiting."""
        if isinstance(self.held, Exception):
            raise self.held
        return self.held

    async def fetch(self, *_: object) -> Any:
        """What does."""
        if isinstance(self.fetched, Exception):
            raise self.fetched
        return self.fetched


HEADERS = ((b"authorization", b"Bearer other"),)


def test_credentials_at_hand_travel_at_once() -> None:
    """The default path starts no coroutine."""
    bench = Bench(a_snapshot(allowing()), credentials=FakeCredentials(HEADERS))
    exchange, _ = bench.ask()

    assert (bench.upstream.sent, exchange.credentials, bench.spawned) == ([exchange], HEADERS, [])
    assert "Bearer" not in repr(exchange)


def test_a_call_waits_for_credentials_that_must_be_fetched() -> None:
    """It was admitted, and is not judged again."""
    bench = Bench(a_snapshot(allowing()), credentials=FakeCredentials(None, HEADERS))
    exchange, requester = bench.ask()
    assert bench.upstream.sent == []
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert (bench.upstream.sent, exchange.credentials, len(requester.calls)) == ([exchange], HEADERS, 1)


@pytest.mark.parametrize(
    ("failure", "reason"), [(Refusal(Reason.PROVIDER, "no"), Reason.PROVIDER), (ValueError("boom"), Reason.FAULT)]
)
def test_without_credentials_nothing_is_sent(failure: Exception, reason: Reason) -> None:
    """And the record says so: it was not let through."""
    bench = Bench(a_snapshot(allowing()), credentials=FakeCredentials(None, failure))
    exchange, requester = bench.ask()
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert bench.upstream.sent == []
    assert [each.reason for each in requester.refusals] == [reason]
    assert exchange.admission is None


def test_credentials_that_may_not_travel_refuse() -> None:
    """Such as a token for somebody else."""
    refusal = Refusal(Reason.UNAUTHENTICATED, "no")
    bench = Bench(a_snapshot(allowing()), credentials=FakeCredentials(refusal))
    exchange, requester = bench.ask()

    assert (requester.refusals, bench.upstream.sent) == ([refusal], [])
    assert exchange.admission is None


def test_who_has_gone_while_credentials_came_is_not_served() -> None:
    """Neither a call nor an answer."""
    bench = Bench(a_snapshot(allowing()), credentials=FakeCredentials(None, HEADERS))
    _, requester = bench.ask()
    requester.is_over = True
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert (requester.calls, requester.refusals, bench.upstream.sent) == ([], [], [])


def test_the_metadata_needs_no_identity() -> None:
    """It says how to get one."""
    bench = Bench(a_snapshot(allowing(), identity=OPAQUE))
    connection = a_connection(method="GET", path="/.well-known/oauth-protected-resource")
    _, requester = bench.send(connection)

    assert [each.status for each in requester.responses] == [200]
    assert (requester.refusals, bench.upstream.sent) == ([], [])


def test_every_observer_is_told_and_the_count_goes_down() -> None:
    """In flight is what was begun and not told."""
    bench = Bench(a_snapshot(allowing()))
    exchange, _ = bench.ask()
    assert bench.serving.in_flight == 1
    bench.serving.observe(exchange)

    assert (bench.serving.in_flight, bench.observer.exchanges) == (0, [exchange])


def test_the_trace_of_the_caller_goes_on() -> None:
    """W3C trace context; a broken one begins anew."""
    bench = Bench(a_snapshot(allowing()))
    good = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    followed, _ = bench.ask((b"traceparent", good))
    fresh, _ = bench.ask((b"traceparent", b"00-0-0-01"))

    assert (followed.trace_id, followed.parent_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert (len(fresh.trace_id), fresh.parent_id) == (32, None)
    assert followed.span_id != fresh.span_id


def test_without_a_snapshot_there_are_defaults() -> None:
    """A body must be bounded before the first bundle is there."""
    bare, full = Bench(None).serving, Bench(a_snapshot(allowing(), max_body_bytes=2048)).serving

    assert (bare.max_body_bytes, full.max_body_bytes) == (DEFAULT_MAX_BODY_BYTES, 2048)


def test_what_cannot_be_recorded_is_not_sent(tmp_path: Path) -> None:
    """By the real audit on a full device; the record of the refusal waits for room."""
    bench = Bench(a_snapshot(allowing()))
    audit = Audit(File("/dev/full"))
    bench.serving.announce = audit.begin
    exchange, requester = bench.ask()

    assert [each.reason for each in requester.refusals] == [Reason.NOT_READY]
    assert bench.upstream.sent == []
    assert not exchange.was_sent
    assert exchange.sent_s is None

    file = File(str(tmp_path / "audit.jsonl"))
    bench.serving.announce = Audit(file).begin
    exchange, requester = bench.ask()

    assert bench.upstream.sent == [exchange]
    assert (tmp_path / "audit.jsonl").read_bytes().count(b'"phase":"begin"') == 1
    audit.close()
    file.close()


# what was admitted and is not sent


class FakeStore:
    """Grants everything, and keeps what is given back."""

    is_up = True

    def __init__(self) -> None:
        self.returned: list[Charge] = []

    async def ask(self, charges: Sequence[Charge], _namespace: str) -> tuple[Judgement, ...]:
        """Take what is asked for."""
        return tuple(Judgement(wait_s=0.0, remaining=0.0, marks=(1,)) for _ in charges)

    def give_back(self, charges: Sequence[Charge], namespace: str) -> None:
        """Keep what was taken of *charges*."""
        assert namespace == "pay"
        self.returned += [each for each in charges if each.marks]

    def end(self, charges: Sequence[Charge]) -> None:
        """Hear of the end."""


HERE = Limit(name="here", rate_per_s=1e-6, burst=1, concurrent=1, per=())
SHARED = Limit(name="shared", rate_per_s=1e-6, burst=1, per=(), scope="global")
ANSWER = b'{"jsonrpc":"2.0","id":7,"result":{}}'


def is_free(bench: Bench) -> bool:
    """Say whether a call could be had under the limit of one."""
    account = bench.serving.memory.ledger.rules["here"].account((), 0.0)
    return account.bucket.tokens == 1 and account.under_way == 0


@pytest.mark.parametrize("is_shared", [False, True], ids=["here", "and in the store"])
@pytest.mark.parametrize("goes", [False, True], ids=["refused", "the client goes"])
def test_what_is_not_sent_after_all_costs_nothing(*, is_shared: bool, goes: bool) -> None:
    """No credentials, or nobody there when they come: units and places go back, once."""
    store = FakeStore() if is_shared else None
    both = [HERE] if store is None else [HERE, SHARED]
    failing = FakeCredentials(None, HEADERS if goes else Refusal(Reason.PROVIDER, "no"))
    bench = Bench(a_snapshot(allowing(), limits=both), credentials=failing, store=store)
    _, requester = bench.ask()
    if store is not None:
        asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]
    assert not is_free(bench)
    if goes:
        requester.leave()
    asyncio.run(bench.spawned.pop())  # type: ignore[arg-type]

    assert bench.upstream.sent == []
    assert is_free(bench)
    assert store is None or [each.name for each in store.returned] == ["shared"]
    assert bench.serving.in_flight == 0


def test_a_way_that_is_barred_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in sending is refused, and recorded as not sent."""
    bench = Bench(a_snapshot(allowing(), limits=[HERE]))
    monkeypatch.setattr(bench.upstream, "send", lambda *_, **__: 1 / 0)
    exchange, requester = bench.ask()

    assert [each.reason for each in requester.refusals] == [Reason.FAULT]
    assert is_free(bench)
    assert not exchange.was_sent


@pytest.mark.parametrize("goes", [False, True], ids=["refused", "the client goes"])
def test_an_answer_that_was_not_sent_can_be_given_again(*, goes: bool) -> None:
    """The server's question still waits, and once."""
    failing = FakeCredentials(None, HEADERS if goes else Refusal(Reason.PROVIDER, "no"))
    bench = Bench(a_snapshot(allowing()), credentials=failing)
    asked, whose = bench.serving.memory.asked, scope(bench.ask()[0])
    asked.add(whose, 7)
    _, requester = bench.send(a_connection(ANSWER))
    assert not asked.has(whose, 7)
    if goes:
        requester.leave()
    for each in bench.spawned:
        asyncio.run(each)  # type: ignore[arg-type]

    assert asked.waiting == {(whose, 7): 1}


def test_a_request_that_was_not_sent_hides_no_other() -> None:
    """Its id can be another's, which goes on and may still be cancelled."""
    credentials = FakeCredentials(None, HEADERS)
    bench = Bench(a_snapshot(allowing()), credentials=credentials)
    first, _ = bench.ask()
    _, leaving = bench.ask()
    leaving.leave()
    for each in bench.spawned:
        asyncio.run(each)  # type: ignore[arg-type]

    assert bench.upstream.sent == [first]
    assert bench.serving.memory.calls.waiting == {(scope(first), 7): 1}


def test_a_defect_in_a_batch_refuses_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of its messages stays under way: they would fill a limit of calls at a time for ever."""
    admitted: list[Any] = []

    def admit(*arguments: Any) -> Any:
        admitted.append(limits.admit(*arguments) if len(admitted) < 2 else 1 / 0)
        return admitted[-1]

    monkeypatch.setattr("sidecar.pipeline.admit", admit)
    bench = Bench(a_snapshot(allowing(), limits=[msgspec.structs.replace(HERE, burst=3, concurrent=3)]))
    body = b"[" + b",".join(a_call(request_id=number) for number in range(3)) + b"]"
    _, requester = bench.send(a_connection(body, headers=[(b"mcp-protocol-version", b"2025-03-26")]))
    account = bench.serving.memory.ledger.rules["here"].account((), 0.0)

    assert (len(admitted), account.under_way, account.bucket.tokens, bench.serving.in_flight) == (2, 0, 3, 0)
    assert [each.refusal.reason for each in requester.exchanges if each.refusal] == [Reason.FAULT] * 3


# sessions that the server gives twice


@dataclass(eq=False)
class FakeConnection:
    """A connection with a stream."""

    streams: Sequence[Exchange]
    ended: str = ""

    def end_streams(self, why: str) -> None:
        """Keep *why*."""
        self.ended = why


def test_a_stream_of_who_had_a_session_before_ends() -> None:
    """What the server says there is another's now."""
    bench = Bench(a_snapshot(allowing()))
    connections = {}
    for user, session_id in (("alice", "1"), ("alice", "2"), ("bob", "1")):
        stream = replace(an_exchange(message=STREAM), principal=a_principal(user), session_id=session_id)
        connections[user, session_id] = FakeConnection([stream])
        bench.serving.connections.add(connections[user, session_id])
    for user in ("alice", "bob"):
        opening = a_question(a_request("initialize")).message
        bench.serving.remember(replace(an_exchange(message=opening), principal=a_principal(user)), 200, "1")

    assert {key for key, each in connections.items() if each.ended} == {("alice", "1")}
