"""What replicas tell each other, over real mutual TLS."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from certs.spiffe import SpiffeId, SpiffePattern
from certs.tls import ClientCertificate, MutualClient, MutualServer
from tests.webhook.kube_server import KubeServer
from tests.webhook.shell.test_bundles import CONTROL_PLANE, LEDGER, OURS, snapshot
from webhook.config import Settings
from webhook.core.reports import Reports
from webhook.errors import KubeError
from webhook.shell.bundles import utc_now
from webhook.shell.kube import Kube
from webhook.shell.peers import PATH, Peers, ReportsEndpoint

SLICES = "/apis/discovery.k8s.io/v1/namespaces/sidegate-system"
POD = ("payments", "ledger-0")


@asynccontextmanager
async def replica(heard: Reports) -> AsyncIterator[int]:
    """Serve what a replica heard; gives the port."""
    server = MutualServer(client_certificate=ClientCertificate.OPTIONAL)
    server.follow(snapshot(OURS, CONTROL_PLANE))
    application = web.Application()
    application.router.add_get(PATH, ReportsEndpoint(heard, str(CONTROL_PLANE)).get)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server.context)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def slices(server: KubeServer, *pods: str) -> None:
    """Let *pods* be behind the Service, all on this machine."""
    endpoints = [{"addresses": ["127.0.0.1"], "targetRef": {"name": pod}} for pod in pods]
    server.objects[SLICES] = {"endpointslices": {"items": [{"endpoints": endpoints}]}}


def peers(kube: Kube, port: int, caller: SpiffeId = CONTROL_PLANE) -> Peers:
    """Return what the replica `me` asks the others by."""
    client = MutualClient()
    client.follow(snapshot(OURS, caller))
    settings = Settings(bundles_port=port, control_plane_id=str(CONTROL_PLANE))
    return Peers(kube, client, settings, "me")


def heard() -> Reports:
    """Return the reports of a replica that has one."""
    reports = Reports()
    reports.note(POD, "r1", "", utc_now().timestamp())
    return reports


async def test_the_others_are_asked_and_we_are_not() -> None:
    """Each hears only the pods that ask it."""
    server = KubeServer()
    async with server.running() as kube, replica(heard()) as port, aiohttp.ClientSession() as session:
        slices(server, "me", "other")
        (answer,) = await peers(kube, port).ask(session)
        slices(server, "me")
        alone = await peers(kube, port).ask(session)

    assert answer[POD].revision == "r1"
    assert alone == []


async def test_a_replica_that_is_silent_keeps_its_last_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Counts do not drop for a hiccup; it is said once, and forgotten with the endpoint."""
    server = KubeServer()
    async with server.running() as kube, aiohttp.ClientSession() as session:
        slices(server, "other")
        async with replica(heard()) as port:
            asked = peers(kube, port)
            before = await asked.ask(session)
        with caplog.at_level(logging.WARNING):
            assert await asked.ask(session) == before
            assert await asked.ask(session) == before
        slices(server)
        assert await asked.ask(session) == []

    assert [each.message for each in caplog.records].count("a replica does not tell its reports") == 1


async def test_a_workload_gets_no_reports() -> None:
    """What other pods say is not its business; nor that of a caller without SVID."""
    server = KubeServer()
    async with server.running() as kube, replica(heard()) as port, aiohttp.ClientSession() as session:
        slices(server, "other")
        assert await peers(kube, port, LEDGER).ask(session) == []
        client = MutualClient()
        client.follow(snapshot(OURS, LEDGER))
        url = f"https://127.0.0.1:{port}{PATH}"
        async with session.get(url, ssl=client.context(SpiffePattern.exactly(CONTROL_PLANE))) as response:
            assert response.status == 403
            assert await response.text() == "reports are for the control plane alone"


async def test_replicas_that_cannot_be_found_are_an_error() -> None:
    """Missing rights are said, not taken for being alone."""
    server = KubeServer()
    async with server.running() as kube, aiohttp.ClientSession() as session:
        with pytest.raises(KubeError, match="endpointslices"):
            await peers(kube, 1).ask(session)


async def test_an_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded whatever a replica sends."""
    monkeypatch.setattr("webhook.shell.peers.MAX_BYTES", 10)
    server = KubeServer()
    async with server.running() as kube, replica(heard()) as port, aiohttp.ClientSession() as session:
        slices(server, "other")
        assert await peers(kube, port).ask(session) == []


async def test_replica_that_breaks_off_is_no_end_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every error of a socket comes as one of the library's; one that is not caught would end the process."""

    async def broken(*_: object) -> None:
        raise ConnectionResetError("reset by peer")

    server = KubeServer()
    slices(server, "other")
    monkeypatch.setattr(Peers, "_fetch", broken)
    async with server.running() as kube, aiohttp.ClientSession() as session:
        assert await peers(kube, 1).ask(session) == []
