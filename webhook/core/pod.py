"""What the control plane reads of a pod: a typed view beside the raw object, which alone is ever written back.

Refuses what has not the shape of a pod. A typed round trip would drop every field that is not listed here (it cost
other injectors `restartPolicy` of native sidecars), so the view is for reading only.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from webhook.errors import Denial, DenyCode

JSON = dict[str, Any]
_TEMPLATE_HASHES: Final = {"pod-template-hash": "Deployment", "rollouts-pod-template-hash": "Rollout"}  # Argo's is one
_JOB_OF_CRON_JOB: Final = re.compile(r"(.+)-[0-9]{8,10}", re.ASCII)  # the scheduled minute since 1970


class View(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base: immutable, by keyword, unknown fields ignored."""


class Owner(View, frozen=True, kw_only=True):
    """An owner reference."""

    kind: str
    name: str
    controller: bool | None = None


class Metadata(View, frozen=True, kw_only=True):
    """The parts of ObjectMeta that decide."""

    name: str | None = None
    generate_name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: list[Owner] | None = None


class Port(View, frozen=True, kw_only=True):
    """A declared container port."""

    container_port: int
    name: str | None = None
    host_port: int | None = None
    protocol: str | None = None


class Capabilities(View, frozen=True, kw_only=True):
    """Linux capabilities beyond and below the runtime's default."""

    add: list[str] | None = None
    drop: list[str] | None = None


class SecurityContext(View, frozen=True, kw_only=True):
    """Of a container or, with fewer fields, of the pod."""

    run_as_user: int | None = None
    run_as_non_root: bool | None = None
    privileged: bool | None = None
    allow_privilege_escalation: bool | None = None
    capabilities: Capabilities | None = None


class Mount(View, frozen=True, kw_only=True):
    """A volume in a container."""

    name: str
    mount_path: str


class Variable(View, frozen=True, kw_only=True):
    """An environment variable."""

    name: str
    value: str | None = None


class Resources(View, frozen=True, kw_only=True):
    """Requests and limits, as written."""

    requests: dict[str, str | int | float] | None = None
    limits: dict[str, str | int | float] | None = None


class Container(View, frozen=True, kw_only=True):
    """A container of any of the lists."""

    name: str
    command: list[str] | None = None
    ports: list[Port] | None = None
    env: list[Variable] | None = None
    resources: Resources | None = None
    security_context: SecurityContext | None = None
    volume_mounts: list[Mount] | None = None
    restart_policy: str | None = None
    startup_probe: JSON | None = None
    liveness_probe: JSON | None = None
    readiness_probe: JSON | None = None
    lifecycle: JSON | None = None


class Volume(View, frozen=True, kw_only=True):
    """A volume; *csi* matters, as it is how the Workload API comes in, and *host_path*, as it is how a pod gets out."""

    name: str
    csi: JSON | None = None
    host_path: JSON | None = None


class OperatingSystem(View, frozen=True, kw_only=True):
    """`spec.os`."""

    name: str


class Spec(View, frozen=True, kw_only=True):
    """The parts of PodSpec that decide."""

    containers: list[Container]
    init_containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    service_account_name: str | None = None
    image_pull_secrets: list[JSON] | None = None
    node_selector: dict[str, str] | None = None
    security_context: SecurityContext | None = None
    resources: Resources | None = None
    os: OperatingSystem | None = None
    dns_policy: str | None = None
    dns_config: JSON | None = None
    host_aliases: list[JSON] | None = None
    termination_grace_period_seconds: int | None = None
    host_network: bool | None = None
    host_pid: bool | None = msgspec.field(default=None, name="hostPID")
    host_ipc: bool | None = msgspec.field(default=None, name="hostIPC")
    share_process_namespace: bool | None = None


class Pod(View, frozen=True, kw_only=True):
    """A pod, as far as we read it."""

    metadata: Metadata = Metadata()
    spec: Spec

    @property
    def labels(self) -> dict[str, str]:
        """The labels, {} when there are none."""
        return self.metadata.labels or {}

    @property
    def annotations(self) -> dict[str, str]:
        """The annotations, {} when there are none."""
        return self.metadata.annotations or {}

    @property
    def containers(self) -> tuple[Container, ...]:
        """Init containers and containers, in this order."""
        return (*(self.spec.init_containers or ()), *self.spec.containers)


def read(raw: Any) -> Pod:
    """Return the view of *raw*; raises Denial(MALFORMED) naming the field."""
    try:
        return msgspec.convert(raw, type=Pod)
    except msgspec.ValidationError as error:
        raise Denial(DenyCode.MALFORMED, f"pod: {error}") from error


def is_over(raw: JSON) -> bool:
    """Say whether the pod *raw*, as the API server has it, does nothing any more, or is on its way out."""
    phase = (raw.get("status") or {}).get("phase")
    return phase in ("Succeeded", "Failed") or bool(raw["metadata"].get("deletionTimestamp"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a pod belongs to; itself when nothing owns it."""

    kind: str
    name: str


def workload(pod: Pod) -> Workload:
    """Return the workload above *pod*, from owner references alone: no call to the API while a pod waits for us."""
    owners = pod.metadata.owner_references or ()
    owner = next((each for each in owners if each.controller), None)
    if owner is None:
        # generateName first: it is there before the name is, and the answer must be the same then and later.
        return Workload(kind="Pod", name=(pod.metadata.generate_name or "").rstrip("-") or pod.metadata.name or "")
    if owner.kind == "ReplicaSet":
        # Only what the label names: a Deployment may itself be called billing-api.
        for label, kind in _TEMPLATE_HASHES.items():
            suffix = "-" + pod.labels.get(label, "\0")
            if owner.name.endswith(suffix) and owner.name != suffix:
                return Workload(kind=kind, name=owner.name.removesuffix(suffix))
    if owner.kind == "Job" and (cron := _JOB_OF_CRON_JOB.fullmatch(owner.name)):
        return Workload(kind="CronJob", name=cron[1])
    return Workload(kind=owner.kind, name=owner.name)
