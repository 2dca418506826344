"""An external bundle server, real HTTP: polled, verified, compiled into what pods get; the last good one stays."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from certs.spiffe import SpiffeId
from certs.tls import MutualClient, MutualServer
from sidecar.core.keyring import pem_of
from tests.parts import part
from tests.webhook.core.test_external import KEY, REGO, signed
from tests.webhook.shell.test_bundles import CONTROL_PLANE, OTHERS, OURS, snapshot
from tests.webhook.shell.test_controllers import POLICIES, Cluster, a_pod, a_resource
from webhook.core.external import Fetched, read
from webhook.core.resources import BundleSpec
from webhook.errors import BadResource
from webhook.shell import external as module
from webhook.shell.external import External
from webhook.shell.kube import Gone, Put
from webhook.shell.opa import Opa, Remembering

ALLOWING = REGO.replace(b"data.corp.tools", b'{"ping"}')


@dataclass
class Server:
    """A bundle server with ETags, such as any web server that serves a file."""

    data: bytes = b""
    etag: str = '"1"'
    status: int = 200
    url: str = ""
    answered: list[int] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one GET."""
        is_known = self.status == 200 and request.headers.get("If-None-Match") == self.etag
        self.answered.append(304 if is_known else self.status)
        body = b"" if is_known else self.data
        return web.Response(status=self.answered[-1], body=body, headers={"ETag": self.etag, "Location": "/elsewhere"})

    @asynccontextmanager
    async def running(self, tls: MutualServer | None = None) -> AsyncIterator["Server"]:
        """Serve on a free port."""
        application = web.Application()
        application.router.add_get("/{path:.*}", self.handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls.context if tls else None).start()
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}/b.tar.gz"
        try:
            yield self
        finally:
            await runner.cleanup()

    def spec(self, **changes: object) -> BundleSpec:
        """Return what a policy says of the bundle."""
        return BundleSpec(url=self.url, keys=pem_of([KEY.public_key()]), **changes)  # type: ignore[arg-type]


class Rig:
    """External on a clock of the test's."""

    def __init__(self, allowed: Iterable[str] = ("http://127.0.0.1:", "https://127.0.0.1:")) -> None:
        self.now_s = 1000.0
        self.client = MutualClient()
        self.changed: list[BundleSpec] = []
        self.external = External(self.client, allowed, self.changed.append, lambda: self.now_s)

    async def after(self, seconds: float) -> None:
        """Let time pass, and poll."""
        self.now_s += seconds
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            await self.external.poll(session)


async def test_bundle_is_polled_and_told_when_it_has_changed() -> None:
    """Asked for no more often than the policy says, and sent again only when it is another."""
    rig = Rig()
    async with Server(signed({"p.rego": ALLOWING})).running() as server:
        spec = server.spec()
        rig.external.use([spec, spec])
        for seconds in (0, 59, 1, 60):
            await rig.after(seconds)
        assert rig.external(spec).rego == {"p.rego": ALLOWING.decode()}
        server.data, server.etag = signed({"q.rego": REGO}), '"2"'
        await rig.after(60)

    assert server.answered == [200, 304, 304, 200]
    assert rig.external(spec).rego == {"q.rego": REGO.decode()}
    assert rig.changed == [spec, spec]


async def test_few_bundles_are_taken_in_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be a hundred MB while it is read; hundreds may be due together."""
    taking, most, lock = 0, 0, threading.Lock()

    def counted(packed: bytes, spec: BundleSpec) -> Fetched:
        nonlocal taking, most
        with lock:
            taking += 1
            most = max(most, taking)
        together.wait(0.1)
        with lock:
            taking -= 1
        return read(packed, spec)

    together = threading.Event()  # never set: time for the others to come
    monkeypatch.setattr(module, "AT_ONCE", 2)
    monkeypatch.setattr(module, "read", counted)
    rig = Rig()
    async with Server(signed({"p.rego": ALLOWING})).running() as server:
        specs = [msgspec.structs.replace(server.spec(), url=f"{server.url}?{number}") for number in range(6)]
        rig.external.use(specs)
        await rig.after(0)

    assert most == 2
    assert all(rig.external(spec).rego for spec in specs)


@pytest.mark.parametrize(
    ("data", "status", "why"),
    [
        (signed({"p.rego": REGO}, ec.derive_private_key(78, ec.SECP256R1())), 200, "not signed by a key"),
        (signed({"p.rego": REGO})[:-40], 200, "truncated"),
        (b"<html>", 200, "not gzip"),
        (b"", 302, "HTTP 302"),
        (b"", 304, "HTTP 304"),
        (b"", 503, "HTTP 503"),
        (bytes(200), 200, "larger than 100 bytes"),
    ],
)
async def test_what_does_not_hold_leaves_the_last_good_one(
    data: bytes, status: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one before, the policy cannot be used, and says why; a redirect leads nowhere."""
    rig = Rig()
    async with Server(data, status=status).running() as server:
        if "larger" in why:
            monkeypatch.setattr(module, "Limits", Small)
        spec = server.spec()
        rig.external.use([spec])
        with pytest.raises(BadResource, match="not fetched yet"):
            rig.external(spec)
        await rig.after(0)
        with pytest.raises(BadResource, match=why):
            rig.external(spec)
        monkeypatch.undo()
        server.data, server.status, server.etag = signed({"p.rego": REGO}), 200, '"2"'
        await rig.after(10)
        assert rig.external(spec).rego
        server.data, server.status, server.etag = data or b"x", status, '"3"'
        if status != 304:
            await rig.after(60)

        assert rig.external(spec).rego


async def test_bundle_is_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes of data take seconds, in which admission has to answer."""
    threads: list[threading.Thread] = []

    def noting(packed: bytes, spec: BundleSpec) -> Fetched:
        threads.append(threading.current_thread())
        return read(packed, spec)

    monkeypatch.setattr(module, "read", noting)
    rig = Rig()
    async with Server(signed({"p.rego": REGO})).running() as server:
        rig.external.use([server.spec()])
        await rig.after(0)

        assert rig.external(server.spec()).rego
    assert [each is threading.main_thread() for each in threads] == [False]


class Small:
    """Limits that no bundle keeps."""

    packed_bytes = 100


async def test_server_that_is_away_makes_the_bundle_stale_where_a_limit_is_set() -> None:
    """And back makes it good again; then whoever waits for it is told."""
    rig = Rig()
    async with Server(signed({"p.rego": REGO})).running() as server:
        limited, unlimited = server.spec(max_age_seconds=600), server.spec()
        rig.external.use([limited, unlimited])
        await rig.after(0)
        server.status = 503
        await rig.after(601)
        assert rig.external(unlimited).rego
        with pytest.raises(BadResource, match="stale: HTTP 503"):
            rig.external(limited)
        server.status = 200
        await rig.after(60)
        assert rig.external(limited).rego

    assert rig.changed.count(limited) == 2
    assert rig.changed.count(unlimited) == 1


async def test_address_that_the_operator_does_not_list_is_not_asked() -> None:
    """The control plane reaches what the author of a policy may not."""
    rig = Rig(["https://opa.test/"])
    async with Server(signed({"p.rego": REGO})).running() as server:
        spec = server.spec()
        rig.external.use([spec])
        await rig.after(0)
        with pytest.raises(BadResource, match=r"not an address that is allowed.*SIDEGATE_EXTERNAL_BUNDLES"):
            rig.external(spec)

    assert server.answered == []


async def test_server_may_have_to_prove_who_it_is() -> None:
    """By its SVID; the control plane shows its own."""
    rig, server_id = Rig(), SpiffeId.parse("spiffe://a.test/ns/opa/sa/opa")
    tls = MutualServer()
    tls.follow(snapshot(OURS, server_id))
    rig.client.follow(snapshot(OURS, CONTROL_PLANE))
    async with Server(signed({"p.rego": REGO})).running(tls) as server:
        good, other = server.spec(spiffe_id=str(server_id)), server.spec(spiffe_id="spiffe://a.test/ns/x/sa/x")
        rig.external.use([good, other])
        await rig.after(0)

        assert rig.external(good).rego
        with pytest.raises(BadResource, match=r"spiffe://a\.test/ns/opa/sa/opa"):
            rig.external(other)
    assert OTHERS


async def test_bundles_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than can be kept is told so."""
    monkeypatch.setattr(module, "MAX_SOURCES", 1)
    rig = Rig()
    first, second = (BundleSpec(url=f"http://127.0.0.1:1/{n}", keys="x") for n in range(2))
    rig.external.use([first, second])

    with pytest.raises(BadResource, match="1 others already"):
        rig.external(second)


async def test_policy_from_elsewhere_reaches_the_pods_that_it_selects() -> None:
    """Compiled here by the real opa; a new content makes a new bundle, and a policy that is gone is no longer asked."""
    cluster, rig = Cluster(), Rig()
    cluster.controller._compile_files = Remembering(Opa(part("opa"))).files
    cluster.controller.external = External(
        rig.client, ["http://127.0.0.1:"], cluster.controller.renew, lambda: rig.now_s
    )
    rig.external = cluster.controller.external
    async with Server(signed({"p.rego": REGO, "corp/data.json": b'{"tools": ["ping"]}'})).running() as server:
        spec = {"url": server.url, "keys": pem_of([KEY.public_key()])}
        cluster.listed(a_pod())
        cluster.controller.apply(POLICIES, Put(a_resource("far", bundle=spec)))
        await cluster.controller.compile_dirty()
        assert "MCPPolicy far: spec.bundle" in cluster.entry().problem
        assert "not fetched yet" in cluster.entry().problem
        await rig.after(0)
        await cluster.controller.compile_dirty()
        first = cluster.entry().published
        assert cluster.entry().problem == ""
        assert first is not None
        revision = first.revision
        server.data, server.etag = signed({"p.rego": ALLOWING}), '"2"'
        await rig.after(60)
        await cluster.controller.compile_dirty()
        second = cluster.entry().published
        assert second is not None
        assert second.revision != revision
        cluster.controller.apply(POLICIES, Gone(a_resource("far", bundle=spec)))
        await rig.after(600)

    assert server.answered == [200, 200]


async def test_polling_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that is named later is fetched without being asked for."""
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    rig = Rig()
    async with Server(signed({"p.rego": REGO})).running() as server, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(rig.external.run())
        rig.external.use([server.spec()])
        async with asyncio.timeout(30):
            while not rig.changed:  # noqa: ASYNC110 - it has no event to wait for
                await asyncio.sleep(0.01)
        running.cancel()
