"""Which directories of the node a governed pod may not mount: those from which the sidecar's keys or work could be read.

Refused is a hostPath at, above or below: processes' memory, sockets of agents and container runtimes, the kubelet's and
the runtimes' directories, in which every pod's volumes and file systems lie, and the node's own credentials. Other paths
are left to Pod Security, which forbids hostPath from `baseline` on. A path is judged as it is written: a link on the node
that leads elsewhere is not seen.
Source: Filesystem Hierarchy Standard 3.0 (/var/run is /run), default directories of kubelet, containerd, CRI-O, Docker,
K3s, k0s, MicroK8s and the SPIRE agent.
"""

from collections.abc import Mapping
from typing import Final

from webhook.core.pod import Pod
from webhook.errors import Denial, DenyCode

_VOLUMES: Final = "the file systems and volumes of all pods of the node, the sidecar's too"
SENSITIVE: Final[Mapping[str, str]] = {
    "/proc": "the memory of the node's processes, the sidecar's too",
    "/run": "the sockets of the SPIRE agent and the container runtime",
    "/var/run": "the sockets of the SPIRE agent and the container runtime",
    "/tmp/spire-agent": "the socket of the SPIRE agent",  # noqa: S108 - its default there
    "/sys/fs": "control groups and BPF maps of the node",
    "/sys/kernel": "the kernel's own tracing",
    "/etc/kubernetes": "the node's credentials",
    "/var/lib/etcd": "the cluster's Secrets",
    "/var/lib/kubelet": _VOLUMES,
    "/var/lib/containerd": _VOLUMES,
    "/var/lib/containers": _VOLUMES,
    "/var/lib/docker": _VOLUMES,
    "/var/lib/rancher": _VOLUMES,
    "/var/lib/k0s": _VOLUMES,
    "/var/snap/microk8s": _VOLUMES,
}


def refuse(bare: Pod) -> None:
    """Raise Denial for a volume of *bare* that is such a directory, holds one, or lies in one."""
    for volume in bare.spec.volumes or ():
        path = (volume.host_path or {}).get("path")
        for sensitive, what in SENSITIVE.items():
            if path is not None and _meet(str(path), sensitive):
                raise Denial(
                    DenyCode.UNENFORCEABLE_HOST_PATH,
                    f"volume {volume.name}: hostPath {str(path)[:100]} leads to {what}; use a volume of another kind",
                )


def _meet(path: str, sensitive: str) -> bool:
    # The API server refuses `..` itself; doubled slashes, `.` and a missing slash at the beginning pass it.
    written = "/".join(["", *(part for part in path.split("/") if part not in ("", "."))]) + "/"
    known = f"{sensitive}/"
    return written.startswith(known) or known.startswith(written)
