"""The cluster is what the other tests take it for: NetworkPolicy, limits and identities are really enforced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster import images
from tests.cluster.cluster import Cluster, CommandError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cluster.spire import Spire

pytestmark = pytest.mark.e2e

_EVERYTHING = "/opt/node_modules/@modelcontextprotocol/server-everything/dist/index.js"
_SOCKET = "/spiffe-workload-api/spire-agent.sock"


def a_container(name: str, *command: str, **fields: Any) -> dict[str, Any]:
    """A container of the base image; without a command it sleeps."""
    return {
        "name": name,
        "image": "localhost/base:1",
        "imagePullPolicy": "Never",
        "command": list(command) or ["sleep", "1000000"],
        **fields,
    }


def a_pod(name: str, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A pod labelled app=NAME that ends at once when deleted."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": list(containers), **spec},
    }


def a_web_server(name: str, text: str, port: int, **fields: Any) -> dict[str, Any]:
    """A container that answers every GET of / with *text*."""
    serve = f"mkdir -p /tmp/w && echo {text} >/tmp/w/index.html && exec busybox httpd -f -p {port} -h /tmp/w"
    return a_container(
        name, "sh", "-ec", serve, readinessProbe={"tcpSocket": {"port": port}, "periodSeconds": 1}, **fields
    )


def a_service(name: str, port: int) -> dict[str, Any]:
    """A Service of the pod with the same name."""
    ports = [{"port": 80, "targetPort": port}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": ports},
    }


class Workspace:
    """A namespace of the cluster with the few verbs these tests need."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """What kubectl says, in this namespace."""
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, **options)

    def run(self, *objects: dict[str, Any]) -> None:
        """Create objects; return when the pods among them are ready."""
        self.kubectl("apply", "--filename=-", input="\n---\n".join(json.dumps(item) for item in objects))
        pods = [f"pod/{item['metadata']['name']}" for item in objects if item["kind"] == "Pod"]
        self.kubectl("wait", "--for=condition=Ready", "--timeout=90s", *pods)

    def fetch(self, pod: str, url: str) -> str | None:
        """What wget in *pod* got, or None when nobody answered within 3 seconds."""
        try:
            return self.kubectl("exec", pod, "--", "timeout", "3", "wget", "-qO-", url).strip()
        except CommandError:
            return None


@pytest.fixture
def here(cluster: Cluster, namespace: str) -> Workspace:
    """This test's namespace."""
    return Workspace(cluster, namespace)


def test_a_service_is_reached_by_its_dns_name(here: Workspace) -> None:
    """Pods resolve names of the cluster, and Services lead to their pods."""
    here.run(
        a_pod("web", a_web_server("web", "hello", 8080)), a_service("web", 8080), a_pod("client", a_container("client"))
    )
    url = f"http://web.{here.namespace}.svc.cluster.local/"

    here.cluster.wait_until("the Service answers", lambda: here.fetch("client", url) == "hello")


def test_a_native_sidecar_takes_the_ports_traffic(here: Workspace) -> None:
    """An init container redirects the pod's port to a native sidecar that is up before the application starts."""
    redirect = "iptables -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 15006"
    net_admin = {"runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}}
    here.run(
        a_pod(
            "web",
            a_web_server("app", "from-app", 8080),
            initContainers=[
                a_container("redirect", "sh", "-ec", redirect, securityContext=net_admin),
                a_web_server("sidecar", "from-sidecar", 15006, restartPolicy="Always"),
            ],
        ),
        a_service("web", 8080),
        a_pod("client", a_container("client")),
    )

    here.cluster.wait_until("the sidecar answers", lambda: here.fetch("client", "http://web/") == "from-sidecar")
    assert (
        here.kubectl("exec", "web", "--container=app", "--", "wget", "-qO-", "http://127.0.0.1:8080/").strip()
        == "from-app"
    )


def test_memory_limits_are_enforced(here: Workspace) -> None:
    """A container that takes more than its limit is killed for it."""
    limits = {"limits": {"memory": "32Mi"}}
    greedy = a_container("greedy", "sh", "-c", "exec tail -c 200000000 /dev/zero", resources=limits)
    here.kubectl("apply", "--filename=-", input=json.dumps(a_pod("greedy", greedy, restartPolicy="Never")))

    here.kubectl("wait", "--for=jsonpath={.status.phase}=Failed", "pod/greedy", "--timeout=60s")
    path = "--output=jsonpath={.status.containerStatuses[0].state.terminated.reason}"
    assert here.kubectl("get", "pod", "greedy", path) == "OOMKilled"


def test_network_policy_drops_what_it_does_not_allow(here: Workspace) -> None:
    """Under a policy that admits one client, the other gets no answer."""
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "only-friend"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "web"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}],
        },
    }
    pods = [a_pod(name, a_container("client")) for name in ("friend", "stranger")]
    here.run(a_pod("web", a_web_server("web", "hello", 8080)), a_service("web", 8080), *pods)
    here.cluster.wait_until("all may pass before", lambda: here.fetch("stranger", "http://web/") == "hello")

    here.kubectl("apply", "--filename=-", input=json.dumps(policy))

    here.cluster.wait_until("the stranger gets nothing", lambda: here.fetch("stranger", "http://web/") is None)
    here.cluster.wait_until("the friend is answered", lambda: here.fetch("friend", "http://web/") == "hello")


class Workload:
    """A pod with a native sidecar that may have an SVID, and an application that may not; both see the Workload API."""

    def __init__(self, here: Workspace, spire: Spire) -> None:
        self.here = here
        self.identity = f"spiffe://{spire.trust_domain}/ns/{here.namespace}/pod/workload"
        mount = {"volumeMounts": [{"name": "spiffe", "mountPath": "/spiffe-workload-api", "readOnly": True}]}
        fields = {"image": "localhost/spire:1", **mount}
        sidecar = a_container("sidecar", restartPolicy="Always", securityContext={"runAsUser": 15100}, **fields)
        volumes = [{"name": "spiffe", "csi": {"driver": "csi.spiffe.io", "readOnly": True}}]
        entry = {
            "apiVersion": "spire.spiffe.io/v1alpha1",
            "kind": "ClusterSPIFFEID",
            "metadata": {"name": here.namespace},
            "spec": {
                "spiffeIDTemplate": "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/pod/{{ .PodMeta.Name }}",
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": here.namespace}},
                "workloadSelectorTemplates": ["k8s:container-name:sidecar"],
            },
        }
        here.run(entry, a_pod("workload", a_container("app", **fields), initContainers=[sidecar], volumes=volumes))

    def fetch(self, container: str) -> str:
        """What the Workload API tells *container*. Raises CommandError when it tells nothing."""
        command = ("/opt/spire-agent", "api", "fetch", "x509", "-socketPath", _SOCKET, "-timeout", "2s")
        return self.here.kubectl("exec", "workload", f"--container={container}", "--", *command)

    def wait_for_svid(self) -> None:
        """Return once the sidecar has its identity."""
        self.here.cluster.wait_until("the sidecar has its SVID", lambda: self.identity in self.fetch("sidecar"))


def test_only_the_selected_container_gets_an_svid(here: Workspace, spire: Spire) -> None:
    """A native sidecar gets its SVID through the CSI volume; with a container-name selector its neighbour gets none."""
    workload = Workload(here, spire)

    workload.wait_for_svid()

    with pytest.raises(CommandError, match="no identity issued"):
        workload.fetch("app")


def test_spire_comes_back_the_same_after_a_stop(here: Workspace, spire: Spire) -> None:
    """Server and agent can be stopped and started under a running pod: no API meanwhile, then the same authority."""
    workload = Workload(here, spire)
    workload.wait_for_svid()
    bundle = ("--namespace", "spire-system", "configmap", "spire-bundle")
    before = here.cluster.get(*bundle)["data"]["bundle.crt"]

    spire.stop_agent()
    spire.stop_server()
    with pytest.raises(CommandError):
        workload.fetch("sidecar")
    spire.start_server()
    spire.start_agent()

    workload.wait_for_svid()
    assert here.cluster.get(*bundle)["data"]["bundle.crt"] == before


def test_the_collector_writes_the_spans_it_receives(here: Workspace) -> None:
    """A span sent as OTLP over HTTP in JSON comes out as one line of the collector's file."""
    here.cluster.load_image(images.collector())
    configuration = {
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": "0.0.0.0:4318"}}}},
        "exporters": {"file": {"path": "/tmp/traces.json", "flush_interval": "100ms"}},
        "service": {"pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}}},
    }
    write = f"echo '{json.dumps(configuration)}' >/tmp/collector.yaml && exec /opt/otelcol --config /tmp/collector.yaml"
    collector = {
        **a_container("otelcol", "sh", "-ec", write, readinessProbe={"tcpSocket": {"port": 4318}, "periodSeconds": 1}),
        "image": "localhost/otelcol:1",
    }
    here.run(a_pod("otelcol", collector))
    span: dict[str, Any] = {
        "traceId": "0af7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "name": "tools/call",
        "kind": 2,
        "startTimeUnixNano": "1",
        "endTimeUnixNano": "2",
    }
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})

    post = f"wget -qO- --header 'Content-Type: application/json' --post-data '{body}' http://127.0.0.1:4318/v1/traces"
    here.kubectl("exec", "otelcol", "--", "sh", "-c", post)

    def written() -> str:
        return here.kubectl("exec", "otelcol", "--", "cat", "/tmp/traces.json")

    here.cluster.wait_until("the span is in the file", lambda: span["traceId"] in written())
    line = json.loads(written().splitlines()[0])
    assert line["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "tools/call"


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (lambda: images.python("localhost/mcp-python:1", "mcp==2.3.0"), ("python", "-c", "import mcp; print('works')")),
        (
            lambda: images.node("localhost/mcp-node:1", "mcp-server-everything"),
            ("sh", "-c", f"node {_EVERYTHING} help 2>&1 | grep 'Available transports' && echo works"),
        ),
        (images.kubernetes_mcp_server, ("sh", "-c", "/opt/kubernetes-mcp-server --version && echo works")),
    ],
    ids=["python", "node", "kubernetes-mcp-server"],
)
def test_a_workload_image_runs(here: Workspace, make: Callable[[], images.Image], command: tuple[str, ...]) -> None:
    """Images made here start under containerd and find what they were made with."""
    image = make()
    here.cluster.load_image(image)
    pod = a_pod("once", {**a_container("once", *command), "image": image.reference}, restartPolicy="Never")
    here.kubectl("apply", "--filename=-", input=json.dumps(pod))

    here.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/once", "--timeout=60s")
    assert "works" in here.kubectl("logs", "once")


def test_an_image_built_from_a_dockerfile_runs(here: Workspace, tmp_path: Path) -> None:
    """RUN steps install from PyPI; the result is loaded and runs."""
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        "ARG PYTHON_IMAGE\nARG OPA_IMAGE\nFROM ${OPA_IMAGE} AS opa\nFROM ${PYTHON_IMAGE}\n"
        "RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir msgspec==0.22.0\n"
        "COPY --from=opa /opa /usr/local/bin/opa\n"
        'CMD ["sh", "-c", "/venv/bin/python -c \'import msgspec\' && opa version"]\n'
    )
    arguments = {"PYTHON_IMAGE": images.python(), "OPA_IMAGE": images.opa()}
    image = images.build(dockerfile, tmp_path, tag="localhost/built:1", arguments=arguments)
    here.cluster.load_image(image)
    container = {"name": "once", "image": image.reference, "imagePullPolicy": "Never"}
    here.kubectl("apply", "--filename=-", input=json.dumps(a_pod("once", container, restartPolicy="Never")))

    here.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/once", "--timeout=60s")
    assert "1.22.2" in here.kubectl("logs", "once")
