"""Move the kubelet's probes and HTTP hooks of the application to the sidecar's health port, and back.

Captured traffic needs an identity, which the kubelet has not; the health listener performs exactly what was recorded
(sidecar/shell/probes.py). Probes it performs for anyone who asks; hooks act, so their path has a token that only the
pod's specification tells. Exec and sleep need no network and stay, as does what is aimed at another host.
Refuses a port name that the container does not declare (dropping the probe would hide the misspelling), and a probe of
the sidecar's own ports. Thresholds are not touched. Source: Kubernetes API, Probe and Lifecycle; KEP-2727 (gRPC).
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from sidecar.config import EGRESS_PORT, HEALTH_PORT, INBOUND_PORT
from webhook.core.pod import JSON, Container
from webhook.errors import Denial, DenyCode

RESERVED_PORTS: Final = frozenset({INBOUND_PORT, HEALTH_PORT, EGRESS_PORT})
PROBES: Final = {"startup": "startupProbe", "liveness": "livenessProbe", "readiness": "readinessProbe"}
HOOKS: Final = {"post-start": "postStart", "pre-stop": "preStop"}  # fields of `lifecycle`
HANDLERS: Final = ("httpGet", "tcpSocket", "grpc")  # of a probe; a hook's tcpSocket is never executed (API reference)
TIMEOUT_S: Final = 1  # the API's default
HOOK_TIMEOUT_S: Final = 3600  # the kubelet has none of its own: what ends a hook is the pod's grace period
_TOKEN: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)

Originals = dict[str, dict[str, JSON]]
"""Container -> kind -> {httpGet | tcpSocket | grpc: as it was, port: number, timeout_s; of a hook also token}."""


def relocate(raw: JSON, container: Container, token: str) -> tuple[JSON, dict[str, JSON]]:
    """Return *raw* with its probes and hooks at the health port, and the originals by kind. Raises Denial."""
    moved, originals = dict(raw), {}
    for kind, field in PROBES.items():
        probe = moved.get(field)
        if probe is not None and (original := _original(probe, container, field)):
            originals[kind] = original
            moved[field] = _without(probe, HANDLERS) | {"httpGet": _target(container.name, kind, original)}
    lifecycle = moved.get("lifecycle") or {}
    for kind, field in HOOKS.items():
        hook = lifecycle.get(field)
        if isinstance(hook, dict) and (original := _original_hook(hook, container, f"lifecycle.{field}", token)):
            originals[kind] = original
            lifecycle = lifecycle | {field: hook | {"httpGet": _target(container.name, kind, original)}}
            moved["lifecycle"] = lifecycle
    return moved, originals


def put_back(raw: JSON, originals: Mapping[str, JSON]) -> JSON:
    """Return *raw* as it was before `relocate`; what does not point at the health port stays."""
    restored, name = dict(raw), str(raw.get("name"))
    for kind, field in PROBES.items():
        if kind in originals and _is_ours(restored.get(field), name, kind, originals[kind]):
            restored[field] = _without(restored[field], ("httpGet",)) | _handler(originals[kind])
    for kind, field in HOOKS.items():
        lifecycle = restored.get("lifecycle")
        if (
            kind in originals
            and isinstance(lifecycle, dict)
            and _is_ours(lifecycle.get(field), name, kind, originals[kind])
        ):
            restored["lifecycle"] = lifecycle | {field: lifecycle[field] | _handler(originals[kind])}
    return restored


def token_of(originals: Originals) -> str | None:
    """Return the token of the hooks in *originals*: what was once handed out stays; None when there is no such."""
    for kinds in originals.values():
        for original in kinds.values():
            if _TOKEN.fullmatch(str(original.get("token"))):
                return str(original["token"])
    return None


def encode(originals: Originals) -> str:
    """Return *originals* as the value of a variable; no dollar sign, as Kubernetes expands $(NAME) there."""
    return json.dumps(originals, sort_keys=True, separators=(",", ":")).replace("$", "\\u0024")


def decode(text: str) -> Originals:
    """Return what `encode` was given; raises ValueError on anything else."""
    try:
        originals = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(originals, dict) or not all(
        isinstance(kinds, dict) and all(isinstance(each, dict) for each in kinds.values())
        for kinds in originals.values()
    ):
        raise ValueError("not probes by container and kind")
    return originals


def _original(probe: Any, container: Container, field: str) -> JSON:
    """Return the record of *probe*; {} when the kubelet can go on performing it. Raises Denial."""
    where = f"container {container.name}: {field}"
    if not isinstance(probe, dict):
        raise Denial(DenyCode.MALFORMED, f"{where}: not an object")
    for kind in HANDLERS:
        if kind in probe:
            timeout = probe.get("timeoutSeconds", TIMEOUT_S)
            timeout_s = timeout if isinstance(timeout, int) else TIMEOUT_S
            return _recorded(kind, probe[kind], container, f"{where}.{kind}", timeout_s)
    return {}


def _original_hook(hook: JSON, container: Container, field: str, token: str) -> JSON:
    """Return the record of *hook*; {} when the kubelet can go on performing it. Raises Denial."""
    if "httpGet" not in hook:
        return {}
    where = f"container {container.name}: {field}.httpGet"
    original = _recorded("httpGet", hook["httpGet"], container, where, HOOK_TIMEOUT_S)
    return original | {"token": token} if original else {}


def _recorded(kind: str, handler: Any, container: Container, where: str, timeout_s: int) -> JSON:
    if not isinstance(handler, dict):
        raise Denial(DenyCode.MALFORMED, f"{where}: not an object")
    if handler.get("host"):  # another machine's port: no capture in between
        return {}
    return {kind: handler, "port": _resolve(handler.get("port"), container, f"{where}.port"), "timeout_s": timeout_s}


def _resolve(port: Any, container: Container, where: str) -> int:
    number = port
    if isinstance(port, str):
        declared = {each.name: each.container_port for each in container.ports or () if each.name}
        if port not in declared:
            known = ", ".join(sorted(declared)) or "none"
            raise Denial(DenyCode.PORT_UNRESOLVED, f"{where}: no port named {port[:64]!r}; the container names {known}")
        number = declared[port]
    if not isinstance(number, int) or not 1 <= number <= 65535:
        raise Denial(DenyCode.MALFORMED, f"{where}: not a port from 1 to 65535")
    if number in RESERVED_PORTS:
        raise Denial(DenyCode.PORT_RESERVED, f"{where}: {number} belongs to the sidecar")
    return number


def _target(container: str, kind: str, original: JSON) -> JSON:
    # Scheme written out, as the API server would add it and a second look must find what we wrote.
    path = (
        f"/app-hook/{container}/{kind}/{original.get('token')}" if kind in HOOKS else f"/app-health/{container}/{kind}"
    )
    return {"path": path, "port": HEALTH_PORT, "scheme": "HTTP"}


def _is_ours(part: Any, container: str, kind: str, original: JSON) -> bool:
    return isinstance(part, dict) and part.get("httpGet") == _target(container, kind, original)


def _handler(original: JSON) -> JSON:
    return {kind: original[kind] for kind in HANDLERS if kind in original}


def _without(part: JSON, keys: tuple[str, ...]) -> JSON:
    return {key: value for key, value in part.items() if key not in keys}
