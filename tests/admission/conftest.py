"""The real API server with the real webhook: one namespace for each golden case, and one for the public templates."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.admission.webhook_server import WebhookServer, World
from tests.webhook.core.golden_cases import TEMPLATE, cases
from webhook.core.injection import NamespacePolicy, policy_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.apiserver import ApiServer
    from tests.webhook.core.golden_cases import Case

WARN = {"pod-security.kubernetes.io/warn": "restricted"}
PATIENCE_S = 30.0
PUBLIC = "public-templates"
ENFORCE = "pod-security.kubernetes.io/enforce"


def namespace_of(case: Case) -> str:
    """Return the namespace in which *case* is tried: names of namespaces are told apart by the cases' own."""
    return f"case-{case.folder.name}"


@pytest.fixture(scope="session")
def governed(api_server: ApiServer) -> Iterator[ApiServer]:
    """The API server, which asks the webhook for each pod of these namespaces."""
    worlds, namespaces = {"plain": World(TEMPLATE)}, {PUBLIC: ("plain", str(NamespacePolicy.ENFORCED))}
    api_server.make_namespace(PUBLIC, **WARN)
    for case in cases():
        policy = policy_of(case.namespace["metadata"].get("labels") or {})
        if policy is None:
            continue
        name = namespace_of(case)
        worlds[name], namespaces[name] = World(case.template, case.profiles), (name, str(policy))
        api_server.make_namespace(name, **WARN | ({ENFORCE: "restricted"} if "restricted" in name else {}))
        account = (case.pod.get("spec") or {}).get("serviceAccountName")
        if account:
            made = {"metadata": {"name": account}}
            api_server.call("POST", f"/api/v1/namespaces/{name}/serviceaccounts", made)
    for kind, body in (
        ("scheduling.k8s.io/v1/priorityclasses", {"value": 1000}),
        ("node.k8s.io/v1/runtimeclasses", _GVISOR),
    ):
        name = "high" if "value" in body else "gvisor"
        api_server.call("POST", f"/apis/{kind}", {"metadata": {"name": name}, **body})
    with WebhookServer(worlds) as server:
        api_server.apply(server.configuration("sidegate-admission-test", namespaces))
        _wait_until_asked(api_server)
        yield api_server
        api_server.kubectl("delete", "mutatingwebhookconfiguration", "sidegate-admission-test")


_GVISOR = {"handler": "runsc", "overhead": {"podFixed": {"cpu": "250m", "memory": "64Mi"}}}


def _wait_until_asked(api: ApiServer) -> None:
    """Wait until the API server knows of the configuration: some tenths of a second after it was written."""
    pod = {"metadata": {"generateName": "x-"}, "spec": {"containers": [{"name": "c", "image": "x"}]}}
    deadline_s = time.monotonic() + PATIENCE_S
    while "sidegate" not in (answer := api.create_pod(PUBLIC, pod)).refusal:
        assert time.monotonic() < deadline_s, f"the API server does not ask the webhook: {answer}"
        time.sleep(0.1)


def cleaned(pod: Any) -> Any:
    """Return *pod* as its author could write it again: without what only a stored object has."""
    metadata = {
        key: value
        for key, value in pod["metadata"].items()
        if key not in ("uid", "creationTimestamp", "managedFields", "resourceVersion", "generation", "namespace")
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
