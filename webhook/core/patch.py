"""A pod with the sidecar in it, the pod without, and the RFC 6902 operations from one object to another.

Works on the raw object, so that fields we have never heard of survive. `apply(diff(old, new), old) == new` is a law
(tests), as is `restore(mutate(pod))` leading to the same pod again. Our own `diff`, because the jsonpatch library
compares lists index by index: a container put in front makes it rewrite every container behind (it applies our patches
in the tests). No `test` operations: a patch that does not apply is an internal error whatever the failure policy says.
"""

import json
from dataclasses import dataclass
from typing import Any

from sidecar.config import Capture, WayOut
from webhook.core import container, probes, relay
from webhook.core.annotations import CAPTURED, EGRESS, INJECTED, STATUS
from webhook.core.pod import JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMove:
    """The name that goes from the port *port* of the container *container* to the sidecar, in capture mode `remap`."""

    container: str
    port: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """All that is put into one pod. *relocated* are the application's containers by name, as they are to be."""

    init_containers: list[JSON]
    volumes: list[JSON]
    relocated: dict[str, JSON]
    status: str
    revision: str
    capture: Capture
    is_by_name: bool = False  # connections of its own go out by host name
    image_pull_secrets: tuple[str, ...] = ()
    port_move: PortMove | None = None


def mutate(pod: JSON, injection: Injection) -> JSON:
    """Return *pod*, which holds nothing of ours, with *injection*; *pod* itself is left as it is.

    What does not change is shared between the two, which is also how `diff` knows it.
    """
    metadata = dict(pod.get("metadata") or {})
    for field, key, value in (
        ("labels", CAPTURED, str(injection.capture)),
        ("labels", INJECTED, injection.revision),
        ("annotations", STATUS, injection.status),
    ):
        metadata[field] = (metadata.get(field) or {}) | {key: value}
    # Whoever wrote it there: NetworkPolicies open what our rules in the pod's network close.
    metadata["labels"] = {key: value for key, value in metadata["labels"].items() if key != EGRESS}
    if injection.is_by_name:
        metadata["labels"][EGRESS] = str(WayOut.HOSTS)
    spec = dict(pod["spec"])
    for field in ("initContainers", "containers"):
        if spec.get(field):
            spec[field] = [
                _moved(injection.relocated.get(each["name"], each), injection.port_move) for each in spec[field]
            ]
    spec["initContainers"] = [*injection.init_containers, *(spec.get("initContainers") or ())]
    spec["volumes"] = [*injection.volumes, *(spec.get("volumes") or ())]
    secrets = spec.get("imagePullSecrets") or []
    known = {each.get("name") for each in secrets}
    missing = [{"name": name} for name in injection.image_pull_secrets if name not in known]
    if missing:
        spec["imagePullSecrets"] = [*secrets, *missing]
    return pod | {"metadata": metadata, "spec": spec}


def restore(pod: JSON) -> JSON:
    """Return *pod* without anything of ours, which is found by our names alone; the same pod when there is nothing.

    What stood in its place is read from what we left in the pod. A tenant can forge that, and gets what he could have
    written in the first place: the result is judged and injected like any other pod. Raises ValueError if unreadable.
    """
    ours = [each for each in pod["spec"].get("initContainers") or () if each["name"] in container.CONTAINERS]
    if not ours:
        return pod
    spec, metadata = dict(pod["spec"]), dict(pod.get("metadata") or {})
    originals = _recorded_probes(ours)
    move = _recorded_move(metadata)
    spec["initContainers"] = [each for each in spec["initContainers"] if each["name"] not in container.CONTAINERS]
    for field in ("initContainers", "containers"):
        spec[field] = [
            relay.unwrapped(container.unproxied(_unmoved(probes.put_back(each, originals.get(each["name"], {})), move)))
            for each in spec[field]
        ]
    spec["volumes"] = [each for each in spec.get("volumes") or () if each["name"] not in container.VOLUMES]
    for field, keys in (("labels", (CAPTURED, EGRESS, INJECTED)), ("annotations", (STATUS,))):
        if metadata.get(field):
            metadata[field] = {key: value for key, value in metadata[field].items() if key not in keys}
    return pod | {"metadata": metadata, "spec": spec}


def hook_token(pod: JSON) -> str | None:
    """Return the token that the hooks of *pod* were moved with; None when none was."""
    ours = [each for each in pod["spec"].get("initContainers") or () if each["name"] in container.CONTAINERS]
    return probes.token_of(_recorded_probes(ours))


def diff(old: JSON, new: JSON) -> list[JSON]:
    """Return the operations that make *new* of *old*: no more than what differs."""
    operations: list[JSON] = []
    _diff(old, new, "", operations)
    return operations


def _moved(each: JSON, move: PortMove | None) -> JSON:
    return _renamed(each, move, {move.name: None}) if move else each


def _unmoved(each: JSON, move: PortMove | None) -> JSON:
    return _renamed(each, move, {None: move.name}) if move else each


def _renamed(each: JSON, move: PortMove, names: dict[str | None, str | None]) -> JSON:
    """Return container *each* with the name of the moved port changed from the key to the value of *names*."""
    if each["name"] != move.container:
        return each
    ports = []
    for port in each.get("ports") or ():
        if port.get("containerPort") == move.port and port.get("name") in names:
            name = names[port.get("name")]
            rest = {key: value for key, value in port.items() if key != "name"}
            ports.append(rest | ({"name": name} if name else {}))
            names = {}  # only the first: a port may be declared for TCP and for UDP
        else:
            ports.append(port)
    return each | {"ports": ports}


def _recorded_probes(ours: list[JSON]) -> probes.Originals:
    for each in ours:
        for variable in each.get("env") or ():
            if variable.get("name") == container.PROBES_VARIABLE:
                return probes.decode(str(variable.get("value")))
    return {}


def _recorded_move(metadata: JSON) -> PortMove | None:
    text = (metadata.get("annotations") or {}).get(STATUS, "{}")
    try:
        moved = json.loads(text).get("moved")
        if not moved:
            return None
        return PortMove(container=str(moved["container"]), port=int(moved["port"]), name=str(moved["name"]))
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"annotation {STATUS}: {error}") from error


def _diff(old: Any, new: Any, path: str, operations: list[JSON]) -> None:
    if old is new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        operations.extend({"op": "remove", "path": _join(path, key)} for key in sorted(old.keys() - new.keys()))
        for key in sorted(new):
            if key in old:
                _diff(old[key], new[key], _join(path, key), operations)
            else:
                operations.append({"op": "add", "path": _join(path, key), "value": new[key]})
    elif isinstance(old, list) and isinstance(new, list):
        places = _places(old, new)
        if places is None:
            operations.append({"op": "replace", "path": path, "value": new})
            return
        for index, value in enumerate(new):
            if index in places:
                _diff(old[places[index]], value, f"{path}/{index}", operations)
            else:
                operations.append({"op": "add", "path": f"{path}/{index}", "value": value})
    elif type(old) is not type(new) or old != new:  # 1 == True in Python, not in JSON
        operations.append({"op": "replace", "path": path, "value": new})


def _places(old: list[Any], new: list[Any]) -> dict[int, int] | None:
    """Return where in *old* the items of *new* stand, matched by name in order; None when one of *old* is left over."""
    places: dict[int, int] = {}
    for index, value in enumerate(new):
        if len(places) < len(old) and _key(old[len(places)]) == _key(value):
            places[index] = len(places)
    return places if len(places) == len(old) else None


def _key(item: Any) -> Any:
    named = isinstance(item, dict) and isinstance(item.get("name"), str)
    return item["name"] if named else json.dumps(item, sort_keys=True)


def _join(path: str, key: str) -> str:
    return f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
