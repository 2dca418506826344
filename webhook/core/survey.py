"""What a cluster's pods are, beside what they should be: the facts behind `sidegate status`.

A pod should be governed if the webhook would inject it today; it is governed if our native sidecar is in it, and nothing
in the pod speaks against its being our work (evidence.py), whatever its labels and annotations claim. Reads what the API
server holds, and adds what sidecars say of themselves.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from sidecar.config import INBOUND_PORT, Capture
from webhook.core import annotations, container, placement
from webhook.core import pod as pods
from webhook.core.effective import is_agent, select_profile
from webhook.core.evidence import Origin, doubt
from webhook.core.injection import SERVER_LABEL, NamespacePolicy, policy_of
from webhook.core.pod import JSON
from webhook.core.resources import ServerProfileSpec
from webhook.errors import Denial

MIRROR: Final = "kubernetes.io/config.mirror"


class State(StrEnum):
    """What a pod is, as against what it should be."""

    GOVERNED = "governed"
    STARTING = "starting"  # it has the sidecar, which is not ready
    UNGOVERNED = "ungoverned"  # it should have the sidecar, and has not
    EXEMPT = "exempt"


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What a sidecar says of itself; *problem* why it could not be asked."""

    revision: str = ""
    bundle_age_s: float | None = None
    svid_left_s: float | None = None
    problem: str = ""


class Surveyed(msgspec.Struct, frozen=True, kw_only=True):
    """One pod. *version*, *guarantee* and *control_plane* are what it was injected with."""

    namespace: str
    name: str
    workload: str
    state: State
    server: str = ""  # which MCP server it is of; "": an agent
    listening: tuple[str, ...] = ()  # containers that say so
    guarantee: str = "none"
    version: str = ""
    control_plane: str = ""
    why: str = ""
    live: Live | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A namespace in one line."""

    namespace: str
    policy: str
    expected: int
    governed: int
    starting: int
    guarantees: str
    versions: str
    servers: tuple[str, ...] = ()  # that share the namespace


def survey(
    found: Iterable[JSON],
    policy: NamespacePolicy | None,
    profiles: Mapping[str, ServerProfileSpec],
    origin: Origin,
) -> Iterator[Surveyed]:
    """Yield every pod of a namespace that is alive and should have the sidecar, or has it; *origin* says whose is ours."""
    for raw in found:
        if pods.is_over(raw):
            continue
        judged = _pod(raw, policy, profiles, origin)
        if judged.state is not State.EXEMPT:
            yield judged


def _pod(
    raw: JSON, policy: NamespacePolicy | None, profiles: Mapping[str, ServerProfileSpec], origin: Origin
) -> Surveyed:
    metadata = raw["metadata"]
    seen = _named(raw)
    is_wanted, why = expected(metadata, policy, profiles)
    if not _has_sidecar(raw):
        return msgspec.structs.replace(seen, state=State.UNGOVERNED if is_wanted else State.EXEMPT, why=why)
    if reason := doubt(raw, origin):
        return msgspec.structs.replace(seen, state=State.UNGOVERNED, why=f"it looks so: {reason}")
    said = _status(metadata)
    is_ready, waiting = _sidecar_state(raw)
    return msgspec.structs.replace(
        seen,
        state=State.GOVERNED if is_ready else State.STARTING,
        guarantee=str(said.get("guarantee") or "unknown"),
        version=str(said.get("version") or "unknown"),
        control_plane=str(said.get("revision") or "unknown"),
        why=waiting,
    )


def _named(raw: JSON) -> Surveyed:
    """Return what is known of any pod, before it is judged."""
    namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
    try:
        view = pods.read(raw)
    except Denial:
        return Surveyed(namespace=namespace, name=name, workload=name, state=State.EXEMPT, server=f"Pod {name}")
    return Surveyed(
        namespace=namespace,
        name=name,
        workload=pods.workload(view).name,
        state=State.EXEMPT,
        server=placement.server_of(view),
        listening=tuple(placement.listening(view)),
    )


def expected(
    metadata: JSON, policy: NamespacePolicy | None, profiles: Mapping[str, ServerProfileSpec]
) -> tuple[bool, str]:
    """Return whether the webhook would inject a pod with *metadata* (or refuse it), and why."""
    labels: dict[str, str] = metadata.get("labels") or {}
    if policy is None or MIRROR in (metadata.get("annotations") or {}):
        return False, ""
    wanted, agent = labels.get(SERVER_LABEL), is_agent(labels)
    if wanted == "false" and not agent and policy is not NamespacePolicy.ENFORCED:
        return False, ""
    if policy is not NamespacePolicy.OPTIONAL:
        return True, "the namespace enforces injection"
    if wanted is not None:
        return True, f"label {SERVER_LABEL}={wanted}"
    if agent:
        return True, f"label {annotations.AGENT}=true"
    try:
        profile = select_profile(labels, profiles)
    except Denial as denial:
        return True, str(denial)
    return profile is not None, "an MCPServerProfile selects it" if profile else ""


def _has_sidecar(raw: JSON) -> bool:
    return any(
        each.get("name") == container.SIDECAR and each.get("restartPolicy") == "Always"
        for each in raw["spec"].get("initContainers") or ()
    )


def _sidecar_state(raw: JSON) -> tuple[bool, str]:
    """Return whether the sidecar is ready, and what it waits for."""
    for each in (raw.get("status") or {}).get("initContainerStatuses") or ():
        if each.get("name") == container.SIDECAR:
            waiting = ((each.get("state") or {}).get("waiting") or {}).get("reason", "")
            return bool(each.get("ready")), "" if each.get("ready") else str(waiting or "the sidecar is not ready")
    return False, "the sidecar has not been started"


def _status(metadata: JSON) -> dict[str, Any]:
    """Return what the injector wrote into the pod, which `doubt` could read."""
    said: dict[str, Any] = json.loads((metadata.get("annotations") or {}).get(annotations.STATUS, "{}"))
    return said


def counts(namespace: str, labels: Mapping[str, str], surveyed: Iterable[Surveyed]) -> Counts:
    """Return the line of a namespace with *labels*."""
    known = list(surveyed)
    injected = [each for each in known if each.state is not State.UNGOVERNED]
    return Counts(
        namespace=namespace,
        policy=str(policy_of(labels) or "not labelled"),
        expected=len(known),
        governed=sum(each.state is State.GOVERNED for each in known),
        starting=sum(each.state is State.STARTING for each in known),
        guarantees=",".join(sorted({each.guarantee for each in injected})) or "-",
        versions=",".join(sorted({each.version for each in injected})) or "-",
        servers=tuple(sorted({each.server for each in known if each.server})),
    )


def shared_places(line: Counts, surveyed: Iterable[Surveyed]) -> Iterator[str]:
    """Yield what to say of servers of the namespace *line* that share it, or a pod, with others."""
    if len(line.servers) > 1:
        yield (
            f"Namespace {line.namespace}: {len(line.servers)} MCP servers, {placement.shown_of(line.servers)}: "
            "they share its service accounts; give each a namespace of its own"
        )
    crowded = {each.server: each.listening for each in surveyed if each.server and len(each.listening) > 1}
    for server, names in sorted(crowded.items()):
        yield f"Namespace {line.namespace}: {server}: containers {', '.join(names)} listen in one pod; one server to a pod"


def missed_services(services: Iterable[JSON], found: Iterable[JSON]) -> Iterator[str]:
    """Yield which of *services* lead past the sidecars of the pods *found*: in mode remap, a number means the old port."""
    remapped = [
        each["metadata"]["labels"]
        for each in found
        if not pods.is_over(each) and (each["metadata"].get("labels") or {}).get(annotations.CAPTURED) == Capture.REMAP
    ]
    for service in services:
        selector = service["spec"].get("selector") or {}
        if not selector or not any(selector.items() <= labels.items() for labels in remapped):
            continue
        for port in service["spec"].get("ports") or ():
            target = port.get("targetPort", port["port"])
            if isinstance(target, int) and target != INBOUND_PORT and port.get("protocol", "TCP") == "TCP":
                where = f"Service {service['metadata']['namespace']}/{service['metadata']['name']}"
                yield (
                    f"{where}: targetPort {target} is not the sidecar's, and closed in capture mode remap; "
                    f"use the name of the server's port, or {INBOUND_PORT}"
                )


def parse_live(text: str, now_s: float) -> Live:
    """Return what the metrics of a sidecar say, at the Unix time *now_s*."""
    revision, age_s, left_s = "", None, None
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        match name.partition("{")[0]:
            case "sidegate_bundle_info":
                revision = name.partition('revision="')[2].partition('"')[0]
            case "sidegate_bundle_age_seconds":
                age_s = _number(value)
            case "sidegate_svid_expiry_timestamp_seconds":
                expiry_s = _number(value)
                left_s = None if expiry_s is None else expiry_s - now_s
    return Live(revision=revision, bundle_age_s=age_s, svid_left_s=left_s)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def resource_problems(kind: str, item: JSON) -> str | None:
    """Return what the status of a custom resource complains of, None when it is well."""
    metadata, status = item["metadata"], item.get("status") or {}
    name = "/".join(filter(None, (metadata.get("namespace"), metadata["name"])))
    conditions = status.get("conditions") or []
    if not conditions:
        return f"{kind} {name}: no status yet"
    for each in conditions:
        if each.get("observedGeneration") != metadata.get("generation"):
            return (
                f"{kind} {name}: its status is of generation {each.get('observedGeneration')}, not of the present one"
            )
        if each.get("status") == "False":
            return f"{kind} {name}: {each.get('type')}=False: {each.get('message')}"
    return None
