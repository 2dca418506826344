"""Mutual TLS over real sockets and both event loops: forgery, rotation under load, and nothing left behind."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from aiohttp import ClientError, ClientSession, TCPConnector, web

from certs.embedded import EmbeddedDomain
from certs.errors import PeerReason
from certs.messages import messages
from certs.spiffe import SpiffeId, SpiffePattern
from certs.tls import MutualClient, MutualServer, peer_of
from certs.workload import WorkloadState, X509Source
from tests.certs.agents import FAST, a_socket, an_agent, eventually, ready, running
from tests.certs.pki import A_TEST, B_TEST

SERVER = SpiffeId.parse("spiffe://a.test/ns/pay/sa/api")
CLIENT = SpiffeId.parse("spiffe://b.test/ns/agents/sa/bot")
EXPECTED = SpiffePattern.exactly(SERVER)
SOAK_S = 5.0
ROTATIONS = 12

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


def on(new_loop: NewLoop, body: Callable[[], Awaitable[None]]) -> None:
    """Run *body* on a loop of its own kind."""
    with asyncio.Runner(loop_factory=new_loop) as runner:

        async def main() -> None:
            await body()

        runner.run(main())


class Mesh:
    """A server of a.test and a client of b.test, federated, each with its own agent."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b = EmbeddedDomain(A_TEST), EmbeddedDomain(B_TEST)
        self.server_agent = an_agent(folder.with_suffix(".a"), SERVER, domain=self.a, federated=[self.b])
        self.client_agent = an_agent(folder.with_suffix(".b"), CLIENT, domain=self.b, federated=[self.a])
        self.server_source = X509Source(self.server_agent.address, timing=FAST)
        self.client_source = X509Source(self.client_agent.address, timing=FAST)
        self.refused: Counter[PeerReason] = Counter()
        self.served: Counter[str] = Counter()
        self.server = MutualServer(on_refused=self._note)
        self.client = MutualClient(on_refused=self._note)
        self.server_source.subscribe(self.server.follow)
        self.client_source.subscribe(self.client.follow)
        self.port = 0

    def _note(self, reason: PeerReason, _serial: int | None) -> None:
        self.refused[reason] += 1

    async def _answer(self, request: web.Request) -> web.Response:
        peer = peer_of(request.transport) if request.transport else None
        assert peer
        self.served[str(peer.spiffe_id)] += 1
        return web.Response(text=str(peer.spiffe_id))

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Serve HTTP over mutual TLS while the block lasts."""
        async with running(self.server_agent, self.client_agent, self.server_source, self.client_source):
            await ready(self.server_source, self.client_source)
            application = web.Application()
            application.router.add_get("/", self._answer)
            runner = web.AppRunner(application)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.server.context)
            await site.start()
            self.port = runner.addresses[0][1]
            try:
                yield
            finally:
                await runner.cleanup()

    async def get(self, session: ClientSession) -> str:
        """Ask the server who we are, with the SVID of the moment."""
        context = self.client.context(EXPECTED)
        async with asyncio.timeout(5), session.get(f"https://127.0.0.1:{self.port}/", ssl=context) as response:
            return await response.text()


@LOOPS
def test_each_end_of_a_federated_call_knows_the_other(new_loop: NewLoop) -> None:
    """A client of b.test calls a server of a.test; the handler sees its ID."""

    async def body() -> None:
        with a_socket() as folder:
            mesh = Mesh(folder)
            async with mesh.up(), ClientSession() as session:
                assert await mesh.get(session) == str(CLIENT)

    on(new_loop, body)


@LOOPS
@pytest.mark.parametrize("rotated", [False, True], ids=["at start", "after rotation"])
def test_an_id_of_our_domain_signed_by_a_federated_authority_reaches_no_handler(
    new_loop: NewLoop, rotated: bool
) -> None:
    """b.test's CA is trusted for b.test; a leaf of it that says a.test is a forgery."""

    async def body() -> None:
        with a_socket() as folder:
            mesh = Mesh(folder)
            async with mesh.up(), ClientSession() as session:
                if rotated:
                    before = mesh.server_source.current
                    mesh.server_agent.rotate()
                    await eventually(lambda: mesh.server_source.current is not before)
                forged = mesh.b.issue(SERVER)
                forger = an_agent(folder.with_suffix(".c"), domain=mesh.b, federated=[mesh.a])
                forger.push(
                    messages.X509SVIDResponse(svids=[forged], federated_bundles={"spiffe://b.test": mesh.b.bundle_der})
                )
                # The forger's own source accepts it: to the forger, b's CA is a.test's. It must still find our server.
                source = X509Source(forger.address, timing=FAST)
                async with running(forger, source):
                    await ready(source)
                    assert source.current
                    assert mesh.client_source.current
                    mesh.client.use(source.current.svid, mesh.client_source.current.bundles)
                    with pytest.raises(ClientError):
                        await mesh.get(session)

                assert set(mesh.refused) == {PeerReason.UNTRUSTED_CHAIN}  # twice: aiohttp tries a GET again
                assert not mesh.served

    on(new_loop, body)


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@LOOPS
def test_rotation_under_load_loses_no_request_and_leaves_nothing_behind(new_loop: NewLoop) -> None:
    """A dozen SVIDs, one new CA on each side pass unseen by callers; no descriptor is left open."""

    async def body() -> None:
        with a_socket() as folder:
            mesh = Mesh(folder)
            async with mesh.up():
                deadline = asyncio.get_running_loop().time() + SOAK_S
                done: Counter[str] = Counter()

                async def fresh(worker: str) -> None:
                    """One connection per request, a new handshake each."""
                    while asyncio.get_running_loop().time() < deadline:
                        async with ClientSession(connector=TCPConnector(force_close=True)) as session:
                            assert await mesh.get(session) == str(CLIENT)
                        done[worker] += 1
                        await asyncio.sleep(0.02)

                async def kept(worker: str) -> None:
                    """Connections are kept as long as they live."""
                    async with ClientSession() as session:
                        while asyncio.get_running_loop().time() < deadline:
                            assert await mesh.get(session) == str(CLIENT)
                            done[worker] += 1
                            await asyncio.sleep(0.02)

                async def rotate() -> None:
                    for turn in range(ROTATIONS):
                        await asyncio.sleep(SOAK_S / (ROTATIONS + 1))
                        if turn == ROTATIONS // 2:
                            # As SPIRE does: the new CA is announced to everybody before it signs.
                            await announce(mesh)
                            seen = done.copy()
                            await eventually(lambda seen=seen: all(done[name] > seen[name] + 1 for name in seen))
                        mesh.server_agent.rotate()
                        mesh.client_agent.rotate()

                serials: set[int] = set()
                mesh.server_source.subscribe(lambda held: serials.add(held.svid.serial) if held else None)
                gc.collect()
                before = open_descriptors()
                async with asyncio.TaskGroup() as tasks:
                    for work in (fresh("1"), fresh("2"), kept("3"), kept("4"), rotate()):
                        tasks.create_task(work)
                await eventually(lambda: open_descriptors() <= before + 1)

                assert not mesh.refused
                await eventually(lambda: len(serials) > ROTATIONS)
                assert done.total() == sum(mesh.served.values())
                assert done.total() > 50

    on(new_loop, body)


async def announce(mesh: Mesh) -> None:
    """Give both domains a new CA, and return once both ends trust it, while SVIDs of the old one are still in use."""
    both = (mesh.server_agent, mesh.client_agent)
    for domain, agents in ((mesh.a, both), (mesh.b, both[::-1])):
        own, foreign = (agent._response for agent in agents)
        domain.rotate_authority()
        own.svids[0].bundle = domain.bundle_der
        foreign.federated_bundles[f"spiffe://{domain.trust_domain}"] = domain.bundle_der
        for agent in agents:
            agent.push(agent._response)
    for source in (mesh.server_source, mesh.client_source):
        await eventually(
            lambda source=source: all(len(source.current.bundles.anchors(name)) == 2 for name in (A_TEST, B_TEST))
        )


@LOOPS
def test_a_deleted_entry_closes_the_door(new_loop: NewLoop) -> None:
    """New handshakes meet an alert, and a restored entry opens the door without a restart."""

    async def body() -> None:
        with a_socket() as folder:
            mesh = Mesh(folder)
            async with mesh.up():
                mesh.server_agent.drop()
                await eventually(lambda: mesh.server_source.state is WorkloadState.NO_IDENTITY)
                async with ClientSession() as session:
                    with pytest.raises(ClientError):
                        await mesh.get(session)
                assert set(mesh.refused) == {PeerReason.OWN_SVID_MISSING}

                mesh.server_agent.restore()
                await ready(mesh.server_source)
                async with ClientSession() as session:
                    assert await mesh.get(session) == str(CLIENT)

    on(new_loop, body)
