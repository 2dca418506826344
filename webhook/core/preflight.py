"""What `sidegate check` finds: each judgement from objects of the API server to one Finding, with what to do.

What the API cannot tell (whether a CNI enforces NetworkPolicies, whether a node runs its SPIRE agent) is said to be
unknown, not guessed. Sources: KEP-753 (native sidecars), spiffe-csi and OpenShift documentation (CSI volumes, SCCs), GKE
documentation (firewall rules of private clusters), AKS FAQ (admissions enforcer), docs/how-to/upgrade.md (CRDs).
"""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import msgspec
from cryptography import x509

from webhook.core import resources
from webhook.core.injection import BREAK_GLASS_LABEL, INJECTION_LABEL, SYSTEM_LABELS, policy_of
from webhook.core.pod import JSON

OLDEST: Final = (1, 33)  # as the chart's kubeVersion
CSI_DRIVER: Final = "csi.spiffe.io"
OPENSHIFT_LABEL: Final = "security.openshift.io/csi-ephemeral-volume-profile"
POD_SECURITY: Final = "pod-security.kubernetes.io/enforce"
INJECTORS: Final[Mapping[str, str]] = {  # parts of names of what changes pods as we do
    "istio": "Istio",
    "linkerd": "Linkerd",
    "dapr": "Dapr",
    "consul": "Consul",
    "kuma": "Kuma",
}
ENFORCERS: Final = ("calico", "cilium", "anetd", "antrea", "kube-router", "azure-npm", "weave", "kindnet", "ovn")
VENDORS: Final = frozenset(key for key, _ in SYSTEM_LABELS)
ENFORCER: Final = "admissions.enforcer/disabled"
NEEDED: Final = (  # what an installation creates, as group, resource, verb
    ("apiextensions.k8s.io", "customresourcedefinitions", "create"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", "create"),
    ("admissionregistration.k8s.io", "validatingadmissionpolicies", "create"),
    ("rbac.authorization.k8s.io", "clusterroles", "create"),
    ("rbac.authorization.k8s.io", "clusterrolebindings", "create"),
    ("apps", "deployments", "create"),
    ("", "secrets", "create"),
)


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """One judgement; *fix* says what to do, where something is to be done."""

    name: str
    level: Level
    text: str
    fix: str = ""


def api_version(version: JSON) -> Finding:
    """Judge the API server's version: from OLDEST on, native sidecars are stable and their named ports reach Services."""
    said = str(version.get("gitVersion"))
    found = re.match(r"v?(\d+)\.(\d+)", said)
    oldest = ".".join(map(str, OLDEST))
    if found is None:
        return Finding("api-version", Level.WARN, f"version {said} cannot be read", f"needed is {oldest} or newer")
    if (int(found[1]), int(found[2])) < OLDEST:
        return Finding("api-version", Level.FAIL, f"Kubernetes {said} is too old", f"upgrade to {oldest} or newer")
    return Finding("api-version", Level.OK, f"Kubernetes {said}: native sidecars are stable")


def permissions(answers: Mapping[tuple[str, str, str], bool]) -> Finding:
    """Judge what whoever asks may do, as NEEDED lists it."""
    missing = [f"{verb} {resource}" for (_, resource, verb), is_allowed in answers.items() if not is_allowed]
    if missing:
        return Finding(
            "permissions", Level.FAIL, f"you may not {', '.join(missing)}", "install as an administrator of the cluster"
        )
    return Finding("permissions", Level.OK, "you may create what the chart creates")


def csi_driver(driver: JSON | None, nodes: Sequence[JSON], *, is_openshift: bool) -> Finding:
    """Judge whether pods can mount the SPIFFE Workload API; *nodes* are CSINodes."""
    name = "spire-csi"
    if driver is None:
        return Finding(
            name, Level.FAIL, f"no CSIDriver {CSI_DRIVER}", "install SPIRE with its CSI driver (docs/tutorials)"
        )
    profile = (driver["metadata"].get("labels") or {}).get(OPENSHIFT_LABEL)
    if is_openshift and profile != "restricted":
        return Finding(
            name,
            Level.FAIL,
            f"OpenShift takes volumes of {CSI_DRIVER} for privileged",
            f"kubectl label csidriver {CSI_DRIVER} {OPENSHIFT_LABEL}=restricted",
        )
    without = sorted(
        each["metadata"]["name"]
        for each in nodes
        if CSI_DRIVER not in {driver["name"] for driver in (each.get("spec") or {}).get("drivers") or ()}
    )
    if without:
        return Finding(
            name,
            Level.WARN,
            f"{len(without)} of {len(nodes)} nodes have no driver: {', '.join(without[:5])}",
            "governed pods do not start there; let the SPIRE agent's and the driver's DaemonSets run on them",
        )
    return Finding(name, Level.OK, f"CSIDriver {CSI_DRIVER} on {len(nodes)} nodes")


def spire_agent(nodes: Sequence[JSON], control_planes: Sequence[JSON]) -> Finding:
    """Say what is known of the agents' sockets: the control plane's readiness does not wait for one."""
    name = "spire-agent"
    if not nodes or not control_planes:
        return Finding(
            name, Level.WARN, "whether agents listen is not to be known from the API", "sidegate status, once pods run"
        )
    return Finding(
        name, Level.OK, "drivers are registered; whether each agent answers, sidegate status says by its pods' SVIDs"
    )


def crds(found: Mapping[str, JSON | None]) -> Iterator[Finding]:
    """Judge the CRDs by plural name: there, established, and with every field that this program reads."""
    for kind in resources.KINDS:
        name, crd = f"crd-{kind.plural}", found.get(kind.plural)
        fix = "kubectl apply --server-side -f charts/sidegate/crds: Helm upgrades no CRDs"
        if crd is None:
            yield Finding(name, Level.FAIL, "not installed", fix)
            continue
        versions = {each["name"]: each for each in crd["spec"]["versions"] if each.get("served")}
        conditions = (crd.get("status") or {}).get("conditions") or ()
        if not any(each["type"] == "Established" and each["status"] == "True" for each in conditions):
            yield Finding(name, Level.FAIL, "not established", f"kubectl describe crd {kind.plural}.sidegate.dev")
        elif resources.VERSION not in versions:
            yield Finding(name, Level.FAIL, f"does not serve {resources.VERSION}", fix)
        else:
            schema = versions[resources.VERSION]["schema"]["openAPIV3Schema"]["properties"].get("spec") or {}
            known = set(schema.get("properties") or {})
            missing = sorted(
                each.encode_name for each in msgspec.structs.fields(kind.spec) if each.encode_name not in known
            )
            if missing:
                yield Finding(name, Level.FAIL, f"older than this program: no {', '.join(missing)}", fix)
            else:
                yield Finding(name, Level.OK, f"serves {resources.VERSION}")


def webhook_configuration(configuration: JSON | None, ca_pem: bytes | None, now: datetime) -> Finding:
    """Judge what the API server calls and trusts; *ca_pem* is the CA of the Secret, None if it cannot be read."""
    name = "webhook"
    if configuration is None:
        return Finding(
            name, Level.FAIL, "no MutatingWebhookConfiguration: no pod is injected", "helm upgrade --install"
        )
    webhooks = configuration.get("webhooks") or []
    open_ = [each["name"] for each in webhooks if each.get("failurePolicy") != "Fail"]
    if open_:
        return Finding(
            name, Level.FAIL, f"{', '.join(open_)}: fails open", "failurePolicy must be Fail; helm upgrade puts it back"
        )
    for each in webhooks:
        text = (each.get("clientConfig") or {}).get("caBundle")
        if not text:
            return Finding(
                name, Level.FAIL, f"{each['name']}: no caBundle", "the control plane sets it: see its log and readiness"
            )
        problem = _distrust(base64.b64decode(text), ca_pem, now)
        if problem:
            return Finding(
                name, Level.FAIL, f"{each['name']}: {problem}", "the control plane puts it right: see its log"
            )
    suffix = "" if ca_pem else " (not compared with the Secret, which you may not read)"
    return Finding(name, Level.OK, f"{len(webhooks)} webhooks fail closed and trust our CA{suffix}")


def backstop(policies: Sequence[JSON], bindings: Sequence[JSON], release: str) -> Finding:
    """Judge the admission policies that hold when the webhook does not."""
    name, fix = "backstop", "helm upgrade puts them back"
    known = {each["metadata"]["name"] for each in policies}
    denying = {
        each["spec"]["policyName"] for each in bindings if "Deny" in (each["spec"].get("validationActions") or ())
    }
    for wanted in (f"{release}-pods", f"{release}-live-pods"):
        if wanted not in known:
            return Finding(name, Level.FAIL, f"no ValidatingAdmissionPolicy {wanted}", fix)
        if wanted not in denying:
            return Finding(name, Level.FAIL, f"no binding lets ValidatingAdmissionPolicy {wanted} deny", fix)
    return Finding(name, Level.OK, "pods without their sidecar are denied, whether the webhook answers or not")


def _distrust(bundle: bytes, ca_pem: bytes | None, now: datetime) -> str:
    try:
        trusted = x509.load_pem_x509_certificates(bundle)
        ours = x509.load_pem_x509_certificate(ca_pem) if ca_pem else None
    except ValueError as error:
        return f"caBundle cannot be read: {error}"
    if ours and ours not in trusted:
        return "caBundle is not our CA"
    if all(each.not_valid_after_utc < now for each in trusted):
        return "every certificate of the caBundle has expired"
    return ""


def control_plane(deployments: Sequence[JSON]) -> Finding:
    """Judge whether the control plane answers, and would still if a node went."""
    name = "control-plane"
    if not deployments:
        return Finding(name, Level.FAIL, "no Deployment app.kubernetes.io/name=sidegate", "helm upgrade --install")
    for each in deployments:
        wanted, ready = each["spec"].get("replicas", 1), (each.get("status") or {}).get("readyReplicas", 0)
        where = f"{each['metadata']['namespace']}/{each['metadata']['name']}"
        if not ready:
            return Finding(
                name,
                Level.FAIL,
                f"{where}: none of {wanted} replicas is ready; labelled namespaces can create no pods",
                f"kubectl -n {each['metadata']['namespace']} describe pods: the readiness probe's text says why",
            )
        if wanted < 2:
            return Finding(
                name, Level.WARN, f"{where}: one replica", "set replicas to 2 or more: pods wait while it is away"
            )
        if ready < wanted:
            return Finding(
                name, Level.WARN, f"{where}: {ready} of {wanted} replicas are ready", "kubectl describe pods"
            )
    return Finding(name, Level.OK, "all replicas are ready")


def network_policy(daemon_sets: Iterable[JSON]) -> Finding:
    """Say what may enforce NetworkPolicies; that something does cannot be read from the API."""
    names = {each["metadata"]["name"] for each in daemon_sets}
    found = sorted(name for name in names if any(each in name for each in ENFORCERS))
    if found:
        return Finding("network-policy", Level.OK, f"{', '.join(found)} can enforce it; that it does must be tried")
    return Finding(
        "network-policy",
        Level.WARN,
        "nothing is known here that enforces NetworkPolicy; the API takes policies that nobody enforces",
        "use capture redirect, or install a CNI that enforces them, and try: docs/explanation/capture-modes.md",
    )


def other_webhooks(configurations: Iterable[JSON], ours: str) -> Iterator[Finding]:
    """Judge the mutating webhooks of others, which may see the same pods."""
    for each in configurations:
        name = each["metadata"]["name"]
        if name == ours:
            continue
        mesh = next((title for part, title in INJECTORS.items() if part in name), None)
        if mesh and any(_sees_pods(webhook) for webhook in each.get("webhooks") or ()):
            yield Finding(
                "other-webhooks",
                Level.WARN,
                f"{name}: {mesh} changes pods, too",
                f"do not label a namespace for both, or exempt governed pods from {mesh}'s capture",
            )
        for webhook in each.get("webhooks") or ():
            is_open_wide = not webhook.get("namespaceSelector") and not webhook.get("objectSelector")
            if _sees_pods(webhook) and is_open_wide and webhook.get("failurePolicy", "Fail") == "Fail":
                yield Finding(
                    "other-webhooks",
                    Level.WARN,
                    f"{webhook['name']} must answer before any pod is created, ours too",
                    "give it a namespaceSelector that leaves our namespace out",
                )


def _sees_pods(webhook: JSON) -> bool:
    return any(
        {"pods", "*", "*/*"} & set(rule.get("resources") or ()) and {"CREATE", "*"} & set(rule.get("operations") or ())
        for rule in webhook.get("rules") or ()
    )


def namespaces(found: Iterable[JSON], capture: str | None) -> Iterator[Finding]:
    """Judge the labels of namespaces: values that mean nothing, and Pod Security that our capture mode does not pass."""
    governed = 0
    for each in found:
        name, labels = each["metadata"]["name"], each["metadata"].get("labels") or {}
        value = labels.get(INJECTION_LABEL)
        if value is not None and value not in ("enabled", "enforced"):
            yield Finding(
                "namespaces",
                Level.FAIL,
                f"{name}: {INJECTION_LABEL}={value} governs nothing",
                f"kubectl label --overwrite namespace {name} {INJECTION_LABEL}=enabled",
            )
        if policy_of(labels) is None:
            continue
        governed += 1
        level = labels.get(POD_SECURITY)
        if level in ("baseline", "restricted") and capture == "redirect":
            yield Finding(
                "namespaces",
                Level.FAIL,
                f"{name}: Pod Security {level} refuses capture mode redirect, which needs NET_ADMIN",
                "capture: remap in its MCPServerProfile; see docs/how-to/restricted-clusters.md",
            )
        if labels.get(BREAK_GLASS_LABEL) == "allowed":
            yield Finding(
                "namespaces",
                Level.WARN,
                f"{name}: break-glass is open",
                f"kubectl label namespace {name} {BREAK_GLASS_LABEL}-",
            )
    yield Finding("namespaces", Level.OK, f"{governed} namespaces are governed")


def platform(version: JSON, groups: Iterable[str]) -> Iterator[Finding]:
    """Yield what is to be known of the vendor's platform."""
    if "-gke." in str(version.get("gitVersion")):
        yield Finding(
            "gke",
            Level.WARN,
            "GKE: a private cluster's control plane reaches pods on ports 443 and 10250 only",
            "leave the webhook on port 10250, or add a firewall rule",
        )
    if any(group.endswith(".openshift.io") for group in groups):
        yield Finding(
            "openshift",
            Level.WARN,
            "OpenShift: the default SCC allows no UID 15100, which sidecars have",
            "oc adm policy add-scc-to-user nonroot-v2 -z SERVICE_ACCOUNT -n NAMESPACE; see docs/how-to/restricted-clusters.md",
        )


def aks(nodes: Iterable[JSON]) -> Iterator[Finding]:
    """Yield what is to be known of AKS, by the names that it gives to nodes."""
    if any(each["metadata"]["name"].startswith("aks-") for each in nodes):
        yield Finding(
            "aks",
            Level.WARN,
            "AKS: its admissions enforcer rewrites the namespaceSelectors of webhooks that do not opt out",
            f"leave the chart's annotation {ENFORCER}; sidegate check names selectors that were rewritten",
        )


def selectors(configuration: JSON | None) -> Iterator[Finding]:
    """Yield for each of our webhooks which labels of namespaces keep it out, where the chart does not say so."""
    for webhook in (configuration or {}).get("webhooks") or ():
        is_optional = webhook["name"].startswith("optional.")
        for each in (webhook.get("namespaceSelector") or {}).get("matchExpressions") or ():
            is_ours = is_optional and each["operator"] == "NotIn"
            if each["key"] in VENDORS and not is_ours:
                yield Finding(
                    "webhook-selectors",
                    Level.FAIL,
                    f"{webhook['name']}: namespaces with label {each['key']} are left out, and their pods refused by the backstop",
                    f'AKS does that; annotate the configuration {ENFORCER}: "true", and helm upgrade',
                )


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level of all."""
    levels = {each.level for each in findings}
    return next((level for level in (Level.FAIL, Level.WARN) if level in levels), Level.OK)


def environment(deployments: Sequence[JSON], name: str) -> str | None:
    """Return a setting of the control plane, as its Deployment has it."""
    for each in deployments:
        for container in each["spec"]["template"]["spec"]["containers"]:
            for variable in container.get("env") or ():
                if variable.get("name") == name:
                    value: Any = variable.get("value")
                    return None if value is None else str(value)
    return None
