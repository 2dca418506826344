"""Every golden case through the real API server: what we make is admitted, what we refuse is refused with our words.

The API server's own admission runs behind ours: schema, defaults, service-account token, Pod Security, quota.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.admission.conftest import ENFORCE, cleaned, namespace_of
from tests.webhook.core.golden_cases import TEMPLATE, Case, cases
from webhook.core.injection import Deny, Inject, policy_of

if TYPE_CHECKING:
    from tests.cluster.apiserver import Answer, ApiServer

pytestmark = pytest.mark.real_apiserver
JUDGED = {
    case.folder.name: case for case in cases() if policy_of(case.namespace["metadata"].get("labels") or {}) is not None
}
DECISIONS = {name: case.decide(case.pod) for name, case in JUDGED.items()}
INJECTED = [name for name, decision in DECISIONS.items() if isinstance(decision, Inject)]
DENIED = [name for name, decision in DECISIONS.items() if isinstance(decision, Deny)]
UNKNOWN_FIELDS = {"48-unknown-fields"}  # which this version of the API drops, with a warning where it is not strict


def created(api: ApiServer, case: Case, pod: Any) -> Any:
    """Return the API server's answer to the creation of *pod* where *case* plays."""
    named = {**pod, "metadata": {k: v for k, v in (pod.get("metadata") or {}).items() if k != "namespace"}}
    path = f"/api/v1/namespaces/{namespace_of(case)}/pods?dryRun=All"
    strict = "" if case.folder.name in UNKNOWN_FIELDS else "&fieldValidation=Strict"
    return api.call("POST", path + strict, named)


def said(case: Case, text: str) -> str:
    """Return *text* as it is where *case* plays here."""
    return text.replace(f"namespace {case.namespace['metadata']['name']} ", f"namespace {namespace_of(case)} ")


@pytest.fixture(scope="module")
def admitted(governed: ApiServer) -> dict[str, Answer]:
    """Return what the API server makes of each case that is injected."""
    return {name: created(governed, JUDGED[name], JUDGED[name].pod) for name in INJECTED}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_pod_is_admitted_and_needs_no_second_patch(
    governed: ApiServer, admitted: dict[str, Answer], name: str
) -> None:
    """With the defaults that the API server adds, ours is still recognised as ours, and what it returns is admitted again."""
    case, decision = JUDGED[name], DECISIONS[name]
    assert isinstance(decision, Inject)
    answer = admitted[name]

    assert answer.status == 201, answer.refusal
    assert {said(case, text) for text in decision.warnings} <= set(answer.warnings)
    second = case.decide(answer.body)
    assert isinstance(second, Inject), second
    assert second.operations == []
    again = created(governed, case, cleaned(answer.body))
    assert again.status == 201, again.refusal
    assert again.body["spec"] == answer.body["spec"]


@pytest.mark.parametrize("name", INJECTED)
def test_what_we_put_in_is_as_restricted_as_can_be(admitted: dict[str, Answer], name: str) -> None:
    """Pod Security `restricted` has nothing to say of ours but the one thing that capture mode redirect needs."""
    decision = DECISIONS[name]
    assert isinstance(decision, Inject)
    warnings = " ".join(admitted[name].warnings)

    accused = set(re.findall(r'"(sidegate[a-z-]*)"', warnings))
    assert accused <= ({"sidegate-net"} if decision.capture == "redirect" else set())


@pytest.mark.parametrize("name", INJECTED)
def test_our_containers_get_no_token(admitted: dict[str, Answer], name: str) -> None:
    """The ServiceAccount plugin, which runs behind us, mounts the API's token nowhere in ours."""
    pod = admitted[name].body
    mounted = {
        each["name"]
        for each in (*pod["spec"]["initContainers"], *pod["spec"]["containers"])
        for mount in each.get("volumeMounts") or ()
        if mount["name"].startswith("kube-api-access")
    }

    assert not {each for each in mounted if each.startswith("sidegate")}
    assert mounted or pod["spec"].get("automountServiceAccountToken") is False


@pytest.mark.parametrize("name", DENIED)
def test_refusal_arrives_with_its_reason(governed: ApiServer, name: str) -> None:
    """Code and advice reach whoever asked, through the API server."""
    decision = DECISIONS[name]
    assert isinstance(decision, Deny)
    answer = created(governed, JUDGED[name], JUDGED[name].pod)

    assert answer.status == 403
    assert f"sidegate: {decision.code}: {said(JUDGED[name], decision.message)}" in answer.refusal


def test_quota_counts_the_sidecar_and_admits_it(governed: ApiServer) -> None:
    """Where a quota demands requests and limits of every container, ours have them; without room the API server says so."""
    case = JUDGED["32-guaranteed"]
    namespace = namespace_of(case)
    hard = {"requests.cpu": "4", "limits.cpu": "4", "requests.memory": "4Gi", "limits.memory": "4Gi"}
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    quota = {"metadata": {"name": "q"}, "spec": {"hard": hard}}
    governed.call("POST", path, quota)
    # The quota's controller would do this.
    governed.call(
        "PATCH",
        f"{path}/q/status",
        {"status": {"hard": hard, "used": dict.fromkeys(hard, "0")}},
        content_type="application/merge-patch+json",
    )
    try:
        admitted = created(governed, case, case.pod)
        governed.call(
            "PATCH",
            f"{path}/q/status",
            {"status": {"used": {"requests.memory": "4Gi"}}},
            content_type="application/merge-patch+json",
        )
        full = created(governed, case, case.pod)
        bare = created(governed, case, {**case.pod, "metadata": {"generateName": "x-", "labels": {}}})
    finally:
        governed.call("DELETE", f"{path}/q")

    assert admitted.status == 201, admitted.refusal
    assert full.status == 403
    assert "exceeded quota" in full.refusal
    assert bare.status == 403  # by the quota as well: the case's own containers alone do not fit either


def test_limit_range_finds_nothing_to_add(governed: ApiServer) -> None:
    """Defaults of the namespace are for containers without figures; ours have their own."""
    case = JUDGED["01-minimal"]
    path = f"/api/v1/namespaces/{namespace_of(case)}/limitranges"
    limit = {
        "type": "Container",
        "default": {"cpu": "3", "memory": "3Gi"},
        "defaultRequest": {"cpu": "3", "memory": "3Gi"},
    }
    governed.call("POST", path, {"metadata": {"name": "l"}, "spec": {"limits": [limit]}})
    try:
        made = created(governed, case, case.pod)
    finally:
        governed.call("DELETE", f"{path}/l")

    assert made.status == 201, made.refusal
    resources = {each["name"]: each["resources"] for each in made.body["spec"]["initContainers"]}
    amounts = TEMPLATE.amounts
    assert resources["sidegate"]["limits"] == {"cpu": "1", "memory": f"{amounts.memory_limit_bytes // 2**20}Mi"}
    assert made.body["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "3", "memory": "3Gi"}


def test_quality_of_service_stays(admitted: dict[str, Answer]) -> None:
    """The API server's own verdict on the class, before and behind us."""
    classes = {name: admitted[name].body["status"]["qosClass"] for name in ("32-guaranteed", "33-pod-level-resources")}

    assert classes["32-guaranteed"] == "Guaranteed"
    assert classes["33-pod-level-resources"] == "Burstable"  # memory has none, before us and behind


def test_restricted_namespace_takes_remap_and_no_redirect(governed: ApiServer) -> None:
    """Capture mode remap keeps a restricted pod restricted; redirect's init container is named by Pod Security."""
    case = JUDGED["27-restricted-remap"]
    redirect = JUDGED["01-minimal"]
    governed.call(
        "PATCH",
        f"/api/v1/namespaces/{namespace_of(redirect)}",
        {"metadata": {"labels": {ENFORCE: "restricted"}}},
        content_type="application/merge-patch+json",
    )
    try:
        refused = created(governed, redirect, case.pod)
    finally:
        governed.call(
            "PATCH",
            f"/api/v1/namespaces/{namespace_of(redirect)}",
            {"metadata": {"labels": {ENFORCE: None}}},
            content_type="application/merge-patch+json",
        )

    assert created(governed, case, case.pod).status == 201
    assert refused.status == 403
    assert 'container "sidegate-net" must not include "NET_ADMIN"' in refused.refusal
    assert '"sidegate"' not in refused.refusal
