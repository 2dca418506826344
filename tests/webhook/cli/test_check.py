"""`sidegate check`, as typed, against an API server."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.webhook.cli.test_status import a_cluster, typed
from tests.webhook.core.test_preflight import ca, definitions
from tests.webhook.core.test_survey import a_pod
from tests.webhook.kube_server import KubeServer

assert typed  # a fixture
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
ADMISSION = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"


def install(server: KubeServer, *, allowed: bool = True) -> None:
    """Let *server* be a cluster in which everything is as it should be."""
    bundle = base64.b64encode(ca(datetime.now(UTC))).decode()
    server.texts["/version"] = json.dumps({"gitVersion": "v1.37.0"})
    server.texts["/apis"] = json.dumps({"groups": [{"name": "apps"}]})
    server.answers[REVIEWS] = {"status": {"allowed": allowed}}
    server.put("/apis/storage.k8s.io/v1/csidrivers", {"metadata": {"name": "csi.spiffe.io"}})
    node = {"metadata": {"name": "n"}, "spec": {"drivers": [{"name": "csi.spiffe.io"}]}}
    server.put("/apis/storage.k8s.io/v1/csinodes", node)
    server.put("/apis/apps/v1/daemonsets", {"metadata": {"name": "calico-node", "namespace": "kube-system"}})
    webhook = {"name": "w", "failurePolicy": "Fail", "clientConfig": {"caBundle": bundle}}
    server.put(ADMISSION, {"metadata": {"name": "sidegate"}, "webhooks": [webhook]})
    secret = {"metadata": {"name": "sidegate-webhook-ca"}, "data": {"ca.crt": bundle}}
    server.put("/api/v1/namespaces/sidegate-system/secrets", secret)
    policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
    bindings = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
    for name in ("sidegate-pods", "sidegate-live-pods"):
        server.put(policies, {"metadata": {"name": name}})
        server.put(bindings, {"metadata": {"name": name}, "spec": {"policyName": name, "validationActions": ["Deny"]}})
    for plural, each in definitions().items():
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        server.put(path, {**each, "metadata": {"name": f"{plural}.sidegate.dev"}})
    labels = {"app.kubernetes.io/version": "1.0"}
    env = [{"name": "SIDEGATE_CAPTURE", "value": "redirect"}]
    server.put(
        "/apis/apps/v1/deployments",
        {
            "metadata": {"name": "sidegate", "namespace": "sidegate-system", "labels": labels},
            "spec": {"replicas": 2, "template": {"spec": {"containers": [{"name": "c", "env": env}]}}},
            "status": {"readyReplicas": 2},
        },
    )


async def test_a_good_installation_passes(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each finding, and none that fails."""
    async with a_cluster(a_pod()) as server:
        install(server)
        assert await typed(server, "check") == 0
    said = capsys.readouterr().out.splitlines()

    assert said[0].split() == ["ok", "api-version", "Kubernetes", "v1.37.0:", "native", "sidecars", "are", "stable"]
    assert [line.split()[0] for line in said[:-2]] == ["ok"] * (len(said) - 2)
    assert said[-1].endswith(" 0 warnings, 0 failures")
    assert any("1 pods should be governed, and are" in line for line in said)


async def test_before_the_installation_nothing_of_ours_is_expected(
    typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what the cluster must bring."""
    async with a_cluster() as server:
        install(server, allowed=False)
        server.objects["/apis/storage.k8s.io/v1/csidrivers"].clear()
        server.objects["/apis/apps/v1/deployments"].clear()
        assert await typed(server, "check", "--pre") == 1
    said = capsys.readouterr().out

    assert "fail  permissions" in said
    assert "you may not create customresourcedefinitions," in said
    assert "fail  spire-csi" in said
    assert "no CSIDriver csi.spiffe.io" in said
    assert "crd-" not in said


async def test_what_is_wrong_fails_with_what_to_do(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """An ungoverned pod, a foreign caBundle, a resource that complains."""
    async with a_cluster(a_pod("old", sidecar=False)) as server:
        install(server)
        other = base64.b64encode(ca(datetime.now(UTC), "other")).decode()
        webhook = {"name": "w", "failurePolicy": "Fail", "clientConfig": {"caBundle": other}}
        server.put(ADMISSION, {"metadata": {"name": "sidegate"}, "webhooks": [webhook]})
        policy = {"metadata": {"name": "p", "namespace": "shop", "generation": 1}, "spec": {}}
        server.put("/apis/sidegate.dev/v1alpha1/namespaces/shop/mcppolicies", policy)
        assert await typed(server, "check", "-o", "json") == 1
    findings = {each["name"]: each for each in json.loads(capsys.readouterr().out)}

    assert findings["webhook"]["text"] == "w: caBundle is not our CA"
    assert findings["pods"]["text"].startswith("shop/old is not governed, although label sidegate.dev/server=true")
    assert findings["pods"]["fix"] == "restart workload old: kubectl rollout restart"
    assert findings["resources"] == {
        "name": "resources",
        "level": "warn",
        "text": "MCPPolicy shop/p: no status yet",
        "fix": "kubectl describe it",
    }


async def test_servers_that_share_a_namespace_are_a_warning(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a failure: it is for the cluster's operator to enforce."""
    async with a_cluster(a_pod(), a_pod("other")) as server:
        install(server)
        assert await typed(server, "check") == 0

    assert "warn  placement" in (said := capsys.readouterr().out)
    assert "Namespace shop: 2 MCP servers, Pod ledger-0, Pod other" in said


async def test_what_may_not_be_read_is_said(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """No guess, and no failure of the verb: whoever may, asks."""
    async with a_cluster() as server:
        install(server)
        del server.objects["/apis/apps/v1/daemonsets"]
        assert await typed(server, "check") == 0
    said = capsys.readouterr().out

    assert "warn  network-policy" in said
    assert "not to be known: 404" in said
    assert "ask with the rights to read it" in said


async def test_an_api_server_that_is_away_is_an_error(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a list of warnings."""
    server = KubeServer()
    server.port = 1
    assert await typed(server, "check") == 1

    assert capsys.readouterr().err.startswith("sidegate: error: ")
