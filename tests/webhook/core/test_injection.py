"""The decision about one pod: the golden cases, the laws that hold for all of them, and forged artefacts."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonpatch
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.webhook.core.declared import rest
from tests.webhook.core.golden_cases import NONCE, TEMPLATE, Case, cases
from webhook.core import container, patch
from webhook.core.injection import Decision, Deny, Inject, NamespacePolicy, Skip, decide, policy_of
from webhook.errors import DenyCode

CASES = {case.folder.name: case for case in cases()}
INJECTED = {name: case for name, case in CASES.items() if (case.folder / "mutated.yaml").exists()}


def a_pod(**spec: Any) -> Any:
    """Return a pod that is injected."""
    app = {"name": "app", "image": "example/ledger:1", "ports": [{"name": "mcp", "containerPort": 8080}]}
    return {"metadata": {"labels": {"sidegate.dev/server": "true"}}, "spec": {"containers": [app]} | spec}


def decided(pod: Any, template: container.Template = TEMPLATE) -> Decision:
    """Return the decision on *pod* where injection is optional."""
    return decide(
        pod, namespace="payments", policy=NamespacePolicy.OPTIONAL, profiles={}, template=template, nonce=NONCE
    )


def injected(pod: Any, template: container.Template = TEMPLATE) -> Any:
    """Return *pod* after injection."""
    decision = decided(pod, template)
    assert isinstance(decision, Inject), decision
    return decision.pod


def deny_code(decision: Decision) -> DenyCode:
    """Return the code of a denial."""
    assert isinstance(decision, Deny), decision
    return decision.code


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_golden_case_comes_out_as_recorded(case: Case) -> None:
    """What comes out of a case is what was reviewed; nothing else lies in its folder."""
    results = case.results()
    inputs = {"pod.yaml", "namespace.yaml", "settings.toml", "profiles.yaml", "why.md"}

    assert {name: (case.folder / name).read_text() for name in results} == results
    assert {file.name for file in case.folder.iterdir()} - inputs == set(results)
    assert (case.folder / "why.md").read_text().strip()


@pytest.mark.parametrize("case", INJECTED.values(), ids=INJECTED.keys())
def test_recorded_patch_makes_the_recorded_pod(case: Case) -> None:
    """A JSON Patch library makes mutated.yaml of pod.yaml with patch.json: what the API server will do."""
    patch = json.loads((case.folder / "patch.json").read_text())

    assert jsonpatch.apply_patch(case.pod, patch) == yaml.safe_load((case.folder / "mutated.yaml").read_text())
    assert "test" not in {operation["op"] for operation in patch}


@pytest.mark.parametrize("case", INJECTED.values(), ids=INJECTED.keys())
def test_our_own_output_needs_no_patch(case: Case) -> None:
    """The second look at an injected pod changes nothing and warns alike."""
    first = case.decide(case.pod)
    assert isinstance(first, Inject)
    second = case.decide(first.pod)

    assert isinstance(second, Inject)
    assert second.operations == []
    assert second.warnings == first.warnings


@pytest.mark.parametrize("case", INJECTED.values(), ids=INJECTED.keys())
def test_application_keeps_all_but_what_is_declared(case: Case) -> None:
    """Order, unknown fields, everything: but for the targets of probes, the name of a moved port and an agent's proxy."""
    decision = case.decide(case.pod)

    assert isinstance(decision, Inject)
    assert rest(decision.pod, since=case.pod) == rest(case.pod)


def unknown(part: Any) -> Any:
    """Return *part* with a field that nobody knows in each of its objects, but for our own containers and volumes."""
    if isinstance(part, list):
        return [each if ours(each) else unknown(each) for each in part]
    if isinstance(part, dict):
        return {key: unknown(each) for key, each in part.items()} | {"unknown": "1"}
    return part


def ours(part: Any) -> bool:
    """Return whether *part* is a container or volume of our making."""
    return isinstance(part, dict) and part.get("name") in container.CONTAINERS | container.VOLUMES


@pytest.mark.parametrize("case", INJECTED.values(), ids=INJECTED.keys())
def test_unknown_fields_survive_at_every_level(case: Case) -> None:
    """What a later version of the API adds comes out again, in the targets of moved probes by way of the record."""
    pod = unknown(case.pod)
    decision = case.decide(pod)

    assert isinstance(decision, Inject), decision
    assert rest(decision.pod, since=pod) == rest(pod)
    restored, bare = patch.restore(decision.pod), patch.restore(pod)
    if case.template.server_limits == "off":  # bounds stay: they are the container's own from then on
        assert restored["spec"]["containers"] == bare["spec"]["containers"]


@pytest.mark.parametrize(
    "forge",
    [
        lambda sidecar: sidecar.update(image="evil"),
        lambda sidecar: sidecar.update(command=["sleep", "infinity"]),
        lambda sidecar: sidecar.update(args=["--allow-all"]),
        lambda sidecar: sidecar.pop("startupProbe"),
        lambda sidecar: sidecar.pop("restartPolicy"),
        lambda sidecar: sidecar["securityContext"].update(runAsUser=0),
        lambda sidecar: sidecar["env"].append({"name": "SIDEGATE_BUNDLE_KEYS", "value": "evil"}),
        lambda sidecar: sidecar["env"].extend([{"name": "SIDEGATE_PROBES", "value": "{}"}] * 2),
        lambda sidecar: sidecar["env"].append({"name": "SIDEGATE_PROBES", "value": "no JSON"}),
        lambda sidecar: sidecar["env"].append({"name": "SIDEGATE_PROBES", "value": '{"app": 1}'}),
        lambda sidecar: sidecar["env"].append({"name": "LD_PRELOAD", "value": "/x"}),
        lambda sidecar: sidecar["volumeMounts"].pop(),
        lambda sidecar: sidecar.update(envFrom=[{"secretRef": {"name": "x"}}]),
    ],
)
def test_sidecar_that_we_would_not_have_made_is_refused(forge: Callable[[Any], object]) -> None:
    """A container of our name with anything changed is a decoy."""
    pod = injected(a_pod())
    forge(pod["spec"]["initContainers"][1])

    assert deny_code(decided(pod)) is DenyCode.DECOY_CONTAINER


def test_second_sidecar_is_refused() -> None:
    """Two containers of our name: the API server would refuse them too, but we do not rely on it."""
    pod = injected(a_pod())
    pod["spec"]["initContainers"].append(pod["spec"]["initContainers"][1])

    assert deny_code(decided(pod)) is DenyCode.DECOY_CONTAINER


def test_net_container_in_remap_mode_is_refused() -> None:
    """Where no redirect is rendered, a privileged container of that name is a decoy."""
    remap = replace(TEMPLATE, capture=container.Capture.REMAP, weakest_capture=container.Capture.REMAP)

    assert deny_code(decided(injected(a_pod()), remap)) is DenyCode.DECOY_CONTAINER


def test_changed_volume_of_ours_is_refused() -> None:
    """A volume of our name with other content is a decoy, sidecar or not."""
    pod = injected(a_pod())
    pod["spec"]["volumes"][0] = {"name": container.SPIFFE_VOLUME, "emptyDir": {}}

    assert deny_code(decided(pod)) is DenyCode.DECOY_VOLUME


def test_unreadable_record_of_moved_port_is_refused() -> None:
    """A status annotation that cannot be read next to a sidecar is a forgery."""
    pod = injected(a_pod())
    pod["metadata"]["annotations"]["sidegate.dev/status"] = '{"moved": 1}'

    assert deny_code(decided(pod)) is DenyCode.DECOY_CONTAINER


def test_pod_of_another_template_is_refused_with_a_hint() -> None:
    """A pod that an older injector made, brought back by a backup, is refused and says what to do."""
    decision = decided(injected(a_pod()), replace(TEMPLATE, image="registry.example/sidegate/sidecar:2"))

    assert deny_code(decision) is DenyCode.DECOY_CONTAINER
    assert isinstance(decision, Deny)
    assert "remove it and let it be injected" in decision.message


def test_container_that_another_webhook_adds_later_is_governed() -> None:
    """On reinvocation the late container's probe moves and its record joins the others."""
    pod = injected(a_pod())
    pod["spec"]["containers"].append(
        {"name": "late", "image": "example/late:1", "livenessProbe": {"tcpSocket": {"port": 9000}}}
    )
    again = injected(pod)

    assert again == injected(a_pod(containers=[*a_pod()["spec"]["containers"], pod["spec"]["containers"][1]]))
    assert again["spec"]["containers"][1]["livenessProbe"]["httpGet"]["port"] == 15020


def test_init_container_that_was_put_before_ours_goes_behind() -> None:
    """The sidecar is first again after another webhook put its own container there."""
    pod = injected(a_pod())
    pod["spec"]["initContainers"].insert(0, {"name": "early", "image": "example/early:1"})

    assert [each["name"] for each in injected(pod)["spec"]["initContainers"]] == ["sidegate-net", "sidegate", "early"]


def test_shrunk_resources_are_put_right() -> None:
    """A sidecar whose resources were changed gets ours back."""
    pod = injected(a_pod())
    pod["spec"]["initContainers"][1]["resources"] = {"limits": {"cpu": "1m"}}

    assert injected(pod) == injected(a_pod())


def test_token_of_hooks_stays_when_a_container_joins() -> None:
    """The review has another nonce by then, and the kubelet must find what is recorded."""
    app = a_pod()["spec"]["containers"][0] | {"lifecycle": {"preStop": {"httpGet": {"port": 8080}}}}
    late = {"name": "late", "image": "late", "lifecycle": {"postStart": {"httpGet": {"port": 9000}}}}
    first = injected(a_pod(containers=[app]))
    first["spec"]["containers"].append(late)
    again = decide(
        first, namespace="payments", policy=NamespacePolicy.OPTIONAL, profiles={}, template=TEMPLATE, nonce="another"
    )

    assert isinstance(again, Inject)
    assert again.pod == injected(a_pod(containers=[app, late]))


def test_token_of_hooks_differs_from_pod_to_pod() -> None:
    """Who knows one does not know the others."""
    hook = a_pod()["spec"]["containers"][0] | {"lifecycle": {"preStop": {"httpGet": {"port": 8080}}}}
    paths = set()
    for nonce in ("a", "b"):
        made = decide(
            a_pod(containers=[hook]),
            namespace="n",
            policy=NamespacePolicy.OPTIONAL,
            profiles={},
            template=TEMPLATE,
            nonce=nonce,
        )
        assert isinstance(made, Inject)
        paths.add(made.pod["spec"]["containers"][0]["lifecycle"]["preStop"]["httpGet"]["path"])

    assert len(paths) == 2


def test_removed_probe_of_an_injected_pod_stays_removed() -> None:
    """The record is not a licence to bring a probe back that its author took away."""
    app = a_pod()["spec"]["containers"][0]
    pod = injected(a_pod(containers=[app | {"readinessProbe": {"httpGet": {"path": "/", "port": 8080}}}]))
    del pod["spec"]["containers"][0]["readinessProbe"]

    assert injected(pod) == injected(a_pod())


@pytest.mark.parametrize(
    ("labels", "policy"),
    [({}, NamespacePolicy.OPTIONAL), ({"sidegate.dev/server": "false"}, NamespacePolicy.BREAK_GLASS)],
)
@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"containers": [{"name": "sidegate"}]}, DenyCode.DECOY_CONTAINER),
        ({"initContainers": [{"name": "sidegate-net"}]}, DenyCode.DECOY_CONTAINER),
        ({"volumes": [{"name": container.SPIFFE_VOLUME, "emptyDir": {}}]}, DenyCode.DECOY_VOLUME),
    ],
)
def test_pod_left_alone_may_not_look_like_our_work(
    labels: Any, policy: NamespacePolicy, part: Any, code: DenyCode
) -> None:
    """Whatever a pod is skipped for, it holds no container and no volume of our name."""
    pod = a_pod(**part)
    pod["metadata"]["labels"] = labels

    assert deny_code(decide(pod, namespace="n", policy=policy, profiles={}, template=TEMPLATE, nonce=NONCE)) is code


@pytest.mark.parametrize("label", ["sidegate.dev/injected", "sidegate.dev/capture"])
def test_pod_left_alone_may_not_carry_a_label_of_ours(label: str) -> None:
    """NetworkPolicies, SPIRE and people select by them."""
    pod = a_pod()
    pod["metadata"]["labels"] = {label: "redirect"}

    assert deny_code(decided(pod)) is DenyCode.LABEL_INVALID


def test_injected_pod_without_our_labels_is_put_right() -> None:
    """Whoever took them away takes nothing else away."""
    pod = injected(a_pod())
    del pod["metadata"]["labels"]["sidegate.dev/injected"], pod["metadata"]["annotations"]

    assert injected(pod) == injected(a_pod())


def test_injected_pod_that_is_no_longer_selected_is_refused() -> None:
    """Our own work, brought back without the label or profile that asked for it, would never be looked at again."""
    pod = injected(a_pod())
    del pod["metadata"]["labels"]["sidegate.dev/server"]

    assert deny_code(decided(pod)) is DenyCode.DECOY_CONTAINER


def test_mirror_pod_is_left_alone() -> None:
    """The kubelet's static pods appear in the API only as a mirror."""
    pod = a_pod()
    pod["metadata"]["annotations"] = {"kubernetes.io/config.mirror": "x"}

    assert isinstance(decided(pod), Skip)


@pytest.mark.parametrize(
    ("labels", "policy"),
    [
        ({}, None),
        ({"sidegate.dev/injection": "disabled"}, None),
        ({"sidegate.dev/injection": "enabled"}, NamespacePolicy.OPTIONAL),
        ({"sidegate.dev/injection": "enforced"}, NamespacePolicy.ENFORCED),
        ({"sidegate.dev/injection": "enforced", "sidegate.dev/break-glass": "allowed"}, NamespacePolicy.BREAK_GLASS),
        ({"sidegate.dev/injection": "enabled", "sidegate.dev/break-glass": "allowed"}, NamespacePolicy.OPTIONAL),
        ({"sidegate.dev/injection": "enabled", "control-plane": "true"}, None),
        ({"sidegate.dev/injection": "enabled", "control-plane": "controller-manager"}, NamespacePolicy.OPTIONAL),
        ({"sidegate.dev/injection": "enforced", "control-plane": "true"}, NamespacePolicy.ENFORCED),
        ({"sidegate.dev/injection": "enforced", "kubernetes.azure.com/managedby": "aks"}, NamespacePolicy.ENFORCED),
    ],
)
def test_namespace_labels_mean(labels: dict[str, str], policy: NamespacePolicy | None) -> None:
    """A namespace's labels say which of the webhook's paths is called for its pods."""
    assert policy_of(labels) == policy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from(["app", "sidegate", "sidegate-net", "x"])
PORTS = st.lists(
    st.fixed_dictionaries(
        {"containerPort": st.sampled_from([80, 8080, 15443])},
        optional={"name": st.sampled_from(["mcp", "http"]), "protocol": st.sampled_from(["TCP", "UDP"])},
    ),
    max_size=3,
)
HOOKS = st.dictionaries(
    st.sampled_from(["preStop", "postStart"]),
    st.fixed_dictionaries({"httpGet": st.fixed_dictionaries({"port": st.sampled_from([8080, "mcp"])})}) | JSON,
)
PROBES = st.one_of(
    st.fixed_dictionaries({"grpc": st.fixed_dictionaries({"port": st.just(80)}, optional={"service": st.text()})}),
    st.fixed_dictionaries({"httpGet": st.fixed_dictionaries({"port": st.sampled_from([8080, "mcp", 0])})}),
    st.fixed_dictionaries({"tcpSocket": st.fixed_dictionaries({"port": st.just(80)})}),
    JSON,
)
CONTAINERS = st.lists(
    st.fixed_dictionaries(
        {"name": NAMES},
        optional={
            "ports": PORTS,
            "readinessProbe": PROBES,
            "lifecycle": HOOKS | JSON,
            "resources": JSON,
            "securityContext": JSON,
            "extra": JSON,
        },
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda each: each["name"],
)
PODS = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"labels": st.just({"sidegate.dev/server": "true"})},
            optional={"annotations": st.dictionaries(st.sampled_from(["sidegate.dev/port", "x/y"]), st.just("8080"))},
        ),
        "spec": st.fixed_dictionaries(
            {"containers": CONTAINERS},
            optional={
                "initContainers": CONTAINERS,
                "volumes": st.just([{"name": "v"}]),
                "imagePullSecrets": JSON,
                "resources": JSON,
                "extra": JSON,
            },
        ),
    },
    optional={"extra": JSON, "status": JSON},
)


@given(JSON | PODS, st.sampled_from(list(NamespacePolicy)))
@settings(max_examples=150, deadline=None)
def test_any_json_gets_a_decision(pod: Any, policy: NamespacePolicy) -> None:
    """Garbage is skipped or denied with a reason, never an exception."""
    before = copy.deepcopy(pod)

    assert isinstance(
        decide(pod, namespace="n", policy=policy, profiles={}, template=TEMPLATE, nonce=NONCE), (Inject, Skip, Deny)
    )
    assert pod == before


@given(PODS, st.sampled_from(list(container.Capture)[:2]))
@settings(max_examples=150, deadline=None)
def test_laws_of_injection(pod: Any, capture: container.Capture) -> None:
    """The patch makes the pod that was meant, of which nothing undeclared changed; injecting twice is injecting once."""
    template = replace(TEMPLATE, capture=capture, weakest_capture=container.Capture.REMAP)
    first = decided(pod, template)
    if isinstance(first, Inject):
        assert jsonpatch.apply_patch(pod, first.operations) == first.pod
        assert rest(first.pod, since=pod) == rest(pod)
        second = decided(first.pod, template)
        assert isinstance(second, Inject), second
        assert second.operations == []
