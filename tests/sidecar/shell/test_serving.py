"""sidecar.shell.serving: what is not ready refuses, what waits for a key is judged afresh, what is told is told."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from sidecar.core.identity import UnknownKey
from sidecar.core.profile import Identity, Provider
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import Snapshot
from sidecar.shell.serving import DEFAULT_MAX_BODY_BYTES, NOT_READY_RETRY_S, Serving
from tests.builders import a_call, a_connection, a_snapshot
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

    def __init__(self) -> None:
        self.is_over = False
        self.calls: list[object] = []
        self.refusals: list[Refusal] = []

    def forward(self, call: object) -> None:
        """Keep *call*."""
        self.calls.append(call)

    def refuse(self, refusal: Refusal) -> None:
        """Keep *refusal*."""
        self.refusals.append(refusal)


class Bench:
    """A Serving with fakes around it; coroutines are kept until the test runs them."""

    def __init__(self, snapshot: Snapshot | None, *, why: str | None = None) -> None:
        self.upstream, self.observer = FakeUpstream(), FakeObserver()
        self.spawned: list[Coroutine[Any, Any, None]] = []
        self.missing: list[UnknownKey] = []
        self.why = why
        self.serving = Serving(
            upstream=self.upstream,  # type: ignore[arg-type]
            observers=[self.observer],
            spawn=self.spawned.append,
            resolve=self.find,
            why_not_ready=lambda: self.why,
        )
        self.serving.snapshot = snapshot

    async def find(self, missing: UnknownKey) -> None:
        """Find nothing."""
        self.missing.append(missing)

    def ask(self, *headers: tuple[bytes, bytes]) -> tuple[Exchange, FakeRequester]:
        """Begin and admit one call."""
        exchange, requester = self.serving.begin(a_connection(a_call(), headers=headers)), FakeRequester()
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
    """A body must be bounded before the first bundle is there; nothing is visible."""
    bare, full = Bench(None).serving, Bench(a_snapshot(allowing(), max_body_bytes=2048)).serving

    assert (bare.max_body_bytes, full.max_body_bytes) == (DEFAULT_MAX_BODY_BYTES, 2048)
    assert (bare.engines, len(full.engines)) == ((), 1)
