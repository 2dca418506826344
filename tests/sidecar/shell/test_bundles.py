"""The bundle comes from the control plane and no one else, verified, for this workload; the last good one stays."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from certs.authority import make_key
from certs.spiffe import SpiffeId
from certs.svid import Svid
from certs.tls import MutualClient, MutualServer, peer_of
from sidecar.config import Settings
from sidecar.core import profile
from sidecar.core.bundle import Bundle, decode, encode
from sidecar.core.keyring import Keyring
from sidecar.core.profile import Audit, Profile, Server
from sidecar.errors import BundleError, ConfigError
from sidecar.shell import bundles as module
from sidecar.shell.bundles import LAST_GOOD, BundleSource
from tests.certs.pki import NOW, an_authority, bundles_of
from tests.fakes import eventually

CONTROL_PLANE = SpiffeId.parse("spiffe://a.test/ns/sidegate/sa/webhook")
POD = SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing")
AUTHORITY = an_authority()
TRUST = bundles_of(a=AUTHORITY)
KEY = make_key()
OTHER_KEY = make_key()


def an_svid(spiffe_id: SpiffeId) -> Svid:
    """Return an SVID that both ends trust."""
    key = make_key()
    leaf = AUTHORITY.sign_svid(
        spiffe_id, key.public_key(), now=NOW, lifetime=timedelta(hours=1), serial=x509.random_serial_number()
    )
    return Svid.parse(
        spiffe_id,
        leaf.public_bytes(Encoding.DER),
        key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        TRUST,
        now=NOW,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def a_bundle(number: int = 1, *, workload: str = "billing", key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """Return a signed bundle whose profile is told by `audit.max_bytes` = *number*."""
    server = Server(namespace="pay", workload=workload, name="billing", port=8000)
    return encode({"sidegate.json": profile.encode(Profile(server=server, audit=Audit(max_bytes=number)))}, key)


class FakeControlPlane:
    """A bundle endpoint on loopback with real mutual TLS; what it serves is set by the test."""

    def __init__(self, *, spiffe_id: SpiffeId = CONTROL_PLANE) -> None:
        self.url = ""
        self.data = a_bundle()
        self.etag: str | None = '"1"'
        self.status = 200
        self.text = "not today"
        self.retry_after: str | None = None
        self.within: str | None = None
        self.holds = True  # a request whose ETag is current waits, as Prefer asks
        self.changed = asyncio.Event()
        self.asked: list[web.BaseRequest] = []
        self.callers: list[SpiffeId] = []
        self.tls = MutualServer()
        self.tls.use(an_svid(spiffe_id), TRUST)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one GET."""
        self.asked.append(request)
        assert request.transport is not None
        peer = peer_of(request.transport)
        assert peer is not None
        self.callers.append(peer.spiffe_id)
        if self.status != 200:
            headers = {"location": "https://evil.test/"} | (
                {"retry-after": self.retry_after} if self.retry_after else {}
            )
            return web.Response(status=self.status, text=self.text, headers=headers)
        if self.etag is not None and request.headers.get("If-None-Match") == self.etag:
            if self.holds:
                await self.changed.wait()
            if request.headers.get("If-None-Match") == self.etag:
                return web.Response(status=304, headers={"etag": self.etag})
        said = {"etag": self.etag, "Sidegate-Report-Within": self.within}
        return web.Response(body=self.data, headers={name: value for name, value in said.items() if value is not None})

    def publish(self, data: bytes, etag: str) -> None:
        """Serve *data* from now on, also to those who wait."""
        self.data, self.etag = data, etag
        self.changed.set()
        self.changed = asyncio.Event()


class Sidecar:
    """What is told of bundles: remembers those that were put in force, refuses what the test says."""

    def __init__(self) -> None:
        self.revisions: list[str] = []
        self.numbers: list[int] = []
        self.refuses: set[int] = set()

    async def activate(self, bundle: Bundle) -> None:
        """Put *bundle* in force."""
        number = bundle.profile.audit.max_bytes
        if number in self.refuses:
            raise BundleError("policy.wasm: does not load")
        self.revisions.append(bundle.revision)
        self.numbers.append(number)


SETTINGS = Settings(
    namespace="pay",
    pod="billing-1",
    workload="billing",
    control_plane="https://127.0.0.1:1/",
    control_plane_id=str(CONTROL_PLANE),
    bundle_keys=_pem(OTHER_KEY) + _pem(KEY),
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", (0.001, 0.01))
    monkeypatch.setattr(module, "NO_IDENTITY_S", 0.001)


@asynccontextmanager
async def _serving(plane: FakeControlPlane) -> AsyncIterator[None]:
    application = web.Application()
    application.router.add_get("/v1/bundles/{pod}", plane.handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=plane.tls.context).start()
    plane.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        plane.changed.set()
        await runner.cleanup()


@asynccontextmanager
async def _pulling(
    plane: FakeControlPlane, sidecar: Sidecar, *, client: MutualClient | None = None, **changes: object
) -> AsyncIterator[BundleSource]:
    """Run a BundleSource against *plane*."""
    if client is None:
        client = MutualClient()
        client.use(an_svid(POD), TRUST)
    async with _serving(plane), aiohttp.ClientSession(auto_decompress=False) as session:
        settings = replace(SETTINGS, **{"control_plane": plane.url, **changes})  # type: ignore[arg-type]
        source = BundleSource(settings, session, client, sidecar.activate)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(source.run())
            try:
                yield source
            finally:
                running.cancel()


async def test_bundle_is_pulled_and_put_in_force() -> None:
    """The pod's SVID asks, for the pod's own bundle, and is ready to wait for the next."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: len(plane.asked) == 2, what="second question")

        assert sidecar.numbers == [1]
        assert plane.callers[0] == POD
        assert plane.asked[0].path == "/v1/bundles/billing-1"
        assert plane.asked[0].headers["Prefer"] == "modes=snapshot;wait=30"
        assert "If-None-Match" not in plane.asked[0].headers
        assert plane.asked[1].headers["If-None-Match"] == '"1"'
        assert source.detail == "confirmed"
        assert source.age_s is not None


async def test_bundle_is_verified_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes of data take seconds, in which calls go on."""
    threads: list[threading.Thread] = []

    def noting(data: bytes, keys: Keyring) -> Bundle:
        threads.append(threading.current_thread())
        return decode(data, keys)

    monkeypatch.setattr(module, "decode", noting)
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar):
        await eventually(lambda: sidecar.revisions, what="a bundle")

    assert [each is threading.main_thread() for each in threads] == [False]


async def test_new_bundle_comes_as_soon_as_it_is_published() -> None:
    """The waiting request is answered."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar):
        await eventually(lambda: len(plane.asked) == 2, what="waiting request")
        plane.publish(a_bundle(2), '"2"')

        await eventually(lambda: sidecar.numbers == [1, 2], what="second bundle")


async def test_each_question_reports_what_is_in_force_and_what_was_refused() -> None:
    """The control plane learns at once that a bundle is enforced, or why it is not."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    sidecar.refuses = {2}
    async with _pulling(plane, sidecar):
        await eventually(lambda: len(plane.asked) == 2, what="first report")
        plane.publish(a_bundle(2), '"2"')
        await eventually(lambda: len(plane.asked) == 3, what="report of the refusal")
        plane.publish(a_bundle(3), '"3"')
        await eventually(lambda: len(plane.asked) == 4, what="report of the third")

    said = [
        (each.headers.get("Sidegate-Bundle-Revision"), each.headers.get("Sidegate-Bundle-Error"))
        for each in plane.asked
    ]
    first, third = sidecar.revisions
    assert said == [(None, None), (first, None), (first, "policy.wasm: does not load"), (third, None)]


@pytest.mark.parametrize(("said", "expected"), [("2.5", 2.5), ("1e9", 30.0), ("-1", 0.0), ("soon", 0.0), (None, 0.0)])
async def test_control_plane_says_over_how_long_reports_are_spread(
    monkeypatch: pytest.MonkeyPatch, said: str | None, expected: float
) -> None:
    """Thousands of sidecars that get a bundle at once must not ask again at once."""
    pauses: list[float] = []

    async def _pause(longest_s: float) -> None:
        pauses.append(longest_s)
        await asyncio.sleep(0)

    monkeypatch.setattr(module, "_pause", _pause)
    plane = FakeControlPlane()
    plane.within = said
    async with _pulling(plane, Sidecar()):
        await eventually(lambda: pauses, what="pause")

    assert pauses[0] == expected


async def test_report_is_printable_and_short() -> None:
    """A reason may quote what was in the bundle: no header is to be broken by it."""
    plane = FakeControlPlane()

    async def refuse(_bundle: Bundle) -> None:
        raise BundleError("é\r\nX: y" + "z" * 1000)

    sidecar = Sidecar()
    sidecar.activate = refuse  # type: ignore[method-assign]
    async with _pulling(plane, sidecar):
        await eventually(lambda: len(plane.asked) == 2, what="report")

    assert plane.asked[1].headers["Sidegate-Bundle-Error"] == "???X: y" + "z" * 249


async def test_server_with_another_identity_gives_no_bundle() -> None:
    """A verified workload of the same trust domain is not the control plane."""
    plane, sidecar = FakeControlPlane(spiffe_id=POD), Sidecar()
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: source.detail != "not asked yet", what="refusal")

        assert str(POD) in source.detail
    assert plane.asked == []


async def test_source_waits_for_our_own_svid() -> None:
    """It comes seconds after the start; looking for it is no failure that would make later ones slow."""
    plane, sidecar, client = FakeControlPlane(), Sidecar(), MutualClient()
    async with _pulling(plane, sidecar, client=client) as source:
        await eventually(lambda: "no SVID" in source.detail, what="wait")
        client.use(an_svid(POD), TRUST)

        await eventually(lambda: sidecar.numbers == [1], what="bundle")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (a_bundle(key=make_key()), "signature"),
        (a_bundle(workload="payroll"), "made for pay/payroll"),
        (a_bundle()[:-20], "bundle"),
        (b"", "bundle"),
    ],
)
async def test_bundle_that_does_not_hold_is_refused(data: bytes, why: str) -> None:
    """Unknown signer, another workload, cut off: nothing is put in force, nothing is kept."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    plane.data = data
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: len(plane.asked) >= 2, what="refusal")

        assert "bundle refused" in source.detail
        assert why in source.detail
        assert source.age_s is None
    assert sidecar.numbers == []


async def test_last_good_bundle_stays_when_the_next_does_not_load(tmp_path: Path) -> None:
    """The refused one is not kept on disk either, and does not count as a confirmation."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    sidecar.refuses = {2}
    async with _pulling(plane, sidecar, bundle_dir=str(tmp_path)) as source:
        await eventually(lambda: len(plane.asked) == 2, what="first bundle")
        plane.publish(a_bundle(2), '"2"')
        await eventually(lambda: "does not load" in source.detail, what="refusal")
        assert (tmp_path / LAST_GOOD).read_bytes() == a_bundle()

        plane.publish(a_bundle(3), '"3"')
        await eventually(lambda: source.detail == "confirmed", what="third bundle")
    assert sidecar.numbers == [1, 3]


async def test_refused_bundle_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling may have had no time; an ETag that matches must not make that final."""
    monkeypatch.setattr(module, "REFUSED_S", 0.0)
    monkeypatch.setattr(module, "POLL_S", 0)
    plane, sidecar = FakeControlPlane(), Sidecar()
    sidecar.refuses = {1}
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: "does not load" in source.detail, what="refusal")
        sidecar.refuses = set()

        await eventually(lambda: sidecar.numbers == [1], what="second try")
        await eventually(lambda: source.detail == "confirmed", what="confirmation")


@pytest.mark.parametrize("status", [302, 403, 404, 503])
async def test_answer_that_is_no_bundle_is_told_and_asked_again(status: int) -> None:
    """A redirect is not followed: it would lead away from the SVID that was checked."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    plane.status = status
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: len(plane.asked) > 2, what="more questions")
        assert source.detail.endswith(f"HTTP {status}: not today")
        plane.status = 200

        await eventually(lambda: sidecar.numbers == [1], what="bundle")


async def test_long_answer_that_is_no_bundle_is_cut() -> None:
    """What a wrong server says ends in readiness and log."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    plane.status, plane.text = 500, "x" * 10_000
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: "HTTP 500" in source.detail, what="refusal")

        assert source.detail.endswith("HTTP 500: " + "x" * module.MAX_TEXT_BYTES)


async def test_bundle_larger_than_the_limit_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is known before its signature can be."""
    monkeypatch.setattr(module, "Limits", lambda: SmallLimits)
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: "larger than 100 bytes" in source.detail, what="refusal")
    assert sidecar.numbers == []


class SmallLimits:
    """Limits that no bundle keeps."""

    packed_bytes = 100


async def test_server_that_does_not_hold_requests_is_not_pressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any OPA bundle server will do; not all of them know long polling, and some send no ETag."""
    pauses: list[float] = []

    async def _pause(longest_s: float) -> None:
        pauses.append(longest_s)
        await asyncio.sleep(0)

    monkeypatch.setattr(module, "_pause", _pause)
    for etag in ('"1"', None):
        plane, sidecar = FakeControlPlane(), Sidecar()
        plane.holds, plane.etag = False, etag
        pauses.clear()
        async with _pulling(plane, sidecar):
            await eventually(lambda: len(pauses) >= 3, what="pauses")

        assert pauses[0] == 0
        assert set(pauses[1:]) == {module.POLL_S}
        assert sidecar.numbers == [1]


@pytest.mark.parametrize(
    ("retry_after", "expected"), [("2", 2.0), ("0", 0.5), ("9999", 30.0), ("soon", 1.0), (None, 1.0)]
)
async def test_control_plane_says_when_to_ask_again(
    monkeypatch: pytest.MonkeyPatch, retry_after: str | None, expected: float
) -> None:
    """A pod that has just been made waits a second for its bundle, not the doubling time of failures; never too long."""
    pauses: list[float] = []

    async def _pause(longest_s: float) -> None:
        pauses.append(longest_s)
        await asyncio.sleep(0)

    monkeypatch.setattr(module, "_pause", _pause)
    monkeypatch.setattr(module, "RETRY_S", (0.5, 30.0))
    plane = FakeControlPlane()
    plane.status, plane.retry_after = 503, retry_after
    async with _pulling(plane, Sidecar()):
        await eventually(lambda: pauses, what="pause")

    assert pauses[0] == expected


async def test_start_from_disk_while_the_control_plane_is_away(tmp_path: Path) -> None:
    """The kept bundle is verified like any other; its age is that of its last confirmation."""
    (tmp_path / LAST_GOOD).write_bytes(a_bundle(5))
    os.utime(tmp_path / LAST_GOOD, (time.time() - 100, time.time() - 100))
    plane, sidecar = FakeControlPlane(), Sidecar()
    plane.status = 503
    async with _pulling(plane, sidecar, bundle_dir=str(tmp_path), bundle_max_age_s=60.0) as source:
        await eventually(lambda: plane.asked, what="question")

        assert sidecar.numbers == [5]
        assert source.age_s is not None
        assert 99 < source.age_s < 200
        assert source.is_stale


async def test_same_bundle_after_a_start_from_disk_is_only_confirmed(tmp_path: Path) -> None:
    """Loading it again would empty every cache for nothing."""
    (tmp_path / LAST_GOOD).write_bytes(a_bundle())
    os.utime(tmp_path / LAST_GOOD, (1, 1))
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar, bundle_dir=str(tmp_path), bundle_max_age_s=60.0) as source:
        await eventually(lambda: source.detail == "confirmed", what="confirmation")

        assert not source.is_stale
    assert sidecar.numbers == [1]
    assert (tmp_path / LAST_GOOD).stat().st_mtime > 1  # the confirmation outlives this process


@pytest.mark.parametrize("kept", [b"", b"nonsense", a_bundle(key=make_key()), a_bundle(workload="payroll")])
async def test_kept_bundle_that_does_not_hold_is_ignored(tmp_path: Path, kept: bytes) -> None:
    """Whoever can write to the volume cannot change the policy."""
    (tmp_path / LAST_GOOD).write_bytes(kept)
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar, bundle_dir=str(tmp_path)) as source:
        await eventually(lambda: source.detail == "confirmed", what="bundle from the control plane")
    assert sidecar.numbers == [1]


async def test_bundle_is_enforced_also_when_it_cannot_be_kept(tmp_path: Path) -> None:
    """A full or missing volume is told, and costs the next start only."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar, bundle_dir=str(tmp_path / "missing")) as source:
        await eventually(lambda: source.detail == "confirmed", what="bundle")
    assert sidecar.numbers == [1]


async def test_kept_bundle_is_never_half(tmp_path: Path) -> None:
    """Written aside, then renamed: nothing is left over."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar, bundle_dir=str(tmp_path)) as source:
        await eventually(lambda: source.detail == "confirmed", what="bundle")

    assert [path.name for path in tmp_path.iterdir()] == [LAST_GOOD]
    assert (tmp_path / LAST_GOOD).read_bytes() == a_bundle()


async def test_bundle_grows_stale_only_where_a_limit_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bundle_max_age_s` 0 means never."""
    plane, sidecar = FakeControlPlane(), Sidecar()
    async with _pulling(plane, sidecar) as source:
        await eventually(lambda: source.age_s is not None, what="confirmation")
        later = source._clock() + 10_000
        monkeypatch.setattr(source, "_clock", lambda: later)

        assert not source.is_stale
        source._settings = replace(source._settings, bundle_max_age_s=60.0)
        assert source.is_stale


@pytest.mark.parametrize("name", ["namespace", "pod", "workload", "control_plane", "control_plane_id", "bundle_keys"])
async def test_missing_setting_is_named(name: str) -> None:
    """The operator is told which."""
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigError, match=f"SIDEGATE_{name.upper()}"):
            BundleSource(replace(SETTINGS, **{name: ""}), session, MutualClient(), Sidecar().activate)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("bundle_keys", "no key"), ("control_plane_id", "https://webhook")])
async def test_unusable_setting_is_refused_at_the_start(name: str, value: str) -> None:
    """And not at the first bundle."""
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigError):
            BundleSource(replace(SETTINGS, **{name: value}), session, MutualClient(), Sidecar().activate)  # type: ignore[arg-type]
