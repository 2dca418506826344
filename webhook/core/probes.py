"""Move the kubelet's probes of the application to the sidecar's health port, and back.

Captured traffic needs an identity, which the kubelet has not; the health listener performs exactly the recorded probes
and nothing else, for anyone who asks. So HTTP hooks, which act, are refused. Exec stays. Refuses too a port name that
the container does not declare (dropping the probe would hide the misspelling), gRPC probes, and a probe of the
sidecar's own ports. Thresholds are not touched.
Source: Kubernetes API, Probe and Lifecycle.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from sidecar.config import EGRESS_PORT, HEALTH_PORT, INBOUND_PORT
from webhook.core.pod import JSON, Container
from webhook.errors import Denial, DenyCode

RESERVED_PORTS: Final = frozenset({INBOUND_PORT, HEALTH_PORT, EGRESS_PORT})
PROBES: Final = {"startup": "startupProbe", "liveness": "livenessProbe", "readiness": "readinessProbe"}
TIMEOUT_S: Final = 1  # the API's default

Originals = dict[str, dict[str, JSON]]
"""Container -> kind -> {httpGet | tcpSocket: as it was, port: number, timeout_s}."""


def relocate(raw: JSON, container: Container) -> tuple[JSON, dict[str, JSON]]:
    """Return *raw* with its probes at the health port, and the originals by kind. Raises Denial."""
    _refuse_http_hooks(raw, container)
    moved, originals = dict(raw), {}
    for kind, field in PROBES.items():
        probe = moved.get(field)
        if probe is not None and (original := _original(probe, container, field)):
            originals[kind] = original
            kept = {key: value for key, value in probe.items() if key not in ("httpGet", "tcpSocket")}
            moved[field] = kept | {"httpGet": _target(container.name, kind)}
    return moved, originals


def put_back(raw: JSON, originals: Mapping[str, JSON]) -> JSON:
    """Return *raw* as it was before `relocate`; what does not point at the health port stays."""
    restored, name = dict(raw), str(raw.get("name"))
    for kind, field in PROBES.items():
        if kind in originals and _is_ours(restored.get(field), name, kind):
            rest = {key: value for key, value in restored[field].items() if key != "httpGet"}
            restored[field] = rest | _handler(originals[kind])
    return restored


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


def _refuse_http_hooks(raw: JSON, container: Container) -> None:
    lifecycle = raw.get("lifecycle") or {}
    for field in ("postStart", "preStop"):
        hook = lifecycle.get(field)
        # A tcpSocket hook is never executed (API reference), so only httpGet is of interest.
        handler = hook.get("httpGet") if isinstance(hook, dict) else None
        elsewhere = isinstance(handler, dict) and handler.get("host")  # another machine's port: no capture in between
        if handler is not None and not elsewhere:
            raise Denial(
                DenyCode.HOOK_UNSUPPORTED,
                f"container {container.name}: lifecycle.{field}.httpGet: the kubelet has no identity to call it with; "
                "use exec",
            )


def _original(probe: Any, container: Container, field: str) -> JSON:
    """Return the record of *probe*; {} when the kubelet can go on performing it. Raises Denial."""
    where = f"container {container.name}: {field}"
    if not isinstance(probe, dict):
        raise Denial(DenyCode.MALFORMED, f"{where}: not an object")
    if "grpc" in probe:
        raise Denial(
            DenyCode.PROBE_UNSUPPORTED, f"{where}: gRPC probes cannot be performed yet; use httpGet, tcpSocket or exec"
        )
    for kind in ("httpGet", "tcpSocket"):
        if kind not in probe:
            continue
        handler = probe[kind]
        if not isinstance(handler, dict):
            raise Denial(DenyCode.MALFORMED, f"{where}.{kind}: not an object")
        if handler.get("host"):  # another machine's port: no capture in between
            return {}
        port = _resolve(handler.get("port"), container, f"{where}.{kind}.port")
        timeout = probe.get("timeoutSeconds", TIMEOUT_S)
        return {kind: handler, "port": port, "timeout_s": timeout if isinstance(timeout, int) else TIMEOUT_S}
    return {}


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


def _target(container: str, kind: str) -> JSON:
    # Scheme written out, as the API server would add it and a second look must find what we wrote.
    return {"path": _path(container, kind), "port": HEALTH_PORT, "scheme": "HTTP"}


def _path(container: str, kind: str) -> str:
    return f"/app-health/{container}/{kind}"


def _is_ours(probe: Any, container: str, kind: str) -> bool:
    return isinstance(probe, dict) and probe.get("httpGet") == _target(container, kind)


def _handler(original: JSON) -> JSON:
    return {kind: original[kind] for kind in ("httpGet", "tcpSocket") if kind in original}
