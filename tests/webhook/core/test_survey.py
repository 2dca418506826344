"""What a pod is, beside what it should be."""

from dataclasses import replace
from typing import Any

import pytest

from sidecar.config import Capture
from tests.webhook.core.golden_cases import TEMPLATE, Case, cases
from webhook.core import resources, survey
from webhook.core.evidence import Origin
from webhook.core.injection import Inject, NamespacePolicy, Skip, SkipReason, decide, policy_of
from webhook.core.survey import Live, State

OPTIONAL, ENFORCED, BREAK_GLASS = NamespacePolicy.OPTIONAL, NamespacePolicy.ENFORCED, NamespacePolicy.BREAK_GLASS
ORIGIN = Origin(repositories=frozenset({"registry.example/sidegate/sidecar"}))


def a_pod(
    name: str = "ledger-0",
    *,
    sidecar: bool = True,
    ready: bool = True,
    containers: Any = None,
    capture: Capture = Capture.REDIRECT,
    **metadata: Any,
) -> Any:
    """Return a pod that is labelled as a server, as the webhook leaves it or as it was before."""
    app = {"name": "app", "image": "app", "ports": [{"name": "mcp", "containerPort": 8080}]}
    own = {"labels": {"sidegate.dev/server": "true"}} | metadata
    pod: Any = {"metadata": {"name": name, "namespace": "shop"} | own, "spec": {"containers": containers or [app]}}
    if sidecar:
        template = replace(TEMPLATE, version="1.0", capture=capture, weakest_capture=capture)
        made = decide(pod, namespace="shop", policy=ENFORCED, profiles={}, template=template, nonce="")
        assert isinstance(made, Inject), made
        pod = made.pod
        pod["metadata"]["annotations"] |= metadata.get("annotations") or {}
    states = [{"name": "sidegate", "ready": ready, "state": {}}]
    return pod | {"status": {"phase": "Running", "initContainerStatuses": states if sidecar else []}}


def one(pod: Any, policy: NamespacePolicy | None = OPTIONAL, **profiles: Any) -> survey.Surveyed | None:
    """Return what is found of *pod*."""
    found = list(survey.survey([pod], policy, profiles, ORIGIN))
    return found[0] if found else None


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.folder.name)
def test_what_the_webhook_would_leave_alone_is_not_expected(case: Case) -> None:
    """The survey and the webhook decide alike, for every golden pod that can be read."""
    decision = case.decide(case.pod)
    policy = policy_of(case.namespace["metadata"].get("labels") or {})
    is_expected, _ = survey.expected(case.pod.get("metadata") or {}, policy, case.profiles)

    if isinstance(decision, Skip) and decision.reason is not SkipReason.EXCLUDED_NAMESPACE:
        assert not is_expected
    if isinstance(decision, Inject):
        assert is_expected


def test_a_governed_pod_says_by_what() -> None:
    """Guarantee, version and control plane are what it was injected with."""
    found = one(a_pod())

    assert found is not None
    assert (found.state, found.guarantee, found.version, found.control_plane) == (
        State.GOVERNED,
        "redirect",
        "1.0",
        "default",
    )


def test_labels_and_annotations_are_no_evidence() -> None:
    """A pod that claims to be injected and has no sidecar is ungoverned."""
    found = one(a_pod(sidecar=False, labels={"sidegate.dev/server": "true", "sidegate.dev/injected": "default"}))

    assert found is not None
    assert (found.state, found.guarantee, found.why) == (State.UNGOVERNED, "none", "label sidegate.dev/server=true")


def test_a_sidecar_that_is_not_ready_is_starting() -> None:
    """With what it waits for."""
    waiting = a_pod(ready=False)
    waiting["status"]["initContainerStatuses"][0]["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
    found, plain, new = one(waiting), one(a_pod(ready=False)), a_pod()
    new["status"] = {"phase": "Pending"}
    unborn = one(new)

    assert found is not None
    assert plain is not None
    assert unborn is not None
    assert (found.state, found.why) == (State.STARTING, "CrashLoopBackOff")
    assert plain.why == "the sidecar is not ready"
    assert unborn.why == "the sidecar has not been started"


@pytest.mark.parametrize(
    ("labels", "policy", "is_expected"),
    [
        ({}, None, False),
        ({}, OPTIONAL, False),
        ({}, ENFORCED, True),
        ({}, BREAK_GLASS, True),
        ({"sidegate.dev/server": "false"}, OPTIONAL, False),
        ({"sidegate.dev/server": "false"}, BREAK_GLASS, False),
        ({"sidegate.dev/server": "false"}, ENFORCED, True),
        ({"sidegate.dev/agent": "true"}, OPTIONAL, True),
        ({"app": "ledger"}, OPTIONAL, True),
        ({"app": "two"}, OPTIONAL, True),
        ({"app": "none"}, OPTIONAL, False),
    ],
)
def test_who_should_be_governed(labels: dict[str, str], policy: NamespacePolicy | None, *, is_expected: bool) -> None:
    """As the namespace's policy, the pod's labels and the profiles say; two profiles are a refusal."""
    specs = {
        "ledger": {"selector": {"matchLabels": {"app": "ledger"}}},
        "one": {"selector": {"matchLabels": {"app": "two"}}},
        "two": {"selector": {"matchLabels": {"app": "two"}}},
    }
    profiles = {
        name: resources.decode(
            resources.SERVER_PROFILE, {"metadata": {"name": name}, "spec": spec}, resources.ServerProfileSpec
        )
        for name, spec in specs.items()
    }

    assert survey.expected({"labels": labels}, policy, profiles)[0] is is_expected


def test_pods_that_are_over_are_left_out() -> None:
    """A completed Job's pod governs nothing."""
    over, going, mirror = a_pod(), a_pod(deletionTimestamp="now"), a_pod(sidecar=False)
    over["status"]["phase"] = "Succeeded"
    mirror["metadata"]["annotations"] = {"kubernetes.io/config.mirror": "x"}

    assert one(over) is one(going) is one(mirror, ENFORCED) is None


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "null"])
def test_a_status_that_cannot_be_read_is_not_ours(text: str) -> None:
    """Nobody can change it on a governed pod, so it was there before the label."""
    found = one(a_pod(annotations={"sidegate.dev/status": text}))

    assert found is not None
    assert found.state is State.UNGOVERNED
    assert found.why.startswith("it looks so: container sidegate: ")


def test_a_status_that_says_nothing_is_unknown() -> None:
    """Another version may write less."""
    found = one(a_pod(annotations={"sidegate.dev/status": "{}"}))

    assert found is not None
    assert (found.state, found.guarantee, found.version) == (State.GOVERNED, "unknown", "unknown")


def test_a_pod_that_cannot_be_read_is_counted() -> None:
    """Its workload is not known, and it is ungoverned all the same."""
    pod = a_pod(sidecar=False)
    pod["spec"]["containers"] = "none"
    found = one(pod)

    assert found is not None
    assert (found.workload, found.state) == ("ledger-0", State.UNGOVERNED)


def test_a_namespace_is_one_line() -> None:
    """What is expected, what is there, by what and how old."""
    pods = [a_pod("a"), a_pod("b", ready=False), a_pod("c", sidecar=False)]
    line = survey.counts("shop", {"sidegate.dev/injection": "enabled"}, survey.survey(pods, OPTIONAL, {}, ORIGIN))

    assert (line.policy, line.expected, line.governed, line.starting) == ("optional", 3, 1, 1)
    assert (line.guarantees, line.versions) == ("redirect", "1.0")
    assert survey.counts("shop", {}, ()).policy == "not labelled"
    assert survey.counts("shop", {}, ()).guarantees == "-"


def test_a_sidecar_that_is_not_ours_governs_nothing() -> None:
    """Planted before the namespace was labelled, it is told from ours, whether the pod should have one or not."""
    planted, unwanted = a_pod(), a_pod(labels={"sidegate.dev/server": "false"})
    for pod in (planted, unwanted):
        pod["spec"]["initContainers"][-1]["image"] = "registry.example/tenant/sidecar:1"
    for found in (one(planted), one(unwanted)):
        assert found is not None
        assert (found.state, found.guarantee) == (State.UNGOVERNED, "none")
        assert found.why == "it looks so: container sidegate: image registry.example/tenant/sidecar:1 is none of ours"


def _counted(*pods: Any) -> tuple[survey.Counts, list[survey.Surveyed]]:
    surveyed = list(survey.survey(pods, OPTIONAL, {}, ORIGIN))
    return survey.counts("shop", {"sidegate.dev/injection": "enabled"}, surveyed), surveyed


def test_servers_that_share_a_namespace_are_named() -> None:
    """One server with replicas, a canary of its name and an agent is one; another workload is another."""
    named = {"sidegate.dev/server": "true", "app.kubernetes.io/name": "ledger"}
    owner = [{"kind": "StatefulSet", "name": "ledger-canary", "controller": True}]
    agent = a_pod("agent", sidecar=False, labels={"sidegate.dev/agent": "true"})
    alone = (a_pod("a", labels=named), a_pod("b", labels=named, ownerReferences=owner), agent)
    line, surveyed = _counted(*alone)

    assert line.servers == ("ledger",)
    assert list(survey.shared_places(line, surveyed)) == []

    line, surveyed = _counted(*alone, a_pod("other"), a_pod("late", sidecar=False))

    assert line.servers == ("Pod late", "Pod other", "ledger")
    (said,) = survey.shared_places(line, surveyed)
    assert said == (
        "Namespace shop: 3 MCP servers, Pod late, Pod other, ledger: they share its service accounts; "
        "give each a namespace of its own"
    )


def test_containers_that_listen_in_one_pod_are_named_once() -> None:
    """However many replicas there are; a helper that is a native sidecar is none of them."""
    two = [{"name": name, "image": "x", "ports": [{"name": port, "containerPort": number}]}
           for name, port, number in (("app", "mcp", 8080), ("beside", "metrics", 9090))]  # fmt: skip
    labels = {"sidegate.dev/server": "true", "app.kubernetes.io/name": "ledger"}
    line, surveyed = _counted(*(a_pod(name, containers=two, labels=labels) for name in "ab"))

    assert list(survey.shared_places(line, surveyed)) == [
        "Namespace shop: ledger: containers app, beside listen in one pod; one server to a pod"
    ]


@pytest.mark.parametrize(
    ("port", "missed"),
    [
        ({"port": 80, "targetPort": 8080}, "targetPort 8080 is not the sidecar's"),
        ({"port": 8080}, "targetPort 8080 is not the sidecar's"),
        ({"port": 80, "targetPort": "mcp"}, ""),
        ({"port": 80, "targetPort": 15443}, ""),
        ({"port": 53, "targetPort": 53, "protocol": "UDP"}, ""),
    ],
)
def test_a_service_that_leads_past_the_sidecar_is_told(port: Any, missed: str) -> None:
    """In mode remap a number means the application's own port, which is closed; a name has moved to the sidecar."""
    pod = a_pod(capture=Capture.REMAP, labels={"sidegate.dev/server": "true", "app": "ledger"})
    service = {
        "metadata": {"namespace": "shop", "name": "ledger"},
        "spec": {"selector": {"app": "ledger"}, "ports": [port]},
    }
    said = list(survey.missed_services([service], [pod]))

    assert len(said) == bool(missed)
    assert all(f"Service shop/ledger: {missed}" in each for each in said)


def test_services_of_other_pods_are_left_alone() -> None:
    """One that selects nothing or somebody else; and in mode redirect every port leads to the sidecar."""
    spec = {"ports": [{"port": 80, "targetPort": 8080}]}
    metadata = {"namespace": "shop", "name": "x"}
    selecting = {"metadata": metadata, "spec": spec | {"selector": {"app": "ledger"}}}
    labels = {"sidegate.dev/server": "true", "app": "ledger"}
    remapped, over = a_pod(capture=Capture.REMAP, labels=labels), a_pod(capture=Capture.REMAP, labels=labels)
    over["status"]["phase"] = "Failed"

    assert list(survey.missed_services([selecting], [a_pod(labels=labels), over])) == []
    assert list(survey.missed_services([{"metadata": metadata, "spec": spec}], [remapped])) == []
    other = {"metadata": metadata, "spec": spec | {"selector": {"app": "other"}}}
    assert (
        list(
            survey.missed_services([other, {"metadata": metadata, "spec": {"selector": {"app": "ledger"}}}], [remapped])
        )
        == []
    )


def test_a_sidecar_tells_its_age_by_metrics() -> None:
    """What is absent or no number is not known."""
    text = (
        "# TYPE sidegate_bundle_info gauge\n"
        'sidegate_bundle_info{revision="abc",kind="x"} 1\n'
        "sidegate_bundle_age_seconds 12.5\n"
        "sidegate_svid_expiry_timestamp_seconds 1100\n"
    )

    assert survey.parse_live(text, 1000.0) == Live(revision="abc", bundle_age_s=12.5, svid_left_s=100.0)
    assert survey.parse_live("sidegate_bundle_age_seconds soon\nx\n", 0.0) == Live()
    assert survey.parse_live("sidegate_svid_expiry_timestamp_seconds x", 0.0) == Live()


def test_a_resource_that_is_not_well_says_why() -> None:
    """Its first condition that is False; or that nobody has looked at it."""

    def resource(generation: int = 1, *conditions: Any) -> Any:
        return {
            "metadata": {"name": "p", "namespace": "shop", "generation": generation},
            "status": {"conditions": list(conditions)},
        }

    good = {"type": "Compiled", "status": "True", "observedGeneration": 1}
    bad = {"type": "Distributed", "status": "False", "observedGeneration": 1, "message": "1/2 pods enforce it"}

    assert survey.resource_problems("MCPPolicy", resource(1, good)) is None
    assert survey.resource_problems("MCPPolicy", resource(1)) == "MCPPolicy shop/p: no status yet"
    assert (
        survey.resource_problems("MCPPolicy", resource(1, good, bad))
        == "MCPPolicy shop/p: Distributed=False: 1/2 pods enforce it"
    )
    assert (
        survey.resource_problems("MCPPolicy", resource(2, good))
        == "MCPPolicy shop/p: its status is of generation 1, not of the present one"
    )
