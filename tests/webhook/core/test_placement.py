"""One MCP server to a pod and to a namespace: what is told of others, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from tests.webhook.core.golden_cases import TEMPLATE
from webhook.core import placement, pod
from webhook.core.injection import Decision, Deny, Inject, NamespacePolicy, decide
from webhook.core.placement import Occupants
from webhook.errors import Denial, DenyCode


def a_pod(*listening: str, name: str = "ledger", owner: Any = None, **labels: str) -> Any:
    """A pod whose containers *listening* declare a port each."""
    containers = [
        {
            "name": each,
            "image": "x",
            "ports": [{"name": "mcp" if each == "app" else each, "containerPort": 8000 + index}],
        }
        for index, each in enumerate(listening or ("app",))
    ]
    metadata = {
        "name": name,
        "labels": {key.replace("__", "/").replace("_", "."): value for key, value in labels.items()},
    }
    return {"metadata": metadata | ({"ownerReferences": [owner]} if owner else {}), "spec": {"containers": containers}}


DEPLOYMENT = {"kind": "ReplicaSet", "name": "ledger-6c9f", "controller": True}


@pytest.mark.parametrize(
    ("raw", "server"),
    [
        (a_pod(), "Pod ledger"),
        (a_pod(owner=DEPLOYMENT), "ReplicaSet ledger-6c9f"),
        (a_pod(owner=DEPLOYMENT, app_kubernetes_io__name="books"), "books"),
        (a_pod(app_kubernetes_io__name="books", app_kubernetes_io__instance="books"), "books"),
        (a_pod(app_kubernetes_io__name="books", app_kubernetes_io__instance="two"), "books (two)"),
    ],
)
def test_a_server_is_known_by_its_labels_or_its_workload(raw: Any, server: str) -> None:
    """A canary and the Jobs of one application bear its name."""
    assert placement.server_of(pod.read(raw)) == server


def test_an_agent_is_no_server() -> None:
    """It only calls them."""
    agent = {"metadata": {"labels": {"sidegate.dev/agent": "true"}}, "spec": {"containers": []}}

    assert placement.server_of(pod.read(agent)) == ""


def test_containers_that_listen_are_told() -> None:
    """Those of another mesh, those that say nothing and native sidecars are helpers."""
    raw = a_pod("app", "istio-proxy")
    raw["spec"]["containers"].append({"name": "silent", "image": "x"})
    raw["spec"]["initContainers"] = [a_pod("helper")["spec"]["containers"][0] | {"restartPolicy": "Always"}]

    assert list(placement.judge(pod.read(raw), (), "warn")) == []
    assert list(placement.judge(pod.read(a_pod("app", "beside")), (), "warn")) == [
        "containers app, beside: on loopback they call each other unjudged; one server to a pod"
    ]


def test_other_servers_of_the_namespace_are_told() -> None:
    """Itself, in another replica, is no other."""
    raw = pod.read(a_pod())

    assert list(placement.judge(raw, ["Pod ledger"], "enforce")) == []
    (said,) = placement.judge(raw, ["Pod ledger", "b", "a"], "warn")
    assert said == (
        "this namespace has another MCP server, a, b: they share its service accounts; "
        "one server to a namespace, or label app.kubernetes.io/name alike"
    )


@pytest.mark.parametrize(("raw", "others"), [(a_pod("app", "beside"), ()), (a_pod(), ("other",))])
def test_where_it_is_enforced_they_are_refused(raw: Any, others: Any) -> None:
    """With the same words, and who wants it so."""
    with pytest.raises(Denial, match="this cluster enforces it") as refused:
        placement.judge(pod.read(raw), others, "enforce")

    assert refused.value.code is DenyCode.PLACE_SHARED


def test_every_warning_fits_what_the_api_server_passes_on() -> None:
    """256 characters, however many there are and however long their names."""
    many = [f"container-{number:02}-{'x' * 40}" for number in range(9)]
    said = list(placement.judge(pod.read(a_pod(*many)), [f"Deployment {name}" for name in many], "warn"))

    assert len(said) == 2
    assert max(map(len, said)) <= 256
    assert "and 6 more" in said[1]


def decided(*servers: str, mode: Any = "warn", **labels: str) -> Decision:
    """What the webhook makes of a server in a namespace with *servers*."""
    raw = a_pod(sidegate_dev__server="true", **labels)
    template = replace(TEMPLATE, placement=mode)
    return decide(
        raw,
        namespace="team",
        policy=NamespacePolicy.OPTIONAL,
        profiles={},
        template=template,
        nonce="",
        servers=servers,
    )


def test_the_webhook_warns_or_refuses() -> None:
    """As the cluster's setting says; agents are never in the way."""
    warned, refused = decided("Deployment other"), decided("Deployment other", mode="enforce")

    assert isinstance(warned, Inject)
    assert ["another MCP server, Deployment other:" in each for each in warned.warnings] == [True]
    assert isinstance(refused, Deny)
    assert refused.code is DenyCode.PLACE_SHARED
    assert isinstance(decided("Pod ledger", mode="enforce"), Inject)


def test_occupants_are_those_that_are_alive() -> None:
    """Replicas count once; one that is over, gone, unreadable or an agent does not count."""
    occupants = Occupants()
    for name in ("a", "b", "c"):
        occupants.put("team", name, pod.read(a_pod(name="ledger")), is_over=False)
    occupants.put("team", "d", pod.read(a_pod(name="other")), is_over=False)
    assert occupants.servers("team") == {"Pod ledger", "Pod other"}

    occupants.put("team", "a", pod.read(a_pod(name="ledger")), is_over=True)
    occupants.put("team", "b", None, is_over=False)
    occupants.remove("team", "c")
    assert occupants.servers("team") == {"Pod other"}

    occupants.remove("team", "d")
    occupants.remove("team", "d")
    assert occupants.servers("team") == occupants.servers("nowhere") == frozenset()
    assert occupants == Occupants()
