"""What in a pod the sidecar could not enforce past, and what weakens it: refusals and warnings.

Refused, never skipped: the node's namespaces, ways round the capture, the sidecar's own user, Windows, and another mesh
that captures the same traffic. Warned of: what works, but less well than its author may think.
Source: Kubernetes API, PodSpec; capabilities(7); Istio and Linkerd, annotations and container names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sidecar.config import INBOUND_PORT, USER_ID, Capture, Role
from webhook.core import node_paths
from webhook.core.container import Template
from webhook.core.pod import Capabilities, Container, Pod, SecurityContext
from webhook.errors import Denial, DenyCode

# With these a container can leave netfilter, the pod's namespaces or the sidecar's memory behind.
CAPABILITIES: Final = frozenset(
    {"ALL", "NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE", "SYS_MODULE", "SYS_RAWIO", "BPF", "PERFMON"}
    | {"CHECKPOINT_RESTORE", "DAC_READ_SEARCH"}
)
GRACE_S: Final = 30  # the API's default, and what the sidecar's own drain is made for
_DNS: Final = frozenset({"Default", "None"})  # policies by which the cluster's names may not resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mesh:
    """Another mesh, and how it is told to keep away."""

    name: str
    keep_out: str  # of the pod
    excluded_ports: str  # annotation: inbound ports that it leaves alone


_ISTIO: Final = _Mesh(
    name="Istio",
    keep_out='label sidecar.istio.io/inject: "false"',
    excluded_ports="traffic.sidecar.istio.io/excludeInboundPorts",
)
_LINKERD: Final = _Mesh(
    name="Linkerd",
    keep_out="annotation linkerd.io/inject: disabled",
    excluded_ports="config.linkerd.io/skip-inbound-ports",
)
_CAPTURING: Final = {"istio-init": _ISTIO, "linkerd-init": _LINKERD}  # with NET_ADMIN, after us: the last one wins
_PROXIES: Final = {"istio-proxy": _ISTIO, "linkerd-proxy": _LINKERD}


def refuse(bare: Pod, capture: Capture) -> None:
    """Raise Denial for what could not be enforced in the pod *bare*."""
    _refuse_pod(bare)
    node_paths.refuse(bare)
    for each in bare.containers:
        _refuse_mesh(each, capture)
        _refuse_container(each)


def refuse_by_name(bare: Pod, capture: Capture) -> None:
    """Raise Denial where a server that is let out by host name could go round the sidecar.

    NetworkPolicies no longer hold it back from public addresses then: that stands on its not becoming the sidecar's user,
    on its having no raw sockets, and on names that mean what DNS says. Root, even without capabilities, owns /etc/hosts
    and /etc/resolv.conf, which all containers of a pod share, the sidecar's too.
    """
    spec = bare.spec
    if capture is not Capture.REDIRECT:
        raise Denial(
            DenyCode.UNENFORCEABLE_EGRESS,
            f"capture mode {capture}: spec.egress of the MCPServerProfile names hosts, which needs mode redirect",
        )
    if spec.host_aliases or spec.dns_policy == "None" or (spec.dns_config or {}).get("nameservers"):
        raise Denial(
            DenyCode.UNENFORCEABLE_EGRESS,
            "hostAliases, dnsPolicy None or dnsConfig.nameservers: hosts that the MCPServerProfile names in spec.egress "
            "would be whatever this pod says; remove them",
        )
    for each in bare.containers:
        own, pods = each.security_context or SecurityContext(), spec.security_context or SecurityContext()
        capabilities = own.capabilities or Capabilities()
        user = pods.run_as_user if own.run_as_user is None else own.run_as_user
        is_held = (
            bool(user)
            and own.allow_privilege_escalation is False
            and "ALL" in {name.upper() for name in capabilities.drop or ()}  # with a prefix containerd drops nothing
            and _named(capabilities.add) <= {"NET_BIND_SERVICE"}
        )
        if not is_held:
            raise Denial(
                DenyCode.UNENFORCEABLE_EGRESS,
                f"container {each.name}: hosts in spec.egress of the MCPServerProfile need securityContext with runAsUser "
                "other than 0, allowPrivilegeEscalation: false and capabilities.drop: [ALL] (NET_BIND_SERVICE may be added)",
            )


def warnings(bare: Pod, capture: Capture, role: Role, template: Template) -> Iterator[str]:
    """Yield what the author of *bare* should know, each within what the API server passes on."""
    spec = bare.spec
    for each in bare.containers:
        mesh = _PROXIES.get(each.name)
        if mesh and str(INBOUND_PORT) not in bare.annotations.get(mesh.excluded_ports, "").split(","):
            yield f"{mesh.name} takes this pod's traffic first; set annotation {mesh.excluded_ports}: '{INBOUND_PORT}'"
    if role is Role.AGENT and capture is Capture.REDIRECT:
        names = ", ".join(each.name for each in bare.containers if _may_become_sidecar(bare, each))
        if names:
            yield (
                f"containers {names[:64]}: root with SETUID can become user {USER_ID} and pass the capture by; "
                "set runAsNonRoot and drop capabilities"
            )
    if spec.dns_policy in _DNS:
        host = template.sidecar.control_plane.removeprefix("https://")
        yield f"dnsPolicy {spec.dns_policy}: the sidecar starts only if the pod's resolver knows {host}"
    if spec.termination_grace_period_seconds is not None and spec.termination_grace_period_seconds < GRACE_S:
        yield f"terminationGracePeriodSeconds {spec.termination_grace_period_seconds}: open streams have that long to end"


def _refuse_pod(bare: Pod) -> None:
    spec = bare.spec
    windows = (spec.os and spec.os.name == "windows") or (spec.node_selector or {}).get("kubernetes.io/os") == "windows"
    for found, code, what in (
        (
            spec.host_network,
            DenyCode.UNENFORCEABLE_HOST_NETWORK,
            "hostNetwork: traffic would not pass the sidecar; remove it",
        ),
        (spec.host_pid, DenyCode.UNENFORCEABLE_HOST_PID, "hostPID: the sidecar's process would be in reach; remove it"),
        (spec.host_ipc, DenyCode.UNENFORCEABLE_HOST_IPC, "hostIPC: the node's memory would be in reach; remove it"),
        (
            spec.share_process_namespace,
            DenyCode.UNENFORCEABLE_SHARED_PROCESSES,
            "shareProcessNamespace: the sidecar's process would be in reach; remove it",
        ),
        (windows, DenyCode.UNENFORCEABLE_WINDOWS, "a Windows pod: there is no sidecar for it"),
        (
            # A pod-level user does no harm when every container sets its own.
            _runs_as_sidecar(spec.security_context) and not all(_has_own_user(each) for each in bare.containers),
            DenyCode.UNENFORCEABLE_USER,
            f"securityContext.runAsUser {USER_ID}: it is the sidecar's, whose memory and files it could read; use another",
        ),
    ):
        if found:
            raise Denial(code, what)


def _refuse_mesh(each: Container, capture: Capture) -> None:
    if mesh := _CAPTURING.get(each.name):
        raise Denial(
            DenyCode.UNENFORCEABLE_MESH,
            f"container {each.name}: {mesh.name} would redirect the traffic that the sidecar captures; "
            f"use its CNI plugin, or keep it out of this pod: {mesh.keep_out}",
        )
    if (mesh := _PROXIES.get(each.name)) and capture is Capture.REDIRECT:
        raise Denial(
            DenyCode.UNENFORCEABLE_MESH,
            f"container {each.name}: {mesh.name} and capture mode redirect would both take the traffic; "
            f"use capture mode remap, or keep it out of this pod: {mesh.keep_out}",
        )


def _refuse_container(each: Container) -> None:
    security = each.security_context
    if any(port.host_port for port in each.ports or ()):
        raise Denial(
            DenyCode.UNENFORCEABLE_HOST_PORT, f"container {each.name}: hostPort goes round the Service; remove it"
        )
    if security is None:
        return
    if security.privileged:
        raise Denial(
            DenyCode.UNENFORCEABLE_PRIVILEGED, f"container {each.name}: privileged can undo the capture; remove it"
        )
    if _runs_as_sidecar(security):
        raise Denial(
            DenyCode.UNENFORCEABLE_USER,
            f"container {each.name}: runAsUser {USER_ID} is the sidecar's, whose memory and files it could read; use another",
        )
    added = security.capabilities.add if security.capabilities else None
    if dangerous := sorted(_named(added) & CAPABILITIES):
        raise Denial(
            DenyCode.UNENFORCEABLE_CAPABILITY,
            f"container {each.name}: capability {', '.join(dangerous)} can undo the capture or reach the sidecar; remove it",
        )


def _named(capabilities: list[str] | None) -> frozenset[str]:
    """Return them without the prefix that runtimes accept, too."""
    return frozenset(name.upper().removeprefix("CAP_") for name in capabilities or ())


def _runs_as_sidecar(security: SecurityContext | None) -> bool:
    return security is not None and security.run_as_user == USER_ID


def _has_own_user(each: Container) -> bool:
    return each.security_context is not None and each.security_context.run_as_user not in (None, USER_ID)


def _may_become_sidecar(bare: Pod, each: Container) -> bool:
    """Return whether *each* may be root, and root there may take any user ID: it has SETUID unless that is dropped."""
    own, pods = each.security_context or SecurityContext(), bare.spec.security_context or SecurityContext()
    user = pods.run_as_user if own.run_as_user is None else own.run_as_user
    is_other = pods.run_as_non_root if own.run_as_non_root is None else own.run_as_non_root
    dropped = {name.upper() for name in (own.capabilities and own.capabilities.drop) or ()}  # as above: no prefix
    return not user and not is_other and not {"ALL", "SETUID"} & dropped
