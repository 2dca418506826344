"""`sidegate status`, as typed, against an API server."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.config import Capture
from tests.webhook.core.test_survey import a_pod
from tests.webhook.kube_server import KubeServer, kubeconfig
from webhook.cli.__main__ import main
from webhook.core import resources

API = "/apis/sidegate.dev/v1alpha1"
GOOD = {"conditions": [{"type": t, "status": "True", "observedGeneration": 1} for t in ("Accepted", "Compiled")]}


def a_resource(name: str, spec: Any, status: Any = GOOD, namespace: str = "shop") -> Any:
    """Return a custom resource."""
    return {"metadata": {"name": name, "namespace": namespace, "generation": 1}, "spec": spec, "status": status}


@asynccontextmanager
async def a_cluster(
    *pods: Any, labels: dict[str, str] | None = None, version: str = "1.0"
) -> AsyncIterator[KubeServer]:
    """Serve a cluster whose namespace shop is labelled, and has *pods*."""
    server = KubeServer()
    known = {"sidegate.dev/injection": "enabled"} if labels is None else labels
    server.put("/api/v1/namespaces", {"metadata": {"name": "shop", "labels": known}})
    server.objects["/api/v1/namespaces/shop/pods"] = {}
    server.objects["/api/v1/namespaces/shop/services"] = {}
    for each in pods:
        server.put("/api/v1/namespaces/shop/pods", each)
        path = f"/api/v1/namespaces/shop/pods/{each['metadata']['name']}:15020/proxy/metrics"
        server.texts[path] = (
            'sidegate_bundle_info{revision="0123456789abcdef"} 1\nsidegate_bundle_age_seconds 5\n'
            f"sidegate_svid_expiry_timestamp_seconds {time.time() + 3000}\n"
        )
    for kind in resources.KINDS:
        is_cluster = kind in (resources.CLUSTER_POLICY, resources.IDENTITY_PROVIDER)
        server.objects[f"{API}/{kind.plural}" if is_cluster else f"{API}/namespaces/shop/{kind.plural}"] = {}
    labels = {"app.kubernetes.io/version": version}
    env = [{"name": "SIDEGATE_IMAGE", "value": "registry.example/sidegate/sidecar:1.0"}]
    deployment = {
        "metadata": {"name": "sidegate", "namespace": "sidegate-system", "labels": labels},
        "spec": {"template": {"spec": {"containers": [{"name": "c", "env": env}]}}},
    }
    server.put("/apis/apps/v1/deployments", deployment)
    async with server.running():
        yield server


@pytest.fixture
def typed(tmp_path: Path) -> Any:
    """Run a verb as typed, in a thread; gives the exit status."""

    async def run(server: KubeServer, *arguments: str) -> int:
        path = tmp_path / "kubeconfig"
        path.write_text(kubeconfig(server.port))
        return await asyncio.to_thread(main, [*arguments, "--kubeconfig", str(path)])

    return run


async def test_all_is_governed(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a namespace, one a pod, and what cannot be known from here."""
    async with a_cluster(a_pod()) as server:
        assert await typed(server, "status") == 0
    said = capsys.readouterr().out.splitlines()

    assert said[0].startswith("control plane: 1.0   this program: ")
    assert said[2].split() == [
        "NAMESPACE",
        "POLICY",
        "EXPECTED",
        "GOVERNED",
        "STARTING",
        "SERVERS",
        "GUARANTEE",
        "VERSION",
    ]
    assert said[3].split() == ["shop", "optional", "1", "1", "0", "1", "redirect", "1.0"]
    assert said[6].split()[:6] == ["shop/ledger-0", "governed", "redirect", "1.0", "0123456789ab", "5s"]
    assert said[6].split()[-1] == "50m"
    assert "not to be known from here:" in said
    assert said[-1] == "all that should be governed is"
    assert "problems:" not in said


async def test_an_ungoverned_pod_fails_the_verb(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It ran before the namespace was labelled."""
    async with a_cluster(a_pod(), a_pod("old", sidecar=False)) as server:
        assert await typed(server, "status", "-n", "shop", "--no-ask") == 1
        assert not any("proxy" in each for each in server.requests)
    said = capsys.readouterr().out

    assert "Pod shop/old: not governed, although label sidegate.dev/server=true; restart workload old" in said
    assert "bundle and SVID age: not asked for (--no-ask)" in said
    assert said.endswith("1 not governed that should be\n")


async def test_what_is_not_well_is_listed(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Skew, a sidecar without bundle, one that does not answer, an SVID that ends, a policy that does not compile."""
    bad = {
        "conditions": [{"type": "Compiled", "status": "False", "observedGeneration": 1, "message": "p.cedar:1:1: no"}]
    }
    starting = a_pod("starting", ready=False)
    async with a_cluster(a_pod(), a_pod("mute"), a_pod("bare"), starting, version="1.1") as server:
        del server.texts["/api/v1/namespaces/shop/pods/mute:15020/proxy/metrics"]
        server.texts["/api/v1/namespaces/shop/pods/bare:15020/proxy/metrics"] = (
            f"sidegate_svid_expiry_timestamp_seconds {time.time() + 60}"
        )
        server.put(f"{API}/namespaces/shop/mcppolicies", a_resource("p", {"selector": {}, "cedar": "x"}, bad))
        server.put(f"{API}/namespaces/shop/mcpserverprofiles", a_resource("q", {"selector": 1}))
        assert await typed(server, "status") == 0
    said = capsys.readouterr().out

    assert "Pod shop/ledger-0: injected by version 1.0, the control plane is 1.1; restart it" in said
    assert "Pod shop/mute: its sidecar does not answer: 404" in said
    assert "Pod shop/bare: its sidecar has no bundle, and refuses all calls" in said
    assert "Pod shop/bare: its SVID ends in 60s; is SPIRE well?" in said or "its SVID ends in 1m" in said
    assert "Pod shop/starting: the sidecar is not ready" in said
    assert "MCPPolicy shop/p: Compiled=False: p.cedar:1:1: no" in said
    assert "MCPServerProfile shop/q: spec: Expected `object`, got `int`" in said


async def test_shared_places_and_services_that_miss_are_listed(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither makes the verb fail; Services that may not be read are said to be unknown."""
    labels = {"sidegate.dev/server": "true", "app": "ledger"}
    pods = (a_pod(capture=Capture.REMAP, labels=labels), a_pod("other"))
    service = {
        "metadata": {"namespace": "shop", "name": "ledger"},
        "spec": {"selector": {"app": "ledger"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    async with a_cluster(*pods) as server:
        server.put("/api/v1/namespaces/shop/services", service)
        assert await typed(server, "status") == 0
        said = capsys.readouterr().out
        del server.objects["/api/v1/namespaces/shop/services"]
        assert await typed(server, "status") == 0

    assert "Service shop/ledger: targetPort 8080 is not the sidecar's" in said
    assert "shared places:\n  Namespace shop: 2 MCP servers, Pod ledger-0, Pod other" in said
    assert "Services of namespace shop: 404" in capsys.readouterr().out


async def test_a_sidecar_of_another_image_is_not_governed(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Which are ours, the control plane's settings say."""
    planted = a_pod()
    planted["spec"]["initContainers"][-1]["image"] = "registry.example/tenant/sidecar:1"
    async with a_cluster(planted) as server:
        assert await typed(server, "status") == 1

    assert (
        "not governed, although it looks so: container sidegate: image registry.example/tenant"
        in capsys.readouterr().out
    )


async def test_excluded_namespaces_are_left_out(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever their labels say: the webhook does not look at them."""
    async with a_cluster(a_pod(sidecar=False)) as server:
        (deployment,) = server.objects["/apis/apps/v1/deployments"].values()
        env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
        env.append({"name": "SIDEGATE_EXCLUDED_NAMESPACES", "value": "kube-system,shop"})
        assert await typed(server, "status") == 0
        assert "no namespace is labelled" in capsys.readouterr().out
        assert await typed(server, "status", "-n", "shop") == 0


async def test_json_holds_every_pod(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs."""
    async with a_cluster(a_pod(), a_pod("old", sidecar=False)) as server:
        assert await typed(server, "status", "-o", "json") == 1
    report = json.loads(capsys.readouterr().out)

    assert {each["name"]: each["state"] for each in report["pods"]} == {"ledger-0": "governed", "old": "ungoverned"}
    assert report["namespaces"][0]["expected"] == 2


async def test_a_misspelt_label_is_a_problem(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It governs nothing, and looks as if it did."""
    async with a_cluster(labels={"sidegate.dev/injection": "true"}) as server:
        assert await typed(server, "status") == 0

    assert "sidegate.dev/injection=true governs nothing; it must be enabled or enforced" in capsys.readouterr().out


async def test_nothing_is_labelled(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What to do is said; no control plane is said, too."""
    async with a_cluster() as server:
        server.objects["/api/v1/namespaces"].clear()
        server.objects["/apis/apps/v1/deployments"].clear()
        assert await typed(server, "status") == 0
    said = capsys.readouterr().out

    assert "kubectl label namespace NAME sidegate.dev/injection=enabled" in said
    assert "version skew: no control plane was found to compare with" in said


async def test_a_namespace_that_is_not_there(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """An error, not an empty table."""
    async with a_cluster() as server:
        assert await typed(server, "status", "-n", "nowhere") == 1

    assert capsys.readouterr().err == "sidegate: error: 404 namespace nowhere: not there\n"


def test_no_kubeconfig_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what to do about it."""
    assert main(["status", "--kubeconfig", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err

    assert said.startswith("sidegate: error: no access to the Kubernetes API: ")
    assert said.endswith("hint: name a kubeconfig by --kubeconfig FILE or KUBECONFIG\n")
