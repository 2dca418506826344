"""What operators do to the control plane while pods start: upgrade, restart, roll its CA over, canary, roll back, uninstall."""

from __future__ import annotations

import base64
import concurrent.futures
import datetime as dt
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from certs.authority import Authority, make_key
from tests.cluster.cluster import CommandError
from tests.e2e.governed import RELEASE, REPOSITORY, Governed, container, workload_image

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

CHART = REPOSITORY / "charts" / "sidegate"
SYSTEM = ("--namespace", RELEASE)
ADMISSIONS = Path(__file__).parent / "workloads" / "admissions.py"
TAKE_BACK = ("--force-conflicts",)  # what another module has scaled by kubectl is Helm's again
STAGING_S = 15
SETTINGS = ("--set", "replicas=2", "--set", f"webhook.stagingSeconds={STAGING_S}", "--set", "lingerSeconds=5")
CLUSTER_WIDE = (
    "mutatingwebhookconfigurations", "validatingwebhookconfigurations", "validatingadmissionpolicies",
    "validatingadmissionpolicybindings", "clusterroles", "clusterrolebindings", "clusterspiffeids",
)  # fmt: skip
RATE = 20  # pods a second


@pytest.fixture(scope="module")
def operated(governed: Governed) -> Iterator[Governed]:
    """The installation with two replicas, reached by an upgrade that reuses the values it was installed with."""
    _upgrade(governed, *SETTINGS)
    yield governed
    _upgrade(governed, "--set", "replicas=1")


def _upgrade(governed: Governed, *settings: str) -> None:
    governed.cluster.helm(
        "upgrade", "sidegate", CHART, *SYSTEM, "--reuse-values", *TAKE_BACK, "--wait", "--timeout", "3m", *settings
    )


def _admit(governed: Governed, seconds: int, namespace: str = "demo") -> dict[str, Any]:
    """Have pods admitted for *seconds*; return what came of them."""
    kubeconfig = governed.cluster.run_dir / "pki" / "admin.conf"
    command = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable, ADMISSIONS, kubeconfig, namespace)
    text = governed.cluster.exec(*command, str(RATE), str(seconds), timeout_s=seconds + 120)
    outcome: dict[str, Any] = json.loads(text)
    return outcome


def _ca_bundles(governed: Governed) -> set[str]:
    configuration = governed.cluster.get("mutatingwebhookconfiguration/sidegate")
    return {each["clientConfig"].get("caBundle", "") for each in configuration["webhooks"]}


def _rollout(governed: Governed) -> None:
    governed.cluster.kubectl(*SYSTEM, "rollout", "status", "deployment/sidegate", "--timeout=180s")


def test_the_chart_passes_its_own_trial(operated: Governed) -> None:
    """`helm test` admits, leaves alone and refuses as it should, and leaves nothing."""
    operated.cluster.helm("test", "sidegate", *SYSTEM, "--timeout", "2m")


def test_a_rolling_restart_and_a_new_authority_lose_no_admission(operated: Governed) -> None:
    """At 20 pods a second both replicas are replaced and the CA rolls over, and every creation is admitted and injected."""
    cluster = operated.cluster
    before = _ca_bundles(operated)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        admitted = pool.submit(_admit, operated, 75)
        cluster.kubectl(*SYSTEM, "rollout", "restart", "deployment/sidegate")
        _rollout(operated)
        _stage_authority(operated)
        outcome = admitted.result()

    assert outcome["failures"] == []
    assert outcome["made"] == 75 * RATE
    assert outcome["not_injected"] == 0
    cluster.wait_until("the API server trusts the new CA", lambda: _ca_bundles(operated) != before, timeout_s=60)
    secret = cluster.get(*SYSTEM, "secret/sidegate-webhook-ca")["data"]
    assert "retired.crt" in secret  # the new one signs, and the old one is trusted until its last leaf has ended
    assert "staged.crt" not in secret


def _stage_authority(governed: Governed) -> None:
    """Do by hand what the control plane does when the CA grows old: put the next one beside it."""
    authority = Authority.make(
        name="sidegate",
        key=make_key(),
        now=dt.datetime.now(dt.UTC),
        lifetime=dt.timedelta(days=365),
        serial=x509.random_serial_number(),
    )
    encoded = {
        "staged.crt": base64.b64encode(authority.certificate_pem).decode(),
        "staged.key": base64.b64encode(authority.key_pem).decode(),
    }
    patch = json.dumps({"data": encoded})
    governed.cluster.kubectl(*SYSTEM, "patch", "secret/sidegate-webhook-ca", "--type=merge", f"--patch={patch}")


def test_a_ca_bundle_that_somebody_spoils_is_put_back(operated: Governed) -> None:
    """Pods wait for it no longer than the control plane needs to look."""
    before = _ca_bundles(operated)
    other = base64.b64encode(_stranger().certificate_pem).decode()
    patch = [
        {"op": "replace", "path": f"/webhooks/{number}/clientConfig/caBundle", "value": other} for number in range(3)
    ]
    operated.cluster.kubectl(
        "patch", "mutatingwebhookconfiguration/sidegate", "--type=json", f"--patch={json.dumps(patch)}"
    )

    operated.cluster.wait_until("the CA is back", lambda: _ca_bundles(operated) == before, timeout_s=30)


def _stranger() -> Authority:
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    return Authority.make(name="x", key=make_key(), now=now, lifetime=day, serial=x509.random_serial_number())


def test_a_second_version_takes_the_namespaces_that_are_labelled_for_it(operated: Governed) -> None:
    """A canary governs one namespace; the first release governs the others, and that one again when it is gone."""
    cluster = operated.cluster
    cluster.make_namespace("tried")
    cluster.kubectl("label", "namespace", "tried", "sidegate.dev/injection=enabled", "sidegate.dev/revision=next")
    settings = [*operated.values(), "--set", "revision=next", "--set", "canary=true"]
    cluster.helm("install", "sidegate-next", CHART, "--namespace", "sidegate-next", "--create-namespace", "--wait",
                 "--timeout", "3m", *settings)  # fmt: skip
    try:
        _upgrade(operated, "--set", "canaries={next}")
        _wait_for_revision(operated, "tried", "next")
        _wait_for_revision(operated, "demo", "default")
        cluster.wait_until(
            "the canary keeps its namespace fenced in",
            lambda: "sidegate-next" in _fences(operated, "tried"),
            timeout_s=30,
        )
    finally:
        cluster.helm("uninstall", "sidegate-next", "--namespace", "sidegate-next", "--wait")
        _upgrade(operated, "--set-json", "canaries=[]")
    _wait_for_revision(operated, "tried", "default")
    cluster.kubectl("delete", "namespace", "tried", "sidegate-next", "--wait=false")


def _fences(governed: Governed, namespace: str = "demo") -> str:
    """The names of the NetworkPolicies that the control plane keeps in *namespace*."""
    ours = "--selector=app.kubernetes.io/managed-by=sidegate"
    return governed.cluster.kubectl("--namespace", namespace, "get", "networkpolicies", ours, "--output=name")


def _wait_for_revision(governed: Governed, namespace: str, revision: str) -> None:
    """The API server reads changed webhook configurations with some delay."""
    claim = f"pods of {namespace} get revision {revision}"
    governed.cluster.wait_until(claim, lambda: _revision(governed, namespace) == revision, timeout_s=15)


def _revision(governed: Governed, namespace: str) -> str:
    pod = _server(namespace)
    text = governed.cluster.kubectl(
        "create", "--filename=-", "--dry-run=server", "--output=json", input=json.dumps(pod)
    )
    return str(json.loads(text)["metadata"]["labels"].get("sidegate.dev/injected"))


def _server(namespace: str) -> dict[str, Any]:
    """A pod that would be governed."""
    metadata = {"name": "tried", "namespace": namespace, "labels": {"sidegate.dev/server": "true"}}
    process = {"name": "server", "image": "server", "ports": [{"name": "mcp", "containerPort": 8000}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [process]}}


def test_a_job_completes(operated: Governed) -> None:
    """The sidecar of a pod that ends ends with it."""
    process = container("server", workload_image(), "python3", "-c", "print('done')",
                        ports=[{"name": "mcp", "containerPort": 8000}])  # fmt: skip
    template = {
        "metadata": {"labels": {"sidegate.dev/server": "true", "app": "once"}},
        "spec": {"containers": [process], "restartPolicy": "Never"},
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once", "namespace": "demo"},
           "spec": {"template": template, "backoffLimit": 0}}  # fmt: skip
    operated.cluster.apply(job)

    operated.cluster.kubectl("--namespace", "demo", "wait", "--for=condition=Complete", "job/once", "--timeout=120s")
    pods = operated.cluster.get("--namespace", "demo", "pods", "--selector=app=once")["items"]
    assert "sidegate" in [each["name"] for each in pods[0]["spec"]["initContainers"]]
    operated.cluster.kubectl("--namespace", "demo", "delete", "job/once")


def test_a_rollback_goes_on_admitting(operated: Governed) -> None:
    """The release before is trusted at once: the CA and the signing key outlive both."""
    _upgrade(operated, "--set", "logLevel=debug")
    operated.cluster.helm("rollback", "sidegate", *SYSTEM, *TAKE_BACK, "--wait", "--timeout", "3m")

    outcome = _admit(operated, 5)
    assert outcome["failures"] == []
    assert outcome["not_injected"] == 0


def test_an_uninstall_blocks_nothing_and_leaves_what_it_says(operated: Governed) -> None:
    """Pods start, ungoverned; of cluster-wide objects only the CRDs are left; installed again, it governs as before."""
    cluster = operated.cluster
    user_resources = cluster.get("mcppolicies", "--all-namespaces")["items"]
    cluster.helm("uninstall", "sidegate", *SYSTEM, "--wait", "--timeout", "3m")
    try:
        _wait_for_revision(operated, "demo", "None")
        left = cluster.kubectl(
            "get", ",".join(CLUSTER_WIDE), "--selector=app.kubernetes.io/name=sidegate", "--output=name"
        ).split()
        assert left == []
        cluster.wait_until("no NetworkPolicy of ours is left", lambda: not _fences(operated), timeout_s=60)
        secrets = cluster.kubectl(*SYSTEM, "get", "secrets", "--output=name").split()
        assert {"secret/sidegate-webhook-ca", "secret/sidegate-bundle-signing"} == {
            each for each in secrets if "helm" not in each
        }
        assert len(cluster.get("mcppolicies", "--all-namespaces")["items"]) == len(user_resources)
    finally:
        cluster.helm("install", "sidegate", CHART, *SYSTEM, "--wait", "--timeout", "3m", *operated.values(), *SETTINGS)
    _wait_for_revision(operated, "demo", "default")
    cluster.wait_until("the server is fenced in again", lambda: bool(_fences(operated)), timeout_s=60)
    broken = _server("demo")
    broken["metadata"]["annotations"] = {"sidegate.dev/port": "eighty"}
    with pytest.raises(CommandError, match=r"sidegate\.dev/port"):
        cluster.apply(broken)
