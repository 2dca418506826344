"""The Lease on an API server, with several candidates and connections that fail."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.webhook.kube_server import KubeServer
from webhook.errors import KubeError
from webhook.shell import lease
from webhook.shell.kube import Kube
from webhook.shell.lease import Leadership
from webhook.shell.metrics import Metrics

LEASES = "/apis/coordination.k8s.io/v1/namespaces/sidegate-system/leases"


class Clock:
    """Stands for the module `time`, and stands still until moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of all candidates."""
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


@pytest.fixture
async def kube() -> AsyncIterator[tuple[KubeServer, Kube]]:
    """Return an API server and a connection to it."""
    server = KubeServer()
    async with server.running() as connection:
        yield server, connection


def candidate(kube: Kube, identity: str, name: str = "sidegate") -> Leadership:
    """Return one replica."""
    return Leadership(kube, Metrics(), namespace="sidegate-system", name=name, identity=identity)


async def test_one_of_two_leads(kube: tuple[KubeServer, Kube], clock: Clock) -> None:
    """The second waits until the first has been silent for as long as its Lease says."""
    server, connection = kube
    first, second = candidate(connection, "a"), candidate(connection, "b")
    await first.step()
    await second.step()
    assert (first.leads, second.leads) == (True, False)

    clock.now_s += 9
    await first.step()
    await second.step()
    clock.now_s += 14
    await second.step()
    assert (first.leads, second.leads) == (False, False)  # its deadline is over, its Lease is not

    clock.now_s += 1
    await second.step()
    await first.step()
    assert (first.leads, second.leads) == (False, True)
    spec = server.objects[LEASES]["sidegate"]["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)


async def test_of_two_that_write_at_once_one_wins(kube: tuple[KubeServer, Kube], clock: Clock) -> None:
    """The version that was read decides."""
    _, connection = kube
    assert clock.now_s
    replicas = [candidate(connection, name) for name in "abc"]
    await asyncio.gather(*(each.step() for each in replicas))

    assert sum(each.leads for each in replicas) == 1


async def test_who_cannot_renew_stops_leading(kube: tuple[KubeServer, Kube], clock: Clock) -> None:
    """Before anybody else may begin."""
    server, connection = kube
    leader = candidate(connection, "a")
    await leader.step()
    server.fail_next = [500]
    clock.now_s += 8
    with pytest.raises(KubeError):
        await leader.step()
    assert leader.leads

    clock.now_s += 2
    assert not leader.leads


async def test_a_replica_that_stops_lets_go(kube: tuple[KubeServer, Kube]) -> None:
    """The next one leads at once; and errors on the way end nothing."""
    server, connection = kube
    first, second = candidate(connection, "a"), candidate(connection, "b")
    server.fail_next = [500]
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(first.run())
        while not first.leads:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        running.cancel()
    await second.step()

    assert not first.leads
    assert second.leads


async def test_without_name_nobody_leads(kube: tuple[KubeServer, Kube]) -> None:
    """Another installation writes the status."""
    server, connection = kube
    alone = candidate(connection, "a", name="")
    await alone.run()

    assert not alone.leads
    assert server.requests == []
