"""AdmissionReview in and out, over HTTP."""

import base64
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import jsonpatch
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.webhook.core.golden_cases import NONCE, TEMPLATE, Case, cases
from webhook.core.container import Template
from webhook.core.injection import Deny, Inject, Skip, policy_of
from webhook.core.resources import ServerProfileSpec
from webhook.errors import BadResource
from webhook.shell.admission import MAX_BODY_BYTES, Admission, NotReady, World
from webhook.shell.metrics import Metrics

POD = {
    "metadata": {"labels": {"sidegate.dev/server": "true"}},
    "spec": {"containers": [{"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}]},
}

CASES = [case for case in cases() if policy_of(case.namespace["metadata"].get("labels") or {}) is not None]


class FakeWorld:
    """What admission knows; *error* is raised instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def template(self) -> Template:
        """Return the template of the goldens."""
        return TEMPLATE

    def servers(self, namespace: str) -> frozenset[str]:
        """Return one other server."""
        assert namespace == "payments"
        return frozenset({"Deployment other"})

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:
        """Return no profile."""
        if self.error:
            raise self.error
        assert namespace == "payments"
        return {}


def a_review(pod: Any = POD, **request: Any) -> Any:
    """Return a review of the creation of *pod*."""
    base = {
        "uid": "u-1",
        "operation": "CREATE",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": "payments",
        "object": pod,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": base | request}


@asynccontextmanager
async def serving(
    error: Exception | None = None, *, world: World | None = None, policy: str = "optional"
) -> AsyncIterator[tuple[str, Metrics, aiohttp.ClientSession]]:
    """Give the address of a webhook, and what it counts."""
    metrics = Metrics()
    application = web.Application(client_max_size=MAX_BODY_BYTES)
    application.router.add_post("/mutate/{policy}", Admission(world or FakeWorld(error), metrics).mutate)
    async with TestServer(application) as server, aiohttp.ClientSession() as session:
        yield str(server.make_url(f"/mutate/{policy}")), metrics, session


async def reviewed(review: Any, error: Exception | None = None) -> Any:
    """Return the response to *review*."""
    body = io.BytesIO(json.dumps(review).encode())
    headers = {"Content-Type": "application/json"}
    async with serving(error) as (url, _, session), session.post(url, data=body, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        answer = await response.json()
    assert (answer["apiVersion"], answer["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    assert answer["response"]["uid"] == review["request"]["uid"]
    return answer["response"]


@dataclass(frozen=True, slots=True)
class CaseWorld:
    """What admission knows in a golden case."""

    case: Case

    def template(self) -> Template:
        """Return the case's template."""
        return self.case.template

    def servers(self, namespace: str) -> frozenset[str]:
        """Return no server: the cases are about pods alone."""
        assert namespace == self.case.namespace["metadata"]["name"]
        return frozenset()

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:
        """Return the case's profiles."""
        assert namespace == self.case.namespace["metadata"]["name"]
        return self.case.profiles


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder.name)
async def test_golden_case_is_answered_as_decided(case: Case) -> None:
    """The API server gets, in its own form, what the offline renderer prints; twice, and then without a patch."""
    decision = case.decide(case.pod)
    metadata = case.namespace["metadata"]
    policy = policy_of(metadata.get("labels") or {})
    assert policy is not None

    async with serving(world=CaseWorld(case), policy=policy) as (url, _, session):

        async def ask(pod: Any) -> Any:
            review = a_review(pod, uid=NONCE, namespace=metadata["name"])
            async with session.post(url, json=review) as response:
                return (await response.json())["response"]

        first = await ask(case.pod)
        assert first["auditAnnotations"]["decision"] == type(decision).__name__.lower()
        match decision:
            case Inject():
                patched = jsonpatch.apply_patch(case.pod, json.loads(base64.b64decode(first.get("patch", "W10="))))
                assert patched == decision.pod
                assert first.get("warnings", []) == list(decision.warnings)
                second = await ask(patched)
                assert second["allowed"]
                assert not {"patch", "patchType"} & second.keys()
            case Skip():
                assert first["allowed"]
                assert "patch" not in first
            case Deny():
                assert first["status"]["reason"] == decision.code
                assert decision.message in first["status"]["message"]


async def test_pod_is_patched() -> None:
    """The patch comes with its type, both or neither, and makes a pod with the sidecar in it."""
    response = await reviewed(a_review())
    patch = json.loads(base64.b64decode(response["patch"]))

    assert response["allowed"] is True
    assert response["patchType"] == "JSONPatch"
    assert response["auditAnnotations"]["decision"] == "inject"
    assert jsonpatch.apply_patch(POD, patch)["spec"]["initContainers"][1]["name"] == "sidegate"


async def test_other_servers_of_the_namespace_are_told() -> None:
    """As a warning, which whoever creates the pod sees."""
    response = await reviewed(a_review())

    assert any("another MCP server, Deployment other:" in each for each in response["warnings"])


async def test_injected_pod_is_allowed_without_patch() -> None:
    """Nothing to change: neither patch nor patchType."""
    first = await reviewed(a_review())
    pod = jsonpatch.apply_patch(POD, json.loads(base64.b64decode(first["patch"])))
    second = await reviewed(a_review(pod))

    assert second["allowed"] is True
    assert not {"patch", "patchType"} & second.keys()


async def test_dry_run_is_answered_alike() -> None:
    """There is no side effect that a dry run would have to avoid."""
    assert await reviewed(a_review(dryRun=True)) == await reviewed(a_review())


@pytest.mark.parametrize(
    "request_",
    [
        {"operation": "UPDATE"},
        {"operation": "DELETE", "object": None},
        {"operation": "CONNECT", "object": None},
        {"subResource": "ephemeralcontainers"},
        {"resource": {"group": "apps", "version": "v1", "resource": "deployments"}},
        {"object": {"metadata": {}, "spec": {"containers": []}}},
    ],
)
async def test_what_is_not_ours_is_allowed_without_patch(request_: Any) -> None:
    """Other operations, resources and pods that nothing selects pass."""
    response = await reviewed(a_review(**request_))

    assert response["allowed"] is True
    assert response["auditAnnotations"]["decision"] == "skip"
    assert "patch" not in response


async def test_denial_says_code_and_what_to_change() -> None:
    """A refused pod gets 403, a reason and a sentence."""
    response = await reviewed(a_review(POD | {"spec": POD["spec"] | {"hostNetwork": True}}))

    assert response["allowed"] is False
    assert response["status"]["code"] == 403
    assert response["status"]["reason"] == "unenforceable_host_network"
    assert "remove it" in response["status"]["message"]
    assert response["auditAnnotations"]["reason"] == "unenforceable_host_network"


@pytest.mark.parametrize("pod", [None, [], 1, {}, {"spec": None}, {"spec": {"containers": [1]}}])
async def test_garbage_for_a_pod_is_denied(pod: Any) -> None:
    """No shape of the object is an internal error."""
    response = await reviewed(a_review(pod))

    assert response["allowed"] is False
    assert response["status"]["reason"] == "malformed"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (NotReady("just started"), 503, "not_ready"),
        (BadResource("MCPServerProfile n/x", "spec: broken"), 403, "bad_resource"),
        (RuntimeError("secret detail"), 500, "internal"),
    ],
)
async def test_error_never_lets_a_pod_in(error: Exception, code: int, reason: str) -> None:
    """Whatever goes wrong, the answer is a proper refusal; a defect shows a correlation only."""
    response = await reviewed(a_review(), error)

    assert response["allowed"] is False
    assert (response["status"]["code"], response["status"]["reason"]) == (code, reason)
    assert "secret detail" not in response["status"]["message"]


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{}", "application/json", 400),
        (b"no JSON", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (json.dumps(a_review() | {"kind": "Pod"}).encode(), "application/json", 400),
        (json.dumps(a_review() | {"apiVersion": "admission.k8s.io/v1beta1"}).encode(), "application/json", 400),
        (json.dumps(a_review(uid="")).encode(), "application/json", 400),
        (json.dumps(a_review()).encode(), "text/plain", 415),
        (b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
    ],
)
async def test_what_is_no_review_is_an_http_error(body: bytes, content_type: str, status: int) -> None:
    """A request that cannot be answered in kind is refused by status, and counted."""
    async with serving() as (url, metrics, session):
        async with session.post(url, data=io.BytesIO(body), headers={"Content-Type": content_type}) as response:
            assert response.status == status
        assert b'sidegate_admissions_total{decision="error",reason="bad_review"} 1.0' in metrics.render()


async def test_two_mebibytes_of_pod_are_read() -> None:
    """The framework's own limit of 1 MiB would refuse pods that the API server accepts."""
    response = await reviewed(a_review(POD | {"padding": "x" * 2 * 2**20}))

    assert response["allowed"] is True


async def test_other_path_is_not_found() -> None:
    """Only the paths that the chart's selectors lead to exist."""
    async with serving() as (url, _, session), session.post(url + "x", json=a_review()) as response:
        assert response.status == 404


async def test_decisions_are_counted() -> None:
    """By decision and reason, closed sets both."""
    async with serving() as (url, metrics, session):
        for review in (a_review(), a_review(operation="UPDATE")):
            async with session.post(url, json=review):
                pass
    text = metrics.render().decode()

    assert 'sidegate_admissions_total{decision="inject",reason=""} 1.0' in text
    assert 'sidegate_admissions_total{decision="skip",reason="not_a_pod_creation"} 1.0' in text
    assert "sidegate_admission_seconds_count 2.0" in text
