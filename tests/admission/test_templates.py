"""Pod templates of public charts: through `sidegate inject` and the real API server, unchanged but for what we declare.

Each file below templates/ says in its head which chart it is of. MCP servers first, then what stands beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.admission.conftest import PUBLIC
from tests.webhook.core.declared import rest
from webhook.cli.__main__ import main
from webhook.core.annotations import GROUP

if TYPE_CHECKING:
    from tests.cluster.apiserver import Answer, ApiServer

TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.yaml"))}
REFUSED = {  # what these charts ask for goes round any sidecar
    "nats": "unenforceable_shared_processes",
    "node-exporter": "unenforceable_host_network",
    "promtail": "unenforceable_host_path",  # /var/lib/docker, where every container's file system lies
    "weaviate": "unenforceable_privileged",  # an init container that sets vm.max_map_count
}
GOVERNED = [name for name in TEMPLATES if name not in REFUSED]
COLLECTIONS = {
    "Deployment": "apis/apps/v1/namespaces/{}/deployments",
    "StatefulSet": "apis/apps/v1/namespaces/{}/statefulsets",
    "DaemonSet": "apis/apps/v1/namespaces/{}/daemonsets",
    "Job": "apis/batch/v1/namespaces/{}/jobs",
}


def workload(name: str) -> Any:
    """Return the workload of the file, with the one annotation that it takes where a pod has several ports or none."""
    made = yaml.safe_load(TEMPLATES[name].read_text())
    template = made["spec"]["template"]
    ports = [port for each in template["spec"]["containers"] for port in each.get("ports") or ()]
    if len(ports) != 1:
        template["metadata"].setdefault("annotations", {})[f"{GROUP}/port"] = str(
            ports[0]["containerPort"] if ports else 8000
        )
    return made


def injected(made: Any, directory: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what `sidegate inject` prints for the workload."""
    path = directory / "workload.yaml"
    path.write_text(yaml.safe_dump(made))
    assert main(["inject", "-f", str(path), "--namespace-labels", f"{GROUP}/injection=enforced"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def volumes_of(made: Any) -> list[Any]:
    """Return stand-ins for the claims that a StatefulSet's controller would put in as volumes."""
    claims = made["spec"].get("volumeClaimTemplates") or ()
    return [{"name": claim["metadata"]["name"], "emptyDir": {}} for claim in claims]


def test_there_are_enough_of_them_and_each_says_whence() -> None:
    """At least twenty-five are governed; each names chart, repository, commit and licence."""
    assert len(GOVERNED) >= 25
    assert len([name for name in GOVERNED if name.startswith("mcp-")]) >= 10
    for path in TEMPLATES.values():
        head = path.read_text().split("\napiVersion:")[0].replace("\n# ", " ")
        assert head.startswith("# What chart "), path.name
        assert all(word in head for word in ("github.com/", "commit ")), path.name
        assert any(licence in head for licence in ("Apache-2.0", "MIT", "BSD-3-Clause")), path.name


@pytest.mark.parametrize("name", GOVERNED)
def test_template_changes_only_as_declared(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The workload around the template stays; of the template changes what the reference page says."""
    before = workload(name)
    after = injected(before, tmp_path, capsys)

    assert [each["name"] for each in after["spec"]["template"]["spec"]["initContainers"]][:2] == [
        "sidegate-net",
        "sidegate",
    ]
    assert rest(after["spec"]["template"], since=before["spec"]["template"]) == rest(before["spec"]["template"])
    for each in after["spec"]["template"]["spec"]["containers"]:
        assert {"cpu", "memory"} <= each["resources"]["limits"].keys()
    after["spec"]["template"] = before["spec"]["template"]
    assert after == before


@pytest.mark.parametrize("name", REFUSED)
def test_template_that_cannot_be_governed_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the field that its author has to change."""
    path = tmp_path / "workload.yaml"
    path.write_text(yaml.safe_dump(workload(name)))

    assert main(["inject", "-f", str(path), "--namespace-labels", f"{GROUP}/injection=enforced"]) == 1
    assert (
        f"error: {workload(name)['kind']} {workload(name)['metadata']['name']}: {REFUSED[name]}"
        in capsys.readouterr().err
    )


@pytest.mark.real_apiserver
@pytest.mark.parametrize("name", GOVERNED)
def test_api_server_admits_the_workload_and_its_pod(
    governed: ApiServer, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `sidegate inject` printed is accepted, and so is the pod that the webhook makes of the template as it was."""
    before = workload(name)
    after = injected(before, tmp_path, capsys)
    path = COLLECTIONS[before["kind"]].format(PUBLIC)
    rendered = governed.call("POST", f"/{path}?dryRun=All&fieldValidation=Strict", after)

    assert rendered.status == 201, rendered.refusal

    answer = created(governed, before)
    plain = created(governed, before, namespace="default")
    assert plain.status == 201, plain.refusal
    assert answer.status == 201, answer.refusal
    assert _without_token(rest(answer.body)["spec"]) == _without_token(rest(plain.body)["spec"])


def created(api: ApiServer, made: Any, namespace: str = PUBLIC) -> Answer:
    """Return the API server's answer to a pod of the workload; its service account is made first."""
    template = made["spec"]["template"]
    spec = {**template["spec"], "volumes": [*(template["spec"].get("volumes") or ()), *volumes_of(made)]}
    for account in {"default", spec.get("serviceAccountName") or "default"}:
        api.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": account}})
    pod = {"metadata": {**template["metadata"], "generateName": f"{made['metadata']['name']}-"}, "spec": spec}
    return api.create_pod(namespace, pod)


def _without_token(spec: Any) -> Any:
    """Return *spec* without the volume of the API's token, whose name is random."""
    spec["volumes"] = [each for each in spec.get("volumes") or () if not each["name"].startswith("kube-api-access")]
    for each in (*(spec.get("initContainers") or ()), *spec["containers"]):
        each["volumeMounts"] = [
            mount for mount in each.get("volumeMounts") or () if not mount["name"].startswith("kube-api-access")
        ]
    return spec
