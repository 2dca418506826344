"""A governed pod mounts no directory of the node from which the sidecar could be read."""

import pytest

from webhook.core import node_paths, pod
from webhook.errors import Denial, DenyCode


def a_pod(path: str) -> pod.Pod:
    """A pod with a volume of each kind, one of them the node's *path*."""
    volumes = [{"name": "scratch", "emptyDir": {}}, {"name": "node", "hostPath": {"path": path}}]
    return pod.read({"metadata": {}, "spec": {"containers": [], "volumes": volumes}})


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/", "the memory of the node's processes"),
        ("//", "the memory of the node's processes"),
        ("/proc/1/root", "the memory of the node's processes"),
        ("/run", "the sockets of the SPIRE agent"),
        ("/run/spire/agent-sockets/", "the sockets of the SPIRE agent"),
        ("/var/run/docker.sock", "the sockets of the SPIRE agent"),
        ("run/containerd", "the sockets of the SPIRE agent"),
        ("//run/./spire", "the sockets of the SPIRE agent"),
        ("/var", "the sockets of the SPIRE agent"),
        ("/tmp", "the socket of the SPIRE agent"),  # noqa: S108 - a path that is judged, not used
        ("/var/lib/kubelet/pods", "the file systems and volumes of all pods"),
        ("/etc", "the node's credentials"),
        ("/sys", "control groups and BPF maps"),
        ("/sys/kernel/debug", "the kernel's own tracing"),
    ],
)
def test_what_reaches_the_sidecar_is_refused(path: str, what: str) -> None:
    """At, above and below the directories in question, however the path is written."""
    with pytest.raises(Denial, match=what) as refused:
        node_paths.refuse(a_pod(path))

    assert refused.value.code is DenyCode.UNENFORCEABLE_HOST_PATH
    assert str(refused.value).startswith(f"volume node: hostPath {path} leads to ")


@pytest.mark.parametrize(
    "path",
    ["/data", "/etc/localtime", "/var/log", "/runner", "/process", "/var/lib/kubelets", "/sys/class", "/opt/models"],
)
def test_other_paths_are_pod_securitys_affair(path: str) -> None:
    """A name that only begins alike is another directory."""
    node_paths.refuse(a_pod(path))


def test_a_pod_without_volumes_passes() -> None:
    """As most are."""
    node_paths.refuse(pod.read({"metadata": {}, "spec": {"containers": []}}))
