"""What shares its place with an MCP server: policies and identities are made for one server to a pod and to a namespace.

Containers of one pod call each other on loopback, where nobody judges; the servers of one namespace share what its
service accounts stand for: the SPIFFE ID, the bundles, whom NetworkPolicies let through. Which server a pod is of, its
author says by the labels app.kubernetes.io/name and instance; without them it is its workload. So replicas are one
server, and so are a canary, a stable Deployment and the Jobs of one application that bear its name. Agents are none.
Found are accidents, not tricks: nobody sees two servers in one program, or two under one name.
Source: Kubernetes documentation, recommended labels; KEP-753 (helpers are native sidecars).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from webhook.core.effective import is_agent
from webhook.core.pod import Pod, workload
from webhook.errors import Denial, DenyCode

Mode = Literal["warn", "enforce"]
NAME: Final = "app.kubernetes.io/name"
INSTANCE: Final = "app.kubernetes.io/instance"
PROXIES: Final = frozenset({"istio-proxy", "linkerd-proxy"})  # another mesh's, in front of the same server
_SHOWN: Final = 3


def server_of(pod: Pod) -> str:
    """Return which server *pod* is of, in words; "" for an agent."""
    if is_agent(pod.labels):
        return ""
    if name := pod.labels.get(NAME):
        instance = pod.labels.get(INSTANCE, name)
        return name if instance == name else f"{name} ({instance})"
    above = workload(pod)
    return f"{above.kind} {above.name}"


def listening(pod: Pod) -> list[str]:
    """Return which containers of *pod* say that they listen; helpers that are native sidecars are none."""
    return [each.name for each in pod.spec.containers if each.ports and each.name not in PROXIES]


def judge(bare: Pod, others: Iterable[str], mode: Mode) -> Iterable[str]:
    """Return what to warn of, where the servers *others* are in the namespace already; raises Denial in `enforce`."""
    said = []
    if len(names := listening(bare)) > 1:
        shown = ", ".join(names)[:64]
        said.append(f"containers {shown}: on loopback they call each other unjudged; one server to a pod")
    if neighbours := sorted(set(others) - {server_of(bare)}):
        said.append(
            f"this namespace has another MCP server, {shown_of(neighbours)}: they share its service accounts; "
            f"one server to a namespace, or label {NAME} alike"
        )
    if said and mode == "enforce":
        raise Denial(DenyCode.PLACE_SHARED, f"{'; '.join(said)}: this cluster enforces it")
    return said


def shown_of(servers: Iterable[str]) -> str:
    """Return the first few of *servers*, and how many there are besides."""
    known = [each[:28] for each in servers]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return ", ".join(known[:_SHOWN]) + more


@dataclass(slots=True)
class Occupants:
    """The server of each injected pod that is alive. Mutated by whoever follows the pods."""

    _servers: dict[str, dict[str, str]] = field(default_factory=dict)  # by namespace and pod

    def put(self, namespace: str, name: str, pod: Pod | None, *, is_over: bool) -> None:
        """Take in a pod; None: it cannot be read. One that is over occupies nothing."""
        server = "" if pod is None or is_over else server_of(pod)
        if server:
            self._servers.setdefault(namespace, {})[name] = server
        else:
            self.remove(namespace, name)

    def remove(self, namespace: str, name: str) -> None:
        """Take in that a pod is gone."""
        inside = self._servers.get(namespace, {})
        inside.pop(name, None)
        if not inside:
            self._servers.pop(namespace, None)

    def servers(self, namespace: str) -> frozenset[str]:
        """Return the servers of *namespace*."""
        return frozenset(self._servers.get(namespace, {}).values())
