"""What should be governed is counted beside what is, by the replica that leads."""

import asyncio
from typing import Any

import pytest

from tests.fakes import eventually
from tests.webhook.core.test_survey import ORIGIN, a_pod
from tests.webhook.kube_server import KubeServer
from webhook.core.injection import INJECTION_LABEL
from webhook.errors import BadResource, KubeError
from webhook.shell import coverage
from webhook.shell.coverage import Coverage
from webhook.shell.metrics import Metrics

EXCLUDED = frozenset({"kube-system"})


def _a_namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def _a_cluster() -> KubeServer:
    server = KubeServer()
    server.put("/api/v1/namespaces", _a_namespace("pay", **{INJECTION_LABEL: "enabled"}))
    server.put("/api/v1/namespaces", _a_namespace("odd", **{INJECTION_LABEL: "what"}))
    server.put("/api/v1/namespaces", _a_namespace("kube-system", **{INJECTION_LABEL: "enforced"}))
    for pod in (
        a_pod("a", namespace="pay"),
        a_pod("b", namespace="pay", ready=False),
        a_pod("c", namespace="pay", sidecar=False),
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
        await Coverage(kube, metrics, leads=lambda: True, profiles=profiles, excluded=EXCLUDED, origin=ORIGIN).count()

    assert _counts(metrics) == {"governed": 1, "starting": 1, "ungoverned": 1}
    assert not any(
        name in each for each in server.requests for name in ("/namespaces/odd/", "/namespaces/kube-system/")
    )
    assert b'sidegate_servers{namespace="pay"} 3.0' in metrics.render()
    assert b"sidegate_pods_counted_timestamp_seconds 1" in metrics.render()


async def test_only_who_leads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several replicas would count the same pods; who leads no more forgets."""
    monkeypatch.setattr(coverage, "EVERY_S", 0.01)
    monkeypatch.setattr(coverage, "LOOK_S", 0.01)
    server, metrics, leading = _a_cluster(), Metrics(), [True]
    async with server.running() as kube, asyncio.TaskGroup() as tasks:
        server.fail_next = [500]  # once: the next look counts
        counting = Coverage(
            kube, metrics, leads=lambda: leading[0], profiles=lambda _: {}, excluded=EXCLUDED, origin=ORIGIN
        )
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
            await Coverage(
                kube, Metrics(), leads=lambda: True, profiles=lambda _: {}, excluded=EXCLUDED, origin=ORIGIN
            ).count()
