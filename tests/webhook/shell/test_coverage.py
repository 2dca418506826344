"""What should be governed is counted beside what is, by the replica that leads."""

import asyncio
from typing import Any

import pytest

from tests.fakes import eventually
from tests.webhook.kube_server import KubeServer
from webhook.core.container import SIDECAR
from webhook.core.injection import INJECTION_LABEL, SERVER_LABEL
from webhook.errors import BadResource, KubeError
from webhook.shell import coverage
from webhook.shell.coverage import Coverage
from webhook.shell.metrics import Metrics

EXCLUDED = frozenset({"kube-system"})


def _a_namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def _a_pod(name: str, *, has_sidecar: bool, ready: bool = True) -> dict[str, Any]:
    ours = {"name": SIDECAR, "restartPolicy": "Always"}
    return {
        "metadata": {"namespace": "pay", "name": name, "labels": {SERVER_LABEL: "true"}},
        "spec": {"initContainers": [ours] if has_sidecar else [], "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "initContainerStatuses": [{"name": SIDECAR, "ready": ready}]},
    }


def _a_cluster() -> KubeServer:
    server = KubeServer()
    server.put("/api/v1/namespaces", _a_namespace("pay", **{INJECTION_LABEL: "enabled"}))
    server.put("/api/v1/namespaces", _a_namespace("odd", **{INJECTION_LABEL: "what"}))
    server.put("/api/v1/namespaces", _a_namespace("kube-system", **{INJECTION_LABEL: "enforced"}))
    for pod in (
        _a_pod("a", has_sidecar=True),
        _a_pod("b", has_sidecar=True, ready=False),
        _a_pod("c", has_sidecar=False),
    ):
        server.put("/api/v1/namespaces/pay/pods", pod)
    return server


def _counts(metrics: Metrics) -> dict[str, float]:
    text = metrics.render().decode()
    return {
        line.partition('state="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith('sidegate_pods{namespace="pay"')
    }


async def test_pods_are_counted_by_what_they_are() -> None:
    """One that should have the sidecar and has not is seen; namespaces that are left alone are not looked at."""
    server, metrics = _a_cluster(), Metrics()

    def profiles(_: str) -> dict[str, Any]:
        raise BadResource("MCPServerProfile pay/x", "broken")

    async with server.running() as kube:
        await Coverage(kube, metrics, leads=lambda: True, profiles=profiles, excluded=EXCLUDED).count()

    assert _counts(metrics) == {"governed": 1, "starting": 1, "ungoverned": 1}
    assert not any(
        name in each for each in server.requests for name in ("/namespaces/odd/", "/namespaces/kube-system/")
    )
    assert b"sidegate_pods_counted_timestamp_seconds 1" in metrics.render()


async def test_only_who_leads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several replicas would count the same pods; who leads no more forgets."""
    monkeypatch.setattr(coverage, "EVERY_S", 0.01)
    monkeypatch.setattr(coverage, "LOOK_S", 0.01)
    server, metrics, leading = _a_cluster(), Metrics(), [True]
    async with server.running() as kube, asyncio.TaskGroup() as tasks:
        server.fail_next = [500]  # once: the next look counts
        counting = Coverage(kube, metrics, leads=lambda: leading[0], profiles=lambda _: {}, excluded=EXCLUDED)
        running = tasks.create_task(counting.run())
        await eventually(lambda: _counts(metrics), what="the counts")
        leading.clear()
        leading.append(False)
        await eventually(lambda: not _counts(metrics), what="the counts to be forgotten")
        running.cancel()


async def test_api_server_that_fails_is_told() -> None:
    """Counting raises; `run` logs and tries again."""
    server = _a_cluster()
    server.fail_next = [500]
    async with server.running() as kube:
        with pytest.raises(KubeError):
            await Coverage(kube, Metrics(), leads=lambda: True, profiles=lambda _: {}, excluded=EXCLUDED).count()
