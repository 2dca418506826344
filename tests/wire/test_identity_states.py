"""What the whole process says and does while its identity comes, goes and comes back (the agent is the embedded one)."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.errors import PeerReason
from certs.spiffe import SpiffeId, SpiffePattern
from certs.tls import MutualClient
from certs.workload import X509Source
from sidecar.shell.app import App
from tests.builders import a_call
from tests.certs.agents import FAST, a_socket, an_agent, ready, running
from tests.certs.pki import A_TEST, B_TEST
from tests.fakes import Client, a_server, echo_script, eventually, post
from tests.wire.test_spire import BOT, EXPECTED, SERVER, a_sidecar


class World:
    """Two domains, an agent for the sidecar and one for a caller of b.test."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b = EmbeddedDomain(A_TEST), EmbeddedDomain(B_TEST)
        self.socket = folder.with_suffix(".s")
        self.theirs = an_agent(
            folder.with_suffix(".c"), domain=self.b, identities=[Identity(spiffe_id=BOT)], federated=[self.a]
        )
        self.source, self.client = X509Source(self.theirs.address, timing=FAST), MutualClient()
        self.source.subscribe(self.client.follow)

    def agent(self, *ids: SpiffeId, **changes: Any) -> EmbeddedWorkloadApi:
        """The sidecar's agent, with one entry, or those of *ids*."""
        identities = [Identity(spiffe_id=each) for each in ids or (SERVER,)]
        return an_agent(self.socket, domain=self.a, identities=identities, **{"federated": [self.b], **changes})

    async def dial(self, port: int, expected: SpiffePattern = EXPECTED) -> Client:
        """Connect as the caller."""
        context = self.client.context(expected)
        return Client(*await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="x"))


@asynccontextmanager
async def a_world(folder: Path) -> AsyncIterator[tuple[World, App, int]]:
    """Run the sidecar, without an agent yet, and the caller."""
    with a_socket() as path:
        world = World(path)
        async with (
            running(world.theirs, world.source),
            a_server(echo_script()) as (_, upstream),
            a_sidecar(f"unix:{world.socket}", upstream, folder) as (app, port),
        ):
            await ready(world.source)
            yield world, app, port


def told(app: App) -> str:
    """What readiness says of the identity; empty when nothing is wrong with it."""
    return app.conditions().get("identity", "")


async def test_without_an_agent_it_stays_up_unready_and_closed(tmp_path: Path) -> None:
    """Handshakes get an alert, plain calls 503; with the agent it is ready, without a restart."""
    async with a_world(tmp_path) as (world, app, port):
        await eventually(lambda: told(app).startswith("no-agent"), what="the state")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await world.dial(port)
        plain = Client(*await asyncio.open_connection("127.0.0.1", port))
        await plain.say(post(a_call()))
        answer = await plain.hear()
        assert answer is not None
        assert answer.line.startswith((b"HTTP/1.1 503", b"HTTP/1.1 401"))
        await plain.close()
        assert app._telemetry.metrics._handshakes[PeerReason.OWN_SVID_MISSING] == 1

        async with running(world.agent()):
            await eventually(lambda: told(app) == "", what="readiness")
            client = await world.dial(port)
            await client.say(post(a_call()))
            assert b'"echo"' in (await client.hear()).body  # type: ignore[union-attr]
            await client.close()


async def test_no_entry_and_several_entries_are_told_apart(tmp_path: Path) -> None:
    """The operator reads what to do: register the pod, or say which identity is meant."""
    async with a_world(tmp_path) as (world, app, _):
        nobody = world.agent()
        nobody.drop()
        async with running(nobody):
            await eventually(lambda: told(app).startswith("no-identity"), what="the state")
        async with running(world.agent(SERVER, SpiffeId.parse("spiffe://a.test/other"))):
            await eventually(lambda: told(app).startswith("ambiguous"), what="the state")


async def test_a_deleted_entry_ends_connections_and_a_new_one_brings_all_back(tmp_path: Path) -> None:
    """At once: not ready, kept connections closed, no new ones."""
    async with a_world(tmp_path) as (world, app, port):
        agent = world.agent()
        async with running(agent):
            await eventually(lambda: told(app) == "", what="readiness")
            client = await world.dial(port)
            await client.say(post(a_call()))
            assert await client.hear()
            agent.drop()
            assert await client.rest() == b""
            assert told(app).startswith("no-identity")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await world.dial(port)
            agent.restore()
            await eventually(lambda: told(app) == "", what="readiness")
            client = await world.dial(port)
            await client.say(post(a_call()))
            assert await client.hear()
            await client.close()


async def test_a_lost_agent_costs_nothing_while_the_svid_lives(tmp_path: Path) -> None:
    """Degraded is ready: a restart of the agent must not take servers away."""
    async with a_world(tmp_path) as (world, app, port):
        async with running(world.agent()):
            await eventually(lambda: told(app) == "", what="readiness")
        assert app._identity
        source = app._identity.source
        await eventually(lambda: source.state == "degraded", what="the state")
        assert told(app) == ""
        assert source.current  # what an alert is made of: how much of the SVID's life is left
        life = source.current.svid.not_after - source.current.svid.not_before
        readings = {each.name: read() for each, read in app._gauges()}
        assert readings["sidegate.svid.lifetime"] == life.total_seconds() > 0
        client = await world.dial(port)
        await client.say(post(a_call()))
        assert await client.hear()
        await client.close()


async def test_a_domain_whose_bundle_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    """Its members are refused in the handshake, by OpenSSL already, so that their serial is not known."""
    async with a_world(tmp_path) as (world, app, port):
        agent = world.agent()
        agent._response.federated_bundles["spiffe://b.test"] = b"nonsense"
        async with running(agent):
            await eventually(lambda: told(app) == "", what="readiness")
            client = await world.dial(port)  # TLS 1.3: the client's side of the handshake may end well
            with suppress(ssl.SSLError, ConnectionError):
                await client.say(post(a_call()))
                assert await client.rest() == b""
            await client.close()
            await eventually(lambda: app._telemetry.metrics._handshakes[PeerReason.UNTRUSTED_CHAIN], what="the refusal")
    assert "untrusted-chain" in (tmp_path / "audit.jsonl").read_text()
