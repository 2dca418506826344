"""Decide about one pod: patch it, let it be, or refuse it.

First hit wins, in the order of `decide`. What cannot be enforced is refused, never skipped: for a control, a skip is a
way round, and what is skipped must not look like our work. "Already injected" is never believed: the pod is taken apart
and rendered again, and either equals our work, becomes our work, or is a decoy. The same function serves the webhook
and the offline renderer; it makes no call.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sidecar.config import Capture, Role
from webhook.core import annotations, bounds, container, obstacles, patch, placement, probes, quantity, relay
from webhook.core import pod as pods
from webhook.core.annotations import GROUP, Overrides
from webhook.core.container import Plan, Template
from webhook.core.effective import MCP_PORT_NAME, resolve_port, resolve_transport, select_profile
from webhook.core.pod import JSON, Container, Pod
from webhook.core.resources import ServerProfileSpec
from webhook.errors import Denial, DenyCode

INJECTION_LABEL: Final = f"{GROUP}/injection"  # on a namespace
BREAK_GLASS_LABEL: Final = f"{GROUP}/break-glass"  # on a namespace; whoever may set it may let pods out
SYSTEM_LABELS: Final = (("control-plane", "true"), ("kubernetes.azure.com/managedby", "aks"))  # of a vendor's namespace
SERVER_LABEL: Final = f"{GROUP}/server"  # on a pod
AGENT_LABEL: Final = annotations.AGENT
_MIRROR: Final = "kubernetes.io/config.mirror"
_HINT: Final = "remove it and let it be injected; backups should leave pods to their Deployment"
_STRENGTH: Final = {Capture.REMAP: 0, Capture.REDIRECT: 1}


class NamespacePolicy(StrEnum):
    """What a namespace's labels say of its pods."""

    OPTIONAL = "optional"  # only pods that a label or a profile picks
    ENFORCED = "enforced"  # every pod
    BREAK_GLASS = "break-glass"  # every pod but those labelled out


class SkipReason(StrEnum):
    """Why a pod is left alone."""

    NOT_A_POD_CREATION = "not_a_pod_creation"
    MIRROR_POD = "mirror_pod"
    EXCLUDED_NAMESPACE = "excluded_namespace"
    NAMESPACE_NOT_LABELLED = "namespace_not_labelled"
    OPT_OUT = "opt_out"
    NOT_SELECTED = "not_selected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inject:
    """The pod with the sidecar in it. *operations* is empty when it was there already."""

    pod: JSON
    operations: list[JSON]
    capture: Capture
    hash: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """The pod stays as it is."""

    reason: SkipReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Deny:
    """The pod may not be created."""

    code: DenyCode
    message: str


Decision = Inject | Skip | Deny


def policy_of(labels: Mapping[str, str]) -> NamespacePolicy | None:
    """Return what a namespace with *labels* wants; None: nothing. The webhook's selectors in the chart say the same.

    A vendor's own namespaces stay out where injection is a choice; who enforces it means every pod. Excluded names are
    the template's, and go before either.
    """
    match labels.get(INJECTION_LABEL):
        case "enabled":
            return None if set(SYSTEM_LABELS) & labels.items() else NamespacePolicy.OPTIONAL
        case "enforced":
            return (
                NamespacePolicy.BREAK_GLASS if labels.get(BREAK_GLASS_LABEL) == "allowed" else NamespacePolicy.ENFORCED
            )
        case _:
            return None


def decide(
    raw: Any,
    *,
    namespace: str,
    policy: NamespacePolicy | None,
    profiles: Mapping[str, ServerProfileSpec],
    template: Template,
    nonce: str,
    servers: Collection[str] = (),
) -> Decision:
    """Return what becomes of the pod *raw*, to be created in *namespace* with the profiles *profiles*.

    *nonce* is what nobody can guess; the token of the pod's hooks is made of it, unless the pod brings one. *servers*
    are in the namespace already, as far as that is known.
    """
    try:
        return _decide(raw, namespace, policy, profiles, template, nonce, servers)
    except Denial as denial:
        return Deny(code=denial.code, message=str(denial))


def _decide(
    raw: Any,
    namespace: str,
    policy: NamespacePolicy | None,
    profiles: Mapping[str, ServerProfileSpec],
    template: Template,
    nonce: str,
    servers: Collection[str],
) -> Decision:
    if policy is None:
        return Skip(reason=SkipReason.NAMESPACE_NOT_LABELLED)
    if namespace in template.excluded_namespaces:
        return Skip(reason=SkipReason.EXCLUDED_NAMESPACE)
    seen = pods.read(raw)
    if _MIRROR in seen.annotations:  # the kubelet's own; the API server runs none that a tenant made up
        return Skip(reason=SkipReason.MIRROR_POD)
    wanted = _label(seen, SERVER_LABEL)
    is_agent = _label(seen, AGENT_LABEL) is True
    if is_agent:
        _refuse_two_roles(policy, namespace, wanted=wanted)
    profile = select_profile(seen.labels, profiles)
    warnings = []
    if wanted is False and not is_agent:
        if policy is not NamespacePolicy.ENFORCED:
            return _left_alone(seen, SkipReason.OPT_OUT)
        warnings.append(f"{SERVER_LABEL}=false has no effect: namespace {namespace} enforces injection")
    if policy is NamespacePolicy.OPTIONAL and wanted is None and profile is None and not is_agent:
        return _left_alone(seen, SkipReason.NOT_SELECTED)
    if is_agent:
        injection, plan, bare = _plan_agent(raw, seen, profile, template, warnings)
    else:
        injection, plan, bare = _plan(raw, seen, profile, template, nonce, servers, warnings)
    _refuse_decoys(seen, raw, injection)
    mutated = patch.mutate(bare, injection)
    return Inject(
        pod=mutated,
        operations=patch.diff(raw, mutated),
        capture=plan.capture,
        hash=template.hash,
        warnings=tuple(warnings),
    )


def _left_alone(seen: Pod, reason: SkipReason) -> Skip:
    """Return the skip of *seen*; raises Denial for anything of ours in it: nobody would render it again and compare.

    The SPIRE server gives the sidecar's identity to whatever has our label and container name. Without them a SPIFFE
    volume brings no identity of ours, so it is the pod's own affair.
    """
    for each in seen.containers:
        if each.name in container.CONTAINERS:
            raise Denial(DenyCode.DECOY_CONTAINER, f"container {each.name}: this pod is not injected; {_HINT}")
    for volume in seen.spec.volumes or ():
        if volume.name in container.VOLUMES:
            raise Denial(DenyCode.DECOY_VOLUME, f"volume {volume.name}: this pod is not injected; {_HINT}")
    for label in (annotations.INJECTED, annotations.CAPTURED, annotations.EGRESS):
        if label in seen.labels:
            raise Denial(DenyCode.LABEL_INVALID, f"label {label}: this pod is not injected; remove it")
    return Skip(reason=reason)


def _plan(
    raw: JSON,
    seen: Pod,
    profile: ServerProfileSpec | None,
    template: Template,
    nonce: str,
    servers: Collection[str],
    warnings: list[str],
) -> tuple[patch.Injection, Plan, JSON]:
    """Return what to put in, how it was decided, and the pod without anything of ours. Raises Denial."""
    bare_raw, bare = take_apart(raw, seen)
    bounded = bounds.bounded(bare_raw, bare, template)
    if bounded is not bare_raw:
        bare_raw, bare = bounded, pods.read(bounded)
    asked = annotations.read(bare.annotations)
    capture = _capture(asked, profile, template)
    obstacles.refuse(bare, capture)
    is_by_name = profile is not None and any(each.hosts for each in profile.egress)
    if is_by_name:
        obstacles.refuse_by_name(bare, capture)
    port = resolve_port(bare, asked, profile)
    if port in probes.RESERVED_PORTS:
        raise Denial(
            DenyCode.PORT_RESERVED, f"port {port} belongs to the sidecar; let the application listen on another"
        )
    relocated, originals = _relocate(bare_raw, bare, patch.hook_token(raw) or _digest(nonce))
    is_stdio = resolve_transport(asked, profile) == "stdio"
    if is_stdio:
        name, command = relay.find_server(bare, asked)
        most = int(template.sidecar.max_processes)
        relocated[name] = relay.wrapped(relocated[name], command, port=port, max_processes=most)
    move = _port_move(bare, port) if capture is Capture.REMAP and not is_stdio else None
    if capture is Capture.REMAP:
        warnings.extend(_remap_warnings(bare, None if is_stdio else port, move))
    warnings.extend(placement.judge(bare, servers, template.placement))
    warnings.extend(obstacles.warnings(bare, capture, Role.SERVER, template))
    plan = Plan(
        workload=pods.workload(bare).name,
        capture=capture,
        asked=asked,
        probes=probes.encode(originals),
        port_name=_mcp_name(bare) if is_stdio else move.name if move else None,
        is_stdio=is_stdio,
        is_by_name=is_by_name,
        guaranteed=_is_guaranteed(bare.containers),
        pod_level_resources=bare.spec.resources is not None,
    )
    injection = patch.Injection(
        init_containers=container.init_containers(template, plan),
        volumes=container.volumes(is_stdio=is_stdio, audit_bytes=int(template.sidecar.audit_keep_bytes)),
        relocated=relocated,
        status=_status(template, capture, port, move),
        revision=template.revision,
        capture=capture,
        is_by_name=is_by_name,
        image_pull_secrets=template.image_pull_secrets,
        port_move=move,
    )
    return injection, plan, bare_raw


def take_apart(raw: JSON, seen: Pod) -> tuple[JSON, Pod]:
    """Return the pod *raw*, of which *seen* is the view, without anything of ours; raises Denial for ours elsewhere."""
    _refuse_misplaced(seen)
    try:
        bare_raw = patch.restore(raw)
    except ValueError as error:
        raise Denial(DenyCode.DECOY_CONTAINER, f"container {container.SIDECAR}: {error}") from error
    bare = pods.read(bare_raw)
    for each in bare.containers:
        _refuse_ours_in(each)
    return bare_raw, bare


def _refuse_two_roles(policy: NamespacePolicy, namespace: str, *, wanted: bool | None) -> None:
    """Refuse what would let a server out of its governance, or would need both sides at once."""
    if wanted:
        raise Denial(
            DenyCode.ROLE_CONFLICT,
            f"labels {SERVER_LABEL}=true and {AGENT_LABEL}=true: a pod is an MCP server or an agent; use two pods",
        )
    if policy is NamespacePolicy.ENFORCED:
        raise Denial(
            DenyCode.ROLE_CONFLICT,
            f"label {AGENT_LABEL}=true: namespace {namespace} enforces that every pod is a governed server; "
            "run agents in a namespace of their own",
        )


def _plan_agent(
    raw: JSON, seen: Pod, profile: ServerProfileSpec | None, template: Template, warnings: list[str]
) -> tuple[patch.Injection, Plan, JSON]:
    """Return the same for an agent: nothing of its own inbound side is touched. Raises Denial."""
    bare_raw, bare = take_apart(raw, seen)
    if profile is None or profile.agent is None:
        raise Denial(
            DenyCode.AGENT_WITHOUT_SERVERS,
            f"label {AGENT_LABEL}=true: no MCPServerProfile with spec.agent selects this pod; it says which servers are called",
        )
    asked = annotations.read(bare.annotations)
    capture = _capture(asked, profile, template)
    obstacles.refuse(bare, capture)
    ports = tuple(sorted({server.port for server in profile.agent.servers}))
    if capture is Capture.REMAP:
        _refuse_own_proxy(bare)
        warnings.append(
            "an agent in capture mode remap is governed as far as its programs heed HTTP_PROXY; servers still refuse the rest"
        )
    warnings.extend(obstacles.warnings(bare, capture, Role.AGENT, template))
    both = (*(bare_raw["spec"].get("initContainers") or ()), *bare_raw["spec"]["containers"])
    plan = Plan(
        workload=pods.workload(bare).name,
        role=Role.AGENT,
        capture=capture,
        captured_ports=ports,
        asked=asked,
        probes="{}",
        guaranteed=_is_guaranteed(bare.containers),
        pod_level_resources=bare.spec.resources is not None,
    )
    injection = patch.Injection(
        init_containers=container.init_containers(template, plan),
        volumes=container.volumes(audit_bytes=int(template.sidecar.audit_keep_bytes)),
        relocated={each["name"]: container.proxied(each) for each in both} if capture is Capture.REMAP else {},
        status=_agent_status(template, capture, ports),
        revision=template.revision,
        capture=capture,
        image_pull_secrets=template.image_pull_secrets,
    )
    return injection, plan, bare_raw


def _refuse_own_proxy(bare: Pod) -> None:
    names = {variable["name"] for variable in container.PROXY_VARIABLES}
    for each in bare.containers:
        taken = sorted(variable.name for variable in each.env or () if variable.name in names)
        if taken:
            raise Denial(
                DenyCode.PROXY_TAKEN,
                f"container {each.name}: {taken[0]} is set, and capture mode remap needs it; use redirect, or let it go",
            )


def _mcp_name(bare: Pod) -> str | None:
    """Return the name of the sidecar's port for a server that has none, so that a Service can say targetPort: mcp."""
    taken = any(port.name == MCP_PORT_NAME for each in bare.containers for port in each.ports or ())
    return None if taken else MCP_PORT_NAME


def _label(seen: Pod, key: str) -> bool | None:
    value = seen.labels.get(key)
    if value not in (None, "true", "false"):
        raise Denial(DenyCode.LABEL_INVALID, f"label {key}: {value[:64]!r} is neither true nor false")
    return None if value is None else value == "true"


def _capture(asked: Overrides, profile: ServerProfileSpec | None, template: Template) -> Capture:
    capture = asked.capture or Capture((profile and profile.capture) or template.capture)
    if _STRENGTH[capture] < _STRENGTH[template.weakest_capture]:
        raise Denial(
            DenyCode.ANNOTATION_INVALID,
            f"capture {capture}: weaker than {template.weakest_capture}, the weakest that this cluster allows",
        )
    return capture


def _refuse_misplaced(seen: Pod) -> None:
    """Refuse our names and ports where we never put them."""
    for each in seen.spec.containers:
        if each.name in container.CONTAINERS:
            raise Denial(DenyCode.DECOY_CONTAINER, f"container name {each.name} is reserved; choose another")
    for volume in seen.spec.volumes or ():
        if volume.name not in container.VOLUMES and (volume.csi or {}).get("driver") == container.SPIFFE_DRIVER:
            raise Denial(
                DenyCode.DECOY_VOLUME, f"volume {volume.name}: the SPIFFE Workload API is mounted for the sidecar alone"
            )
    names = set()
    for each in seen.containers:
        if each.name in container.CONTAINERS:
            continue
        if each.name in names:  # the API server refuses that too, but only after us, and probes are kept by name
            raise Denial(DenyCode.MALFORMED, f"container name {each.name} is used twice")
        names.add(each.name)


def _refuse_ours_in(each: Container) -> None:
    for mount in each.volume_mounts or ():
        if mount.name in container.VOLUMES:
            raise Denial(DenyCode.DECOY_MOUNT, f"container {each.name}: volume {mount.name} is the sidecar's alone")
    for port in each.ports or ():
        if port.container_port in probes.RESERVED_PORTS:
            raise Denial(
                DenyCode.PORT_RESERVED, f"container {each.name}: port {port.container_port} belongs to the sidecar"
            )


def _refuse_decoys(seen: Pod, raw: JSON, injection: patch.Injection) -> None:
    """Refuse parts of our names that we would not have made; what follows from the rest of the pod is rendered anew."""
    injected = any(each.name in container.CONTAINERS for each in seen.spec.init_containers or ())
    for field, code, expected, names in (
        ("initContainers", DenyCode.DECOY_CONTAINER, injection.init_containers, container.CONTAINERS),
        ("volumes", DenyCode.DECOY_VOLUME, injection.volumes, container.VOLUMES),
    ):
        left = {each["name"]: each for each in expected}
        for part in raw["spec"].get(field) or ():
            if part["name"] not in names:
                continue
            ours = left.pop(part["name"], None)
            if not injected or ours is None or _fixed(part) != _fixed(ours):
                raise Denial(code, f"{field}: {part['name']} is not what the injector makes; {_HINT}")


def _fixed(part: JSON) -> JSON:
    """Return *part* without what follows from the application's containers: they may have changed since."""
    kept = {key: value for key, value in part.items() if key not in ("ports", "resources")}
    recorded = [each for each in kept.get("env") or () if each["name"] == container.PROBES_VARIABLE]
    if len(recorded) == 1:  # a second one would win, so it must be seen
        kept["env"] = [each for each in kept["env"] if each is not recorded[0]]
    return kept


def _relocate(raw: JSON, bare: Pod, token: str) -> tuple[dict[str, JSON], probes.Originals]:
    relocated: dict[str, JSON] = {}
    originals: probes.Originals = {}
    for field, views in (("initContainers", bare.spec.init_containers or ()), ("containers", bare.spec.containers)):
        for each, view in zip(raw["spec"].get(field) or (), views, strict=True):
            # Only native sidecars among the init containers can have probes; the API server sees to that.
            relocated[view.name], kinds = probes.relocate(each, view, token)
            if kinds:
                originals[view.name] = kinds
    return relocated, originals


def _digest(nonce: str) -> str:
    return hashlib.sha256(nonce.encode()).hexdigest()[:32]


def _port_move(bare: Pod, port: int) -> patch.PortMove | None:
    """Return which port name goes to the sidecar, so that Services with that name as targetPort follow."""
    for each in bare.spec.containers:
        for declared in each.ports or ():
            if declared.container_port == port and declared.name and declared.protocol in (None, "TCP"):
                return patch.PortMove(container=each.name, port=port, name=declared.name)
    return None


def _remap_warnings(bare: Pod, port: int | None, move: patch.PortMove | None) -> Iterable[str]:
    if move is None and port is not None:
        yield f"port {port} has no name: Services must use targetPort 15443 to reach the sidecar"
    others = sorted({each.container_port for c in bare.spec.containers for each in c.ports or ()} - {port})
    if others:
        yield f"ports {others} do not pass the sidecar in capture mode remap; close them by NetworkPolicy"


def _is_guaranteed(containers: Sequence[Container]) -> bool:
    """Return whether every container has limits for CPU and memory, and requests that equal them."""
    for each in containers:
        limits = (each.resources and each.resources.limits) or {}
        requests = (each.resources and each.resources.requests) or {}
        for name in ("cpu", "memory"):
            limit = quantity.parse(limits.get(name))
            if not limit or quantity.parse(requests.get(name, limits.get(name))) != limit:
                return False
    return True


def _status(template: Template, capture: Capture, port: int, move: patch.PortMove | None) -> str:
    moved = {"moved": {"container": move.container, "port": move.port, "name": move.name}} if move else {}
    return _status_text(template, capture, port=port, **moved)


def _agent_status(template: Template, capture: Capture, ports: Sequence[int]) -> str:
    return _status_text(template, capture, role=str(Role.AGENT), ports=list(ports))


def _status_text(template: Template, capture: Capture, **more: Any) -> str:
    status: JSON = {
        "version": template.version,
        "revision": template.revision,
        "hash": template.hash,
        "guarantee": str(capture),
        **more,
    }
    return json.dumps(status, sort_keys=True, separators=(",", ":"))
