"""A tenant who wants out, and a caller who wants in: each attempt on the real cluster fails, and says why."""

from __future__ import annotations

import copy
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.cluster import CommandError
from tests.e2e.governed import KNOCK, Governed, container, service, workload_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.e2e

CONFIGURATION = "mutatingwebhookconfiguration/sidegate"


def a_pod(name: str, namespace: str = "demo", **spec: Any) -> dict[str, Any]:
    """A pod as a tenant writes it, of the image of the governed servers."""
    server = container("server", workload_image(), "python3", "/opt/app/three_tools.py", "8000")
    labels = {"app": name, "sidegate.dev/server": "true"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"containers": [server | {"ports": [{"name": "mcp", "containerPort": 8000}]}], **spec},
    }


def refused(governed: Governed, pod: dict[str, Any]) -> str:
    """Why the API server does not take *pod*."""
    with pytest.raises(CommandError) as caught:
        governed.cluster.kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(pod))
    return str(caught.value)


def admitted(governed: Governed, pod: dict[str, Any]) -> dict[str, Any]:
    """What the API server makes of *pod*, which it does not keep."""
    said = governed.cluster.kubectl(
        "create", "--dry-run=server", "--output=json", "--filename=-", input=json.dumps(pod)
    )
    made: dict[str, Any] = json.loads(said)
    return made


@pytest.mark.parametrize("port", [8000, 15443])
def test_the_applications_port_leads_to_the_sidecar(governed: Governed, port: int) -> None:
    """As the sidecar's own does: no identity, no call."""
    address = governed.pod("records")["status"]["podIP"]

    assert governed.knock("agents", "agent", address, port).startswith("401")


def test_every_other_port_leads_to_the_sidecar_too(governed: Governed) -> None:
    """Nobody listens there, and yet the connection opens: the sidecar takes it, and ends it without a word."""
    address = governed.pod("records")["status"]["podIP"]

    assert governed.knock("agents", "agent", address, 1) in {"RemoteDisconnected", "ConnectionResetError"}


def test_a_headless_service_does_not_get_round_it(governed: Governed) -> None:
    """Names that lead to the pods themselves change nothing."""
    headless = service("demo", "records-direct", 8000)
    headless["spec"] |= {"clusterIP": "None", "selector": {"app": "records"}}
    governed.cluster.apply(headless)

    def knocked() -> str:
        return governed.knock("agents", "agent", "records-direct.demo.svc.cluster.local", 8000)

    governed.cluster.wait_until("the name is known", lambda: knocked() != "gaierror", timeout_s=30)
    assert knocked().startswith("401")


def test_the_nodes_own_network_does_not_get_round_it(governed: Governed) -> None:
    """What a pod with hostNetwork sends comes from the node, which no NetworkPolicy stops; netfilter in the pod does."""
    address = governed.pod("records")["status"]["podIP"]

    assert governed.cluster.exec(sys.executable, "-c", KNOCK, address, "8000").startswith("401")


def _container_with(**security: Any) -> Callable[[dict[str, Any]], object]:
    return lambda pod: pod["spec"]["containers"][0].update(securityContext=security)


def _spec(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda pod: pod["spec"].update(values)


def _foreign(pod: dict[str, Any]) -> None:
    decoy = {
        "name": "sidegate",
        "image": "localhost/workload:1",
        "restartPolicy": "Always",
        "command": ["sleep", "1000"],
    }
    pod["spec"]["initContainers"] = [decoy]


def _own_volume(pod: dict[str, Any]) -> None:
    pod["spec"]["volumes"] = [{"name": "own", "csi": {"driver": "csi.spiffe.io", "readOnly": True}}]


ATTEMPTS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "host-network": ("hostNetwork: traffic would not pass the sidecar", _spec(hostNetwork=True)),
    "host-pid": ("hostPID: the sidecar's process would be in reach", _spec(hostPID=True)),
    "shared-processes": ("shareProcessNamespace: the sidecar's process would be in reach", _spec(shareProcessNamespace=True)),
    "node-sockets": ("hostPath /run leads to the sockets", _spec(volumes=[{"name": "node", "hostPath": {"path": "/run"}}])),
    "same-uid": ("runAsUser 15100 is the sidecar's", _container_with(runAsUser=15100)),
    "raw-sockets": ("capability NET_RAW can undo the capture", _container_with(capabilities={"add": ["NET_RAW"]})),
    "network-administrator": ("capability NET_ADMIN can undo", _container_with(capabilities={"add": ["NET_ADMIN"]})),
    "privileged": ("privileged can undo the capture", _container_with(privileged=True)),
    "sidecar-of-ones-own": ("sidegate is not what the injector makes", _foreign),
    "spiffe-socket": ("mounted for the sidecar alone", _own_volume),
    "opt-out-with-our-label": ("this pod is not injected", lambda pod: pod["metadata"]["labels"].update(
        {"sidegate.dev/server": "false", "sidegate.dev/injected": "default"}
    )),
    "unknown-annotation": ("no such annotation", lambda pod: pod["metadata"].update(
        annotations={"sidegate.dev/inject": "false"}
    )),
}  # fmt: skip


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_pod_that_would_get_out_is_not_created(governed: Governed, attempt: str) -> None:
    """The API server repeats our reason."""
    words, change = ATTEMPTS[attempt]
    pod = a_pod(attempt)
    change(pod)

    assert words in refused(governed, pod)


def test_forged_evidence_is_not_believed(governed: Governed) -> None:
    """Status, revision and capture mode that a tenant writes himself: the sidecar is put in, and they are overwritten."""
    pod = a_pod("forged")
    pod["metadata"]["labels"] |= {"sidegate.dev/injected": "mine", "sidegate.dev/capture": "none"}
    pod["metadata"]["annotations"] = {"sidegate.dev/status": '{"guarantee":"redirect","hash":"0"}'}
    made = admitted(governed, pod)

    assert [each["name"] for each in made["spec"]["initContainers"]] == ["sidegate-net", "sidegate"]
    assert made["metadata"]["labels"]["sidegate.dev/injected"] == "default"
    assert made["metadata"]["labels"]["sidegate.dev/capture"] == "redirect"
    assert json.loads(made["metadata"]["annotations"]["sidegate.dev/status"])["hash"] != "0"


def test_the_sidecar_of_a_running_pod_is_not_swapped(governed: Governed) -> None:
    """The API server would allow another image; it is refused with what to do instead, and so are our labels."""
    name = governed.pod("records")["metadata"]["name"]
    swap = {"spec": {"initContainers": [{"name": "sidegate", "image": "localhost/workload:1"}]}}
    for patch, words in (
        (swap, "the image of a sidecar is not changed on a pod that runs"),
        ({"metadata": {"labels": {"sidegate.dev/injected": None}}}, "are not changed on one that runs"),
        ({"metadata": {"annotations": {"sidegate.dev/status": "{}"}}}, "are not changed on one that runs"),
    ):
        with pytest.raises(CommandError, match=words):
            governed.cluster.kubectl("--namespace", "demo", "patch", "pod", name, f"--patch={json.dumps(patch)}")


def test_ways_into_a_running_pod_are_closed(governed: Governed) -> None:
    """A debug container and port-forward go behind the sidecar, exec into it; the application can be entered."""
    name = governed.pod("records")["metadata"]["name"]
    demo = ("--namespace", "demo")
    debug = (
        "debug",
        name,
        "--image=localhost/workload:1",
        "--image-pull-policy=Never",
        "--target=server",
        "--",
        "true",
    )
    for command, words in (
        (debug, "a debug container would be inside a governed pod, behind its sidecar"),
        (("exec", name, "--container=sidegate", "--", "true"), "nobody enters the sidecar's containers"),
        (("port-forward", name, ":8000"), "port-forward reaches a pod's loopback behind its sidecar"),
    ):
        with pytest.raises(CommandError, match=words):
            governed.cluster.kubectl(*demo, *command, timeout_s=30)
    assert "ok" in governed.cluster.kubectl(*demo, "exec", name, "--container=server", "--", "echo", "ok")


def test_a_debug_container_comes_in_by_a_broken_glass(governed: Governed) -> None:
    """Whoever may label the namespace may let it in; it is still none of the sidecar's."""
    name = governed.pod("records")["metadata"]["name"]
    label = ("label", "namespace", "demo")
    governed.cluster.kubectl(*label, "sidegate.dev/break-glass=allowed")
    try:
        base = ("--namespace", "demo", "debug", name, "--image=localhost/workload:1", "--image-pull-policy=Never")
        with pytest.raises(CommandError, match="touches neither the sidecar's process"):
            governed.cluster.kubectl(
                *base, "--container=nosy", "--target=sidegate", "--profile=restricted", "--", "true"
            )
        governed.cluster.kubectl(*base, "--container=helper", "--profile=restricted", "--", "true")
    finally:
        governed.cluster.kubectl(*label, "sidegate.dev/break-glass-")


@pytest.fixture
def without_webhook(governed: Governed) -> Iterator[None]:
    """Somebody has deleted our webhook configuration; afterwards it is back."""
    configuration = governed.cluster.get(CONFIGURATION)
    governed.cluster.kubectl("delete", CONFIGURATION)
    yield
    kept = {key: value for key, value in configuration["metadata"].items() if key in ("name", "labels", "annotations")}
    governed.cluster.apply(configuration | {"metadata": kept})
    governed.cluster.wait_until("pods are injected", lambda: _is_injected(governed, a_pod("back")), timeout_s=60)


def _is_injected(governed: Governed, pod: dict[str, Any]) -> bool:
    return "sidegate" in [each["name"] for each in admitted(governed, pod)["spec"].get("initContainers", ())]


@pytest.mark.usefixtures("without_webhook")
def test_without_the_webhook_governed_pods_do_not_start_and_others_do(governed: Governed) -> None:
    """Labelled, picked by a profile, or with a copied sidecar in it: refused. Other namespaces do not notice."""
    labelled, picked = a_pod("labelled"), a_pod("picked")
    del picked["metadata"]["labels"]["sidegate.dev/server"]
    governed.cluster.wait_until(
        "the API server has forgotten it", lambda: not _reaches_webhook(governed, labelled), timeout_s=30
    )

    assert "nobody has put the sidecar into it" in refused(governed, labelled)
    assert "as MCPServerProfile servers selects it" in refused(governed, picked)
    running = governed.pod("records")
    copied = {"apiVersion": "v1", "kind": "Pod", "spec": copy.deepcopy(running["spec"])}
    copied["metadata"] = {key: running["metadata"][key] for key in ("labels", "annotations")}
    copied["metadata"] |= {"name": "copied", "namespace": "demo"}
    copied["spec"].pop("ephemeralContainers", None)
    copied["spec"]["initContainers"][1]["image"] = "localhost/workload:1"
    assert "has not the image" in refused(governed, copied)
    assert "initContainers" not in admitted(governed, a_pod("free", namespace="agents"))["spec"]


def _reaches_webhook(governed: Governed, pod: dict[str, Any]) -> bool:
    try:
        return _is_injected(governed, pod)
    except CommandError:
        return False
