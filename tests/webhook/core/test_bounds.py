"""Requirements on the bounds of CPU and memory that governed servers get."""

from dataclasses import replace
from typing import Any, Literal

import pytest

from tests.webhook.core.golden_cases import TEMPLATE
from webhook.core.injection import Decision, Deny, Inject, NamespacePolicy, decide
from webhook.errors import DenyCode


def decided(pod: dict[str, Any], mode: Literal["default", "require", "off"] = "default") -> Decision:
    """What becomes of *pod* where servers' limits are treated by *mode*."""
    template = replace(TEMPLATE, server_limits=mode)
    return decide(pod, namespace="team", policy=NamespacePolicy.OPTIONAL, profiles={}, template=template, nonce="")


def a_pod(resources: Any = None, **spec: Any) -> dict[str, Any]:
    """A server whose container has these resources, and a second one with its own limits."""
    app = {"name": "app", "image": "a", "ports": [{"name": "mcp", "containerPort": 8080}]}
    if resources is not None:
        app["resources"] = resources
    bounded = {"name": "beside", "image": "b", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}
    labels = {"sidegate.dev/server": "true"}
    return {"metadata": {"name": "a", "labels": labels}, "spec": {"containers": [app, bounded], **spec}}


def resources_of(decision: Decision) -> Any:
    """The resources of the server's container, as it comes out."""
    assert isinstance(decision, Inject)
    assert decision.pod["spec"]["containers"][1] == a_pod()["spec"]["containers"][1]
    return decision.pod["spec"]["containers"][0].get("resources")


@pytest.mark.parametrize(
    ("resources", "limits", "requests"),
    [
        (None, {"cpu": "2", "memory": "2Gi"}, {"cpu": "50m", "memory": "128Mi"}),
        ({}, {"cpu": "2", "memory": "2Gi"}, {"cpu": "50m", "memory": "128Mi"}),
        ({"limits": {"cpu": "500m"}}, {"cpu": "500m", "memory": "2Gi"}, {"memory": "128Mi"}),
        ({"requests": {"memory": "64Mi"}}, {"cpu": "2", "memory": "2Gi"}, {"cpu": "50m", "memory": "64Mi"}),
        ({"requests": {"cpu": 4, "memory": "3Gi"}}, {"cpu": 4, "memory": "3Gi"}, {"cpu": 4, "memory": "3Gi"}),
    ],
    ids=str,
)
def test_what_is_missing_is_added_and_nothing_else_changed(resources: Any, limits: Any, requests: Any) -> None:
    """A request above the default limit is the limit, for one below it would be invalid."""
    made = resources_of(decided(a_pod(resources)))

    assert made == {"limits": limits, "requests": requests}


def test_a_second_look_changes_nothing() -> None:
    """The bounds that we gave are the pod's own from then on, also where they make its QoS class another."""
    for resources in (None, {"requests": {"cpu": "2", "memory": "2Gi"}}):
        first = decided(a_pod(resources))
        assert isinstance(first, Inject)

        second = decided(first.pod)

        assert isinstance(second, Inject)
        assert second.operations == []


def test_a_server_without_limits_is_refused_where_they_are_required() -> None:
    """The container and what it lacks are named."""
    denied = decided(a_pod({"limits": {"cpu": "1"}}), "require")

    assert isinstance(denied, Deny)
    assert denied.code is DenyCode.LIMITS_MISSING
    assert denied.message == "container app: resources.limits must name memory: this cluster requires them of servers"
    assert resources_of(decided(a_pod({"limits": {"cpu": "1", "memory": "1Gi"}}), "require")) == {
        "limits": {"cpu": "1", "memory": "1Gi"}
    }


def test_pods_with_bounds_of_their_own_and_switched_off_are_left_as_they_are() -> None:
    """Resources of the pod as a whole bound all its containers."""
    assert resources_of(decided(a_pod(resources={"limits": {"cpu": "1", "memory": "1Gi"}}), "off")) is not None
    assert resources_of(decided(a_pod(), "off")) is None
    whole = a_pod()
    whole["spec"]["resources"] = {"limits": {"cpu": "1", "memory": "1Gi"}}
    assert resources_of(decided(whole)) is None
    assert isinstance(decided(whole, "require"), Inject)
