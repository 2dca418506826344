"""Lines reach their receiver in order, at least once, whatever it does meanwhile; what does not is counted."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from certs.spiffe import SpiffeId
from certs.tls import MutualClient, MutualServer, peer_of
from sidecar.config import Settings, ShipFormat
from sidecar.core.chain import verify
from sidecar.core.profile import Audit as AuditProfile
from sidecar.errors import ConfigError, Reason, Refusal
from sidecar.shell import shipping, trail
from sidecar.shell.audit import Audit
from sidecar.shell.shipping import NotTakenError, Shipping, opened
from sidecar.shell.trail import File
from tests.fakes import eventually
from tests.sidecar.exchanges import a_profile, an_exchange
from tests.sidecar.shell.test_bundles import TRUST, an_svid

KEEP_BYTES = 1_000_000.0


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses."""
    monkeypatch.setattr(shipping, "LINGER_S", 0.01)
    monkeypatch.setattr(shipping, "BACKOFF_S", (0.01, 0.02))


@dataclass
class Receiver:
    """Takes lines, or answers with what is in *statuses* first."""

    statuses: list[int] = field(default_factory=list)
    retry_after: str = "0"
    takes: int = 10**9  # lines at a time; more are answered with 413
    hangs: bool = False
    port: int = 0
    lines: list[bytes] = field(default_factory=list)
    requests: list[web.Request] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one POST."""
        body = await request.read()
        self.requests.append(request)
        peer = None if request.transport is None else peer_of(request.transport)
        self.callers += [] if peer is None else [str(peer.spiffe_id)]
        if self.hangs:
            await asyncio.sleep(60)
        if self.statuses:
            return web.Response(status=self.statuses.pop(0), headers={"Retry-After": self.retry_after})
        lines = body.splitlines(keepends=True)
        if len(lines) > self.takes:
            return web.Response(status=413)
        self.lines += lines
        return web.json_response({})

    @property
    def numbers(self) -> list[int]:
        """The places in the chain of the lines that arrived."""
        return [json.loads(line)["chain"]["seq"] for line in self.lines]


@asynccontextmanager
async def serving(receiver: Receiver, tls: MutualServer | None = None) -> AsyncIterator[Receiver]:
    """Let *receiver* listen, on the port that it had before."""
    application = web.Application(client_max_size=2**26)
    application.router.add_post("/{path:.*}", receiver.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", receiver.port, ssl_context=tls and tls.context).start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()


def settings(path: Path, port: int, **changes: Any) -> Settings:
    """Return settings that ship the lines of *path*."""
    given = {
        "audit_sink": str(path),
        "audit_keep_bytes": KEEP_BYTES,
        "audit_ship": f"http://127.0.0.1:{port}/in",
        "audit_ship_format": ShipFormat.LINES,
        "workload": "billing",
        "namespace": "pay",
        "pod": "billing-0",
    }
    return Settings(**(given | changes))


def file_of(chosen: Settings) -> File:
    """Return the audit file."""
    file = opened(chosen)
    assert file is not None
    return file


@asynccontextmanager
async def shipping_to(chosen: Settings, file: File) -> AsyncIterator[Shipping]:
    """Ship in the background."""
    made = Shipping(chosen, file, None)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(made.run())
        try:
            yield made
        finally:
            task.cancel()


def begin(audit: Audit, count: int) -> None:
    """Write that so many calls are about to be sent."""
    for _ in range(count):
        audit.begin([an_exchange()])


def observe(audit: Audit, count: int) -> None:
    """Write records of *count* calls."""
    for _ in range(count):
        audit.observe(an_exchange())


async def test_lines_arrive_as_they_stand(tmp_path: Path) -> None:
    """Those that were there before, those that come, and those of files before; compressed, and with the token of now."""
    (tmp_path / "token").write_text("first\n")
    async with serving(Receiver()) as receiver:
        path = tmp_path / "audit.jsonl"
        chosen = settings(path, receiver.port, audit_ship_token_file=str(tmp_path / "token"))
        file = file_of(chosen)
        audit = Audit(file)
        observe(audit, 5)
        file._rotate()
        observe(audit, 5)
        async with shipping_to(chosen, file) as made:
            await eventually(lambda: len(receiver.lines) == 10, what="what was there")
            (tmp_path / "token").write_text("second\n")
            observe(audit, 3)
            await eventually(lambda: len(receiver.lines) == 13, what="what came")
            await eventually(lambda: file.waiting_bytes == 0, what="the position")

    assert verify(receiver.lines, None).is_sound
    assert (made.shipped, made.rejected, made.failures) == (13, 0, 0)
    told = {instrument.name: read() for instrument, read in made.gauges()}
    assert told == {
        "sidegate.audit_shipped": {("taken",): 13, ("refused",): 0},
        "sidegate.audit_retries": 0,
        "sidegate.audit.waiting": 0,
    }
    heads = receiver.requests[0].headers
    assert (heads["content-type"], heads["content-encoding"]) == ("application/x-ndjson", "gzip")
    assert [each.headers["authorization"] for each in (receiver.requests[0], receiver.requests[-1])] == [
        "Bearer first",
        "Bearer second",
    ]


async def test_a_dead_receiver_loses_nothing_within_the_bound(tmp_path: Path) -> None:
    """It was never there, comes, goes, and comes again, while the sidecar restarts: each line arrives, in order."""
    receiver = Receiver()
    async with serving(receiver):
        pass  # its port is known, and nobody listens there
    chosen = settings(tmp_path / "audit.jsonl", receiver.port)
    for life in range(1, 4):
        file = file_of(chosen)
        audit = Audit(file)
        async with shipping_to(chosen, file) as made:
            observe(audit, 20)
            await eventually(lambda: made.failures > 1, what="failures")
            async with serving(receiver):
                observe(audit, 20)
                await eventually(lambda: file.waiting_bytes == 0, what="all lines")  # noqa: B023 - same
            observe(audit, 5)
        audit.close()
        assert life * 40 <= len(receiver.lines) <= life * 45
    async with serving(receiver):
        await Shipping(chosen, file_of(chosen), None).flush()

    report = verify(receiver.lines, None)
    assert report.is_sound
    assert [state.lines for state in report.chains.values()] == [45, 45, 45]


async def test_a_slow_receiver_is_given_up_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines, later: twice is possible, and their places tell."""
    monkeypatch.setattr(shipping, "POST_S", 0.05)
    async with serving(Receiver(hangs=True)) as receiver:
        chosen = settings(tmp_path / "audit.jsonl", receiver.port)
        file = file_of(chosen)
        observe(Audit(file), 3)
        async with shipping_to(chosen, file) as made:
            await eventually(lambda: made.failures >= 2, what="failures")
            monkeypatch.setattr(shipping, "POST_S", 30.0)
            receiver.hangs = False
            await eventually(lambda: file.waiting_bytes == 0, what="all lines")

    assert sorted(set(receiver.numbers)) == [1, 2, 3]


@pytest.mark.parametrize("status", [302, 401, 404, 429, 500, 503])
async def test_what_may_be_healed_is_tried_again(tmp_path: Path, status: int) -> None:
    """A wrong token is replaced, a receiver gets well; nothing is passed over."""
    async with serving(Receiver(statuses=[status, status])) as receiver:
        chosen = settings(tmp_path / "audit.jsonl", receiver.port)
        file = file_of(chosen)
        observe(Audit(file), 3)
        async with shipping_to(chosen, file) as made:
            await eventually(lambda: len(receiver.lines) == 3, what="all lines")

    assert (receiver.numbers, made.failures) == ([1, 2, 3], 2)


@pytest.mark.parametrize(("asked", "pause_s"), [("7", 7.0), ("0", 0.005), ("3600", 60.0), ("soon", 0.005)])
async def test_a_receiver_says_when_to_come_again(tmp_path: Path, asked: str, pause_s: float) -> None:
    """OTLP: Retry-After is honoured, up to a minute; our own pauses grow all the same."""
    async with serving(Receiver(statuses=[429], retry_after=asked)) as receiver, aiohttp.ClientSession() as session:
        chosen = settings(tmp_path / "audit.jsonl", receiver.port)
        file = file_of(chosen)
        observe(Audit(file), 1)
        with pytest.raises(NotTakenError, match="HTTP 429") as caught:
            await Shipping(chosen, file, None)._ship(session)

    assert pause_s <= shipping._pause_s(1, caught.value) <= max(pause_s, 0.01)


async def test_too_large_a_batch_is_divided(tmp_path: Path) -> None:
    """413 says so; the halves come in order."""
    async with serving(Receiver(takes=3)) as receiver:
        chosen = settings(tmp_path / "audit.jsonl", receiver.port)
        file = file_of(chosen)
        observe(Audit(file), 20)
        async with shipping_to(chosen, file) as made:
            await eventually(lambda: len(receiver.lines) == 20, what="all lines")

    assert (receiver.numbers, made.rejected, made.shipped) == (list(range(1, 21)), 0, 20)


async def test_a_line_that_is_refused_by_itself_holds_nothing_up(tmp_path: Path) -> None:
    """It is counted, and stays in the file."""
    async with serving(Receiver(statuses=[400, 400])) as receiver:
        chosen = settings(tmp_path / "audit.jsonl", receiver.port)
        file = file_of(chosen)
        observe(Audit(file), 2)
        async with shipping_to(chosen, file) as made:
            await eventually(lambda: file.waiting_bytes == 0, what="the end")

    assert (receiver.numbers, made.rejected, made.shipped) == ([2], 1, 1)


async def test_otlp_goes_to_the_signal_s_path_and_counts_what_is_not_taken(tmp_path: Path) -> None:
    """As OTLP/HTTP has it."""
    bodies: list[Any] = []

    async def take(request: web.Request) -> web.Response:
        bodies.append(json.loads(await request.read()))
        return web.json_response({"partialSuccess": {"rejectedLogRecords": "1", "errorMessage": "full"}})

    receiver = Receiver()
    receiver.handle = take  # type: ignore[method-assign]
    async with serving(receiver):
        base = f"http://127.0.0.1:{receiver.port}"
        chosen = settings(tmp_path / "audit.jsonl", 0, audit_ship=base, audit_ship_format=ShipFormat.OTLP)
        file = file_of(chosen)
        observe(Audit(file), 2)
        async with shipping_to(chosen, file) as made:
            await eventually(lambda: file.waiting_bytes == 0, what="the end")

    (body,) = bodies
    described = body["resourceLogs"][0]["resource"]["attributes"]
    assert {"key": "k8s.pod.name", "value": {"stringValue": "billing-0"}} in described
    assert (made.shipped, made.rejected) == (1, 1)


async def test_the_receiver_must_be_whom_we_expect_and_learns_who_we_are(tmp_path: Path) -> None:
    """By mutual TLS with SVIDs; a receiver with another identity gets nothing."""
    client, server = MutualClient(), MutualServer()
    client.use(an_svid(SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing")), TRUST)
    server.use(an_svid(SpiffeId.parse("spiffe://a.test/ns/siem/sa/collector")), TRUST)
    async with serving(Receiver(), tls=server) as receiver:
        url = f"https://127.0.0.1:{receiver.port}/in"
        right = settings(tmp_path / "audit.jsonl", 0, audit_ship=url, audit_ship_id="spiffe://a.test/ns/siem/sa/*")
        file = file_of(right)
        observe(Audit(file), 2)
        wrong = replace(right, audit_ship_id="spiffe://a.test/ns/pay/sa/billing")
        await Shipping(wrong, file, client).flush()
        assert receiver.lines == []
        await Shipping(right, file, client).flush()

    assert receiver.numbers == [1, 2]
    assert receiver.callers == ["spiffe://a.test/ns/pay/sa/billing"]


async def test_beyond_the_bound_calls_are_refused_or_lines_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the profile says; and when the receiver is back, the chain says how many lines are gone."""
    receiver = Receiver()
    async with serving(receiver):
        pass
    chosen = settings(tmp_path / "audit.jsonl", receiver.port, audit_keep_bytes=100_000.0)
    file = file_of(chosen)
    audit = Audit(file, sign=lambda _: "signature")
    with pytest.raises(Refusal) as refused:
        begin(audit, 200)
    assert (refused.value.reason, refused.value.retry_after_s) == (Reason.NOT_READY, 5)
    assert (audit.failed, audit.lost) == (True, 0)
    written = audit.records

    dropping = a_profile(audit=AuditProfile(when_full="drop"))
    for _ in range(200):
        audit.begin([an_exchange(profile=dropping)])
    assert (audit.failed, audit.records) == (False, written + 200)
    assert audit.lost > 0

    monkeypatch.setattr("sidecar.shell.audit.CHECKPOINT_LINES", 1)
    async with serving(receiver), shipping_to(chosen, file):
        audit.observe(an_exchange())
        await eventually(lambda: file.waiting_bytes == 0, what="all lines")
    arrived = len([line for line in receiver.lines if b'"phase"' in line])
    (state,) = verify(receiver.lines, None).chains.values()
    assert arrived == written + 201 - audit.lost
    assert state.lost == audit.lost
    assert file.kept_bytes <= 100_000 * 9 // 8


async def test_what_is_left_is_shipped_at_the_end(tmp_path: Path) -> None:
    """A pod's files go with it; and an end is not held up by a receiver that is away."""
    receiver = Receiver()
    async with serving(receiver):
        pass
    chosen = settings(tmp_path / "audit.jsonl", receiver.port)
    file = file_of(chosen)
    audit = Audit(file)
    observe(audit, 3)
    audit.close()
    made = Shipping(chosen, file, None)

    await made.flush()
    assert made.shipped == 0
    async with serving(receiver):
        await made.flush()
    assert receiver.numbers == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"audit_sink": "stdout"}, "only where SIDEGATE_AUDIT_SINK is the path of a file"),
        ({"audit_keep_bytes": 0.0}, "needs SIDEGATE_AUDIT_KEEP_BYTES"),
        ({"audit_ship_id": "https://x"}, "SIDEGATE_AUDIT_SHIP_ID or SIDEGATE_AUDIT_SHIP_CA_FILE"),
        ({"audit_ship_id": "spiffe://a.test/ns/x/sa/y"}, "needs SIDEGATE_SPIFFE_SOCKET"),
        ({"audit_ship_ca_file": "/nowhere.pem"}, "No such file"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """At the start, by a text that names them."""
    chosen = settings(tmp_path / "audit.jsonl", 1, **changes)
    with pytest.raises(ConfigError, match=said):
        Shipping(chosen, file_of(chosen), None)


@pytest.mark.parametrize("how", ["moved", "cut"])
async def test_a_file_that_somebody_else_rotates_is_shipped_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The place in the old file says nothing of the new one; half a line or none would be sent from there."""
    monkeypatch.setattr(trail, "LOOK_S", 0.0)
    path = tmp_path / "audit.jsonl"
    async with serving(Receiver()) as receiver:
        chosen = settings(path, receiver.port)
        file = file_of(chosen)
        audit = Audit(file)
        observe(audit, 10)
        async with shipping_to(chosen, file):
            await eventually(lambda: len(receiver.lines) == 10, what="the first lines")
            if how == "moved":
                path.rename(tmp_path / "audit.jsonl-20261122")
            else:
                os.truncate(path, 0)
            observe(audit, 3)
            await eventually(lambda: len(receiver.lines) == 13, what="the lines of the new file")
        audit.close()

    assert verify(receiver.lines, None).is_sound
