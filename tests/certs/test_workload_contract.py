"""What the source may expect of any agent: held against the embedded one, and against real SPIRE."""

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import pytest

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffePattern
from certs.tls import MutualClient, MutualServer
from certs.workload import Timing, WorkloadState, X509Source
from tests.certs.agents import a_socket, eventually, running
from tests.certs.pki import A_TEST, API
from tests.certs.spire import SpireAgent
from tests.certs.test_tls import connect, peer

TIMING = Timing(lost_max_s=0.5, denied_min_s=0.2, denied_max_s=0.5, reserve_s=0.0)
SLOWEST_S = 60.0  # SPIRE on a loaded machine; the embedded agent needs milliseconds


class Agent(Protocol):
    """An agent that knows one workload: us, as API."""

    address: str

    def up(self) -> AbstractAsyncContextManager[None]:
        """Run while the block lasts."""

    async def drop(self) -> None:
        """Delete our entry."""

    async def restore(self) -> None:
        """Create it again."""

    async def stop(self) -> None:
        """End the agent."""

    async def start(self) -> None:
        """Start it again."""


class EmbeddedAgent:
    """The embedded agent under the contract's interface."""

    def __init__(self) -> None:
        self._domain = EmbeddedDomain(A_TEST)
        self._folder = a_socket()
        self._socket = self._folder.__enter__()
        self.address = f"unix:{self._socket}"
        self._make()

    def _make(self) -> None:
        self._api = EmbeddedWorkloadApi(
            self._socket, self._domain, identities=[Identity(spiffe_id=API)], rotation_s=0.2, in_cluster=False
        )
        self._running: AbstractAsyncContextManager[None] = running(self._api)

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Run while the block lasts."""
        await self._running.__aenter__()
        try:
            yield
        finally:
            await self.stop()
            self._folder.__exit__(None, None, None)

    async def drop(self) -> None:
        """Delete our entry."""
        self._api.drop()

    async def restore(self) -> None:
        """Create it again."""
        self._api.restore()

    async def stop(self) -> None:
        """End the agent."""
        await self._running.__aexit__(None, None, None)

    async def start(self) -> None:
        """Start it again."""
        self._make()
        await self._running.__aenter__()


ANY_AGENT = pytest.mark.parametrize(
    "make", [EmbeddedAgent, pytest.param(SpireAgent, marks=pytest.mark.real_spire)], ids=["embedded", "spire"]
)


@ANY_AGENT
async def test_we_get_our_identity_and_it_is_rotated(make: Callable[[], Agent]) -> None:
    """Three SVIDs of the same ID, one after the other, each fit for both ends of a strict handshake."""
    agent = make()
    async with agent.up():
        source = X509Source(agent.address, timing=TIMING)
        server, client = MutualServer(), MutualClient()
        source.subscribe(server.follow)
        source.subscribe(client.follow)
        serials = set()
        async with running(source):
            for _ in range(3):
                await eventually(
                    lambda: bool(source.current and source.current.svid.serial not in serials), within_s=SLOWEST_S
                )
                assert source.current
                serials.add(source.current.svid.serial)
                client_end, _ = connect(client.context(SpiffePattern.exactly(API)), server.context)
                proven = peer(client_end)

                assert proven
                assert proven.serial in serials
                assert isinstance(client_end, ssl.SSLObject)


@ANY_AGENT
async def test_a_deleted_entry_takes_our_identity_and_a_new_one_gives_it_back(make: Callable[[], Agent]) -> None:
    """Without a restart of anything."""
    agent = make()
    async with agent.up():
        source = X509Source(agent.address, timing=TIMING)
        async with running(source):
            await eventually(lambda: source.state is WorkloadState.READY, within_s=SLOWEST_S)
            await agent.drop()
            await eventually(lambda: source.state is WorkloadState.NO_IDENTITY, within_s=SLOWEST_S)
            assert source.current is None
            await agent.restore()
            await eventually(lambda: source.state is WorkloadState.READY, within_s=SLOWEST_S)


@ANY_AGENT
async def test_an_agent_that_ends_is_survived(make: Callable[[], Agent]) -> None:
    """Our SVID is used on while it lives, and the agent found again."""
    agent = make()
    async with agent.up():
        source = X509Source(agent.address, timing=TIMING)
        async with running(source):
            await eventually(lambda: source.state is WorkloadState.READY, within_s=SLOWEST_S)
            await agent.stop()
            await eventually(lambda: source.state is WorkloadState.DEGRADED, within_s=SLOWEST_S)
            assert source.current
            await agent.start()
            await eventually(lambda: source.state is WorkloadState.READY, within_s=SLOWEST_S)
