"""Process 1 of the sandbox: private mounts and network, then the daemons of a node, each once what it needs answers.

Started by `cluster.py` inside fresh mount, network, UTS and PID namespaces as `python -m tests.cluster.node RUN_DIR`.
Writes RUN_DIR/ready when pods can be scheduled, or RUN_DIR/failed with the reason. Killing this process ends every
daemon and pod; its mounts, links and rules go with the namespaces.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import cgroups
from tests.cluster.addresses import (
    DNS_IP,
    GATEWAY_IP,
    GATEWAY_IP6,
    NODE_IP,
    NODE_IP6,
    NODE_NAME,
    POD_CIDR,
    POD_CIDR6,
    SERVICE_CIDR,
    SERVICE_CIDR6,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Global settings of the kernel that kubelet checks: it gets files of its own to read instead of changing the machine's.
_SYSCTL_STAND_INS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
_ETCD = "http://127.0.0.1:2379"


class NodeError(Exception):
    """The node did not come up; the text names the step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """What `cluster.py` decides and this process carries out. Paths are absolute."""

    run_dir: str
    cgroup: str
    cni_bin_dir: str
    runc: str
    images: list[str]  # OCI archives present from the start

    @classmethod
    def read(cls, run_dir: Path) -> NodePlan:
        """The plan that `write` left in *run_dir*."""
        return cls(**json.loads((run_dir / "plan.json").read_text()))

    def write(self) -> None:
        """Leave the plan in the run directory."""
        Path(self.run_dir, "plan.json").write_text(json.dumps(dataclasses.asdict(self)))


class Node:
    """One node, coming up. Mutable: the daemons started so far."""

    def __init__(self, plan: NodePlan) -> None:
        self.plan = plan
        self.run_dir = Path(plan.run_dir)
        self.pki = self.run_dir / "pki"
        self.daemons: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}

    def start(self) -> None:
        """Bring the node up to the point where pods can be scheduled. Raises NodeError."""
        self._mount()
        self._connect()
        self._configure()
        self._daemon("containerd", "containerd", "--config", self.run_dir / "containerd.toml")
        self._daemon("etcd", *_etcd_arguments())
        self._until("etcd is healthy", lambda: _answers(f"{_ETCD}/health"))
        self._until("containerd answers", lambda: _succeeds("ctr", "version"))
        for archive in self.plan.images:
            self._run("ctr", "-n", "k8s.io", "images", "import", "--local", archive)
        self._daemon("kube-apiserver", *_apiserver_arguments(self.pki))
        self._until("kube-apiserver is ready", lambda: _succeeds("kubectl", "get", "--raw", "/readyz"))
        self._daemon("kube-controller-manager", *_controller_manager_arguments(self.pki))
        scheduler = self.pki / "scheduler.conf"
        authorisation = (f"--authentication-kubeconfig={scheduler}", f"--authorization-kubeconfig={scheduler}")
        self._daemon(
            "kube-scheduler", "kube-scheduler", f"--kubeconfig={scheduler}", *authorisation, "--leader-elect=false"
        )
        kubelet = (
            f"--config={self.run_dir}/kubelet.json",
            f"--kubeconfig={self.pki}/kubelet.conf",
            f"--node-ip={NODE_IP},{NODE_IP6}",
        )
        self._daemon("kubelet", "kubelet", *kubelet, f"--hostname-override={NODE_NAME}")
        self._daemon(
            "kube-proxy", "kube-proxy", f"--config={self.run_dir}/proxy.json", f"--hostname-override={NODE_NAME}"
        )
        ready = ("kubectl", "wait", "--for=condition=Ready", f"node/{NODE_NAME}", "--timeout=1s")
        self._until("the node is Ready", lambda: _succeeds(*ready))
        self._daemon("kube-router", *_kube_router_arguments(self.pki))  # exits when its Node object does not exist yet
        self._until("NetworkPolicy is enforced", lambda: "KUBE-ROUTER-FORWARD" in _output("iptables-save"))
        account = (
            "kubectl",
            "get",
            "serviceaccount",
            "default",
        )  # pods are refused before the controller manager made it
        self._until("service account default exists", lambda: _succeeds(*account))

    def watch(self) -> None:
        """Reap for ever, as process 1 must; leave a line for each daemon that ends."""
        while True:
            pid, status = os.wait()
            if pid in self.daemons:
                self._log(f"{self.daemons.pop(pid)[0]} ended with status {os.waitstatus_to_exitcode(status)}")

    def _mount(self) -> None:
        self._run("mount", "--make-rshared", "/")  # the CSI driver's mounts must reach the pods
        for directory in ("run", "var/lib", "var/log"):  # default paths hold, the machine's own directories stay clean
            private = self.run_dir / "root" / directory
            private.mkdir(parents=True)
            self._run("mount", "--bind", private, f"/{directory}")
        for name, value in _SYSCTL_STAND_INS.items():
            file = self.run_dir / "sysctl" / name.replace("/", "_")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{value}\n")
            self._run("mount", "--bind", file, f"/proc/sys/{name}")

    def _connect(self) -> None:
        self._run("hostname", NODE_NAME)
        for command in (
            "link set lo up",
            "link add node0 type veth peer name node0-peer",  # a kernel may lack dummy devices
            "link set node0-peer up",
            f"address add {NODE_IP}/24 dev node0",
            f"address add {NODE_IP6}/64 dev node0 nodad",
            "link set node0 up",
            f"route add default via {GATEWAY_IP} dev node0",
            f"route add default via {GATEWAY_IP6} dev node0",
        ):
            self._run("ip", *command.split())
        for family in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", family).write_text("1")
        for tables in ("iptables", "ip6tables"):
            bridged = Path(f"/proc/sys/net/bridge/bridge-nf-call-{tables}")
            if not bridged.exists():
                raise NodeError(f"kernel module br_netfilter is needed ({bridged.name}), and is not loaded")
            bridged.write_text("1")

    def _configure(self) -> None:
        self.run_dir.joinpath("cni").mkdir()
        self.run_dir.joinpath("cni", "10-test.conflist").write_text(json.dumps(_cni_network()))
        self.run_dir.joinpath("containerd.toml").write_text(_containerd_toml(self.plan, self.run_dir / "cni"))
        self.run_dir.joinpath("kubelet.json").write_text(json.dumps(_kubelet_configuration(self.plan, self.pki)))
        self.run_dir.joinpath("proxy.json").write_text(json.dumps(_proxy_configuration(self.pki)))

    def _daemon(self, name: str, *command: str | Path) -> None:
        with (self.run_dir / "logs" / name).open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.daemons[process.pid] = (name, process)
        self._log(f"{name} started")

    def _until(self, claim: str, check: Callable[[], bool], *, timeout_s: float = 180) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not check():
            for name, process in self.daemons.values():
                if process.poll() is not None:
                    raise NodeError(f"{name} exited {process.returncode} before {claim}; see its log")
            if time.monotonic() > deadline_s:
                raise NodeError(f"not true within {timeout_s:.0f} s: {claim}")
            time.sleep(0.1)
        self._log(claim)

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NodeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")

    def _log(self, line: str) -> None:
        with (self.run_dir / "logs" / "node").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:  # noqa: S310 - a constant loopback address
            return bool(response.status == 200)
    except OSError:
        return False


def _etcd_arguments() -> list[str]:
    peer = "http://127.0.0.1:2380"
    return [
        "etcd",
        "--data-dir=/var/lib/etcd",
        "--unsafe-no-fsync",  # the data dies with the cluster
        f"--listen-client-urls={_ETCD}",
        f"--advertise-client-urls={_ETCD}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--log-level=warn",
    ]


def _apiserver_arguments(pki: Path) -> list[str]:
    return [
        "kube-apiserver",
        f"--etcd-servers={_ETCD}",
        f"--advertise-address={NODE_IP}",
        "--secure-port=6443",
        f"--service-cluster-ip-range={SERVICE_CIDR},{SERVICE_CIDR6}",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--endpoint-reconciler-type=lease",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki}/sa.pub",
        f"--service-account-signing-key-file={pki}/sa.key",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={pki}/ca.crt",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki}/front-proxy.crt",
        f"--proxy-client-key-file={pki}/front-proxy.key",
    ]


def _controller_manager_arguments(pki: Path) -> list[str]:
    kubeconfig = pki / "controller-manager.conf"
    return [
        "kube-controller-manager",
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={pki}/sa.key",
        f"--root-ca-file={pki}/ca.crt",
        f"--cluster-signing-cert-file={pki}/ca.crt",
        f"--cluster-signing-key-file={pki}/ca.key",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--allocate-node-cidrs=true",
        f"--cluster-cidr={POD_CIDR},{POD_CIDR6}",
        f"--service-cluster-ip-range={SERVICE_CIDR},{SERVICE_CIDR6}",
        "--node-cidr-mask-size-ipv4=24",
        "--node-cidr-mask-size-ipv6=112",
    ]


def _kube_router_arguments(pki: Path) -> list[str]:
    return [
        "kube-router",
        "--run-router=false",
        "--run-service-proxy=false",
        "--run-firewall=true",
        f"--kubeconfig={pki}/admin.conf",
        f"--hostname-override={NODE_NAME}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",  # not of IPv6: v2.1.0 names its sets wrongly (issue 1653)
        "--iptables-sync-period=1m",
    ]


def _cni_network() -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": POD_CIDR}], [{"subnet": POD_CIDR6}]],
        "dataDir": "/var/lib/cni",
    }
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": addresses,
    }
    return {
        "cniVersion": "1.0.0",
        "name": "test",
        "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def _containerd_toml(plan: NodePlan, cni_conf_dir: Path) -> str:
    return f"""\
version = 3
disabled_plugins = ['io.containerd.nri.v1.nri', 'io.containerd.tracing.processor.v1.otlp']
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'localhost/pause:1'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true  # CAP_SYS_RESOURCE may be missing
  disable_apparmor = true
  disable_hugetlb_controller = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{plan.cni_bin_dir}']
  conf_dir = '{cni_conf_dir}'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '{plan.runc}'
  SystemdCgroup = false
"""


def _kubelet_configuration(plan: NodePlan, pki: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": cgroups.is_v2(),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{plan.cgroup}",
        "oomScoreAdj": 0,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "address": NODE_IP,
        "tlsCertFile": f"{pki}/kubelet-server.crt",
        "tlsPrivateKeyFile": f"{pki}/kubelet-server.key",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "failSwapOn": False,
        "protectKernelDefaults": True,
        # Absolute numbers: a machine whose disk is 85 % full still has room for these tests.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1Gi", "imagefs.available": "1Gi"},
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "5s",
        "serializeImagePulls": False,
    }


def _proxy_configuration(pki: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{pki}/proxy.conf"},
        "mode": "nftables",
        "clusterCIDR": f"{POD_CIDR},{POD_CIDR6}",
        "oomScoreAdj": 0,
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def main(run_dir: Path) -> None:
    """Bring the node up, say so in a file, and reap for ever."""
    node = Node(NodePlan.read(run_dir))
    try:
        node.start()
    except (NodeError, OSError) as error:
        (run_dir / "failed").write_text(str(error))
        raise
    (run_dir / "ready").touch()
    node.watch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
