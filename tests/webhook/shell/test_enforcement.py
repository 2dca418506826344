"""Whether NetworkPolicy is enforced is found out with real connections."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.webhook.kube_server import PODS, KubeServer
from webhook.shell import enforcement as enforcement_module
from webhook.shell.enforcement import Enforcement
from webhook.shell.kube import Gone, Listed, Put
from webhook.shell.lease import Leadership
from webhook.shell.metrics import Metrics


async def closed_port() -> int:
    """A port on which nobody listens."""
    async with listener() as port:
        return port


@contextlib.asynccontextmanager
async def listener(port: int = 0) -> AsyncIterator[int]:
    """Somebody who listens, and hears nothing."""
    heard = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            heard.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", port)
    async with server:
        yield server.sockets[0].getsockname()[1]
    assert not any(heard)


def a_pod(*ports: int, address: str | None = "127.0.0.1", name: str = "a", namespace: str = "team") -> Any:
    """A pod in mode remap, whose application declares *ports*."""
    app = {"name": "app", "ports": [{"containerPort": port} for port in ports]}
    ours = {"name": "sidegate", "ports": [{"containerPort": 15443}]}
    metadata = {"name": name, "namespace": namespace, "labels": {"sidegate.dev/capture": "remap"}}
    return {
        "metadata": metadata,
        "spec": {"initContainers": [ours], "containers": [app]},
        "status": {"podIP": address} if address else {},
    }


def an_enforcement(health_port: int, *, leads: bool = True, kube: Any = None) -> tuple[Enforcement, Metrics]:
    """What is tried, and what it counts."""
    metrics = Metrics()
    leadership = Leadership(kube, metrics, namespace="n", name="", identity="x")
    leadership._until_s = float("inf") if leads else 0.0
    made = Enforcement(
        kube, leadership, metrics, governs=lambda namespace: namespace == "team", health_port=health_port
    )
    return made, metrics


def counted(metrics: Metrics) -> dict[str, float]:
    """The pods by state."""
    return {state: metrics.remapped_pods.labels(state)._value.get() for state in ("closed", "exposed", "unknown")}


async def test_an_application_that_answers_is_exposed(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, with the pod's name, and nothing is sent to it."""
    async with listener() as health, listener() as app:
        enforcement, metrics = an_enforcement(health)
        enforcement.apply(Listed([a_pod(await closed_port(), app)], "1"))
        await enforcement.step()
        await enforcement.step()

    assert counted(metrics) == {"closed": 0, "exposed": 1, "unknown": 0}
    assert [each.pod for each in caplog.records if hasattr(each, "pod")] == ["team/a"]


async def test_a_pod_with_many_ports_does_not_keep_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ports are dialled together, and no more than a few of them."""
    dialled: list[int] = []
    together = asyncio.Barrier(enforcement_module.MAX_PORTS)

    async def answers(_: str, port: int) -> bool:
        dialled.append(port)
        if port != 1:
            await together.wait()
        return port == 1

    monkeypatch.setattr(enforcement_module, "_answers", answers)
    enforcement, metrics = an_enforcement(1)
    enforcement.apply(Listed([a_pod(*range(8000, 9000))], "1"))
    async with asyncio.timeout(10):
        await enforcement.step()

    assert len(dialled) == 1 + enforcement_module.MAX_PORTS
    assert counted(metrics) == {"closed": 1, "exposed": 0, "unknown": 0}


async def test_pods_of_namespaces_that_are_not_governed_are_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the label is anybody's, and the pod's address and ports are none of ours."""
    dialled: list[tuple[str, int]] = []

    async def answers(address: str, port: int) -> bool:
        dialled.append((address, port))
        return True

    monkeypatch.setattr(enforcement_module, "_answers", answers)
    enforcement, metrics = an_enforcement(1)
    enforcement.apply(Listed([a_pod(8000, address="192.0.2.9", namespace="elsewhere"), a_pod(8000)], "1"))
    await enforcement.step()

    assert dialled == [("127.0.0.1", 1), ("127.0.0.1", 8000)]
    assert counted(metrics) == {"closed": 0, "exposed": 1, "unknown": 0}


@pytest.mark.parametrize(
    ("silent", "answering", "state"),
    [
        ((), ("fd00::1", 8000), "exposed"),
        ((), None, "closed"),
        ((("fd00::1", 1),), None, "unknown"),
        ((("fd00::1", 1),), ("192.0.2.1", 8000), "exposed"),
    ],
)
async def test_each_address_of_a_pod_is_dialled(
    monkeypatch: pytest.MonkeyPatch, silent: Any, answering: Any, state: str
) -> None:
    """A network that enforces policies for IPv4 alone does not enforce them, and one that is not in reach is not proven."""

    async def answers(address: str, port: int) -> bool:
        return (port == 1 and (address, port) not in silent) or (address, port) == answering

    monkeypatch.setattr(enforcement_module, "_answers", answers)
    enforcement, metrics = an_enforcement(1)
    pod = a_pod(8000)
    pod["status"] = {"podIP": "192.0.2.1", "podIPs": [{"ip": "192.0.2.1"}, {"ip": "fd00::1"}]}
    enforcement.apply(Listed([pod], "1"))
    await enforcement.step()

    assert counted(metrics) == {"closed": 0, "exposed": 0, "unknown": 0} | {state: 1}


async def test_silence_beside_an_answer_is_the_proof() -> None:
    """The health port shows that the pod is up and in reach."""
    async with listener() as health:
        enforcement, metrics = an_enforcement(health)
        enforcement.apply(Put(a_pod(await closed_port())))
        await enforcement.step()

    assert counted(metrics) == {"closed": 1, "exposed": 0, "unknown": 0}


async def test_silence_alone_proves_nothing() -> None:
    """A pod that is not up yet, or that we may not dial."""
    async with listener() as app:
        enforcement, metrics = an_enforcement(await closed_port())
        enforcement.apply(Listed([a_pod(app)], "1"))
        await enforcement.step()

    assert counted(metrics) == {"closed": 0, "exposed": 0, "unknown": 1}


async def test_a_pod_that_was_starting_is_dialled_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an address before its sidecar listens."""
    monkeypatch.setattr(enforcement_module, "SOON_S", 0.0)
    port = await closed_port()
    enforcement, metrics = an_enforcement(port)
    enforcement.apply(Listed([a_pod(await closed_port())], "1"))
    await enforcement.step()
    assert counted(metrics)["unknown"] == 1

    async with listener(port):
        await enforcement.step()

    assert counted(metrics) == {"closed": 1, "exposed": 0, "unknown": 0}


async def test_an_exposed_pod_is_dialled_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network takes some seconds to enforce what holds for a new pod; an alert for minutes would be about nothing."""
    monkeypatch.setattr(enforcement_module, "SOON_S", 0.0)
    async with listener() as health:
        enforcement, metrics = an_enforcement(health)
        async with listener() as app:
            enforcement.apply(Listed([a_pod(app)], "1"))
            await enforcement.step()
            assert counted(metrics)["exposed"] == 1
        await enforcement.step()

    assert counted(metrics) == {"closed": 1, "exposed": 0, "unknown": 0}


async def test_an_application_that_listens_later_than_its_sidecar_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its silence counts for minutes only when it was heard twice."""
    monkeypatch.setattr(enforcement_module, "SOON_S", 0.0)
    port = await closed_port()
    async with listener() as health:
        enforcement, metrics = an_enforcement(health)
        enforcement.apply(Listed([a_pod(port)], "1"))
        await enforcement.step()
        assert counted(metrics)["closed"] == 1

        async with listener(port):
            await enforcement.step()

    assert counted(metrics) == {"closed": 0, "exposed": 1, "unknown": 0}


async def test_silence_that_was_heard_twice_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods are not dialled all the time."""
    monkeypatch.setattr(enforcement_module, "SOON_S", 0.0)
    dialled: list[int] = []

    async def answers(_: str, port: int) -> bool:
        dialled.append(port)
        return port == 1

    monkeypatch.setattr(enforcement_module, "_answers", answers)
    enforcement, metrics = an_enforcement(1)
    enforcement.apply(Listed([a_pod(8000)], "1"))
    for _ in range(4):
        await enforcement.step()

    assert dialled == [1, 8000] * 2
    assert counted(metrics) == {"closed": 1, "exposed": 0, "unknown": 0}


async def test_who_leads_no_more_counts_nothing() -> None:
    """Another replica does; the sum over both is the number of pods."""
    async with listener() as health, listener() as app:
        enforcement, metrics = an_enforcement(health)
        enforcement.apply(Listed([a_pod(app)], "1"))
        await enforcement.step()
        enforcement._leadership._until_s = 0.0
        await enforcement.step()

    assert counted(metrics) == {"closed": 0, "exposed": 0, "unknown": 0}


async def test_only_pods_that_can_be_dialled_count() -> None:
    """None without an address or a port, none that is gone, and none while another replica leads."""
    async with listener() as health, listener() as app:
        enforcement, metrics = an_enforcement(health)
        broken = {"metadata": {"name": "c", "namespace": "team"}, "spec": {}, "status": {"podIP": "127.0.0.1"}}
        enforcement.apply(Listed([a_pod(app, address=None), a_pod(name="b"), broken, a_pod(app, name="d")], "1"))
        enforcement.apply(Gone(a_pod(app, name="d")))
        await enforcement.step()
        follower, untouched = an_enforcement(health, leads=False)
        follower.apply(Listed([a_pod(app)], "1"))
        await follower.step()

    assert counted(metrics) == counted(untouched) == {"closed": 0, "exposed": 0, "unknown": 0}


async def test_a_pod_that_moves_is_dialled_again_and_one_that_stays_is_not() -> None:
    """What was found holds for some minutes, for the same address and ports."""
    async with listener() as health:
        enforcement, metrics = an_enforcement(health)
        async with listener() as app:
            enforcement.apply(Listed([a_pod(app)], "1"))
            await enforcement.step()
            enforcement.apply(Put(a_pod(app)))
        await enforcement.step()
        assert counted(metrics)["exposed"] == 1

        enforcement.apply(Put(a_pod(await closed_port())))
        await enforcement.step()

    assert counted(metrics) == {"closed": 1, "exposed": 0, "unknown": 0}


async def test_pods_are_followed() -> None:
    """The API server says which there are."""
    server = KubeServer()
    server.objects[PODS] = {}
    async with server.running() as kube, listener() as health, listener() as app:
        server.put(PODS, a_pod(app))
        enforcement, metrics = an_enforcement(health, kube=kube)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(enforcement.run())
            while counted(metrics)["exposed"] == 0:
                await asyncio.sleep(0.02)
                await enforcement.step()
            running.cancel()

    assert counted(metrics)["exposed"] == 1
