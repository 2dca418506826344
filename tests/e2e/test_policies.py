"""Policies from `kubectl apply` to the sidecars and back: what is refused, what is in force, and what the status says."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.cluster import CommandError
from tests.e2e.governed import RELEASE, Governed, container, resource, workload_image
from tests.e2e.test_governed import READ, RECORDS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

HEAD = "package mcp.authz\ndefault allow := false\n"
ANY: dict[str, Any] = {"selector": {}}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-field": ({**ANY, "ceder": "permit (principal, action, resource);"}, r"unknown field \"spec\.ceder\""),
    "no-engine": (ANY, r"one of cedar, rego, bundle and content must be given"),
    "cedar-syntax": (
        {**ANY, "cedar": "permit (principal, action, resource)\nwhen { context.tool.name == };"},
        r"cedar-syntax\.cedar:2:29: unexpected token `}`; try it before: sidegate policy check",
    ),
    "cedar-type": (
        {**ANY, "cedar": 'permit (principal is User, action == Action::"tools/call", resource)\nwhen { principal.salary > 3 };'},
        r"cedar-type\.cedar:2:18: attribute `salary` on entity type `User` not found; hint: ",
    ),
    "cedar-action": (
        {**ANY, "cedar": 'permit (principal, action == Action::"tools/cal", resource);'},
        r"cedar-action\.cedar:1:20: unrecognized action `Action::\\?\"tools/cal\\?\"`; hint: one of tools/call",
    ),
    "rego-syntax": ({**ANY, "rego": HEAD + "allow if { input.user.role == }\n"}, r"rego-syntax\.rego:3:31: unexpected } token"),
    "rego-builtin": ({**ANY, "rego": HEAD + "allow if nonsense(input.user)\n"}, r"rego-builtin\.rego:3:10: undefined function nonsense"),
    "http-send": (
        {**ANY, "rego": HEAD + 'allow if http.send({"method": "get", "url": "http://x"}).status_code == 200\n'},
        r"http-send\.rego:3:10: undefined function http\.send",
    ),
    "wrong-package": ({**ANY, "rego": "package authz\nallow if input.user\n"}, r"there is no rule allow in package mcp\.authz"),
    "no-selector": ({"cedar": "permit (principal, action, resource);"}, r"spec\.selector: Required value"),
    "bad-mode": (
        {**ANY, "cedar": "permit (principal, action, resource);", "mode": "audit"},
        r'spec\.mode: Unsupported value: "audit": supported values: "enforce", "shadow"',
    ),
    "recursion": (
        {**ANY, "rego": HEAD + "allow if deny\ndeny if not allow\n"},
        r"recursion\.rego:3:1: rule data\.mcp\.authz\.allow is recursive",
    ),
    "misspelt-input": (
        {**ANY, "rego": HEAD + 'allow if input.usr.role == "analyst"\n'},
        r"misspelt-input\.rego:3:10: undefined ref: input\.usr\.role; hint: one of agent,",
    ),
}  # fmt: skip


def shown(governed: Governed, name: str) -> list[str]:
    """The words that `kubectl get` prints for a policy of demo, but for the age."""
    return governed.cluster.kubectl("--namespace", "demo", "get", "mcppolicy", name, "--no-headers").split()[:-1]


def everywhere(governed: Governed) -> str:
    """What the status says when all injected pods of demo have it."""
    pods = governed.cluster.get("--namespace", "demo", "pods", "--selector=sidegate.dev/injected")["items"]
    count = sum("deletionTimestamp" not in each["metadata"] for each in pods)
    assert count >= 2
    return f"{count}/{count}"


def conditions(governed: Governed, name: str) -> dict[str, dict[str, Any]]:
    """The conditions of a policy of demo, by type."""
    found = governed.cluster.get("--namespace", "demo", "mcppolicy", name).get("status", {}).get("conditions", [])
    return {each["type"]: each for each in found}


@contextlib.contextmanager
def without_validation(governed: Governed) -> Iterator[None]:
    """Let resources in unchecked, as while no control plane answers."""
    path = ("validatingwebhookconfiguration", "sidegate")
    held = governed.cluster.get(*path)
    governed.cluster.kubectl("delete", *path)
    try:
        yield
    finally:
        fresh = {"name": held["metadata"]["name"], "labels": held["metadata"]["labels"]}
        annotations = held["metadata"].get("annotations", {})
        governed.cluster.apply(held | {"metadata": fresh | {"annotations": annotations}})


def test_a_changed_ca_bundle_is_put_back(governed: Governed) -> None:
    """Somebody overwrites what the API server trusts: repaired within seconds, by one that leads or by any other."""
    path = ("mutatingwebhookconfiguration", "sidegate")
    trusted = [each["clientConfig"]["caBundle"] for each in governed.cluster.get(*path)["webhooks"]]
    wrong = base64.b64encode(governed.ca_pem.encode()).decode()  # a CA, but another one
    patch = [
        {"op": "replace", "path": f"/webhooks/{index}/clientConfig/caBundle", "value": wrong}
        for index in range(len(trusted))
    ]
    governed.cluster.kubectl("patch", *path, "--type=json", f"--patch={json.dumps(patch)}")

    governed.cluster.wait_until(
        "the caBundle is right again",
        lambda: [each["clientConfig"]["caBundle"] for each in governed.cluster.get(*path)["webhooks"]] == trusted,
        timeout_s=15,
    )


def refusal(governed: Governed, policy: dict[str, Any]) -> str:
    """Why the API server refuses it. What no compiler had time for is let in, and tried again."""
    for _ in range(3):
        try:
            governed.cluster.apply(policy)
        except CommandError as error:
            return str(error)
        governed.cluster.kubectl("--namespace", "demo", "delete", "mcppolicy", policy["metadata"]["name"])
    return "it was let in"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_policy_is_refused_by_the_api_server(governed: Governed, name: str) -> None:
    """With where it is wrong and, mostly, what would be right."""
    spec, said = BROKEN[name]

    assert re.search(said, refusal(governed, resource("MCPPolicy", name, spec)))


def test_the_status_of_every_kind_says_that_the_pods_have_it(governed: Governed) -> None:
    """Policy, limit, profile and provider: accepted, compiled, and in force in every pod that they select."""
    wanted = ["True", "True", everywhere(governed)]
    for kind in ("mcppolicy/article", "mcplimit/calls", "mcpserverprofile/servers", "identityprovider/corp"):
        columns = (
            ".status.conditions[?(@.type=='Accepted')].status",
            ".status.conditions[?(@.type=='Compiled')].status",
            ".status.distributed",
        )
        path = "jsonpath=" + " ".join(f"{{{each}}}" for each in columns)

        def says(kind: str = kind, path: str = path) -> list[str]:
            return governed.cluster.kubectl("--namespace", "demo", "get", kind, f"--output={path}").split()

        governed.cluster.wait_until(f"{kind} is distributed", lambda says=says: says() == wanted, timeout_s=60)
    assert shown(governed, "article") == ["article", "enforce", *wanted]
    found = conditions(governed, "article")
    assert {each["status"] for each in found.values()} == {"True"}
    assert {each["observedGeneration"] for each in found.values()} == {1}


def test_a_good_policy_reaches_every_pod_and_a_broken_one_none(governed: Governed) -> None:
    """In force at once; then, with the webhook away, one that does not compile: it says so, and the last good one stays."""
    narrow = 'permit (principal, action, resource) unless { resource == Tool::"records/list_tables" };'
    token = governed.token("alice")
    governed.cluster.apply(resource("MCPPolicy", "narrow", {**ANY, "cedar": narrow}))
    try:
        governed.cluster.wait_until(
            "it is distributed",
            lambda: shown(governed, "narrow")[2:] == ["True", "True", everywhere(governed)],
            timeout_s=60,
        )
        assert not governed.ask(RECORDS, READ, token=token)["results"][0]["ok"]

        with without_validation(governed):
            broken = resource("MCPPolicy", "narrow", {**ANY, "cedar": "permit (principal, action, resource) when {"})
            governed.cluster.apply(broken)
            governed.cluster.wait_until(
                "it says that it does not compile", lambda: shown(governed, "narrow")[3:4] == ["False"], timeout_s=60
            )
        found = conditions(governed, "narrow")
        assert found["Compiled"]["reason"] == "DoesNotCompile"
        assert found["Compiled"]["message"].startswith("narrow.cedar:1:")
        assert found["Compiled"]["observedGeneration"] == 2
        assert shown(governed, "narrow")[4] == f"0/{everywhere(governed).partition('/')[0]}"
        assert not governed.ask(RECORDS, READ, token=token)["results"][0]["ok"]
    finally:
        governed.cluster.kubectl("--namespace", "demo", "delete", "mcppolicy", "narrow")
    governed.cluster.wait_until(
        "the tool is allowed again", lambda: governed.ask(RECORDS, READ, token=token)["results"][0]["ok"], timeout_s=60
    )


def sidegate(governed: Governed, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb as an operator types it, by the cluster's kubeconfig."""
    command = governed.cluster.command(sys.executable, "-m", "webhook.cli", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_status_says_that_everything_is_governed_and_how_fresh_it_is(governed: Governed) -> None:
    """Guarantee, version, bundle and SVID of each pod, by its sidecar's own word."""
    done = sidegate(governed, "status", "-n", "demo", "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)

    assert report["namespaces"][0]["expected"] == report["namespaces"][0]["governed"] >= 2
    for pod in report["pods"]:
        assert (pod["state"], pod["guarantee"]) == ("governed", "redirect")
        assert len(pod["live"]["revision"]) >= 12
        assert 0 <= pod["live"]["bundle_age_s"] < 90
        assert 0 < pod["live"]["svid_left_s"] <= governed.spire.settings.svid_ttl_s
    table = sidegate(governed, "status", "-n", "demo").stdout
    assert table.endswith("\nall that should be governed is\n")


def test_a_pod_from_before_the_label_is_found(governed: Governed) -> None:
    """By status and by check, which both fail, and say what to do."""
    cluster = governed.cluster
    cluster.make_namespace("late")
    labels = {"sidegate.dev/server": "true"}
    pod = {"containers": [container("app", workload_image(), "sleep", "1000000")], "terminationGracePeriodSeconds": 1}
    metadata = {"name": "early", "namespace": "late", "labels": labels}
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})
    cluster.kubectl("label", "namespace", "late", "sidegate.dev/injection=enabled")
    try:
        said = sidegate(governed, "status", "-n", "late")
        checked = sidegate(governed, "check", "-o", "json")
    finally:
        cluster.kubectl("delete", "namespace", "late", "--wait=false")

    assert said.returncode == checked.returncode == 1
    assert (
        "Pod late/early: not governed, although label sidegate.dev/server=true; restart workload early" in said.stdout
    )
    failed = {each["name"]: each["text"] for each in json.loads(checked.stdout) if each["level"] == "fail"}
    assert set(failed) == {"pods"}, failed
    assert failed["pods"].startswith("late/early is not governed")


def test_check_passes_where_nothing_is_wrong(governed: Governed) -> None:
    """But for what one small cluster lacks: a second replica."""
    governed.cluster.kubectl("wait", "--for=delete", "namespace/late", "--timeout=60s")
    done = sidegate(governed, "check", "-o", "json")
    findings = json.loads(done.stdout)

    assert done.returncode == 0, done.stdout
    assert {each["text"] for each in findings if each["name"] == "control-plane"} == {
        "sidegate-system/sidegate: one replica"
    }
    levels = {each["name"]: each["level"] for each in findings}
    assert {levels[name] for name in ("api-version", "permissions", "spire-csi", "webhook", "crd-mcppolicies")} == {
        "ok"
    }


def test_the_next_replica_counts_on(governed: Governed) -> None:
    """Pods ask either of two replicas; the one that leads goes; the other leads, and the sums are right."""
    system = ("--namespace", RELEASE)
    cluster = governed.cluster

    def holder() -> str:
        name: str = cluster.get(*system, "lease", "sidegate")["spec"]["holderIdentity"]
        return name.rpartition("_")[0]

    cluster.kubectl(*system, "scale", "deployment/sidegate", "--replicas=2")
    try:
        cluster.kubectl(*system, "rollout", "status", "deployment/sidegate", "--timeout=120s")
        first = holder()
        cluster.kubectl(*system, "delete", "pod", first, "--wait=false")
        cluster.wait_until("another one leads", lambda: holder() not in {first, ""}, timeout_s=60)
        narrow = 'permit (principal, action, resource) unless { resource == Tool::"records/list_tables" };'
        cluster.apply(resource("MCPPolicy", "narrow", {**ANY, "cedar": narrow}))
        cluster.wait_until(
            "it is distributed",
            lambda: shown(governed, "narrow")[2:] == ["True", "True", everywhere(governed)],
            timeout_s=90,
        )
    finally:
        cluster.kubectl("--namespace", "demo", "delete", "mcppolicy", "narrow", "--ignore-not-found")
        cluster.kubectl(*system, "scale", "deployment/sidegate", "--replicas=1")
        cluster.kubectl(*system, "rollout", "status", "deployment/sidegate", "--timeout=120s")
