"""What NetworkPolicies let through around governed servers, with real packets and a real enforcer, in both capture modes."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import Authority, make_key
from tests.cluster.cluster import CommandError
from tests.e2e.governed import ARTICLE, Governed, container, deployment, records, resource, service, workload_image

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.e2e

LISTEN = "import http.server; http.server.HTTPServer(('', 8000), http.server.SimpleHTTPRequestHandler).serve_forever()"
CATCH_UP_S = 120.0  # for the control plane and the network to take up what is new, on a machine with other work
CLOSED = ("TimeoutError", "ConnectionRefusedError", "timeout")
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def listening(port: int) -> dict[str, Any]:
    """What makes a container ready once it listens on *port*: started is too soon to be called."""
    return {"readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1}}


OWN, FOREIGN = "203.0.113.10", "203.0.113.66"
NAMES = NAMED, OTHER = "api.world.svc.cluster.local", "other.world.svc.cluster.local"
# Says to whoever speaks TLS at which address it was reached.
ANSWER = """
import socket, ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
listener = socket.create_server(("0.0.0.0", 443))
while True:
    plain, _ = listener.accept()
    plain.settimeout(5)
    try:
        with context.wrap_socket(plain, server_side=True) as tls:
            tls.recv(1)
            tls.sendall(tls.getsockname()[0].encode())
    except OSError as error:
        print(error, flush=True)
"""
# What is said at an address to who asks for a name, or why nothing is.
CALL = """
import socket, ssl, sys
address, name, authority = sys.argv[1:]
context = ssl.create_default_context(cadata=authority)
try:
    with socket.create_connection((address, 443), timeout=8) as plain:
        with context.wrap_socket(plain, server_hostname=name) as tls:
            tls.sendall(b"x")
            print(tls.recv(100).decode())
except OSError as error:
    print(getattr(error, "reason", None) or type(error).__name__)
"""
SEND = """
import socket
try:
    print(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.10", 443)))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def world(governed: Governed) -> str:
    """Public addresses on the node, two names for one of them in DNS, and TLS behind both; gives its authority."""
    cluster = governed.cluster
    now, day, key = dt.datetime.now(dt.UTC), dt.timedelta(days=1), make_key()
    serial = x509.random_serial_number()
    authority = Authority.make(name="world", key=make_key(), now=now, lifetime=day, serial=serial)
    leaf = authority.sign_serving(NAMES, key.public_key(), now=now, lifetime=day, serial=x509.random_serial_number())
    cluster.make_namespace("world")
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "tls", "namespace": "world"},
        "stringData": {
            "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            "tls.crt": leaf.public_bytes(Encoding.PEM).decode(),
        },
    }
    mount = {"volumeMounts": [{"name": "tls", "mountPath": "/tls", "readOnly": True}]}
    tls = container("world", workload_image(), "python3", "-uc", ANSWER, **listening(443), **mount)
    volumes = [{"name": "tls", "secret": {"secretName": "tls"}}]
    cluster.apply(secret, deployment("world", "world", tls, volumes=volumes, hostNetwork=True))
    for address in (OWN, FOREIGN):
        cluster.exec("ip", "address", "replace", f"{address}/32", "dev", "lo")
    for each in NAMES:
        # Without a cluster IP a Service is a name for addresses, and these are outside the cluster.
        where = {"name": each.split(".")[0], "namespace": "world"}
        labels = {"kubernetes.io/service-name": where["name"]}
        ports = [{"port": 443}]
        endpoints = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": where | {"labels": labels},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [OWN]}],
            "ports": ports,
        }
        spec = {"clusterIP": "None", "ports": ports}
        cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": where, "spec": spec}, endpoints)
    governed.wait_for("world", "world")
    return authority.certificate_pem.decode()


@pytest.fixture(scope="module")
def strangers(governed: Governed) -> str:
    """A namespace that no profile knows, with a pod that calls and listens; gives its address."""
    governed.cluster.make_namespace("strangers")
    listener = container("stranger", workload_image(), "python3", "-c", LISTEN, **listening(8000))
    governed.cluster.apply(deployment("strangers", "stranger", listener))
    governed.wait_for("strangers", "stranger")
    return str(governed.pod("stranger", "strangers")["status"]["podIP"])


@pytest.fixture(scope="module")
def restricted(governed: Governed) -> str:
    """A namespace at Pod Security's strictest level with a server in mode remap; gives its name."""
    cluster, namespace = governed.cluster, "restricted"
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "sidegate.dev/injection": "enabled"}
    cluster.make_namespace(namespace, **labels)
    caller = f"spiffe://{governed.spire.trust_domain}/ns/agents/sa/default"
    identity = {"callers": [caller], "providers": [{"name": "corp"}]}
    cluster.apply(
        resource("MCPServerProfile", "tight", {"selector": {}, "identity": identity, "capture": "remap"}, namespace),
        resource("MCPPolicy", "article", {"selector": {}, "rego": ARTICLE}, namespace),
    )
    cluster.wait_until(
        "it is fenced in",
        lambda: _fenced(cluster, namespace, "sidegate", "sidegate-remap.tight"),
        timeout_s=CATCH_UP_S,
    )
    command = ("python3", "/opt/app/three_tools.py", "8000")
    ports = [{"name": "mcp", "containerPort": 8000}]
    server = container("tight", workload_image(), *command, ports=ports, securityContext=RESTRICTED, **listening(8000))
    reached = service(namespace, "tight", 8000)
    reached["spec"]["ports"][0]["targetPort"] = "mcp"
    cluster.apply(deployment(namespace, "tight", server), reached)
    governed.wait_for(namespace, "tight")
    return namespace


def _closes(governed: Governed, namespace: str, name: str, host: str, port: int, **where: str) -> None:
    governed.cluster.wait_until(
        f"{host}:{port} is closed to {name}",
        lambda: governed.knock(namespace, name, host, port, **where) in CLOSED,
        timeout_s=CATCH_UP_S,
    )


def _fenced(cluster: Cluster, namespace: str, *names: str) -> bool:
    found = cluster.get("--namespace", namespace, "networkpolicies")["items"]
    return set(names) <= {each["metadata"]["name"] for each in found}


def test_only_callers_get_through_to_the_server(governed: Governed, strangers: str) -> None:
    """Where no caller of the profile lives, nothing answers but health; from the callers' namespace the sidecar does."""
    address = governed.pod("records")["status"]["podIP"]
    assert strangers
    assert _fenced(governed.cluster, "demo", "sidegate", "sidegate.servers")
    _closes(governed, "strangers", "stranger", address, 8000)

    assert governed.knock("strangers", "stranger", address, 15443) in CLOSED
    assert governed.knock("strangers", "stranger", address, 15020).startswith("40")
    assert governed.knock("agents", "agent", address, 8000).startswith("401")


def test_a_server_reaches_what_is_declared(governed: Governed, strangers: str) -> None:
    """A destination answers everybody but the governed server, until its profile names it."""
    assert governed.knock("agents", "agent", strangers, 8000).startswith("404")
    _closes(governed, "demo", "records", strangers, 8000, within="server")
    patch = {"spec": {"egress": [{"namespace": "strangers", "ports": [8000]}]}}
    profile = ("--namespace", "demo", "patch", "mcpserverprofile/servers", "--type=merge")
    governed.cluster.kubectl(*profile, f"--patch={json.dumps(patch)}")
    try:
        governed.cluster.wait_until(
            "the destination is reached",
            lambda: governed.knock("demo", "records", strangers, 8000, within="server").startswith("404"),
            timeout_s=CATCH_UP_S,
        )
    finally:
        governed.cluster.kubectl(*profile, '--patch={"spec": {"egress": null}}')


def test_policies_that_somebody_deletes_or_opens_are_put_right(governed: Governed) -> None:
    """Within seconds, and nothing else is touched."""
    demo = ("--namespace", "demo")
    policy = "networkpolicy/sidegate"
    before = governed.cluster.get(*demo, policy)["spec"]
    opened = json.dumps({"spec": {"ingress": [{}], "egress": [{}]}})

    governed.cluster.kubectl(*demo, "patch", policy, "--type=merge", f"--patch={opened}")
    governed.cluster.wait_until("it is repaired", lambda: bool(governed.cluster.get(*demo, policy)["spec"] == before))
    governed.cluster.kubectl(*demo, "delete", policy)
    governed.cluster.wait_until("it is back", lambda: bool(governed.cluster.get(*demo, policy)["spec"] == before))


def test_a_restricted_namespace_takes_remap(governed: Governed, restricted: str) -> None:
    """Pod Security's strictest level admits the pod; the Service leads to the sidecar, and the old port to nothing."""
    pod = governed.pod("tight", restricted)
    address = pod["status"]["podIP"]

    assert pod["metadata"]["labels"]["sidegate.dev/capture"] == "remap"
    service_of = "--selector=kubernetes.io/service-name=tight"
    slices = governed.cluster.get("--namespace", restricted, "endpointslices", service_of)["items"]
    assert [[port["port"] for port in each["ports"]] for each in slices] == [[15443]]
    assert json.loads(pod["metadata"]["annotations"]["sidegate.dev/status"])["guarantee"] == "remap"
    outcome = governed.ask(
        "https://tight.restricted.svc:8000/mcp",
        ("list_tables", {}),
        ("execute_query", {"sql": "SELECT 1"}),
        user="alice",
        expected=f"spiffe://{governed.spire.trust_domain}/ns/{restricted}/sa/default",
    )
    assert [result["ok"] for result in outcome["results"]] == [True, False], outcome
    assert governed.knock(restricted, "tight", "127.0.0.1", 8000)[:3] in {"200", "400", "405", "406"}
    _closes(governed, "agents", "agent", address, 8000)
    assert governed.knock("agents", "agent", address, 15443).startswith("401")


def test_a_restricted_namespace_says_no_to_redirect(governed: Governed) -> None:
    """Before Pod Security does, or by it: the init container needs NET_ADMIN, and the message leads to remap."""
    cluster = governed.cluster
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "sidegate.dev/injection": "enabled"}
    cluster.make_namespace("tight-lipped", **labels)
    server: dict[str, Any] = container("server", workload_image(), "sleep", "1", securityContext=RESTRICTED)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "tight-lipped", "labels": {"sidegate.dev/server": "true"}},
        "spec": {"containers": [server | {"ports": [{"containerPort": 8000}]}]},
    }

    with pytest.raises(CommandError, match=r"PodSecurity|restricted"):
        cluster.kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(pod))


def test_the_control_plane_proves_that_policies_are_enforced(governed: Governed, restricted: str) -> None:
    """The replica that leads dials the pod in mode remap itself: health answers, the application does not."""
    assert governed.pod("tight", restricted)

    def is_proven() -> bool:
        return governed.remapped("closed") > 0 and governed.remapped("exposed") == 0

    governed.cluster.wait_until("the pod is found closed", is_proven, timeout_s=CATCH_UP_S)


def test_a_server_reaches_hosts_by_name_and_nothing_else_of_the_world(governed: Governed, world: str) -> None:
    """Real TLS: a named host at its own address, whatever was dialled; no other name, no datagrams; all on record."""
    cluster, namespace = governed.cluster, "traders"
    cluster.make_namespace(namespace, **{"sidegate.dev/injection": "enabled"})
    caller = f"spiffe://{governed.spire.trust_domain}/ns/agents/sa/default"
    identity = {"callers": [caller], "providers": [{"name": "corp"}]}
    spec = {"selector": {}, "identity": identity, "capture": "redirect", "egress": [{"hosts": [NAMED]}]}
    cluster.apply(resource("MCPServerProfile", "traders", spec, namespace))
    cluster.wait_until("it is fenced in", lambda: _fenced(cluster, namespace, "sidegate", "sidegate-hosts.traders"))
    command, ports = ("python3", "/opt/app/three_tools.py", "8000"), [{"name": "mcp", "containerPort": 8000}]
    held = container("server", workload_image(), *command, ports=ports, securityContext=RESTRICTED)
    cluster.apply(deployment(namespace, "traders", held))
    governed.wait_for(namespace, "traders")

    def run(where: str, name: str, within: str, *code: str) -> str:
        prefix = ("--namespace", where, "exec", f"deployment/{name}", f"--container={within}", "--", "python3", "-c")
        return cluster.kubectl(*prefix, *code).strip()

    def call(address: str, name: str) -> str:
        return run(namespace, "traders", "server", CALL, address, name, world)

    assert run("agents", "agent", "agent", CALL, FOREIGN, OTHER, world) == FOREIGN
    cluster.wait_until("the host is reached", lambda: call(NAMED, NAMED) == OWN)
    assert call(FOREIGN, NAMED) == OWN
    assert "ACCESS_DENIED" in call(OTHER, OTHER)
    assert "ACCESS_DENIED" in call(OWN, OTHER)
    assert run(namespace, "traders", "server", SEND) == "PermissionError"
    pod = governed.pod("traders", namespace)["metadata"]
    assert pod["labels"]["sidegate.dev/egress"] == "hosts"
    kept = records(cluster.kubectl("--namespace", namespace, "logs", pod["name"], "--container=sidegate"))
    outbound = [
        (each["destination"]["host"], each["destination"]["address"])
        for each in kept
        if each["direction"] == "outbound"
    ]
    assert (NAMED, OWN) in outbound
    assert (OTHER, None) in outbound
    refused = [each["decision"] for each in kept if (each["destination"] or {}).get("host") == OTHER]
    assert {(each["reason"], each["detail"]) for each in refused} == {("egress", f"not_allowed: {OTHER} on port 443")}
