"""What the kubelet does with a pod beside starting it, through the sidecar: probes of every kind, and hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.governed import WORKLOADS, container, workload_image

if TYPE_CHECKING:
    from tests.e2e.governed import Governed

pytestmark = pytest.mark.e2e


def a_probed_pod() -> dict[str, Any]:
    """A pod that is ready only when gRPC, HTTP and TCP probes succeed, with hooks; it listens on loopback alone."""
    server = container(
        "server",
        workload_image(),
        "python3",
        "-c",
        (WORKLOADS / "probed.py").read_text(),
        ports=[{"name": "mcp", "containerPort": 8000}],
        startupProbe={"grpc": {"port": 9000}, "periodSeconds": 1, "failureThreshold": 60},
        livenessProbe={"tcpSocket": {"port": "mcp"}, "periodSeconds": 5},
        readinessProbe={"httpGet": {"path": "/ready?full=1", "port": "mcp"}, "periodSeconds": 1},
        lifecycle={
            "preStop": {
                "httpGet": {"path": "/quit", "port": "mcp", "httpHeaders": [{"name": "X-Reason", "value": "stop"}]}
            }
        },
    )
    labels = {"app": "probed", "sidegate.dev/server": "true"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probed", "namespace": "demo", "labels": labels},
        "spec": {"containers": [server], "terminationGracePeriodSeconds": 30},
    }


def test_probes_and_hooks_reach_the_application(governed: Governed) -> None:
    """The kubelet has no identity and the application no open port; both get what they are used to."""
    cluster, demo = governed.cluster, ("--namespace", "demo")

    def said() -> str:
        return cluster.kubectl(*demo, "logs", "probed", "--container=server")

    cluster.apply(a_probed_pod())
    try:
        cluster.kubectl(*demo, "wait", "--for=condition=Ready", "pod/probed", "--timeout=120s")
        assert "/ready?full=1 None kube-probe/" in said()
        assert "/quit" not in said()
        cluster.kubectl(*demo, "delete", "pod/probed", "--wait=false")
        cluster.wait_until("the hook is called", lambda: "/quit stop kube-lifecycle/" in said(), timeout_s=20)
    finally:
        cluster.kubectl(*demo, "delete", "pod/probed", "--ignore-not-found")
