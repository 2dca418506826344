"""What injection may change of a pod, said a second time and independently: `rest` is all that must come out as it went in."""

from typing import Any

OURS = {"sidegate", "sidegate-net", "sidegate-relay"}
VOLUMES = {"sidegate-spiffe", "sidegate-cache", "sidegate-no-token", "sidegate-relay"}
WRITTEN = {"sidegate.dev/capture", "sidegate.dev/egress", "sidegate.dev/injected", "sidegate.dev/status"}
PROXY = {"HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"}
SECRET = {"name": "sidegate"}  # of the cases that pull with one
RELAY = "/.sidegate/relay"


def rest(pod: Any, since: Any = None) -> Any:
    """Return *pod* without our own parts, and its containers without what a page of the reference says we change.

    *since* is the pod before: bounds of CPU and memory that its containers lacked do not count.
    """
    before = {each["name"]: each for each in (since or {"spec": {}})["spec"].get("containers") or ()}
    metadata = {
        key: value for key, value in (pod.get("metadata") or {}).items() if key not in ("labels", "annotations")
    }
    for field in ("labels", "annotations"):
        kept = {
            key: value for key, value in ((pod.get("metadata") or {}).get(field) or {}).items() if key not in WRITTEN
        }
        metadata |= {field: kept} if kept else {}
    spec = dict(pod["spec"])
    for field in ("initContainers", "containers"):
        spec[field] = [_container(each, before) for each in spec.get(field) or () if each["name"] not in OURS]
    spec["volumes"] = [each for each in spec.get("volumes") or () if each["name"] not in VOLUMES]
    spec["imagePullSecrets"] = [each for each in spec.get("imagePullSecrets") or () if each != SECRET]
    return {**pod, "metadata": metadata, "spec": {key: value for key, value in spec.items() if value != []}}


def _unbounded(resources: Any, was: Any) -> Any:
    """Return *resources* without the limits and requests that *was* has not."""
    kept = dict(resources)
    for field in ("limits", "requests"):
        known = (was.get("resources") or {}).get(field) or {}
        entries = {k: v for k, v in (kept.get(field) or {}).items() if k in known or k not in ("cpu", "memory")}
        kept |= {field: entries}
        if not entries and not known and field not in (was.get("resources") or {}):
            del kept[field]
    return kept


def _container(each: Any, before: Any) -> Any:
    """Probes and HTTP hooks without their target, ports without their names, an agent's proxy, a stdio server's relay."""
    kept = dict(each)
    was = before.get(each["name"])
    if was is not None and isinstance(kept.get("resources"), dict):
        kept["resources"] = _unbounded(kept["resources"], was)
    if not kept.get("resources"):
        kept.pop("resources", None)
    for field in ("startupProbe", "livenessProbe", "readinessProbe"):
        if isinstance(kept.get(field), dict):
            kept[field] = {k: v for k, v in kept[field].items() if k not in ("httpGet", "tcpSocket", "grpc")}
    if isinstance(kept.get("lifecycle"), dict):
        kept["lifecycle"] = {
            hook: {k: v for k, v in what.items() if k != "httpGet"} if isinstance(what, dict) else what
            for hook, what in kept["lifecycle"].items()
        }
    if kept.get("ports"):
        kept["ports"] = [{k: v for k, v in port.items() if k != "name"} for port in kept["ports"]]
    if kept.get("env"):
        kept["env"] = [variable for variable in kept["env"] if variable["name"] not in PROXY]
    if (kept.get("command") or [""])[0] == RELAY:
        kept["command"] = kept["command"][3:]
        kept["volumeMounts"] = [mount for mount in kept["volumeMounts"] if mount["name"] not in VOLUMES]
    return {key: value for key, value in kept.items() if value != []}
