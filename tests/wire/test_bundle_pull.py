"""The sidecar's puller and the control plane's endpoint, as they are, over real mutual TLS.

What is no bundle for this pod is refused, whoever serves it; what is one reaches the connections that are open.
"""

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from certs.authority import make_key
from certs.tls import MutualClient, MutualServer
from sidecar.core import profile
from sidecar.core.bundle import Bundle, Limits, Stamp, encode
from sidecar.core.keyring import PrivateKey, pem_of
from sidecar.core.profile import Audit, Identity, PolicySet, Profile, Server
from sidecar.shell import bundles as module
from sidecar.shell.bundles import LAST_GOOD, BundleSource
from sidecar.shell.lifetimes import Lifetimes
from sidecar.shell.snapshot import Snapshots
from tests.builders import ANYBODY, a_call
from tests.fakes import Client, Heard, a_path, a_server, eventually, post, response
from tests.sidecar.core.test_bundle import archive, members
from tests.sidecar.shell.test_bundles import CONTROL_PLANE, KEY, POD, SETTINGS, TRUST, FakeControlPlane, an_svid
from tests.sidecar.shell.test_bundles import Sidecar as Receiver
from tests.sidecar.shell.test_bundles import _serving as serving
from webhook.core.reports import Reports
from webhook.core.signing import KeyTimes, SigningKeys, due
from webhook.shell.bundles import BundleEndpoint, Bundles
from webhook.shell.metrics import Metrics

POD_KEY = ("pay", "billing-1")
SERVER = Server(namespace="pay", workload="billing", name="billing", port=8000)
HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", (0.001, 0.01))
    monkeypatch.setattr(module, "NO_IDENTITY_S", 0.001)


def files(number: int, *, workload: str = "billing") -> dict[str, bytes]:
    """Return the files of a bundle that is told by *number*."""
    server = Server(namespace="pay", workload=workload, name="billing", port=8000)
    return {"sidegate.json": profile.encode(Profile(server=server, audit=Audit(max_bytes=number)))}


def a_bundle(number: int, sequence: int, *, term: int = 5, key: PrivateKey = KEY, **changes: Any) -> bytes:
    """Return a signed bundle, the newer the higher *term* and *sequence*."""
    return encode(files(number, **changes), key, stamp=Stamp(term=term, sequence=sequence))


GOOD = a_bundle(1, 50)


class Clock:
    """Both clocks of a machine, which stand until the test moves them."""

    def __init__(self) -> None:
        self.wall_s = 1.8e9
        self.monotonic_s = 1000.0

    def wall(self) -> float:
        """Return Unix time."""
        return self.wall_s

    def monotonic(self) -> float:
        """Return what only grows."""
        return self.monotonic_s

    def passes(self, seconds: float) -> None:
        """Let time pass."""
        self.wall_s += seconds
        self.monotonic_s += seconds


@asynccontextmanager
async def pulling(url: str, activate: Any, clock: Clock | None = None, **settings: Any) -> AsyncIterator[BundleSource]:
    """Run a BundleSource against *url*."""
    client = MutualClient()
    client.use(an_svid(POD), TRUST)
    clocks = {} if clock is None else {"wall": clock.wall, "clock": clock.monotonic}
    async with aiohttp.ClientSession(auto_decompress=False) as session, asyncio.TaskGroup() as tasks:
        source = BundleSource(replace(SETTINGS, control_plane=url, **settings), session, client, activate, **clocks)
        running = tasks.create_task(source.run())
        try:
            yield source
        finally:
            running.cancel()


class Plane:
    """The control plane's endpoint."""

    def __init__(self) -> None:
        self.bundles = Bundles()
        self.reports = Reports()
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Plane"]:
        """Serve on a free port."""
        server = MutualServer()
        server.use(an_svid(CONTROL_PLANE), TRUST)
        endpoint = BundleEndpoint(self.bundles, POD.trust_domain, Metrics(), reports=self.reports)
        application = web.Application()
        application.router.add_get("/v1/bundles/{pod}", endpoint.get)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server.context).start()
        self.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def publish(self, content: dict[str, bytes], sequence: int) -> None:
        """Hand out the bundle of *content* from now on."""
        self.bundles.publish(POD_KEY, await self.bundles.sign(content, sequence), sequence)

    def reported(self) -> tuple[str, str] | None:
        """Return revision and error that the pod reported last."""
        report = self.reports.alive(datetime.now(UTC).timestamp()).get(POD_KEY)
        return None if report is None else (report.revision, report.error)


async def test_pod_gets_its_bundle_and_each_new_one_at_once() -> None:
    """From "no such pod" over the first bundle to the second, in one conversation, in which it reports back."""
    receiver = Receiver()
    async with Plane().running() as plane, pulling(plane.url, receiver.activate) as source:
        plane.bundles.keys = SigningKeys(current=KEY, term=1)
        await eventually(lambda: "no injected pod pay/billing-1" in source.detail, what="refusal")
        plane.bundles.track(POD_KEY, "billing")
        await plane.publish(files(1), 1)
        await eventually(lambda: receiver.numbers == [1], what="first bundle")
        await plane.publish(files(2), 2)
        await eventually(lambda: receiver.numbers == [1, 2], what="second bundle")
        await eventually(lambda: plane.reported() == (receiver.revisions[1], ""), what="report")


async def test_older_policy_that_is_applied_again_is_enforced_again() -> None:
    """A rollback is a new change with an old content: the revision says which."""
    receiver = Receiver()
    async with Plane().running() as plane, pulling(plane.url, receiver.activate):
        plane.bundles.keys = SigningKeys(current=KEY, term=1)
        plane.bundles.track(POD_KEY, "billing")
        for sequence, number in enumerate((1, 2, 1)):
            await plane.publish(files(number), 10 + sequence)
            await eventually(lambda n=sequence: len(receiver.numbers) == n + 1, what="bundle")  # type: ignore[misc]

    assert receiver.numbers == [1, 2, 1]
    assert receiver.revisions[0] == receiver.revisions[2]


async def test_replica_that_has_not_heard_of_a_change_does_not_undo_it() -> None:
    """Its older bundle is refused, and the refusal reported to it, until it has seen as much as the other."""
    receiver = Receiver()
    async with Plane().running() as first, Plane().running() as second, pulling(first.url, receiver.activate) as source:
        for plane, number in ((first, 2), (second, 1)):
            plane.bundles.keys = SigningKeys(current=KEY, term=1)
            plane.bundles.track(POD_KEY, "billing")
            await plane.publish(files(number), 10 + number)
        await eventually(lambda: receiver.numbers == [2], what="newer bundle")
        source._url = source._url.replace(first.url, second.url)
        first.bundles.forget(POD_KEY)  # which ends the long poll
        await eventually(lambda: "older than the one before: term 1, sequence 11" in source.detail, what="refusal")
        await eventually(lambda: "older" in (second.reported() or ("", ""))[1], what="report of the refusal")
        assert source.refusals > 0
        second.bundles.floor = 13  # all that has happened since was seen: the older content is the present one
        await eventually(lambda: receiver.numbers == [2, 1], what="the content of today")
        await eventually(lambda: second.reported() == (receiver.revisions[1], ""), what="report")


async def test_keys_are_rotated_under_running_sidecars(tmp_path: Path) -> None:
    """No pod is restarted, also not one that was away for several rotations; a key that was replaced is worth nothing."""
    receiver, now_s = Receiver(), 1.8e9
    keys = due(None, now_s, KeyTimes(age_s=100, overlap_s=10), lambda: KEY)
    begun = keys
    settings: dict[str, Any] = {"bundle_keys": pem_of(keys.believed), "bundle_dir": str(tmp_path)}
    async with Plane().running() as plane:
        plane.bundles.track(POD_KEY, "billing")
        async with pulling(plane.url, receiver.activate, **settings) as source:
            for number in range(1, 8):  # three and a half rotations, each with its overlap
                plane.bundles.keys = keys
                await plane.publish(files(number), number)
                await eventually(lambda n=number: len(receiver.numbers) == n, what="bundle")  # type: ignore[misc]
                now_s += 100 if keys.previous is None else 10
                keys = due(keys, now_s, KeyTimes(age_s=100, overlap_s=10), make_key)
        for _ in range(4):  # and two while the sidecar was away
            now_s += 100
            keys = due(keys, now_s, KeyTimes(age_s=100, overlap_s=10), make_key)
        plane.bundles.keys = keys
        await plane.publish(files(8), 8)
        restarted = Receiver()
        async with pulling(plane.url, restarted.activate, **settings) as source:
            await eventually(lambda: restarted.numbers == [7, 8], what="kept bundle, then the new one")
            plane.bundles.keys = replace(begun, term=keys.term + 1)  # a thief of the first key, in the plane's place
            await plane.publish(files(9), 9)
            await eventually(lambda: "not signed by a key that is trusted here" in source.detail, what="refusal")

    assert receiver.numbers == [1, 2, 3, 4, 5, 6, 7]
    assert restarted.numbers == [7, 8]


def a_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Return the head of a member that is no plain file."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def with_member(*more: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    """Return a newer bundle that holds *more* members."""
    return archive(*members(a_bundle(2, 60)).items(), *more)


def changed(name: str, content: bytes) -> bytes:
    """Return a newer bundle in which *name* was replaced after signing."""
    return archive(*(members(a_bundle(2, 60)) | {name: content}).items())


def a_bomb() -> bytes:
    """Return a few KB that unpack to more than any bundle may hold."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("data.json")
        member.size = Limits().total_bytes + 1
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    assert len(packed.getvalue()) < 2**20
    return packed.getvalue()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "tampered": (lambda: changed("/sidegate.json", files(3)["sidegate.json"]), "is not what was signed"),
    "truncated": (lambda: a_bundle(2, 60)[:-30], "truncated"),
    "replayed: an older sequence": (lambda: a_bundle(2, 49), "older than the one before"),
    "replayed: an older term": (lambda: a_bundle(2, 999, term=4), "older than the one before"),
    "replayed: without a stamp": (lambda: encode(files(2), KEY), "older than the one before"),
    "its stamp raised after signing": (
        lambda: changed("/.manifest", members(a_bundle(2, 40))["/.manifest"].replace(b"40", b"90")),
        "is not what was signed",
    ),
    "wrongly signed": (lambda: a_bundle(2, 60, key=make_key()), "not signed by a key that is trusted here"),
    "not signed": (lambda: archive(("sidegate.json", files(2)["sidegate.json"])), ".signatures.json: missing"),
    "oversized": (lambda: os.urandom(Limits().packed_bytes + 1), "larger than 16777216 bytes"),
    "decompression bomb": (a_bomb, "unpacks to more than 67108864 bytes"),
    "too many files": (lambda: with_member(*((f"policy/{n}.rego", b"") for n in range(1100))), "more than 1024 files"),
    "path traversal": (lambda: with_member(("../../etc/passwd.rego", b"x")), "not a path inside the bundle"),
    "absolute path twice": (lambda: with_member(("//sidegate.json", b"x")), "not a path inside the bundle"),
    "symbolic link": (lambda: with_member((a_member("data.json", tarfile.SYMTYPE, "/etc/passwd"), b"")), "plain files"),
    "hard link": (lambda: with_member((a_member("data.json", tarfile.LNKTYPE, "sidegate.json"), b"")), "plain files"),
    "device": (lambda: with_member((a_member("data.json", tarfile.CHRTYPE), b"")), "plain files"),
    "duplicate name": (lambda: with_member(("sidegate.json", files(3)["sidegate.json"])), "given twice"),
    "unknown file": (lambda: with_member(("run.sh", b"x")), "no such file in a bundle"),
    "another workload's": (lambda: a_bundle(2, 60, workload="payroll"), "made for pay/payroll"),
    "no archive": (lambda: b"<html>502</html>", "not gzip"),
    "nothing": (lambda: b"", "truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_what_is_no_bundle_for_this_pod_changes_nothing(case: str, tmp_path: Path) -> None:
    """Refused with its reason, counted, told to the control plane; the last good one stays, on disk too."""
    make, why = HOSTILE[case]
    plane, receiver = FakeControlPlane(), Receiver()
    plane.data = GOOD
    async with serving(plane), pulling(plane.url, receiver.activate, bundle_dir=str(tmp_path)) as source:
        await eventually(lambda: source.detail == "confirmed", what="good bundle")
        plane.publish(make(), '"2"')
        await eventually(lambda: why in source.detail and source.refusals, what=why)
        await eventually(lambda: why in plane.asked[-1].headers.get("Sidegate-Bundle-Error", ""), what="report")
        assert (tmp_path / LAST_GOOD).read_bytes() == GOOD
        assert receiver.numbers == [1]
        plane.publish(a_bundle(3, 70), '"3"')
        await eventually(lambda: source.detail == "confirmed", what="next good bundle")

    assert receiver.numbers == [1, 3]


async def test_older_bundle_stays_refused_after_a_restart(tmp_path: Path) -> None:
    """What was seen is kept beside the last good one: in it. Also when that does not load any more."""
    plane = FakeControlPlane()
    (tmp_path / LAST_GOOD).write_bytes(GOOD)
    for refuses in (set[int](), {1}):
        receiver = Receiver()
        receiver.refuses = refuses
        plane.data = a_bundle(2, 49)
        async with serving(plane), pulling(plane.url, receiver.activate, bundle_dir=str(tmp_path)) as source:
            await eventually(lambda s=source: "older than the one before" in s.detail, what="refusal")  # type: ignore[misc]

        assert receiver.numbers == [each for each in [1] if each not in refuses]


async def test_control_plane_may_be_away_up_to_the_limit_whatever_the_clock_says() -> None:
    """An hour is bridged though somebody sets the clock; beyond the limit calls are refused until it is back."""
    plane, receiver, clock = FakeControlPlane(), Receiver(), Clock()
    plane.data = GOOD
    async with (
        serving(plane),
        pulling(plane.url, receiver.activate, clock, bundle_max_age_s=2 * HOUR_S) as source,
    ):
        await eventually(lambda: source.detail == "confirmed", what="bundle")
        plane.status = 503
        plane.changed.set()
        await eventually(lambda: "HTTP 503" in source.detail, what="absence")
        clock.passes(HOUR_S)
        assert (source.age_s, source.is_stale) == (HOUR_S, False)
        for shift_s in (86_400.0, -172_800.0):
            clock.wall_s += shift_s
            assert (source.age_s, source.is_stale) == (HOUR_S, False)
        clock.passes(HOUR_S + 1)
        assert source.is_stale
        plane.status = 200
        await eventually(lambda: not source.is_stale, what="confirmation")

    assert receiver.numbers == [1]


@pytest.mark.parametrize(("away_s", "is_stale"), [(HOUR_S, False), (2 * HOUR_S + 1, True)])
async def test_time_without_a_process_counts(tmp_path: Path, *, away_s: float, is_stale: bool) -> None:
    """A restart makes no bundle younger."""
    plane, receiver, clock = FakeControlPlane(), Receiver(), Clock()
    plane.status = 503
    (tmp_path / LAST_GOOD).write_bytes(GOOD)
    os.utime(tmp_path / LAST_GOOD, (clock.wall_s - away_s,) * 2)
    settings: dict[str, Any] = {"bundle_dir": str(tmp_path), "bundle_max_age_s": 2 * HOUR_S}
    async with serving(plane), pulling(plane.url, receiver.activate, clock, **settings) as source:
        await eventually(lambda: "HTTP 503" in source.detail, what="absence")

        assert receiver.numbers == [1]
        assert source.age_s == pytest.approx(away_s)
        assert source.is_stale is is_stale


# --- open connections ---

EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n9\r\n: hello\n\n\r\n"
GET = b"GET /mcp HTTP/1.1\r\nHost: billing.test\r\nAccept: text/event-stream\r\n\r\n"
EVERYTHING = "permit (principal, action, resource);"
CALLS_ALONE = 'permit (principal, action == Action::"tools/call", resource == Tool::"billing/read_schema");'


async def server_script(heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Answer calls; hold streams open."""
    writer.write(EVENTS if heard.line.startswith(b"GET") else response(b'{"jsonrpc":"2.0","id":7,"result":{}}'))


async def test_new_bundle_takes_effect_on_open_connections(tmp_path: Path) -> None:
    """The next call on a connection that stays is judged by it, and a stream ends whose client may not call any more."""

    def content(port: int, policy: str, identity: Identity = ANYBODY) -> dict[str, bytes]:
        server = Server(namespace="pay", workload="billing", name="billing", port=port)
        made = Profile(server=server, identity=identity, policies=(PolicySet(cedar=True),))
        return {"sidegate.json": profile.encode(made), "cedar/policy.cedar": policy.encode()}

    async def outcome(client: Client, tool: str) -> bool:
        await client.say(post(a_call(tool)))
        heard = await client.hear()
        assert heard is not None
        return b'"result"' in heard.body

    async with a_server(server_script) as (_, port), a_path(None) as path, Plane().running() as plane:
        lifetimes = Lifetimes(path.serving, max_age_s=HOUR_S, grace_s=30)
        snapshots = Snapshots(path.serving, hosts=frozenset(), work_dir=str(tmp_path))

        async def activate(bundle: Bundle) -> None:
            await snapshots.activate(bundle)
            revisions.append(bundle.revision)

        revisions: list[str] = []
        plane.bundles.keys = SigningKeys(current=KEY, term=1)
        plane.bundles.track(POD_KEY, "billing")
        await plane.publish(content(port, EVERYTHING), 1)
        async with pulling(plane.url, activate) as source:
            await eventually(lambda: source.detail == "confirmed", what="first bundle")
            client, streaming = await path.dial(), await path.dial()
            await streaming.say(GET)
            await streaming.until(b": hello\n\n\r\n")
            lifetimes.review()
            assert [await outcome(client, each) for each in ("read_schema", "drop_table")] == [True, True]
            await plane.publish(content(port, CALLS_ALONE), 2)
            await eventually(lambda: len(revisions) == 2, what="second bundle")
            assert [await outcome(client, each) for each in ("read_schema", "drop_table")] == [True, False]
            lifetimes.review()
            assert path.serving.in_flight == 1  # to listen is no call
            await plane.publish(content(port, CALLS_ALONE, Identity(mtls="permissive", user="required")), 3)
            await eventually(lambda: len(revisions) == 3, what="third bundle")
            lifetimes.review()
            assert await streaming.until(b"\r\n\r\n") == b"0\r\n\r\n"
            await client.close()
            await streaming.close()
