"""The API server's own policies: a real one judges pods with no webhook registered, as if ours had been deleted."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import yaml

from sidecar.config import Capture
from tests.chart.render import CHART, NAMESPACE, helm
from tests.cluster.apiserver import ApiServer
from tests.webhook.core import golden_cases
from webhook.core import node_paths, obstacles, resources
from webhook.core.container import Template
from webhook.core.injection import Deny, Inject, NamespacePolicy, Skip, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.cluster.apiserver import Answer
    from webhook.core.resources import ServerProfileSpec

pytestmark = pytest.mark.real_apiserver

JSON = dict[str, Any]
SIDECAR_IMAGE = "registry.example/sidegate/sidecar"
SERVER = {"sidegate.dev/server": "true"}
APP: JSON = {"name": "app", "image": "app:1", "ports": [{"name": "mcp", "containerPort": 8080}]}
PATIENCE_S = 60.0
NONE: Mapping[str, ServerProfileSpec] = {}


def rendered(release: str, *settings: str) -> str:
    """The policies of a release."""
    values = ("spiffe.trustDomain=example.org", f"image.sidecar.repository={SIDECAR_IMAGE}", *settings)
    flags = [part for value in values for part in ("--set", value)]
    only = ("--show-only", "templates/backstop.yaml")
    done = helm("template", release, CHART, "--namespace", NAMESPACE, *flags, *only)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(claim: str, check: Callable[[], bool]) -> None:
    """Ask until it holds: the API server takes policies up a moment after it has stored them."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline_s, claim
        time.sleep(0.1)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server of this module's own, with the custom resources and the policies in force."""
    with ApiServer(tmp_path_factory.mktemp("backstop")) as running:
        for definition in (CHART / "crds").iterdir():
            running.apply(definition.read_text())
        running.apply(rendered("sidegate", "canaries={loose,strict}"))
        running.apply(rendered("loose", "canary=true", "revision=loose", "capture.weakest=remap"))
        for name, labels in (
            ("optional", {"sidegate.dev/injection": "enabled"}),
            ("enforced", {"sidegate.dev/injection": "enforced"}),
            ("glass", {"sidegate.dev/injection": "enforced", "sidegate.dev/break-glass": "allowed"}),
            ("vendor", {"sidegate.dev/injection": "enabled", "control-plane": "true"}),
            ("free", {}),
            (NAMESPACE, {"sidegate.dev/injection": "enforced"}),
        ):
            running.make_namespace(name, **labels)
        until("the policies hold", lambda: bool(running.create_pod("enforced", a_pod()).refusal))
        yield running


def a_pod(labels: JSON | None = None, **spec: Any) -> JSON:
    """A pod as a tenant writes it."""
    return {"metadata": {"name": "a", "labels": labels or {}}, "spec": {"containers": [copy.deepcopy(APP)], **spec}}


def injected(
    pod: JSON | None = None,
    *,
    template: Template = golden_cases.TEMPLATE,
    profiles: Mapping[str, ServerProfileSpec] = NONE,
) -> JSON:
    """The same as our webhook makes it."""
    decision = decide(
        pod or a_pod(SERVER),
        namespace="optional",
        policy=NamespacePolicy.OPTIONAL,
        profiles=profiles,
        nonce="",
        template=template,
    )
    assert isinstance(decision, Inject), decision
    return copy.deepcopy(decision.pod)


def of_release(release: str, template: Template = golden_cases.TEMPLATE) -> Template:
    """The template of a release of that name, which tells its sidecars whom to ask."""
    name = f"{release}-sidegate"
    identity = f"spiffe://example.org/ns/{NAMESPACE}/sa/{name}"
    ask = replace(template.sidecar, control_plane=f"https://{name}.{NAMESPACE}.svc:8443", control_plane_id=identity)
    return replace(template, sidecar=ask)


def container(pod: JSON, name: str = "sidegate") -> JSON:
    """The container of that name."""
    both = (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])
    found: JSON = next(each for each in both if each["name"] == name)
    return found


def set_variable(pod: JSON, name: str, value: str) -> None:
    """Overwrite a setting of the sidecar, or add it."""
    variables = container(pod)["env"]
    variables[:] = [each for each in variables if each["name"] != name] + [{"name": name, "value": value}]


def test_the_api_server_finds_no_fault_with_the_types(api: ApiServer) -> None:
    """Every expression of every policy fits the objects that it is asked about."""
    api.apply(rendered("typed", "canary=true", "revision=typed", "capture.weakest=remap", "backstop.rawSockets=deny",
                       "backstop.debug.exec=deny", "backstop.namespaceGroups={system:masters}"))  # fmt: skip
    api.start_controllers("validatingadmissionpolicy-status-controller")
    kind = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"

    def policies() -> list[JSON]:
        return list(api.call("GET", kind).body["items"])

    until("all were checked", lambda: all("typeChecking" in each.get("status", {}) for each in policies()))
    assert len([each for each in policies() if each["metadata"]["name"].startswith("typed-")]) == 6
    assert [each["status"]["typeChecking"] for each in policies() if each["status"]["typeChecking"]] == []


def refusal(api: ApiServer, namespace: str, pod: JSON) -> str:
    """Why *pod* is refused; "" when it is not. Other errors than a refusal fail the test."""
    own = copy.deepcopy(pod)
    own["metadata"] = {key: value for key, value in own.get("metadata", {}).items() if key != "namespace"}
    if "name" not in own["metadata"]:
        own["metadata"]["generateName"] = "a-"
    answer = api.create_pod(namespace, own)
    assert answer.status in {201, 403}, answer.refusal
    return answer.refusal


def home(api: ApiServer, case: golden_cases.Case, labels: JSON) -> str:
    """A namespace as the case has it, with its profiles and the service accounts that golden pods name."""
    if case.namespace["metadata"]["name"] == "kube-system":
        name = "kube-system"
    else:
        name = f"golden-{case.folder.name}"
        api.make_namespace(name, **(case.namespace["metadata"].get("labels") or {}), **labels)
    for account in ("ledger", "planner", "clock"):
        api.make_service_account(name, account)
    if (file := case.folder / "profiles.yaml").exists():
        for profile in yaml.safe_load_all(file.read_text()):
            kind = {"apiVersion": "sidegate.dev/v1alpha1", "kind": "MCPServerProfile"}
            api.apply(profile | kind | {"metadata": {"name": profile["metadata"]["name"], "namespace": name}})
    return name


# The webhook lets none come this far that it denies; a field of tomorrow's Kubernetes is an error in this one, and a
# class of priority or runtime must exist.
ADMITTED = [
    case
    for case in golden_cases.cases()
    if not isinstance(case.decide(case.pod), Deny) and case.folder.name not in {"48-unknown-fields", "52-runtime-class"}
]


@pytest.mark.parametrize("case", ADMITTED, ids=lambda case: case.folder.name)
def test_golden_pods_pass_as_the_webhook_leaves_them_and_only_so(api: ApiServer, case: golden_cases.Case) -> None:
    """What is injected is admitted as it comes out and refused as it came in; what is left alone is admitted."""
    labels = {}
    if case.template.weakest_capture is Capture.REMAP:
        labels = {"sidegate.dev/revision": "loose"}
        case = replace(case, template=of_release("loose", case.template))
    decision = case.decide(case.pod)
    namespace = home(api, case, labels)
    if isinstance(decision, Skip):
        assert refusal(api, namespace, case.pod) == ""
        return
    assert refusal(api, namespace, decision.pod) == ""
    if decision.operations:
        # Profiles are known to the policies a moment later than to the API.
        until("the pod is refused without the webhook", lambda: "Policy 'sidegate-" in refusal(api, namespace, case.pod)
              or "Policy 'loose-" in refusal(api, namespace, case.pod))  # fmt: skip


def test_other_namespaces_are_left_alone(api: ApiServer) -> None:
    """Without the label, for a vendor's, and in our own, nothing is refused; there is nobody to ask when we are gone."""
    for namespace in ("free", "vendor", NAMESPACE):
        assert refusal(api, namespace, a_pod(SERVER)) == ""
    assert refusal(api, "optional", a_pod()) == ""
    assert "must be governed" in refusal(api, "optional", a_pod(SERVER))
    assert "must be governed" in refusal(api, "optional", a_pod({"sidegate.dev/agent": "true"}))
    assert "must be governed" in refusal(api, "enforced", a_pod({"sidegate.dev/server": "false"}))
    assert refusal(api, "glass", a_pod({"sidegate.dev/server": "false"})) == ""


def test_a_mirror_pod_is_its_kubelets(api: ApiServer) -> None:
    """The annotation lets nobody else through."""
    pod = a_pod(nodeName="node1", automountServiceAccountToken=False)
    pod["metadata"]["annotations"] = {"kubernetes.io/config.mirror": "x"}

    assert "must be governed" in refusal(api, "enforced", pod)


def _swap(field: str, value: Any, name: str = "sidegate") -> Callable[[JSON], object]:
    return lambda pod: container(pod, name).update({field: value})


def _security(name: str, **values: Any) -> Callable[[JSON], object]:
    return lambda pod: container(pod, name).setdefault("securityContext", {}).update(values)


def _volume(name: str, source: JSON) -> Callable[[JSON], object]:
    def change(pod: JSON) -> None:
        volumes = pod["spec"]["volumes"]
        volumes[:] = [each for each in volumes if each["name"] != name] + [{"name": name, **source}]

    return change


def _mount(name: str, volume: str, path: str) -> Callable[[JSON], object]:
    mount = {"name": volume, "mountPath": path}
    return lambda pod: container(pod, name).setdefault("volumeMounts", []).append(mount)


def _without(name: str) -> Callable[[JSON], object]:
    def change(pod: JSON) -> None:
        pod["spec"]["initContainers"] = [each for each in pod["spec"]["initContainers"] if each["name"] != name]

    return change


def _spec(**values: Any) -> Callable[[JSON], object]:
    return lambda pod: pod["spec"].update(values)


def _variable(name: str, value: str) -> Callable[[JSON], object]:
    return lambda pod: set_variable(pod, f"SIDEGATE_{name}", value)


SH = ["sh", "-c", "sleep 1000"]
FORGERIES: dict[str, tuple[str, Callable[[JSON], object]]] = {
    "no-sidecar": ("must be governed", _without("sidegate")),
    "no-status": ("must be governed", lambda pod: pod["metadata"].pop("annotations")),
    "no-label": ("must be governed", lambda pod: pod["metadata"]["labels"].pop("sidegate.dev/injected")),
    "other-image": ("has not the image", _swap("image", "busybox:1")),
    "image-of-similar-name": ("has not the image", _swap("image", f"{SIDECAR_IMAGE}-own:1")),
    "net-with-other-image": ("has not the image", _swap("image", "busybox:1", "sidegate-net")),
    "other-command": ("has not the command", _swap("command", SH)),
    "net-with-other-command": ("has not the command", _swap("command", SH, "sidegate-net")),
    "net-as-an-agents": ("has not the command", lambda pod: container(pod, "sidegate-net")["command"].append("8080")),
    "with-arguments": ("has not the image", _swap("args", ["--help"])),
    "in-another-directory": ("has not the image", _swap("workingDir", "/srv")),
    "with-a-hook": ("has not the image", _swap("lifecycle", {"postStart": {"exec": {"command": SH}}})),
    "with-foreign-environment": ("has not the image", _swap("envFrom", [{"configMapRef": {"name": "x"}}])),
    "as-root": ("has not the image", _security("sidegate", runAsUser=0, runAsNonRoot=False)),
    "with-a-capability": ("has not the image", _security("sidegate", capabilities={"add": ["SYS_PTRACE"]})),
    "not-restarted": ("has not the command", lambda pod: [
        container(pod).pop(key) for key in ("restartPolicy", "startupProbe", "livenessProbe", "readinessProbe")
    ]),
    "behind-another": ("must come before", lambda pod: pod["spec"]["initContainers"].insert(
        0, {"name": "first", "image": "busybox:1"}
    )),
    "net-behind-the-sidecar": ("must come before", lambda pod: pod["spec"]["initContainers"].reverse()),
    "second-one-among-the-containers": ("must come before", lambda pod: (
        _without("sidegate-net")(pod), pod["spec"]["containers"].append({"name": "sidegate-net", "image": "busybox:1"})
    )),
    "without-capture": ("not captured", _without("sidegate-net")),
    "labelled-as-captured-otherwise": (
        "not captured", lambda pod: pod["metadata"]["labels"].update({"sidegate.dev/capture": "remap"})
    ),
    "captured-otherwise": ("not captured", _variable("CAPTURE", "listen")),
    "captured-more-weakly": ("not captured", lambda pod: (
        pod["metadata"]["labels"].update({"sidegate.dev/capture": "remap"}),
        _without("sidegate-net")(pod),
        _variable("CAPTURE", "remap")(pod),
    )),
    "other-control-plane": ("environment", _variable("CONTROL_PLANE", "https://mine.team.svc:8443")),
    "other-control-planes-identity": ("environment", _variable("CONTROL_PLANE_ID", "spiffe://example.org/ns/team/sa/mine")),
    "other-agent": ("environment", _variable("SPIFFE_SOCKET", "unix:/var/cache/sidegate/agent.sock")),
    "other-role": ("environment", _variable("ROLE", "agent")),
    "other-upstream": ("environment", _variable("UPSTREAM_HOST", "10.0.0.1")),
    "other-port": ("environment", _variable("LISTEN_PORT", "1")),
    "variable-twice": ("environment", lambda pod: container(pod)["env"].append(
        {"name": "SIDEGATE_CONTROL_PLANE_ID", "value": "spiffe://example.org/ns/team/sa/mine"}
    )),
    "python-path": ("environment", lambda pod: container(pod)["env"].append({"name": "PYTHONPATH", "value": "/srv"})),
    "telemetry-elsewhere": ("environment", lambda pod: container(pod)["env"].append(
        {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://mine.team:4318"}
    )),
    "own-agent-socket": ("SPIFFE Workload API", _volume("sidegate-spiffe", {"emptyDir": {}})),
    "own-cache": ("SPIFFE Workload API", _volume("sidegate-cache", {"configMap": {"name": "mine"}})),
    "second-agent-socket": ("SPIFFE Workload API", _volume("own", {"csi": {"driver": "csi.spiffe.io", "readOnly": True}})),
    "sidecar-mounts-more": ("SPIFFE Workload API", lambda pod: (
        _volume("mine", {"emptyDir": {}})(pod), _mount("sidegate", "mine", "/usr/lib/python3")(pod)
    )),
    "net-mounts-the-cache": ("SPIFFE Workload API", _mount("sidegate-net", "sidegate-cache", "/c")),
    "application-mounts-the-cache": ("container app mounts a volume", _mount("app", "sidegate-cache", "/c")),
    "application-mounts-the-agent": ("container app mounts a volume", _mount("app", "sidegate-spiffe", "/s")),
    "hostnetwork": ("go round the sidecar", _spec(hostNetwork=True)),
    "hostpid": ("go round the sidecar", _spec(hostPID=True)),
    "hostipc": ("go round the sidecar", _spec(hostIPC=True)),
    "shared-processes": ("go round the sidecar", _spec(shareProcessNamespace=True)),
    "same-user": ("runAsUser 15100", _security("app", runAsUser=15100)),
    "same-user-by-pod": ("runAsUser 15100", _spec(securityContext={"runAsUser": 15100})),
    "privileged": ("privileged", _security("app", privileged=True)),
    "node-root": ("a hostPath leads to", _volume("node", {"hostPath": {"path": "//./"}})),
    "node-socket": ("a hostPath leads to", _volume("node", {"hostPath": {"path": "/run/spire/x.sock"}})),
    "read-all-files": ("DAC_READ_SEARCH", _security("app", capabilities={"add": ["CAP_DAC_READ_SEARCH"]})),
    "raw-sockets": ("NET_RAW", _security("app", capabilities={"add": ["CAP_NET_RAW"]})),
    "network-administrator": ("NET_ADMIN", _security("app", capabilities={"add": ["NET_ADMIN"]})),
    "host-port": ("hostPort", _swap("ports", [{"containerPort": 8080, "hostPort": 8080}], "app")),
    "sidecars-port": ("hostPort", _swap("ports", [{"containerPort": 15020}], "app")),
}  # fmt: skip


def test_the_policies_know_what_the_webhook_refuses() -> None:
    """The same directories of the node, and the same capabilities."""
    text = rendered("sidegate")
    for each in (obstacles.CAPABILITIES, node_paths.SENSITIVE):
        assert f"[{', '.join(repr(name) for name in sorted(each))}]" in text


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_sidecar_is_refused(api: ApiServer, forgery: str) -> None:
    """One thing changed in what the webhook makes, with no webhook there to compare, and the reason is told."""
    words, change = FORGERIES[forgery]
    pod = injected()
    change(pod)

    assert words in refusal(api, "optional", pod)


HELD: JSON = {"runAsUser": 1000, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
BY_NAME = {
    "p": msgspec.convert({"selector": {}, "egress": [{"hosts": ["api.example.com"]}]}, type=resources.ServerProfileSpec)
}


def let_out() -> JSON:
    """A pod whose profile names hosts, as our webhook makes it."""
    pod = a_pod(SERVER)
    pod["spec"]["containers"][0]["securityContext"] = dict(HELD)
    return injected(pod, profiles=BY_NAME)


def _unheld(**values: Any) -> Callable[[JSON], object]:
    return lambda pod: container(pod, "app").update(
        securityContext={k: v for k, v in (HELD | values).items() if v is not None}
    )


LOOSE: dict[str, tuple[str, Callable[[JSON], object]]] = {
    "without-the-rules": ("command", lambda pod: container(pod, "sidegate-net")["command"].pop()),
    "other-value": ("sidegate.dev/egress", lambda pod: pod["metadata"]["labels"].update({"sidegate.dev/egress": "all"})),
    "agent": ("environment", lambda pod: pod["metadata"]["labels"].update({"sidegate.dev/agent": "true"})),
    "no-user": ("sidegate.dev/egress", _unheld(runAsUser=None)),
    "root": ("sidegate.dev/egress", _unheld(runAsUser=0)),  # who owns /etc/hosts, the sidecar's too
    "may-escalate": ("sidegate.dev/egress", _unheld(allowPrivilegeEscalation=None)),
    "keeps-capabilities": ("sidegate.dev/egress", _unheld(capabilities={"drop": ["NET_RAW"]})),
    "adds-setuid": ("sidegate.dev/egress", _unheld(capabilities={"drop": ["ALL"], "add": ["SETUID"]})),
    "own-hosts": ("sidegate.dev/egress", _spec(hostAliases=[{"ip": "192.0.2.66", "hostnames": ["api.example.com"]}])),
    "own-name-server": ("sidegate.dev/egress", _spec(dnsConfig={"nameservers": ["192.0.2.53"]})),
    "own-resolver": ("sidegate.dev/egress", _spec(dnsPolicy="None", dnsConfig={"nameservers": ["192.0.2.53"]})),
}  # fmt: skip


def test_a_server_that_is_let_out_by_name_passes(api: ApiServer) -> None:
    """As the webhook makes it; the label on any other pod is refused, for it opens the NetworkPolicy."""
    forged = injected()
    forged["metadata"]["labels"]["sidegate.dev/egress"] = "hosts"

    assert refusal(api, "optional", let_out()) == ""
    assert "has not the command" in refusal(api, "optional", forged)


@pytest.mark.parametrize("case", LOOSE)
def test_a_server_that_could_go_round_its_sidecar_is_not_let_out(api: ApiServer, case: str) -> None:
    """One thing changed in what the webhook makes."""
    words, change = LOOSE[case]
    pod = let_out()
    change(pod)

    assert words in refusal(api, "optional", pod)


@pytest.fixture(scope="module")
def live(api: ApiServer) -> str:
    """The path of a governed pod that is there; nothing runs it."""
    pod = injected()
    pod["metadata"] |= {"name": "live"}
    answer = api.create_pod("optional", pod, dry_run=False)
    assert answer.status == 201, answer.refusal
    assert api.create_pod("glass", pod, dry_run=False).status == 201
    return "/api/v1/namespaces/optional/pods/live"


def change(api: ApiServer, path: str, patch: JSON, **who: Any) -> Answer:
    """Have an object changed, without storing it."""
    merge = "application/strategic-merge-patch+json"
    return api.call("PATCH", f"{path}?dryRun=All", patch, content_type=merge, **who)


@pytest.mark.parametrize("name", ["sidegate", "sidegate-net"])
def test_the_sidecars_image_is_not_swapped_on_a_live_pod(api: ApiServer, live: str, name: str) -> None:
    """Not even for another of ours: an older one may lack a repair. The application's own image is its own affair."""
    for image in ("busybox:1", f"{SIDECAR_IMAGE}:0.0.1"):
        swapped = change(api, live, {"spec": {"initContainers": [{"name": name, "image": image}]}})
        assert "image of a sidecar is not changed" in swapped.refusal
    assert change(api, live, {"spec": {"containers": [{"name": "app", "image": "app:2"}]}}).status == 200


@pytest.mark.parametrize("metadata", [
    {"labels": {"sidegate.dev/injected": None}},
    {"labels": {"sidegate.dev/injected": "other"}},
    {"labels": {"sidegate.dev/server": "false"}},
    {"labels": {"sidegate.dev/agent": "true"}},
    {"annotations": {"sidegate.dev/status": "{}"}},
    {"annotations": {"sidegate.dev/status": None}},
    {"annotations": {"sidegate.dev/port": "1"}},
], ids=json.dumps)  # fmt: skip
def test_our_labels_and_annotations_do_not_change_on_a_live_pod(api: ApiServer, live: str, metadata: JSON) -> None:
    """Neither taken away, nor changed, nor added."""
    for path in (live, f"{live}/status"):
        assert "are not changed on one that runs" in change(api, path, {"metadata": metadata}).refusal


def test_everything_else_of_a_live_pod_can_change(api: ApiServer, live: str) -> None:
    """Controllers add labels, annotations and finalizers, and take them away; the pod can be deleted."""
    more = {"labels": {"team": "a"}, "annotations": {"note": "b"}, "finalizers": ["example.org/x"]}

    assert change(api, live, {"metadata": more}).status == 200
    assert api.call("DELETE", f"{live}?dryRun=All").status == 200


def test_a_pod_that_was_there_before_the_label_can_still_be_edited(api: ApiServer) -> None:
    """It is not governed, and is not held up; it just cannot pretend to be."""
    api.make_namespace("older")
    api.create_pod("older", a_pod(SERVER), dry_run=False)
    api.call("PATCH", "/api/v1/namespaces/older", {"metadata": {"labels": {"sidegate.dev/injection": "enforced"}}},
             content_type="application/merge-patch+json")  # fmt: skip
    path = "/api/v1/namespaces/older/pods/a"
    unnamed = a_pod(SERVER)
    del unnamed["metadata"]["name"]
    until("the namespace is governed", lambda: "must be governed" in refusal(api, "older", unnamed))

    assert change(api, path, {"metadata": {"labels": {"team": "b"}, "finalizers": ["example.org/x"]}}).status == 200
    assert change(api, path, {"metadata": {"labels": {"sidegate.dev/injected": "default"}}}).status == 403


def test_the_sidecar_is_not_starved_on_a_live_pod(api: ApiServer, live: str) -> None:
    """Resizing in place is for the application."""

    def resized(name: str, field: str) -> Answer:
        resources = {"requests": {"cpu": "1m"}, "limits": {"cpu": "2m"}}
        return change(api, f"{live}/resize", {"spec": {field: [{"name": name, "resources": resources}]}})

    assert "resources of a sidecar are not changed" in resized("sidegate", "initContainers").refusal
    assert "Sidegate" not in resized("app", "containers").refusal


def debug(api: ApiServer, path: str, **fields: Any) -> Answer:
    """As `kubectl debug` does it."""
    added = {"name": "debugger", "image": "busybox:1", **fields}
    return change(api, f"{path}/ephemeralcontainers", {"spec": {"ephemeralContainers": [added]}})


def test_a_debug_container_needs_the_glass_to_be_broken(api: ApiServer, live: str) -> None:
    """Then it is let in, but not into the sidecar; a pod that is not governed is nobody's business."""
    glass = live.replace("optional", "glass")
    plain = a_pod()
    plain["metadata"]["name"] = "plain"
    api.create_pod("optional", plain, dry_run=False)

    assert "behind its sidecar" in debug(api, live).refusal
    assert debug(api, glass).status == 200
    for fields in (
        {"securityContext": {"runAsUser": 15100}},
        {"securityContext": {"privileged": True}},
        {"securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}}},
        {"targetContainerName": "sidegate"},
        {"volumeMounts": [{"name": "sidegate-spiffe", "mountPath": "/s"}]},
    ):
        assert "touches neither the sidecar's process" in debug(api, glass, **fields).refusal
    assert debug(api, "/api/v1/namespaces/optional/pods/plain").status == 200
    assert "not for debug containers" in debug(api, "/api/v1/namespaces/optional/pods/plain", name="sidegate").refusal


def test_a_debug_container_of_a_server_that_is_let_out_by_name_is_held_as_the_others(api: ApiServer) -> None:
    """It could become the sidecar's user as they could."""
    pod = let_out()
    pod["metadata"]["name"] = "out"
    assert api.create_pod("glass", pod, dry_run=False).status == 201
    path = "/api/v1/namespaces/glass/pods/out"

    assert "touches neither" in debug(api, path).refusal
    for user in (0, 15100):
        assert "touches neither" in debug(api, path, securityContext=HELD | {"runAsUser": user}).refusal
    assert debug(api, path, securityContext=HELD).status == 200


def connect(api: ApiServer, path: str, verb: str, query: str = "") -> str:
    """What is said to an attempt; one that passes the policies fails later, as the pod is on no node."""
    return api.call("POST", f"{path}/{verb}?{query}").refusal


def test_nobody_enters_the_sidecar(api: ApiServer, live: str) -> None:
    """Exec and attach end at the application; port-forward, which ends behind the sidecar, nowhere."""
    for name in ("sidegate", "sidegate-net"):
        assert "nobody enters the sidecar's containers" in connect(api, live, "exec", f"container={name}&command=sh")
        assert "nobody enters the sidecar's containers" in connect(api, live, "attach", f"container={name}")
    assert "does not have a host assigned" in connect(api, live, "exec", "container=app&command=sh")
    assert "port-forward reaches a pod's loopback" in connect(api, live, "portforward", "ports=8080")
    glass = live.replace("optional", "glass")
    assert "does not have a host assigned" in connect(api, glass, "portforward", "ports=8080")


STRICT = (
    "backstop.debug.exec=deny",
    "backstop.debug.groups={oncall}",
    "backstop.debug.ephemeralContainers=allow",
    "backstop.rawSockets=deny",
    "backstop.namespaceGroups={system:masters}",
    "capture.weakest=remap",
    "telemetry.otel.OTEL_TRACES_SAMPLER=always_off",
)


@pytest.fixture(scope="module")
def strict(api: ApiServer) -> str:
    """A namespace under a second release, whose operator chose otherwise."""
    api.apply(rendered("strict", "canary=true", "revision=strict", *STRICT))
    api.make_namespace("strict", **{"sidegate.dev/injection": "enabled", "sidegate.dev/revision": "strict"})
    until("the policies hold", lambda: "configuration strict" in refusal(api, "strict", a_pod(SERVER)).lower())
    return "strict"


def test_the_operator_chooses(api: ApiServer, strict: str) -> None:
    """Each value does what it says, in the namespaces of its release alone."""
    otel = (("OTEL_TRACES_SAMPLER", "always_off"),)
    template = replace(of_release("strict"), capture=Capture.REMAP, weakest_capture=Capture.REMAP, otel=otel)
    pod = a_pod(SERVER)
    loose = injected(pod, template=template)
    pod["spec"]["containers"][0]["securityContext"] = {"capabilities": {"drop": ["NET_RAW"]}}
    tight = injected(pod, template=template)

    assert "container app may open raw sockets" in refusal(api, strict, loose)
    for prefixed in ("CAP_NET_RAW", "CAP_ALL"):  # containerd writes a prefix of its own before it, and drops nothing
        pod["spec"]["containers"][0]["securityContext"] = {"capabilities": {"drop": [prefixed]}}
        assert "container app may open raw sockets" in refusal(api, strict, injected(pod, template=template))
    assert refusal(api, strict, tight) == ""
    assert "environment" in refusal(api, "optional", tight)
    assert api.create_pod(strict, tight, dry_run=False).status == 201
    path = f"/api/v1/namespaces/{strict}/pods/a"
    assert "are off in governed namespaces" in connect(api, path, "exec", "container=app&command=sh")
    oncall = api.call("POST", f"{path}/portforward?ports=8080", user="jane", groups=("system:masters", "oncall"))
    assert "does not have a host assigned" in oncall.refusal
    assert "drops NET_RAW" in debug(api, path).refusal
    assert debug(api, path, securityContext={"capabilities": {"drop": ["ALL"]}}).status == 200


def test_labels_of_namespaces_are_changed_by_the_named_groups(api: ApiServer, strict: str) -> None:
    """Who may update namespaces, but is in none of them, can do the rest."""
    api.apply({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "tenants"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "tenants"}],
    })  # fmt: skip
    path = f"/api/v1/namespaces/{strict}"
    jane = {"user": "jane", "groups": ("tenants",)}

    for label in ({"sidegate.dev/injection": None}, {"sidegate.dev/break-glass": "allowed"}, {"control-plane": "true"}):
        for way in (path, f"{path}/status"):
            assert "members of system:masters only" in change(api, way, {"metadata": {"labels": label}}, **jane).refusal
    assert change(api, path, {"metadata": {"labels": {"team": "a"}}}, **jane).status == 200
    assert change(api, path, {"metadata": {"labels": {"sidegate.dev/injection": None}}}).status == 200
