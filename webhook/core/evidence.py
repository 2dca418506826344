"""Whether the sidecar in a live pod is our work, as far as the pod itself tells.

Nobody judged a pod that is older than its namespace's label, and labels, annotations and names can be planted. So it is
asked what the backstop asks at creation (charts, backstop.yaml), by what holds for all versions of the injector: images,
commands, settings, mounts and volumes of our parts, and nothing beside them that could not be enforced past. What the
bytes behind an image's tag do, and what a node made of the pod, is not known here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.config import PREFIX, Capture, WayOut
from webhook.core import container, obstacles, relay
from webhook.core import pod as pods
from webhook.core.annotations import AGENT, CAPTURED, EGRESS, INJECTED
from webhook.core.injection import take_apart
from webhook.core.pod import JSON
from webhook.errors import Denial

_COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {  # how they begin
    container.SIDECAR: ("python", "-m", "sidecar"),
    container.NET: ("python", "-m", "sidecar.shell.net"),
    container.RELAY: ("python", "-I", "-S", "-c"),
}
_LONGEST: Final[Mapping[str, int]] = {container.SIDECAR: 3, container.NET: 4, container.RELAY: 5}
_MOUNTS: Final[Mapping[str, frozenset[tuple[str, str]]]] = {
    container.SIDECAR: frozenset(
        {(container.SPIFFE_VOLUME, container.SPIFFE_DIR), (container.CACHE_VOLUME, container.CACHE_DIR)}
    ),
    container.RELAY: frozenset({(relay.VOLUME, relay.DIRECTORY)}),
}
_NO_TOKEN: Final = (container.NO_TOKEN_VOLUME, container.TOKEN_DIR)
_NEVER: Final = frozenset({"args", "envFrom", "lifecycle", "workingDir", "volumeDevices"})
_FIXED: Final = frozenset(  # settings that no injector writes: they would lead the sidecar, or traffic, elsewhere
    PREFIX + name
    for name in ("LISTEN_HOST", "LISTEN_PORT", "HEALTH_HOST", "HEALTH_PORT", "EGRESS_PORT", "UPSTREAM_HOST")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose sidecars are ours: image repositories and SPIFFE IDs of control planes; empty: not known, not compared."""

    repositories: frozenset[str] = frozenset()
    control_planes: frozenset[str] = frozenset()


def repository(image: str) -> str:
    """Return *image* without tag and digest."""
    name = image.partition("@")[0]
    head, _, tag = name.rpartition(":")
    return head if head and "/" not in tag else name


def doubt(raw: JSON, origin: Origin) -> str:
    """Return why the sidecar in the pod *raw* is not our work, or enforces nothing; "" when nothing says so."""
    try:
        seen = pods.read(raw)
        _, bare = take_apart(raw, seen)
        capture = seen.labels.get(CAPTURED)
        if INJECTED not in seen.labels or capture not in (Capture.REDIRECT, Capture.REMAP):
            return f"labels {INJECTED} and {CAPTURED} are not what the injector writes"
        obstacles.refuse(bare, Capture(capture))
        if EGRESS in seen.labels:
            obstacles.refuse_by_name(bare, Capture(capture))
    except Denial as denial:
        return str(denial)
    every = raw["spec"]["initContainers"]
    ours = [each for each in every if each["name"] in container.CONTAINERS]
    if every[: len(ours)] != ours:
        return "another container starts before the sidecar"
    return next(_doubts(ours, raw["spec"].get("volumes") or (), seen.labels, origin), "")


def _doubts(ours: list[JSON], volumes: Any, labels: Mapping[str, str], origin: Origin) -> Iterator[str]:
    for each in ours:
        yield from (f"container {each['name']}: {what}" for what in _of_container(each, origin))
    env = {variable["name"]: variable.get("value", "") for variable in ours[-1].get("env") or ()}
    if len(env) != len(ours[-1].get("env") or ()) or ours[-1]["name"] != container.SIDECAR:
        yield f"container {container.SIDECAR}: it is not the last of ours, or a setting is there twice"
    if any(not name.startswith((PREFIX, "OTEL_")) for name in env) or _FIXED & env.keys():
        yield f"container {container.SIDECAR}: its environment is not what the injector writes"
    if origin.control_planes and env.get(f"{PREFIX}CONTROL_PLANE_ID") not in origin.control_planes:
        yield f"container {container.SIDECAR}: it obeys another control plane"
    is_redirected = any(each["name"] == container.NET for each in ours)
    if env.get(f"{PREFIX}CAPTURE") != labels[CAPTURED] or (is_redirected is not (labels[CAPTURED] == Capture.REDIRECT)):
        yield f"label {CAPTURED}={labels[CAPTURED]} is not what captures its traffic"
    if (env.get(f"{PREFIX}ROLE") == "agent") is not (labels.get(AGENT) == "true"):
        yield f"label {AGENT} and the sidecar's role differ"
    yield from _of_rules(ours, labels)
    for volume in volumes:
        kinds = volume.keys() - {"name"}
        if volume["name"] == container.SPIFFE_VOLUME:
            is_ours = (volume.get("csi") or {}).get("driver") == container.SPIFFE_DRIVER
        else:
            is_ours = volume["name"] not in container.VOLUMES or kinds == {"emptyDir"}
        if not is_ours:
            yield f"volume {volume['name']}: it is not what the injector makes"


def _of_rules(ours: list[JSON], labels: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with what the init container loads, if it is there."""
    is_by_name = EGRESS in labels
    has_argument = is_by_name or labels.get(AGENT) == "true"
    asked = [each["command"][3:] for each in ours if each["name"] == container.NET and each.get("command")]
    if not all((what == [WayOut.HOSTS]) is is_by_name and bool(what) is has_argument for what in asked):
        yield f"container {container.NET}: its rules are not what role and label {EGRESS} say"


def _of_container(each: JSON, origin: Origin) -> Iterator[str]:
    name, command = each["name"], tuple(each.get("command") or ())
    if origin.repositories and repository(str(each.get("image"))) not in origin.repositories:
        yield f"image {each.get('image')} is none of ours"
    if command[: len(_COMMANDS[name])] != _COMMANDS[name] or len(command) > _LONGEST[name] or _NEVER & each.keys():
        yield "its command is not what the injector writes"
    for mount in each.get("volumeMounts") or ():
        place = (mount["name"], mount["mountPath"])
        is_known = place == _NO_TOKEN or place in _MOUNTS.get(name, ())
        if not is_known or mount.keys() & {"subPath", "subPathExpr"}:
            yield f"mount {mount['mountPath']} is not what the injector makes"
