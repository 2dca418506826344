"""Requirements on the Helm chart: what it renders, what it refuses, and that it agrees with the code it starts."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
import yaml

from sidecar import __version__
from tests.chart.render import CHART, NAMESPACE, VALUES, golden, helm, manifests, rendered
from webhook.config import PREFIX, Settings
from webhook.core import annotations, container, injection
from webhook.core.resources import Selector

FIRST_RELEASE = Path(__file__).parent / "first-release.yaml"
CANARY = next(each for each in VALUES if each.stem == "canary")
MINIMAL = next(each for each in VALUES if each.stem == "minimal")
by_values = pytest.mark.parametrize("values", VALUES, ids=lambda values: values.stem)

NOT_IN_THE_CHART = {"KUBECONFIG", "LISTEN_HOST", "ADMISSION_PORT", "BUNDLES_PORT", "METRICS_PORT", "OPA"}
"""Development only, or fixed by the image and the manifests."""


def one(values: Path, kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of *kind*, or the one called *name*."""
    found = [each for each in manifests(values) if each["kind"] == kind and name in {None, each["metadata"]["name"]}]
    assert len(found) == 1
    return found[0]


def pods(values: Path) -> list[dict[str, Any]]:
    """The specs of all pods that the chart starts."""
    return [each["spec"]["template"]["spec"] for each in manifests(values) if each["kind"] in {"Deployment", "Job"}]


def environment(values: Path) -> dict[str, str]:
    """The control plane's environment."""
    (process,) = one(values, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each.get("value", NAMESPACE) for each in process["env"]}


@by_values
def test_rendering_is_the_reviewed_one(values: Path) -> None:
    """A change of the manifests shows as one; `python -m tests.chart.render` writes them anew."""
    assert golden(values).read_text() == rendered(values)


def test_no_golden_file_is_left_over() -> None:
    """Each golden file has its values."""
    assert {each.name for each in golden(MINIMAL).parent.iterdir()} == {each.name for each in VALUES}


@by_values
def test_helm_finds_nothing_to_complain_of(values: Path) -> None:
    """Linting is strict."""
    done = helm("lint", "--strict", CHART, "--values", values)

    assert done.returncode == 0, done.stdout + done.stderr


@by_values
@pytest.mark.parametrize("version", ["1.33", "1.36", "1.37"])
def test_manifests_are_valid_where_the_chart_is_supported(values: Path, version: str) -> None:
    """The API server's own schemas know every field; SPIRE's resources are judged in the real cluster."""
    for manifest in manifests(values):
        if manifest["apiVersion"] != "spire.spiffe.io/v1alpha1":
            kubernetes_validate.validate(manifest, version, strict=True)


def test_older_kubernetes_is_refused() -> None:
    """Before 1.33 the named port of a native sidecar reaches no Service."""
    done = helm("template", "sidegate", CHART, "--values", MINIMAL, "--kube-version", "1.32.9")

    assert done.returncode != 0
    assert "chart requires kubeVersion: >=1.33.0-0" in done.stderr


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("spiffe.trustDomain=", "/spiffe/trustDomain"),
        ("spiffe.trustDomain=spiffe://example.org", "/spiffe/trustDomain"),
        ("spiffe.trustdomain=example.org", "'trustdomain' not allowed"),
        ("spiffe.socket=unix:/run/agent.sock", "/spiffe/socket"),
        ("capture.default=none", "/capture/default"),
        ("defaults.mtls=off", "/defaults/mtls"),
        ("image.sidecar.digest=latest", "/image/sidecar/digest"),
        ("image.tag=1", "'tag' not allowed"),
        ("image.pullPolicy=always", "/image/pullPolicy"),
        ("sidecar.resources.limits.memory=lots", "/sidecar/resources/limits/memory"),
        ("telemetry.otlpEndpoint=collector:4318", "/telemetry/otlpEndpoint"),
        ("limits.store=valkey:6379", "/limits/store"),
        ("limits.store=redis://user:secret@valkey:6379", "/limits/store"),
        ("limits.timeoutSeconds=60", "/limits/timeoutSeconds"),
        ("replicas=0", "/replicas"),
        ("webhook.timeoutSeconds=31", "/webhook/timeoutSeconds"),
        ("webhook.failurePolicy=Ignore", "'failurePolicy' not allowed"),
        ("logLevel=trace", "/logLevel"),
        ("canary=perhaps", "/canary"),
        ("canaries={next one}", "/canaries/0"),
        ("telemetry.otel.PATH=/bin", "/telemetry/otel"),
        ("monitoring.rules.enabled=yes please", "/monitoring/rules/enabled"),
        ("monitoring.dashboard.enabled=true", "'dashboard' not allowed"),
        ("sidecar.requestLog=some", "/sidecar/requestLog"),
        ("unheardOf=1", "'unheardOf' not allowed"),
    ],
)
def test_wrong_values_are_refused(setting: str, complaint: str) -> None:
    """A mistyped value is named before anything is installed."""
    done = helm("template", "sidegate", CHART, "--values", MINIMAL, "--set", setting)

    assert done.returncode != 0
    assert complaint in done.stderr


@by_values
def test_the_control_plane_accepts_its_environment(values: Path) -> None:
    """Every variable exists and every value is one that the code allows."""
    read = Settings.from_env(environment(values))

    assert read.namespace == NAMESPACE
    assert read.control_plane_id.endswith(
        f"/ns/{NAMESPACE}/sa/{one(values, 'ServiceAccount', read.service)['metadata']['name']}"
    )
    assert read.capture == yaml.safe_load(values.read_text()).get("capture", {}).get("default", "redirect")


def test_every_setting_can_be_made_by_values() -> None:
    """No setting of the control plane is out of an operator's reach."""
    settings = {PREFIX + name.upper() for name in Settings.__dataclass_fields__}

    assert settings - set(environment(MINIMAL)) == {PREFIX + name for name in NOT_IN_THE_CHART}


def test_defaults_of_the_chart_are_those_of_the_code() -> None:
    """What is documented once must not differ in the other place."""
    read = Settings.from_env(environment(MINIMAL))
    named_by_release = {
        "image",
        "control_plane_id",
        "service",
        "webhook_configuration",
        "lease",
        "ca_secret",
        "signing_secret",
    }
    differing = {
        name
        for name, each in Settings.__dataclass_fields__.items()
        if getattr(read, name) != each.default and name not in named_by_release
    }

    assert differing == set()


def test_ports_are_those_of_the_code() -> None:
    """Service and container send to where the process listens."""
    read = Settings.from_env(environment(MINIMAL))
    (process,) = pods(MINIMAL)[0]["containers"]
    listening = {each["name"]: each["containerPort"] for each in process["ports"]}

    assert listening == {"admission": read.admission_port, "bundles": read.bundles_port, "metrics": read.metrics_port}
    assert {each["targetPort"] for each in one(MINIMAL, "Service")["spec"]["ports"]} <= set(listening)


def test_the_chart_starts_the_images_of_its_version() -> None:
    """Chart, images and packages carry one version."""
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert {described["version"], described["appVersion"]} == {__version__}


@by_values
def test_what_the_process_owns_is_not_rendered(values: Path) -> None:
    """A rendered caBundle or Secret would fight with the one who renews it, at every upgrade."""
    assert all(each["kind"] != "Secret" for each in manifests(values))
    assert all(
        "caBundle" not in each["clientConfig"] for each in one(values, "MutatingWebhookConfiguration")["webhooks"]
    )


@by_values
def test_own_pods_meet_the_restricted_standard(values: Path) -> None:
    """The control plane runs where Pod Security enforces its strictest level."""
    for pod in pods(values):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(set(volume) - {"name"} <= {"csi", "emptyDir"} for volume in pod.get("volumes", ()))
        for process in pod["containers"]:
            assert process["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }


@by_values
def test_rights_are_the_least(values: Path) -> None:
    """No wildcard; Secrets and webhook configurations by name only, save for the creation, which cannot be."""
    for role in (each for each in manifests(values) if each["kind"] in {"Role", "ClusterRole"}):
        for rule in role["rules"]:
            assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            if rule["verbs"] != ["create"] and {"secrets", "mutatingwebhookconfigurations"} & set(rule["resources"]):
                assert rule["resourceNames"]
            if "secrets" in rule["resources"]:
                assert role["kind"] == "Role"


def test_rights_cover_every_custom_resource() -> None:
    """What the chart defines the control plane may read, and of that write the status alone."""
    defined = {yaml.safe_load(each.read_text())["spec"]["names"]["plural"] for each in (CHART / "crds").iterdir()}
    (readable,) = (
        set(rule["resources"])
        for rule in one(MINIMAL, "ClusterRole", "sidegate")["rules"]
        if rule["apiGroups"] == [annotations.GROUP] and "list" in rule["verbs"]
    )
    (written,) = (
        rule
        for rule in one(MINIMAL, "ClusterRole", "sidegate")["rules"]
        if rule["apiGroups"] == [annotations.GROUP] and "list" not in rule["verbs"]
    )

    assert readable == defined
    assert set(written["resources"]) == {f"{plural}/status" for plural in defined}
    assert written["verbs"] == ["patch"]


@by_values
def test_a_namespace_is_governed_by_exactly_what_its_labels_say(values: Path) -> None:
    """Of the three webhooks at most one matches, and its path is the policy that the code reads from it."""
    webhooks = one(values, "MutatingWebhookConfiguration")["webhooks"]
    selectors = {
        each["clientConfig"]["service"]["path"]: msgspec.convert(each["namespaceSelector"], Selector)
        for each in webhooks
    }
    assert set(selectors) == {f"/mutate/{policy}" for policy in injection.NamespacePolicy}

    systems: tuple[dict[str, str], ...] = ({}, *({key: value} for key, value in injection.SYSTEM_LABELS))
    for label, glass, system in itertools.product(
        (None, "enabled", "enforced", "disabled"), (None, "allowed", "no"), systems
    ):
        labels = {"kubernetes.io/metadata.name": "team", "sidegate.dev/revision": "next"} | system
        labels |= {injection.INJECTION_LABEL: label} if label else {}
        labels |= {injection.BREAK_GLASS_LABEL: glass} if glass else {}
        matching = {path.removeprefix("/mutate/") for path, selector in selectors.items() if selector.matches(labels)}

        assert matching == {injection.policy_of(labels)} - {None}


@by_values
@pytest.mark.parametrize(
    "protected",
    [
        {"kubernetes.io/metadata.name": "kube-system"},
        {"kubernetes.io/metadata.name": NAMESPACE},
    ],
    ids=lambda labels: "-".join(labels.values()),
)
def test_the_cluster_can_always_heal_itself(values: Path, protected: dict[str, str]) -> None:
    """Namespaces that everything else needs, our own among them, never wait for the webhook, whatever their labels."""
    for each in one(values, "MutatingWebhookConfiguration")["webhooks"]:
        selector = msgspec.convert(each["namespaceSelector"], Selector)
        for label in ("enabled", "enforced"):
            assert not selector.matches(protected | {injection.INJECTION_LABEL: label})


@by_values
def test_the_webhook_fails_closed(values: Path) -> None:
    """No answer in time means no pod; a dry run changes nothing; other webhooks' changes are seen."""
    for each in one(values, "MutatingWebhookConfiguration")["webhooks"]:
        assert each["failurePolicy"] == "Fail"
        assert each["sideEffects"] == "None"
        assert each["reinvocationPolicy"] == "IfNeeded"
        assert [(rule["operations"], rule["resources"]) for rule in each["rules"]] == [(["CREATE"], ["pods"])]


def test_identities_are_for_our_containers_only() -> None:
    """The application beside the sidecar gets no identity, and neither does a pod that is not governed."""
    control_plane = one(MINIMAL, "ClusterSPIFFEID", "sidegate-control-plane")["spec"]
    governed = one(MINIMAL, "ClusterSPIFFEID", "sidegate-governed")["spec"]
    (process,) = pods(MINIMAL)[0]["containers"]

    assert control_plane["workloadSelectorTemplates"] == [f"k8s:container-name:{process['name']}"]
    assert governed["workloadSelectorTemplates"] == [f"k8s:container-name:{container.SIDECAR}"]
    assert governed["podSelector"]["matchExpressions"] == [{"key": annotations.INJECTED, "operator": "Exists"}]
    assert governed["spiffeIDTemplate"] == control_plane["spiffeIDTemplate"]


def test_the_agent_socket_is_where_both_planes_look_for_it() -> None:
    """Mounts and addresses agree."""
    (process,) = pods(MINIMAL)[0]["containers"]
    address = Settings.from_env(environment(MINIMAL)).spiffe_socket

    assert {each["name"]: each["mountPath"] for each in process["volumeMounts"]}["spiffe"] == str(
        Path(address[5:]).parent
    )


def test_one_replica_is_warned_of() -> None:
    """The notes say what it means; with more, there is a budget for disruptions."""
    alone = next(each for each in VALUES if each.stem == "unprivileged")
    notes = helm("install", "sidegate", CHART, "--values", alone, "--dry-run=client").stdout.partition("NOTES:")[2]

    assert "WARNING: one replica" in notes
    assert "k8s:container-name:sidegate" in notes  # identities are to be registered by hand
    assert all(each["kind"] != "PodDisruptionBudget" for each in manifests(alone))
    assert one(MINIMAL, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_the_uninstall_hook_can_delete_what_refuses_pods() -> None:
    """It runs our own image, with one right on the names that it is called with."""
    role = one(MINIMAL, "ClusterRole", "sidegate-removal")
    (process,) = pods(MINIMAL)[1]["containers"]
    allowed = {
        f"{kind}/{name}" for rule in role["rules"] for kind in rule["resources"] for name in rule["resourceNames"]
    }

    assert {tuple(rule["verbs"]) for rule in role["rules"]} == {("delete",)}
    assert process["command"][:3] == ["python", "-m", "webhook.shell.removal"]
    assert set(process["command"][3:]) == allowed
    made = {f"{each['kind'].lower()}s/{each['metadata']['name']}" for each in manifests(MINIMAL)}
    assert allowed <= made
    assert process["image"] == pods(MINIMAL)[0]["containers"][0]["image"]


@by_values
def test_an_upgrade_that_reuses_old_values_renders_and_runs(values: Path, tmp_path: Path) -> None:
    """`--reuse-values` keeps the defaults of the first release: what is newer has no value, and the code's default holds."""
    old = tmp_path / "sidegate"
    shutil.copytree(CHART, old)
    shutil.copy(FIRST_RELEASE, old / "values.yaml")

    done = helm("template", "sidegate", old, "--namespace", NAMESPACE, "--values", values)

    assert done.returncode == 0, done.stderr
    upgraded = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "Deployment"]
    (process,) = upgraded[0]["spec"]["template"]["spec"]["containers"]
    set_ = {each["name"]: each.get("value", NAMESPACE) for each in process["env"]}
    assert Settings.from_env(set_) == Settings.from_env(environment(values))


def test_values_for_high_availability_fit_the_schema() -> None:
    """The file that the chart brings for production renders, with a budget and a node for each replica."""
    done = helm("template", "sidegate", CHART, "--values", MINIMAL, "--values", CHART / "values-ha.yaml")

    assert done.returncode == 0, done.stderr
    found = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert found["Deployment"]["spec"]["replicas"] == 3
    (rule,) = found["Deployment"]["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"].values()
    labels = found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert rule[0]["labelSelector"]["matchLabels"].items() <= labels.items()
    assert "PodDisruptionBudget" in found


def _takers(revision: str | None) -> list[str]:
    """Return which of two releases side by side takes a namespace labelled with *revision*."""
    labels = {"kubernetes.io/metadata.name": "team", injection.INJECTION_LABEL: "enabled"}
    labels |= {"sidegate.dev/revision": revision} if revision else {}
    releases = {
        "first": ("sidegate", MINIMAL, "canaries={next}"),
        "second": ("sidegate-next", CANARY, "canary=true"),
    }
    takers = []
    for name, (release, values, setting) in releases.items():
        done = helm("template", release, CHART, "--namespace", NAMESPACE, "--values", values, "--set", setting)
        (webhooks,) = (
            each["webhooks"]
            for each in yaml.safe_load_all(done.stdout)
            if each["kind"] == "MutatingWebhookConfiguration"
        )
        selectors = [msgspec.convert(each["namespaceSelector"], Selector) for each in webhooks]
        takers += [name for selector in selectors if selector.matches(labels)]
    return takers


@pytest.mark.parametrize(
    ("revision", "taker"), [(None, "first"), ("default", "first"), ("misspelt", "first"), ("next", "second")]
)
def test_each_namespace_belongs_to_one_of_two_versions(revision: str | None, taker: str) -> None:
    """A canary takes what is labelled for it, the first release everything else: nothing is left ungoverned."""
    assert _takers(revision) == [taker]


def test_a_canary_brings_nothing_that_two_would_fight_over() -> None:
    """Custom resources are judged, and governed pods registered, by the first release alone; names are its own."""
    done = helm("template", "sidegate-next", CHART, "--namespace", "next", "--values", CANARY)
    found = [(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(done.stdout)]

    assert "ValidatingWebhookConfiguration" not in dict(found)
    assert [name for kind, name in found if kind == "ClusterSPIFFEID"] == ["sidegate-next-control-plane"]
    assert all(name.startswith("sidegate-next") for _, name in found)


def test_a_canary_has_a_lease_and_leaves_the_status_to_the_first_release() -> None:
    """Without a Lease nobody would keep the NetworkPolicies of its namespaces, which the first release lets go of."""
    for values, status in ((CANARY, "leave"), (MINIMAL, "write")):
        (deployment,) = [each for each in manifests(values) if each["kind"] == "Deployment"]
        (process,) = deployment["spec"]["template"]["spec"]["containers"]
        settings = {each["name"]: each.get("value") for each in process["env"]}
        assert settings["SIDEGATE_LEASE"] == deployment["metadata"]["name"]
        assert settings["SIDEGATE_STATUS"] == status


def test_the_chart_can_be_tried_after_the_installation() -> None:
    """`helm test` tries pods in a labelled namespace of its own, with the right to create pods there and no other."""
    hooks = [
        each for each in manifests(MINIMAL) if each["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"
    ]
    found = {each["kind"]: each for each in hooks}
    (process,) = found["Pod"]["spec"]["containers"]

    assert found["Namespace"]["metadata"]["labels"][injection.INJECTION_LABEL] == "enabled"
    assert found["Role"]["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}]
    assert process["command"] == ["python", "-m", "webhook.shell.trial", found["Namespace"]["metadata"]["name"]]
    assert set(found) == {"Namespace", "ServiceAccount", "Role", "RoleBinding", "Pod"}
