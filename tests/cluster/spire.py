"""SPIRE in the test cluster: server, controller manager, agent, CSI driver; SVIDs so short that tests see them rotate.

State lies on the node: a server or agent that was stopped and started again is the same one, with the same keys.
Source: SPIRE 1.13 configuration reference; spire-controller-manager's CRD reference.
"""

from __future__ import annotations

import dataclasses
import string

from tests.cluster import images
from tests.cluster.addresses import NODE_IP, NODE_NAME, SPIRE_SERVER_IP
from tests.cluster.cluster import MANIFESTS, Cluster
from tests.parts import part

_NAMESPACE = ("--namespace", "spire-system")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpireSettings:
    """What tests vary."""

    trust_domain: str = "sidegate.test"
    svid_ttl_s: int = 120  # a rotation happens after half of it
    sync_interval_s: int = 2  # how long a new pod waits at most for its entry to reach the agent


class Spire:
    """SPIRE in a cluster. Mutable: what the cluster holds."""

    def __init__(self, cluster: Cluster, settings: SpireSettings | None = None) -> None:
        self.cluster = cluster
        self.settings = settings or SpireSettings()
        self.trust_domain = self.settings.trust_domain

    def start(self) -> None:
        """Return once the agent serves the Workload API and pods can mount its socket (7 s when idle)."""
        self.cluster.load_image(images.spire())
        crds = part("spire-controller-manager") / "bases"
        names = ("clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains")
        self.cluster.apply(*((crds / f"spire.spiffe.io_{name}.yaml").read_text() for name in names))
        self.cluster.apply(self._manifest("spire-server"))
        self.cluster.kubectl(*_NAMESPACE, "rollout", "status", "deployment/spire-server", "--timeout=180s")
        # An agent that starts without the bundle backs off for half a minute.
        self.cluster.kubectl(
            *_NAMESPACE, "wait", r"--for=jsonpath={.data.bundle\.crt}", "configmap/spire-bundle", "--timeout=120s"
        )
        self.cluster.apply(self._manifest("spire-agent"))
        for name in ("spire-agent", "spiffe-csi-driver"):
            self.cluster.kubectl(*_NAMESPACE, "rollout", "status", f"daemonset/{name}", "--timeout=180s")
        self.cluster.wait_until("kubelet knows the CSI driver", self._driver_registered)

    def stop_server(self) -> None:
        """Scale the server to zero and wait until it is gone."""
        self._scale_server(0)
        self._wait_gone("spire-server")

    def start_server(self) -> None:
        """Bring the server back, with its keys and entries."""
        self._scale_server(1)
        self.cluster.kubectl(*_NAMESPACE, "rollout", "status", "deployment/spire-server", "--timeout=180s")

    def stop_agent(self) -> None:
        """Take the agent off the node and wait until it is gone; the pods' socket directory stays."""
        self._select_agent_nodes('{"sidegate.test/absent": "true"}')
        self._wait_gone("spire-agent")

    def start_agent(self) -> None:
        """Bring the agent back."""
        self._select_agent_nodes("null")
        self.cluster.kubectl(*_NAMESPACE, "rollout", "status", "daemonset/spire-agent", "--timeout=180s")

    def _manifest(self, name: str) -> str:
        template = string.Template((MANIFESTS / f"{name}.yaml").read_text())
        return template.substitute(dataclasses.asdict(self.settings), server_ip=SPIRE_SERVER_IP, node_ip=NODE_IP)

    def _driver_registered(self) -> bool:
        drivers = self.cluster.get("csinode", NODE_NAME)["spec"].get("drivers") or []
        return any(driver["name"] == "csi.spiffe.io" for driver in drivers)

    def _scale_server(self, replicas: int) -> None:
        self.cluster.kubectl(*_NAMESPACE, "scale", "deployment/spire-server", f"--replicas={replicas}")

    def _select_agent_nodes(self, selector: str) -> None:
        patch = f'{{"spec": {{"template": {{"spec": {{"nodeSelector": {selector}}}}}}}}}'
        self.cluster.kubectl(*_NAMESPACE, "patch", "daemonset/spire-agent", "--type=merge", f"--patch={patch}")

    def _wait_gone(self, app: str) -> None:
        self.cluster.kubectl(*_NAMESPACE, "wait", "--for=delete", "pod", f"--selector=app={app}", "--timeout=120s")
