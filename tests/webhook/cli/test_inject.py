"""`sidegate inject`: the golden cases once more, workloads with templates, and what is said of wrong input."""

import io
from pathlib import Path

import pytest
import yaml

from tests.webhook.core.golden_cases import NONCE, Case, cases
from webhook.cli.__main__ import main
from webhook.cli.inject import Injector
from webhook.core.injection import Inject, Skip
from webhook.errors import WebhookError

POD = {"containers": [{"name": "app", "image": "app:1", "ports": [{"containerPort": 8080}]}]}
LABELS = {"sidegate.dev/server": "true"}


def deployment(kind: str = "Deployment", namespace: str | None = None) -> dict[str, object]:
    """Return a workload whose pod asks to be governed."""
    metadata = {"name": "api"} | ({"namespace": namespace} if namespace else {})
    return {"kind": kind, "metadata": metadata, "spec": {"template": {"metadata": {"labels": LABELS}, "spec": POD}}}


def injected(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> list[dict[str, object]]:
    """Return what `sidegate inject` prints for the file *path*."""
    assert main(["inject", "-f", str(path), *arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def written(directory: Path, *documents: object) -> Path:
    """Return a file with *documents*."""
    path = directory / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return path


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.folder.name)
def test_a_golden_pod_comes_out_as_from_the_webhook(case: Case) -> None:
    """One decision, two ways to ask for it."""
    metadata = case.namespace["metadata"]
    decision = case.decide(case.pod)
    injector = Injector(case.template, metadata.get("labels") or {}, metadata["name"], [])
    injector._nonce = NONCE
    injector.profiles[metadata["name"]] = case.profiles
    pod = {"kind": "Pod"} | case.pod

    rendered = injector.render(pod)

    if isinstance(decision, Inject):
        assert rendered == {"kind": "Pod"} | decision.pod
        assert injector.render(rendered) == rendered
    else:
        assert rendered == pod
        assert injector.denied is not isinstance(decision, Skip)


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "Rollout"])
def test_a_template_is_rendered_for_its_workload(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The sidecar knows the workload's name, and nothing else of the manifest changes."""
    [made] = injected(capsys, written(tmp_path, deployment(kind)))
    spec = made["spec"]["template"]["spec"]  # type: ignore[index]

    sidecar = next(each for each in spec["initContainers"] if each["name"] == "sidegate")
    assert {"name": "SIDEGATE_WORKLOAD", "value": "api"} in sidecar["env"]
    assert spec["containers"][0]["image"] == "app:1"
    assert made["metadata"] == {"name": "api"}
    assert "generateName" not in made["spec"]["template"]["metadata"]  # type: ignore[index]


def test_a_cron_job_is_rendered_two_levels_down(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its pod is a template within a template."""
    cron = {"kind": "CronJob", "metadata": {"name": "nightly"}, "spec": {"jobTemplate": deployment()}}
    [made] = injected(capsys, written(tmp_path, cron))

    spec = made["spec"]["jobTemplate"]["spec"]["template"]["spec"]  # type: ignore[index]
    assert [each["name"] for each in spec["initContainers"]] == ["sidegate-net", "sidegate"]


def test_lists_and_other_objects_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Lists are taken apart; what holds no pod comes out as it went in."""
    service = {"kind": "Service", "metadata": {"name": "api"}}
    made = injected(capsys, written(tmp_path, {"kind": "List", "items": [service, deployment()]}))

    assert [each["kind"] for each in made] == ["Service", "Deployment"]
    assert made[0] == service


def test_items_of_a_typed_list_get_its_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The API lists deployments as a DeploymentList of objects without kind."""
    item = {key: value for key, value in deployment().items() if key != "kind"}
    [made] = injected(capsys, written(tmp_path, {"apiVersion": "apps/v1", "kind": "DeploymentList", "items": [item]}))

    assert (made["apiVersion"], made["kind"]) == ("apps/v1", "Deployment")
    assert "initContainers" in made["spec"]["template"]["spec"]  # type: ignore[index]


def test_unknown_kinds_with_lists_and_empty_documents_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Only what Kubernetes calls a list is one."""
    path = tmp_path / "many.yaml"
    path.write_text("---\nkind: AllowList\nitems: none\n---\n---\nkind: Shopping\nitems: [milk]\n")

    assert injected(capsys, path) == [{"kind": "AllowList", "items": "none"}, {"kind": "Shopping", "items": ["milk"]}]


@pytest.mark.parametrize("level", ["baseline", "restricted"])
def test_what_pod_security_would_refuse_is_told(level: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its verdict comes behind ours in the API server, and in capture mode redirect it is known beforehand."""
    labels = f"sidegate.dev/injection=enabled,pod-security.kubernetes.io/enforce={level}"
    path = written(tmp_path, deployment())
    settings = tmp_path / "settings"
    settings.write_text("SIDEGATE_CAPTURE=remap\nSIDEGATE_WEAKEST_CAPTURE=remap\n")

    assert main(["inject", "-f", str(path), "--namespace-labels", labels]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: Deployment api: Pod Security {level} of the namespace refuses NET_ADMIN" in said.err
    assert injected(capsys, path, "--namespace-labels", labels, "--settings", str(settings))


def test_each_run_has_hook_tokens_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is printed may be applied, so nobody may know the token beforehand."""
    hooked = deployment()
    app = {**POD["containers"][0], "lifecycle": {"preStop": {"httpGet": {"port": 8080}}}}
    hooked["spec"]["template"]["spec"] = {"containers": [app]}  # type: ignore[index]
    path = written(tmp_path, hooked)

    assert injected(capsys, path) != injected(capsys, path)


def test_a_profile_in_the_input_takes_part(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As it will once it is applied: it selects the pod, in its own namespace only."""
    profile = {
        "kind": "MCPServerProfile",
        "metadata": {"name": "all", "namespace": "shop"},
        "spec": {"selector": {"matchLabels": {"app": "api"}}},
    }
    here, there = deployment(namespace="shop"), deployment(namespace="bank")
    for each in (here, there):
        each["spec"]["template"]["metadata"] = {"labels": {"app": "api"}}  # type: ignore[index]
    made = injected(capsys, written(tmp_path, profile, here, there))

    assert "initContainers" in made[1]["spec"]["template"]["spec"]  # type: ignore[index]
    assert made[2] == there


def test_standard_input_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A dash stands for it, as everywhere."""
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump(deployment())))

    assert main(["inject", "-f", "-"]) == 0
    assert "name: sidegate" in capsys.readouterr().out


def test_settings_are_those_of_the_control_plane(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The file holds its environment, a variable a line."""
    settings = tmp_path / "settings"
    settings.write_text("# of the cluster\nSIDEGATE_IMAGE=registry.example/sidecar:7\n")
    [made] = injected(capsys, written(tmp_path, deployment()), "--settings", str(settings))

    assert {each["image"] for each in made["spec"]["template"]["spec"]["initContainers"]} == {  # type: ignore[index]
        "registry.example/sidecar:7"
    }


def test_a_refused_pod_is_told_and_nothing_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Half a result could be applied by mistake."""
    bad = deployment()
    bad["spec"]["template"]["spec"] = POD | {"hostNetwork": True}  # type: ignore[index]

    assert main(["inject", "-f", str(written(tmp_path, deployment(), bad))]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: Deployment api: unenforceable_host_network: hostNetwork" in said.err


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("{", (), "while parsing"),
        ("- 1", (), "expected objects of Kubernetes, found list"),
        ("a: 1", (), "expected objects of Kubernetes, found one without kind"),
        ("kind: [x]", (), "expected objects of Kubernetes, found one without kind"),
        ("kind: List\nitems: [1]", (), "expected objects of Kubernetes, found int"),
        ("kind: PodList\nitems: [1]", (), "expected objects of Kubernetes, found int"),
        ("kind: Pod\nmetadata: [1]", (), "Pod: metadata: expected an object"),
        ("kind: Deployment\nspec: {template: {metadata: [1]}}", (), "spec.template: expected a pod template"),
        ("kind: Deployment\nspec: {template: {metadata: {labels: 1}, spec: 1}}", (), "malformed: pod: "),
        ("[" * 5000, (), "wrong.yaml"),
        ("kind: Deployment", (), "spec.template: expected a pod template"),
        ("kind: Pod", ("--namespace-labels", "enabled"), "--namespace-labels enabled: expected KEY=VALUE"),
        ("kind: MCPServerProfile", (), "MCPServerProfile"),
    ],
)
def test_wrong_input_is_told(
    text: str, arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With the place and what is expected there."""
    path = tmp_path / "wrong.yaml"
    path.write_text(text)

    assert main(["inject", "-f", str(path), *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("IMAGE=x", "1: expected SIDEGATE_NAME=VALUE"),
        ("SIDEGATE_CAPTURE=magic", "SIDEGATE_CAPTURE='magic': expected one of"),
    ],
)
def test_wrong_settings_are_told(line: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the line, or the setting and its allowed values."""
    settings = tmp_path / "settings"
    settings.write_text(line)

    assert main(["inject", "-f", str(written(tmp_path, deployment())), "--settings", str(settings)]) == 1
    assert expected in capsys.readouterr().err


def test_input_that_is_no_text_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An archive, say, in place of what it holds."""
    path = tmp_path / "chart.tgz"
    path.write_bytes(b"\x1f\x8b\xff")

    assert main(["inject", "-f", str(path)]) == 1
    assert "chart.tgz: expected YAML in UTF-8" in capsys.readouterr().err


def test_a_bad_profile_names_its_field() -> None:
    """As the control plane would."""
    profile = {"kind": "MCPServerProfile", "metadata": {"name": "p"}, "spec": {"selector": {}, "capture": "magic"}}
    with pytest.raises(WebhookError, match=r"MCPServerProfile p: spec: .*capture"):
        Injector(cases()[0].template, {}, "shop", [profile])
