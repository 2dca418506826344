"""Label a namespace, and unmodified MCP servers in it are governed, from admission to audit."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, CommandError
from tests.e2e.governed import Governed, container, deployment, records, resource, service, workload_image

pytestmark = pytest.mark.e2e

RECORDS = "https://records.demo.svc:8000/mcp"
DUCKDB = "https://duckdb.demo.svc:8000/mcp"
READ = ("list_tables", {})
RUN = ("execute_query", {"sql": "SELECT 1"})
DESTROY = ("execute_query", {"sql": "DROP TABLE customers", "destructive": True})


def test_the_pod_comes_up_with_the_sidecar_first(governed: Governed) -> None:
    """The sidecar is a native one, first after the capture container, and says what was done in the status."""
    pod = governed.pod("records")
    names = [each["name"] for each in pod["spec"]["initContainers"]]

    assert names[:2] == ["sidegate-net", "sidegate"]
    assert pod["spec"]["initContainers"][1]["restartPolicy"] == "Always"
    assert pod["metadata"]["labels"]["sidegate.dev/injected"]
    assert json.loads(pod["metadata"]["annotations"]["sidegate.dev/status"])["guarantee"] == "redirect"
    assert all(status["ready"] for status in pod["status"]["initContainerStatuses"])


def test_an_analyst_reads_and_does_not_execute(governed: Governed) -> None:
    """The article's rules verbatim, for the role analyst: the denied caller's SDK goes on."""
    outcome = governed.ask(RECORDS, ("read_schema", {}), READ, RUN, READ, user="alice")

    assert outcome["tools"] == ["list_tables", "read_schema"]
    assert [result["ok"] for result in outcome["results"]] == [True, True, False, True]
    assert outcome["results"][2]["code"] == 403
    assert outcome["results"][2]["data"]["reason"] == "denied"


def test_an_engineer_executes_but_not_with_the_destructive_argument(governed: Governed) -> None:
    """The article's rules verbatim, for the role engineer."""
    outcome = governed.ask(RECORDS, RUN, DESTROY, RUN, user="bob")

    assert outcome["tools"] == ["execute_query", "list_tables", "read_schema"]
    assert [result["ok"] for result in outcome["results"]] == [True, False, True]


def test_a_public_server_is_governed_alike(governed: Governed) -> None:
    """DuckDB's server from PyPI, unmodified, under the same rules."""
    query = ("execute_query", {"sql": "SELECT name FROM customers"})
    analyst = governed.ask(DUCKDB, READ, query, user="alice")
    engineer = governed.ask(DUCKDB, query, DESTROY, user="bob")

    assert analyst["tools"] == ["list_tables"]
    assert [result["ok"] for result in analyst["results"]] == [True, False]
    assert [result["ok"] for result in engineer["results"]] == [True, False]
    assert "Ada" in engineer["results"][0]["text"]


def test_a_stdio_server_is_governed_alike(governed: Governed) -> None:
    """It has no port and opens none: one annotation, and its command is wrapped. Each session has a process of its own."""
    wanted = container("server", workload_image(), "python3", "/opt/app/three_tools.py", "stdio")
    made = deployment("demo", "piped", wanted)
    made["spec"]["template"]["metadata"]["annotations"] = {"sidegate.dev/transport": "stdio"}
    reached = service("demo", "piped", 8000)
    reached["spec"]["ports"][0]["targetPort"] = "mcp"
    governed.cluster.apply(made, reached)
    governed.cluster.kubectl("--namespace", "demo", "rollout", "status", "deployment/piped", "--timeout=180s")
    url = "https://piped.demo.svc:8000/mcp"
    analyst = governed.ask(url, READ, RUN, READ, user="alice")
    engineer = governed.ask(url, RUN, DESTROY, user="bob")

    assert analyst["tools"] == ["list_tables", "read_schema"]
    assert [result["ok"] for result in analyst["results"]] == [True, False, True]
    assert [result["ok"] for result in engineer["results"]] == [True, False]
    pod = governed.pod("piped")
    assert pod["spec"]["containers"][0]["command"][:2] == ["/.sidegate/relay", "15010"]
    assert pod["spec"]["containers"][0]["command"][3:] == wanted["command"]
    assert [each["name"] for each in pod["spec"]["initContainers"]][1] == "sidegate-relay"
    exec_in = ("--namespace", "demo", "exec", pod["metadata"]["name"], "--container=server", "--")
    processes = (
        'import glob; print(sum(b"three_tools" in open(p, "rb").read() for p in glob.glob("/proc/[0-9]*/cmdline")))'
    )
    running = ("python3", "-c", processes)
    # The relay and this very command name it too; no process of a session is left.
    governed.cluster.wait_until(
        "the sessions' processes are gone",
        lambda: int(governed.cluster.kubectl(*exec_in, *running)) == 2,
        timeout_s=30,
    )


def test_the_record_and_the_span_say_who_did_what(governed: Governed) -> None:
    """User, SPIFFE ID, agent session, tool, arguments (redacted as configured), result and latency, in both."""
    asked = ("execute_query", {"sql": "SELECT 42", "password": "hunter2"})
    governed.ask(RECORDS, asked, user="bob", session="session-7f3a")

    record = next(
        each for each in reversed(governed.audit("records"))
        if (each["message"] or {}).get("method") == "tools/call" and each["agent"]["session"] == "session-7f3a"
    )  # fmt: skip
    caller = f"spiffe://{governed.spire.trust_domain}/ns/agents/sa/default"
    assert record["who"]["user"]["email"] == "bob@corp.example"
    assert record["who"]["workload"] == caller
    assert record["message"]["tool"] == "execute_query"
    assert record["arguments"]["content"] == {"sql": "SELECT 42", "password": "[redacted]"}
    assert "SELECT 42" in json.dumps(record["result"]["content"])
    assert record["decision"]["outcome"] == "allowed"
    assert record["decision"]["revision"]
    assert record["latency_s"]["upstream"] > 0
    assert "hunter2" not in json.dumps(record)

    def span() -> dict[str, Any] | None:
        return next((each for each in governed.spans() if each["spanId"] == record["span_id"]), None)

    governed.cluster.wait_until("the collector has the span", lambda: span() is not None, timeout_s=30)
    seen = span()
    assert seen is not None
    assert seen["name"] == "tools/call execute_query"
    assert seen["traceId"] == record["trace_id"]
    assert seen["attributes"]["gen_ai.tool.name"] == "execute_query"
    text = json.dumps(seen)
    assert caller in text
    assert "session-7f3a" in text
    assert "bob" in text


def test_the_application_port_does_not_get_round_the_sidecar(governed: Governed) -> None:
    """A plain connection to the pod's own address and the application's port ends at the sidecar, which refuses it."""
    address = governed.pod("records")["status"]["podIP"]
    initialize = {
        "jsonrpc": "2.0", "id": 1, "method": "initialize",
        "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}},
    }  # fmt: skip
    script = (
        "import json,urllib.request,urllib.error\n"
        f"r=urllib.request.Request('http://{address}:8000/mcp',data=json.dumps({initialize!r}).encode(),"
        "headers={'content-type':'application/json','accept':'application/json, text/event-stream'})\n"
        "try: print(urllib.request.urlopen(r,timeout=5).status)\n"
        "except urllib.error.HTTPError as e: print(e.code, e.read().decode())\n"
    )
    said = governed._in_agent("python3", "-c", script)

    assert said.startswith("401")
    assert "mutual TLS" in said


def test_wrong_tokens_are_refused_and_audited(governed: Governed) -> None:
    """No token, a token for another audience, a cut signature: refused before any tool is named, and in the audit."""
    good = governed.token("bob")
    other = governed.token("bob", audience="https://other.example/mcp")
    for token in (None, other, good[:-4] + "AAAA"):
        outcome = governed.ask(RECORDS, RUN, token=token)
        assert "error" in outcome, outcome

    refused = [each for each in governed.audit("records") if each["decision"].get("reason") == "unauthenticated"]
    assert len(refused) >= 3


def test_a_workload_that_is_not_listed_may_not_call(governed: Governed) -> None:
    """A verified SVID of the same trust domain, but not one of the profile's callers: 403, and audited."""
    cluster = governed.cluster
    cluster.kubectl("--namespace", "agents", "create", "serviceaccount", "stranger")
    patch = {"spec": {"template": {"spec": {"serviceAccountName": "stranger"}}}}
    _rollout_agent(governed, patch)
    try:
        outcome = governed.ask(RECORDS, READ, user="bob")
    finally:
        _rollout_agent(governed, {"spec": {"template": {"spec": {"serviceAccountName": "default"}}}})

    assert "error" in outcome
    assert any(each["decision"].get("reason") == "forbidden_caller" for each in governed.audit("records"))


def _rollout_agent(governed: Governed, patch: dict[str, Any]) -> None:
    agents = ("--namespace", "agents")
    governed.cluster.kubectl(*agents, "patch", "deployment/agent", "--type=strategic", f"--patch={json.dumps(patch)}")
    governed.cluster.kubectl(*agents, "rollout", "status", "deployment/agent", "--timeout=120s")
    governed.cluster.kubectl(
        *agents, "wait", "--for=jsonpath={.status.readyReplicas}=1", "deployment/agent", "--timeout=60s"
    )


def test_a_bad_annotation_is_refused_at_admission(governed: Governed) -> None:
    """The API server says which annotation is wrong and what it may be."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bad", "namespace": "demo", "labels": {"sidegate.dev/server": "true"},
                     "annotations": {"sidegate.dev/port": "eighty"}},
        "spec": {"containers": [{"name": "c", "image": "localhost/base:1"}]},
    }  # fmt: skip

    with pytest.raises(CommandError, match=r"sidegate\.dev/port.*a port from 1 to 65535"):
        governed.cluster.apply(pod)


def test_a_policy_that_does_not_compile_is_refused_when_it_is_written(governed: Governed) -> None:
    """The API server says where it is wrong, and nothing changes for the callers."""
    broken = {
        "apiVersion": "sidegate.dev/v1alpha1", "kind": "MCPPolicy", "metadata": {"name": "broken", "namespace": "demo"},
        "spec": {"selector": {}, "rego": "package mcp.authz\nallow if { nonsense("},
    }  # fmt: skip

    with pytest.raises(CommandError, match=r"broken\.rego:2:20: unexpected eof token"):
        governed.cluster.apply(broken)
    assert governed.ask(RECORDS, READ, user="alice")["results"][0]["ok"]


def test_a_new_policy_reaches_running_sidecars(governed: Governed) -> None:
    """A rule added by kubectl apply holds within seconds, with no restart."""
    before = governed.pod("records")["metadata"]["uid"]
    cedar = 'permit (principal, action, resource) unless { resource == Tool::"records/list_tables" };'
    extra = {
        "apiVersion": "sidegate.dev/v1alpha1", "kind": "MCPPolicy", "metadata": {"name": "extra", "namespace": "demo"},
        "spec": {"selector": {"matchLabels": {"app": "records"}}, "cedar": cedar},
    }  # fmt: skip
    token = governed.token("alice")
    governed.cluster.apply(extra)
    try:
        governed.cluster.wait_until(
            "the tool is denied", lambda: not governed.ask(RECORDS, READ, token=token)["results"][0]["ok"], timeout_s=60
        )
    finally:
        governed.cluster.kubectl("--namespace", "demo", "delete", "mcppolicy", "extra")
    governed.cluster.wait_until(
        "the tool is allowed again", lambda: governed.ask(RECORDS, READ, token=token)["results"][0]["ok"], timeout_s=60
    )
    assert governed.pod("records")["metadata"]["uid"] == before


def test_a_minute_without_control_plane_and_agent_stops_nothing(governed: Governed) -> None:
    """While the SVID is valid and the bundle is there, neither is needed for a call."""
    token = governed.token("alice")
    scale = ("--namespace", "sidegate-system", "scale", "deployment", "--all")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        calls = pool.submit(governed.ask, RECORDS, READ, token=token, seconds=75)
        time.sleep(5)  # the outage begins while calls are under way
        governed.cluster.kubectl(*scale, "--replicas=0")
        governed.spire.stop_agent()
        time.sleep(60)  # the minute that is asked for
        governed.spire.start_agent()
        governed.cluster.kubectl(*scale, "--replicas=1")
        outcome = calls.result()

    assert outcome.get("failures") == [], outcome
    assert outcome["made"] > 100
    governed.cluster.kubectl("--namespace", "sidegate-system", "rollout", "status", "deployment", "--timeout=120s")


def test_rotations_lose_no_call(governed: Governed) -> None:
    """Calls on new and kept connections go on while the SVIDs of both sides rotate."""
    token = governed.token("alice")
    before = _svid_expiry(governed)
    outcome = governed.ask(RECORDS, READ, token=token, seconds=governed.spire.settings.svid_ttl_s)

    assert outcome.get("failures") == [], outcome
    assert outcome["made"] > 100
    assert _svid_expiry(governed) > before
    assert governed.ask(RECORDS, READ, token=token)["results"][0]["ok"]


def _svid_expiry(governed: Governed) -> float:
    """When the sidecar's SVID ends, as its metrics say."""
    address = governed.pod("records")["status"]["podIP"]
    script = f"import urllib.request; print(urllib.request.urlopen('http://{address}:15020/metrics', timeout=5).read().decode())"
    metrics = governed._in_agent("python3", "-c", script)
    line = next(each for each in metrics.splitlines() if each.startswith("sidegate_svid_expiry_timestamp_seconds"))
    return float(line.split()[-1])


PLAIN = RECORDS.replace("https:", "http:")


@pytest.fixture(scope="module")
def planner(governed: Governed) -> str:
    """An unmodified agent in a namespace of its own, labelled; gives its SPIFFE ID."""
    cluster, namespace = governed.cluster, "planners"
    cluster.make_namespace(namespace)
    cluster.kubectl("label", "namespace", namespace, "sidegate.dev/injection=enabled")
    servers = [{"host": "records.demo", "port": 8000}]
    profile = {"selector": {"matchLabels": {"app": "planner"}}, "agent": {"servers": servers}}
    agent = container("agent", workload_image(), "sleep", "1000000")
    pod = deployment(namespace, "planner", agent)
    pod["spec"]["template"]["metadata"]["labels"]["sidegate.dev/agent"] = "true"
    cluster.apply(resource("MCPServerProfile", "planner", profile, namespace=namespace))
    cluster.wait_until("the webhook knows the profile", lambda: _applied(cluster, pod), timeout_s=30)
    cluster.kubectl("--namespace", namespace, "rollout", "status", "deployment/planner", "--timeout=180s")
    spiffe_id = f"spiffe://{governed.spire.trust_domain}/ns/{namespace}/sa/default"
    callers = [f"spiffe://{governed.spire.trust_domain}/ns/agents/sa/default", spiffe_id]
    patch = json.dumps({"spec": {"identity": {"callers": callers}}})
    cluster.kubectl("--namespace", "demo", "patch", "mcpserverprofile/servers", "--type=merge", f"--patch={patch}")
    return spiffe_id


def _applied(cluster: Cluster, pod: dict[str, Any]) -> bool:
    """Make the Deployment; say whether its pods are let in."""
    cluster.apply(pod)
    found = cluster.get("--namespace", "planners", "pods", "--selector=app=planner")["items"]
    return any("sidegate.dev/injected" in each["metadata"]["labels"] for each in found)


def _plan(governed: Governed, **task: Any) -> dict[str, Any]:
    """Have the planner call over plain HTTP; return what its SDK saw."""
    full = {"url": PLAIN, "plain": True, "calls": [list(READ)], **task}
    prefix = ("--namespace", "planners", "exec", "--stdin", "deployment/planner", "--container=agent", "--")
    text = governed.cluster.kubectl(*prefix, "python3", "/opt/app/agent.py", input=json.dumps(full), timeout_s=120)
    outcome: dict[str, Any] = json.loads(text.splitlines()[-1])
    return outcome


def test_an_unmodified_agent_and_an_unmodified_server_know_each_other(governed: Governed, planner: str) -> None:
    """Two namespaces, both labelled, nothing changed in either program: each record names both identities."""
    token = governed.token("alice")
    governed.cluster.wait_until(
        "the new caller is let in", lambda: "results" in _plan(governed, token=token), timeout_s=60
    )
    outcome = _plan(governed, token=token)

    assert outcome["results"][0]["ok"], outcome
    logs = governed.cluster.kubectl("--namespace", "planners", "logs", "deployment/planner", "--container=sidegate")
    out = [each for each in records(logs) if each["direction"] == "outbound"]
    called = next(each for each in reversed(out) if (each["message"] or {}).get("method") == "tools/call")
    answered = next(each for each in reversed(governed.audit("records")) if each["trace_id"] == called["trace_id"])
    server = f"spiffe://{governed.spire.trust_domain}/ns/demo/sa/default"
    assert (called["who"]["workload"], called["destination"]["workload"]) == (planner, server)
    assert answered["who"]["workload"] == planner
    assert answered["who"]["user"]["email"] == "alice@corp.example"
    assert answered["agent"]["session"] == called["agent"]["session"] is not None


def test_strict_refuses_the_same_call_without_a_sidecar(governed: Governed, planner: str) -> None:
    """The same program, the same user, a pod that nobody labelled: 401, and audited."""
    outcome = governed.ask(PLAIN, READ, user="alice", plain=True)

    assert planner
    assert "results" not in outcome, outcome
    refused = [each for each in governed.audit("records") if each["decision"]["detail"] == "no SVID"]
    assert {each["http"]["status"] for each in refused} == {401}
