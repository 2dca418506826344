"""The sidecar as it runs, between two real SPIRE trust domains: forgery, rotation, outages, and keys that touch no disk."""

import asyncio
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import make_key
from certs.errors import PeerReason
from certs.jwt_svid import JwtSvidSource
from certs.spiffe import SpiffeId, SpiffePattern
from certs.svid import Svid
from certs.tls import MutualClient, MutualServer
from certs.verify import TrustBundles
from certs.workload import Timing, WorkloadState, X509Source
from sidecar.config import Settings
from sidecar.core.bundle import Bundle
from sidecar.core.profile import Identity, PolicySet, Profile, Server
from sidecar.shell.app import App
from tests.builders import a_call
from tests.certs.agents import running
from tests.certs.pki import A_TEST, B_TEST, key_der
from tests.certs.spire import SpireAgent, federated
from tests.certs.writes import files_written
from tests.fakes import a_server, echo_script, eventually

pytestmark = pytest.mark.real_spire

SERVER, BOT = SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing"), SpiffeId.parse("spiffe://b.test/ns/agents/sa/bot")
FORGED = SpiffeId.parse("spiffe://a.test/ns/agents/sa/bot")
EXPECTED = SpiffePattern.exactly(SERVER)
HEADERS = {"content-type": "application/json"}
# Short waits, so that SPIRE's own pace shows; the reserve of the sidecar's default would be a third of such a short life.
TIMING = Timing(lost_max_s=0.5, denied_min_s=0.2, denied_max_s=0.5, patience_min_s=2.0, reserve_s=1.0)
ROTATIONS = 20
OUTAGE_S = 4.0  # well within what is left of an SVID at any moment
SLOW_S = 90.0


async def until(condition: Callable[[], Any], *, what: str) -> None:
    """Wait until *condition* holds: SPIRE syncs every two seconds, and the machine may be busy."""
    try:
        async with asyncio.timeout(SLOW_S):
            while not condition():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"never came: {what}") from None


@dataclass
class Caller:
    """A workload with its own agent, calling the sidecar, and counting."""

    source: X509Source
    url: str
    client: MutualClient = field(default_factory=MutualClient)
    served: int = 0
    failed: list[str] = field(default_factory=list)

    async def call(self, session: aiohttp.ClientSession) -> str:
        """Make one call; return what came of it, "ok" or why not."""
        try:
            context = self.client.context(EXPECTED)
            async with (
                asyncio.timeout(10),
                session.post(self.url, data=a_call(), headers=HEADERS, ssl=context) as response,
            ):
                text = await response.text()
                return "ok" if response.status == 200 and '"result"' in text else f"{response.status} {text}"
        except (aiohttp.ClientError, ssl.SSLError, OSError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"

    async def load(self, stop: asyncio.Event, *, keep: bool) -> None:
        """Call until *stop*, on kept connections or on a new one each time."""
        while not stop.is_set():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=not keep)) as session:
                for _ in range(200):
                    if stop.is_set():
                        break
                    came = await self.call(session)
                    if came == "ok":
                        self.served += 1
                    else:
                        self.failed.append(came)
                    await asyncio.sleep(0.05)


@asynccontextmanager
async def a_sidecar(address: str, upstream: int, folder: Path, **identity: str) -> AsyncIterator[tuple[App, int]]:
    """The whole process but its main(), in front of *upstream*; gives it and its port."""
    profile = Profile(
        server=Server(namespace="pay", workload="billing", name="billing", port=upstream),
        identity=Identity(mtls="strict", user="optional", callers=("spiffe://b.test/ns/*/sa/bot",), **identity),  # type: ignore[arg-type]
        policies=(PolicySet(cedar=True),),
    )
    bundle = Bundle(revision="r1", files={"cedar/all.cedar": b"permit(principal, action, resource);"}, profile=profile)
    settings = Settings(
        listen_host="127.0.0.1", listen_port=0, health_host="127.0.0.1", health_port=0, drain_s=1.0,
        spiffe_socket=address, audit_sink=str(folder / "audit.jsonl"), connection_grace_s=1.0,
    )  # fmt: skip
    app = App(settings, bundle=bundle)
    listening: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(app.serve(listening))
        port, _ = await listening
        try:
            yield app, port
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ours alone: the app has a handler for it
            await serving


@asynccontextmanager
async def a_meeting(folder: Path, **identity: str) -> AsyncIterator[tuple[SpireAgent, SpireAgent, App, Caller]]:
    """A sidecar of a.test and a caller of b.test, each with SPIRE of its own, federated."""
    a, b = SpireAgent(A_TEST, SERVER), SpireAgent(B_TEST, BOT)
    async with (
        federated(a, b),
        a_server(echo_script()) as (_, upstream),
        a_sidecar(a.address, upstream, folder, **identity) as (app, port),
    ):
        caller = Caller(X509Source(b.address, timing=TIMING), f"https://127.0.0.1:{port}/mcp")
        caller.source.subscribe(caller.client.follow)
        assert app._identity
        ours, theirs = app._identity.source, caller.source
        async with running(theirs):
            for source in (ours, theirs):
                await until(
                    lambda source=source: source.current and source.current.bundles.domains == {A_TEST, B_TEST},
                    what="both bundles",
                )
            yield a, b, app, caller


async def test_each_domain_vouches_for_its_own_members_only(tmp_path: Path) -> None:
    """Server and client both refuse an ID of a.test that b.test's real CA signed.

    A JWT-SVID of a federated domain counts in place of mTLS. A removed bundle ends the domain's connections.
    """
    async with a_meeting(tmp_path, jwt_svid="allowed") as (a, b, app, caller), aiohttp.ClientSession() as session:
        assert await caller.call(session) == "ok"

        forger, impostor, trusts = await forged(b, caller)
        with suppress(ssl.SSLError, ConnectionError):  # TLS 1.3: the client's side of the handshake may end well
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", app_port(caller), ssl=forger, server_hostname="x"
            )
            writer.write(b"x")
            assert await reader.read() == b""
        assert app._telemetry.metrics._handshakes[PeerReason.UNTRUSTED_CHAIN] == 1

        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=impostor.context)
        refused: list[PeerReason] = []
        client = MutualClient(on_refused=lambda reason, _: refused.append(reason))
        assert caller.source.current
        client.follow(caller.source.current)
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection(
                "127.0.0.1", server.sockets[0].getsockname()[1], ssl=client.context(EXPECTED), server_hostname="x"
            )
        server.close()
        assert refused == [PeerReason.UNTRUSTED_CHAIN]
        assert trusts == {A_TEST}  # to itself the forger looked fine

        await until(lambda: app._serving.snapshot.trust.tokens, what="keys for tokens")  # type: ignore[union-attr]
        assert await told_by_token(b, str(SERVER), session, caller.url) == 200
        assert await told_by_token(b, "https://other.test", session, caller.url) == 401

        # The federation ends: its kept connection too, and no new one begins.
        assert await caller.call(session) == "ok"
        await a.unfederate(b)
        await until(lambda: own_domains(app) == {A_TEST}, what="the bundle to go")
        await eventually(lambda: not app._serving.connections, what="the domain's connections to end")
        assert await caller.call(session) != "ok"


async def forged(b: SpireAgent, caller: Caller) -> tuple[ssl.SSLContext, MutualServer, frozenset[object]]:
    """What b.test's CA can make of IDs of a.test: a client's context, a server, and whom they believe."""
    authority, now = await b.authority(), datetime.now(UTC)
    bundles = TrustBundles({A_TEST: [authority.certificate]})
    assert caller.source.current

    def svid(spiffe_id: SpiffeId) -> Svid:
        key = make_key()
        leaf = authority.sign_svid(
            spiffe_id, key.public_key(), now=now, lifetime=timedelta(minutes=1), serial=x509.random_serial_number()
        )
        return Svid.parse(spiffe_id, leaf.public_bytes(Encoding.DER), key_der(key), bundles, now=now)

    client, server = MutualClient(), MutualServer()
    client.use(svid(FORGED), caller.source.current.bundles)
    server.use(svid(SERVER), caller.source.current.bundles)
    return client.context(EXPECTED), server, bundles.domains


async def told_by_token(b: SpireAgent, audience: str, session: aiohttp.ClientSession, url: str) -> int:
    """The status of a call in the clear, with a JWT-SVID that b.test's agent issued for *audience*."""
    token = (await JwtSvidSource(b.address).fetch(BOT, audience)).token
    plain = url.replace("https:", "http:")
    headers = {**HEADERS, "sidegate-workload-token": token}
    async with session.post(plain, data=a_call(), headers=headers) as response:
        return response.status


def app_port(caller: Caller) -> int:
    """The sidecar's port."""
    port = urlsplit(caller.url).port
    assert port
    return port


def own_domains(app: App) -> frozenset[object]:
    """The domains that the sidecar believes."""
    assert app._identity
    current = app._identity.source.current
    return frozenset() if current is None else frozenset(current.bundles.domains)


async def test_rotations_and_outages_cost_no_call_and_nothing_outlives_its_svid(tmp_path: Path) -> None:
    """Twenty rotations with a new CA among them, an agent killed and frozen: no call fails.

    Then the server goes, and with the last SVID the last call; it comes back, and so do we, without a restart.
    """
    async with a_meeting(tmp_path) as (a, _, app, caller):
        assert app._identity
        source = app._identity.source
        serials: set[int] = set()
        source.subscribe(lambda held: serials.add(held.svid.serial) if held else None)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for keep in (True, True, False):
                tasks.create_task(caller.load(stop, keep=keep))
            await a.prepare_authority()
            await until(lambda: all(anchors(each) == 2 for each in (source, caller.source)), what="the new CA")
            await a.activate_authority()
            await until(lambda: len(serials) >= 6, what="rotations")
            await a.stop()
            await asyncio.sleep(OUTAGE_S)
            assert source.state in (WorkloadState.DEGRADED, WorkloadState.EXPIRING)
            await a.start()
            await until(lambda: source.state is WorkloadState.READY, what="the agent")
            await until(lambda: len(serials) >= 10, what="rotations")
            a.freeze()
            await asyncio.sleep(OUTAGE_S)
            a.thaw()
            await until(lambda: len(serials) >= ROTATIONS, what="rotations")
            stop.set()
        assert caller.failed == []
        assert caller.served > 200

        await a.stop("server")
        late = [came async for came in beyond(caller, source)]
        assert late
        assert "ok" not in late
        assert source.state is WorkloadState.EXPIRED
        assert "identity" in app.conditions()
        assert not app._serving.connections

        await a.start("server")
        await until(lambda: source.is_ready, what="our SVID")
        async with aiohttp.ClientSession() as session:
            assert await caller.call(session) == "ok"


def anchors(source: X509Source) -> int:
    """How many CAs of a.test it trusts."""
    return 0 if source.current is None else len(source.current.bundles.anchors(A_TEST))


async def beyond(caller: Caller, source: X509Source) -> AsyncIterator[str]:
    """Call on a kept connection and on new ones until well after the sidecar's SVID has ended.

    Gives what came of calls that began after it; those before it must be served.
    """
    async with (
        aiohttp.ClientSession() as kept,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as fresh,
    ):
        assert source.current
        ends_s = source.current.svid.not_after.timestamp()
        while time.time() < ends_s + 4:
            for session in (kept, fresh):
                began_s = time.time()
                came = await caller.call(session)
                if source.current is not None:  # one more rotation may have been under way
                    ends_s = source.current.svid.not_after.timestamp()
                if began_s > ends_s:
                    yield came
                elif time.time() < ends_s - 1:
                    assert came == "ok"
            await asyncio.sleep(0.1)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may ask the kernel what was written (fanotify)")
async def test_keys_touch_no_disk(tmp_path: Path) -> None:
    """From start over three rotations, the kernel sees this process write its audit trail and nothing else."""
    agent = SpireAgent(A_TEST, SERVER)
    serials: set[int] = set()
    async with agent.up(), a_server(echo_script()) as (_, upstream):
        with files_written() as written:
            async with a_sidecar(agent.address, upstream, tmp_path) as (app, _):
                assert app._identity
                app._identity.source.subscribe(lambda held: serials.add(held.svid.serial) if held else None)
                await until(lambda: len(serials) >= 4, what="rotations")
                app._port_refused("nobody", 1)  # one record, to see that the watch sees
            await eventually((tmp_path / "audit.jsonl").read_bytes, what="the record")

    captured = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in (1, 2)}  # pytest keeps the log in a file
    assert written - captured == {str(tmp_path / "audit.jsonl")}
