"""Over IPv6, in a cluster whose pods have addresses of both families: nothing gets round the sidecar, calls pass it.

What NetworkPolicies do over IPv6 is not tried: the enforcer that is to be had here, kube-router 2.1.0, has rules that name
other sets than it makes (its issue 1653), so it is left to IPv4.
"""

from __future__ import annotations

import sys
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.governed import KNOCK, Governed, container, deployment, resource, service, workload_image

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

# On both families, and no MCP server: what is asked is who answers at all.
LISTEN = """
import http.server, socket
http.server.HTTPServer.address_family = socket.AF_INET6
http.server.HTTPServer(("::", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def address(pod: dict[str, Any]) -> str:
    """The pod's IPv6 address, as it stands in a URL."""
    found = [each["ip"] for each in pod["status"]["podIPs"] if ":" in each["ip"]]
    assert len(found) == 1
    return f"[{IPv6Address(found[0])}]"


def only_ipv6(reached: dict[str, Any], name: str) -> dict[str, Any]:
    """That Service once more, with an address of IPv6 alone."""
    reached["metadata"]["name"] = name
    reached["spec"] |= {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}
    return reached


@pytest.mark.parametrize("port", [8000, 15443, 1])
def test_every_port_leads_to_the_sidecar(governed: Governed, port: int) -> None:
    """The application's, the sidecar's, and one on which nobody listens, from a pod and from the node itself."""
    records = address(governed.pod("records"))
    node = governed.cluster.exec(sys.executable, "-c", KNOCK, records, str(port)).strip()

    for answer in (governed.knock("agents", "agent", records, port), node):
        assert answer.startswith("401") if port != 1 else answer in {"RemoteDisconnected", "ConnectionResetError"}


def test_calls_pass_by_a_service_of_ipv6(governed: Governed) -> None:
    """From the agent's SDK to the tool's answer, with identity both ways."""
    six = only_ipv6(service("demo", "records", 8000), "records-six")
    six["spec"]["selector"] = {"app": "records"}
    governed.cluster.apply(six)

    outcome = governed.ask("https://records-six.demo.svc.cluster.local:8000/mcp", ("list_tables", {}), user="alice")

    assert [result["ok"] for result in outcome["results"]] == [True], outcome
    assert ":" in governed.cluster.get("--namespace", "demo", "service/records-six")["spec"]["clusterIP"]


@pytest.fixture
def remapped(governed: Governed) -> Iterator[str]:
    """A namespace that is gone afterwards, pod and all: other tests count exposed pods."""
    governed.cluster.make_namespace("six", **{"sidegate.dev/injection": "enabled"})
    yield "six"
    governed.cluster.kubectl("delete", "namespace", "six", "--timeout=120s")


def test_in_mode_remap_a_service_leads_to_the_sidecar(governed: Governed, remapped: str) -> None:
    """By its endpoint; where NetworkPolicy does not know IPv6, as here, the application is exposed, and that is found."""
    cluster, namespace = governed.cluster, remapped
    identity = {"callers": [f"spiffe://{governed.spire.trust_domain}/ns/agents/sa/default"]}
    cluster.apply(
        resource("MCPServerProfile", "six", {"selector": {}, "identity": identity, "capture": "remap"}, namespace)
    )
    server = container("six", workload_image(), "python3", "-c", LISTEN)
    reached = only_ipv6(service(namespace, "six", 8000), "six")
    reached["spec"]["ports"][0]["targetPort"] = "mcp"
    cluster.apply(deployment(namespace, "six", server | {"ports": [{"name": "mcp", "containerPort": 8000}]}), reached)
    governed.wait_for(namespace, "six")
    pod = address(governed.pod("six", namespace))

    assert governed.knock("agents", "agent", pod, 15443).startswith("401")
    slices = cluster.get("--namespace", namespace, "endpointslices", "--selector=kubernetes.io/service-name=six")
    found = [(each["addressType"], [port["port"] for port in each["ports"]]) for each in slices["items"]]
    assert found == [("IPv6", [15443])]
    assert governed.knock("agents", "agent", f"six.{namespace}.svc.cluster.local", 8000).startswith("401")

    # It is dialled every ten seconds at first.
    cluster.wait_until("the pod is found exposed", lambda: governed.remapped("exposed") == 1, timeout_s=120)
