"""The API server that tests of admission share: that its decisions are Kubernetes' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cluster.cluster import CommandError

if TYPE_CHECKING:
    from tests.cluster.apiserver import ApiServer

pytestmark = pytest.mark.real_apiserver
POD = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "x"}]}}


def test_pods_pass_kubernetes_own_admission(api_server: ApiServer) -> None:
    """Defaults and the token's volume are there, an unknown field is refused, and a dry run leaves nothing."""
    api_server.make_namespace("own-admission")
    made = api_server.create_pod("own-admission", POD)

    assert made.status == 201
    assert made.body["spec"]["serviceAccountName"] == "default"
    assert made.body["spec"]["volumes"][0]["projected"]
    assert 'unknown field "nonsense"' in api_server.create_pod("own-admission", {**POD, "nonsense": 1}).refusal
    assert api_server.call("GET", "/api/v1/namespaces/own-admission/pods/a").status == 404


def test_pod_security_judges_and_warns(api_server: ApiServer) -> None:
    """A namespace's level counts, with the field's name; warnings arrive as text."""
    restricted = "pod-security.kubernetes.io"
    api_server.make_namespace("judged", **{f"{restricted}/enforce": "restricted"})
    api_server.make_namespace("warned", **{f"{restricted}/warn": "restricted"})

    assert 'violates PodSecurity "restricted:latest"' in api_server.create_pod("judged", POD).refusal
    (warning,) = api_server.create_pod("warned", POD).warnings
    assert warning.startswith('would violate PodSecurity "restricted:latest"')


def test_rights_are_those_of_who_asks(api_server: ApiServer) -> None:
    """An impersonated user has no rights that nobody granted."""
    answer = api_server.call("GET", "/api/v1/namespaces", user="jane", groups=("tenants",))

    assert answer.status == 403
    assert 'User "jane" cannot list' in answer.refusal


def test_kubectl_speaks_to_it(api_server: ApiServer) -> None:
    """The kubeconfig is the administrator's; an error carries what kubectl said."""
    api_server.make_namespace("spoken")
    api_server.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": "spoken"}})

    assert "configmap/x" in api_server.kubectl("--namespace", "spoken", "get", "configmaps", "--output=name")
    with pytest.raises(CommandError, match='configmaps "y" not found'):
        api_server.kubectl("--namespace", "spoken", "get", "configmap", "y")
