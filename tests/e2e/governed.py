"""The path as a user walks it: images built from the Dockerfile, the chart installed by Helm, a namespace labelled, servers restarted.

Everything is real: the cluster, SPIRE, the OpenID provider, the servers, the collector and the agent's SDK. The servers know nothing of it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import Authority, make_key
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.spire import Spire

REPOSITORY = Path(__file__).parents[2]
WORKLOADS = Path(__file__).parent / "workloads"
RELEASE = "sidegate-system"
AUDIENCE = "https://records.demo.example/mcp"
ISSUER = "https://oidc.identity.svc.cluster.local:8443"
PYTHON_PACKAGES = (
    "mcp==2.3.0",
    "mcp-server-motherduck==1.1.0",
    "cryptography==50.0.2",
    "grpclib==0.4.9",
    "protobuf>=6,<7",
    "spiffe==0.3.2",
)
ARTICLE = (REPOSITORY / "examples" / "article" / "rego" / "article.rego").read_text()


# Asks as anybody would who has no identity. Whatever comes back came from a listener; silence is an error's name.
KNOCK = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(f"http://{sys.argv[1]}:{sys.argv[2]}/mcp", timeout=3).status)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode()[:300])
except OSError as error:
    print(type(getattr(error, "reason", error)).__name__)
"""


@functools.cache
def workload_image() -> images.Image:
    """The test's servers and its agent: PyPI packages, three scripts, and our `certs` for the agent's SVID."""
    files = {f"opt/app/{name}": WORKLOADS / name for name in ("three_tools.py", "agent.py", "login.py")}
    return images.python(
        "localhost/workload:1", *PYTHON_PACKAGES, layers=[{**files, "opt/app/certs": REPOSITORY / "certs"}]
    )


@functools.cache
def provider_image() -> images.Image:
    """Npm oidc-provider."""
    script = {"opt/provider.mjs": WORKLOADS / "provider.mjs"}
    return images.node("localhost/oidc-provider:1", "oidc-provider", layers=[script])


@functools.cache
def product_image(target: str) -> images.Image:
    """One of the two images of our Dockerfile."""
    arguments = {"PYTHON_IMAGE": images.python(), "OPA_IMAGE": images.opa(), "COMPILER_IMAGE": images.compiler()}
    tag = f"registry.example/sidegate/{target}:e2e"
    return images.build(REPOSITORY / "Dockerfile", REPOSITORY, tag=tag, target=target, arguments=arguments)


def container(name: str, image: images.Image, *command: str, **fields: Any) -> dict[str, Any]:
    """A container that runs *command* as nobody in particular."""
    base = {"name": name, "image": image.reference, "imagePullPolicy": "Never", "command": list(command)}
    return {**base, "env": [{"name": "PYTHONPATH", "value": "/opt/packages:/opt/app"}], **fields}


def deployment(namespace: str, name: str, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A Deployment of one pod labelled app=NAME."""
    template = {
        "metadata": {"labels": {"app": name}},
        "spec": {"containers": list(containers), "terminationGracePeriodSeconds": 2, **spec},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": template},
    }


def service(namespace: str, name: str, port: int) -> dict[str, Any]:
    """The Service of that Deployment."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": [{"port": port, "targetPort": port}]},
    }


def resource(kind: str, name: str, spec: dict[str, Any], namespace: str | None = "demo") -> dict[str, Any]:
    """One of our custom resources."""
    where = {} if namespace is None else {"namespace": namespace}
    return {"apiVersion": "sidegate.dev/v1alpha1", "kind": kind, "metadata": {"name": name, **where}, "spec": spec}


def spiffe_id(name: str, namespace: str, container_name: str) -> dict[str, Any]:
    """Let one container of every pod in *namespace* have an SVID."""
    return {
        "apiVersion": "spire.spiffe.io/v1alpha1",
        "kind": "ClusterSPIFFEID",
        "metadata": {"name": name},
        "spec": {
            "spiffeIDTemplate": "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}",
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "workloadSelectorTemplates": [f"k8s:container-name:{container_name}"],
        },
    }


def records(log: str) -> list[dict[str, Any]]:
    """The audit records in what a sidecar wrote, one of each message."""
    lines = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    return [line for line in lines if line.get("phase") == "end"]


@dataclasses.dataclass
class Governed:
    """A cluster with Sidegate in it, and the verbs of its users."""

    cluster: Cluster
    spire: Spire

    def install(self) -> None:
        """Build, load and install everything; return when all of it is up."""
        for image in (
            workload_image(),
            provider_image(),
            images.collector(),
            product_image("sidecar"),
            product_image("control-plane"),
        ):
            self.cluster.load_image(image)
        for name in ("identity", "demo", "agents", "telemetry"):
            self.cluster.make_namespace(name)
        self._start_provider()
        self._start_collector()
        self.cluster.helm(
            "install", "sidegate", REPOSITORY / "charts" / "sidegate", "--namespace", RELEASE, "--create-namespace", "--wait",
            "--timeout", "3m", *self.values(),
        )  # fmt: skip
        self._apply_resources()
        self._start_servers()
        self._start_agent()

    def values(self) -> list[str]:
        """What a user sets: the images, the trust domain, where spans go."""
        settings = {
            "image.controlPlane.repository": "registry.example/sidegate/control-plane",
            "image.controlPlane.tag": "e2e",
            "image.sidecar.repository": "registry.example/sidegate/sidecar",
            "image.sidecar.tag": "e2e",
            "replicas": "1",
            "spiffe.trustDomain": self.spire.trust_domain,
            "telemetry.otlpEndpoint": "http://collector.telemetry.svc:4318",
            "capture.weakest": "remap",
        }
        return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    def label_and_restart(self) -> None:
        """What governs the namespace: one label and a restart."""
        self.cluster.kubectl("label", "namespace", "demo", "sidegate.dev/injection=enabled")
        self.cluster.kubectl("--namespace", "demo", "rollout", "restart", "deployment")
        for name in ("records", "duckdb"):
            self.cluster.kubectl("--namespace", "demo", "rollout", "status", f"deployment/{name}", "--timeout=180s")

    def token(self, user: str, audience: str = AUDIENCE) -> str:
        """Log *user* in, inside the cluster."""
        command = ("python3", "/opt/app/login.py", ISSUER, audience, user, "/tls/ca.crt")
        return self._in_agent(*command).strip()

    def ask(self, url: str, *calls: tuple[str, dict[str, Any]], user: str | None = None, **task: Any) -> dict[str, Any]:
        """Have the agent call; return what its SDK saw."""
        token = task.pop("token", None) or (self.token(user) if user else None)
        expected = f"spiffe://{self.spire.trust_domain}/ns/demo/sa/default"
        full = {"url": url, "expected": expected, "token": token, "calls": [list(call) for call in calls], **task}
        timeout_s = 120 + float(task.get("seconds", 0))
        text = self._in_agent("python3", "/opt/app/agent.py", given=json.dumps(full), timeout_s=timeout_s)
        outcome: dict[str, Any] = json.loads(text.splitlines()[-1])
        return outcome

    def _in_agent(self, *command: str, given: str | None = None, timeout_s: float = 120) -> str:
        prefix = ("--namespace", "agents", "exec", "--stdin", "deployment/agent", "--container=agent", "--")
        return self.cluster.kubectl(*prefix, *command, input=given or "", timeout_s=timeout_s)

    def knock(self, namespace: str, name: str, host: str, port: int, *, within: str = "") -> str:
        """What a plain HTTP request from a pod of Deployment *name* is answered: a status and a text, or the error's name."""
        command = ("--namespace", namespace, "exec", f"deployment/{name}", f"--container={within or name}", "--")
        return self.cluster.kubectl(*command, "python3", "-c", KNOCK, host, str(port)).strip()

    def pod(self, name: str, namespace: str = "demo") -> dict[str, Any]:
        """The one running pod of a Deployment."""
        pods: list[dict[str, Any]] = self.cluster.get("--namespace", namespace, "pods", f"--selector=app={name}")[
            "items"
        ]
        alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        assert len(alive) == 1, [pod["metadata"]["name"] for pod in alive]
        return alive[0]

    def wait_for(self, namespace: str, name: str) -> None:
        """Wait until a Deployment is rolled out."""
        self.cluster.kubectl("--namespace", namespace, "rollout", "status", f"deployment/{name}", "--timeout=180s")

    def remapped(self, state: str) -> float:
        """How many pods in mode remap the control plane's replicas have found *state*: closed, exposed, unknown."""
        replicas = self.cluster.get("--namespace", RELEASE, "pods", "--selector=app.kubernetes.io/name=sidegate")[
            "items"
        ]
        script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
        said = [
            self._in_agent("python3", "-c", script, f"http://{each['status'].get('podIP')}:9090/metrics")
            for each in replicas
        ]
        series = f'sidegate_remapped_pods{{state="{state}"}} '
        lines = (line for text in said for line in text.splitlines())
        return sum(float(line.removeprefix(series)) for line in lines if line.startswith(series))

    def audit(self, name: str) -> list[dict[str, Any]]:
        """The audit records of a server's sidecar, one of each message."""
        text = self.cluster.kubectl(
            "--namespace", "demo", "logs", self.pod(name)["metadata"]["name"], "--container=sidegate"
        )
        return records(text)

    def spans(self) -> list[dict[str, Any]]:
        """Every span that the collector has received."""
        command = ("--namespace", "telemetry", "exec", "deployment/collector", "--", "cat", "/tmp/traces.json")
        return [
            {**span, "attributes": {each["key"]: next(iter(each["value"].values())) for each in span["attributes"]}}
            for line in self.cluster.kubectl(*command).splitlines()
            for resource_spans in json.loads(line)["resourceSpans"]
            for scope in resource_spans["scopeSpans"]
            for span in scope["spans"]
        ]

    # the surroundings

    def _start_provider(self) -> None:
        now = dt.datetime.now(dt.UTC)
        day = dt.timedelta(days=1)
        authority = Authority.make(
            name="identity", key=make_key(), now=now, lifetime=day, serial=x509.random_serial_number()
        )
        key = make_key()
        leaf = authority.sign_serving(
            ["oidc.identity.svc.cluster.local"],
            key.public_key(),
            now=now,
            lifetime=day,
            serial=x509.random_serial_number(),
        )
        self.ca_pem = authority.certificate_pem.decode()
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "tls", "namespace": "identity"},
            "stringData": {
                "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
                "tls.crt": leaf.public_bytes(Encoding.PEM).decode(),
            },
        }
        arguments = ("/usr/local/bin/node", "/opt/provider.mjs", ISSUER, AUDIENCE, "/tls/tls.key", "/tls/tls.crt")
        mount = {"volumeMounts": [{"name": "tls", "mountPath": "/tls", "readOnly": True}]}
        ready = {"readinessProbe": {"tcpSocket": {"port": 8443}, "periodSeconds": 1}}
        pod = container("oidc", provider_image(), *arguments, **mount, **ready)
        self.cluster.apply(
            secret,
            deployment("identity", "oidc", pod, volumes=[{"name": "tls", "secret": {"secretName": "tls"}}]),
            service("identity", "oidc", 8443),
        )
        self.cluster.kubectl("--namespace", "identity", "rollout", "status", "deployment/oidc", "--timeout=120s")

    def _start_collector(self) -> None:
        configuration = {
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": "0.0.0.0:4318"}}}},
            "exporters": {"file": {"path": "/tmp/traces.json", "flush_interval": "100ms"}},
            "service": {"pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}}},
        }
        write = (
            f"echo '{json.dumps(configuration)}' >/tmp/collector.yaml && exec /opt/otelcol --config /tmp/collector.yaml"
        )
        pod = container("collector", images.collector(), "sh", "-ec", write)
        self.cluster.apply(deployment("telemetry", "collector", pod), service("telemetry", "collector", 4318))
        self.cluster.kubectl("--namespace", "telemetry", "rollout", "status", "deployment/collector", "--timeout=120s")

    def _apply_resources(self) -> None:
        provider = {"issuer": ISSUER, "audiences": [AUDIENCE], "caPem": self.ca_pem}
        everything: dict[str, Any] = {"selector": {}}
        caller = f"spiffe://{self.spire.trust_domain}/ns/agents/sa/default"
        identity = {"callers": [caller], "providers": [{"name": "corp"}]}
        self.cluster.apply(
            resource("IdentityProvider", "corp", provider, namespace=None),
            resource("MCPServerProfile", "servers", {**everything, "identity": identity}),
            resource("MCPPolicy", "article", {**everything, "rego": ARTICLE}),
            resource("MCPLimit", "calls", {**everything, "ratePerSecond": 50, "burst": 200}),
        )

    def _start_servers(self) -> None:
        """Two unmodified servers, running before anyone labels anything."""
        image = workload_image()
        probe = {
            "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
            "ports": [{"name": "mcp", "containerPort": 8000}],
        }
        program = "from mcp_server_motherduck import main; main()"
        duckdb = ["python3", "-c", program, "--transport", "http", "--host", "0.0.0.0", "--port", "8000",
                  "--db-path", ":memory:", "--read-write", "--home-dir", "/tmp",
                  "--init-sql", "CREATE TABLE customers AS SELECT 1 AS id, 'Ada' AS name"]  # fmt: skip
        self.cluster.apply(
            deployment(
                "demo", "records", container("server", image, "python3", "/opt/app/three_tools.py", "8000", **probe)
            ),
            service("demo", "records", 8000),
            deployment("demo", "duckdb", container("server", image, *duckdb, **probe)),
            service("demo", "duckdb", 8000),
        )
        for name in ("records", "duckdb"):
            self.cluster.kubectl("--namespace", "demo", "rollout", "status", f"deployment/{name}", "--timeout=120s")

    def _start_agent(self) -> None:
        mounts = [
            {"name": "spiffe", "mountPath": "/spiffe-workload-api", "readOnly": True},
            {"name": "ca", "mountPath": "/tls", "readOnly": True},
        ]
        volumes = [
            {"name": "spiffe", "csi": {"driver": "csi.spiffe.io", "readOnly": True}},
            {"name": "ca", "configMap": {"name": "oidc-ca"}},
        ]
        authority = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "oidc-ca", "namespace": "agents"},
            "data": {"ca.crt": self.ca_pem},
        }
        agent = container("agent", workload_image(), "sleep", "1000000", volumeMounts=mounts)
        self.cluster.apply(
            spiffe_id("agents", "agents", "agent"), authority, deployment("agents", "agent", agent, volumes=volumes)
        )
        self.cluster.kubectl("--namespace", "agents", "rollout", "status", "deployment/agent", "--timeout=120s")
