"""Render what is put into a pod: the sidecar and its volumes; for capture mode `redirect` and for stdio, init containers.

Every field is written out, defaults too: pod-level settings must not leak in, and the API server must have nothing to
add, or our own work would not be recognised at a second look. The sidecar's environment is `Settings.to_env`.
Source: KEP-753 (native sidecars: only a startup probe holds the next container back), Pod Security Standards
`restricted` (which the sidecar meets, and which `sidegate-net` with NET_ADMIN cannot).
"""

import functools
import hashlib
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

import msgspec

from sidecar.config import EGRESS_PORT, HEALTH_PORT, INBOUND_PORT, PREFIX, USER_ID, Capture, Role, Settings, WayOut
from webhook.core import quantity, relay
from webhook.core.annotations import Overrides
from webhook.core.pod import JSON

SIDECAR: Final = "sidegate"
NET: Final = "sidegate-net"
RELAY: Final = "sidegate-relay"  # puts the relay where a stdio server's container finds it
CONTAINERS: Final = frozenset({SIDECAR, NET, RELAY})
SPIFFE_VOLUME: Final = "sidegate-spiffe"
CACHE_VOLUME: Final = "sidegate-cache"
NO_TOKEN_VOLUME: Final = "sidegate-no-token"  # noqa: S105 - the name of a volume
SPIFFE_DRIVER: Final = "csi.spiffe.io"
PROBES_VARIABLE: Final = f"{PREFIX}PROBES"
SPIFFE_DIR: Final = "/spiffe-workload-api"
CACHE_DIR: Final = "/var/cache/sidegate"
CACHE_BYTES: Final = 64 * 2**20  # last good bundle and compiled policy, both several times over
AUDIT_FILE: Final = f"{CACHE_DIR}/audit.jsonl"
TOKEN_DIR: Final = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path
START_BUDGET_S: Final = 180  # an SVID takes some 10 s on a cold node, a new bundle a few


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """CPU in millicores and memory in bytes: what is reserved, and what may be used."""

    cpu_m: int
    cpu_limit_m: int
    memory_bytes: int
    memory_limit_bytes: int

    def adjusted(self, asked: Overrides) -> "Amounts":
        """Return these amounts with what the pod asks for; a request above its limit raises the limit."""
        cpu_m, memory_bytes = asked.cpu_m or self.cpu_m, asked.memory_bytes or self.memory_bytes
        return Amounts(
            cpu_m=cpu_m,
            cpu_limit_m=asked.cpu_limit_m or max(cpu_m, self.cpu_limit_m),
            memory_bytes=memory_bytes,
            memory_limit_bytes=asked.memory_limit_bytes or max(memory_bytes, self.memory_limit_bytes),
        )

    def rendered(self, *, guaranteed: bool) -> JSON:
        """Return `resources`; in a pod of QoS class Guaranteed the requests equal the limits, so that it stays so."""
        limits = {"cpu": quantity.cpu(self.cpu_limit_m), "memory": quantity.memory(self.memory_limit_bytes)}
        if guaranteed:
            return {"limits": limits, "requests": dict(limits)}
        return {
            "limits": limits,
            "requests": {"cpu": quantity.cpu(self.cpu_m), "memory": quantity.memory(self.memory_bytes)},
        }


SERVER_AMOUNTS: Final = Amounts(cpu_m=50, cpu_limit_m=2000, memory_bytes=128 * 2**20, memory_limit_bytes=2 * 2**30)
NET_AMOUNTS: Final = Amounts(cpu_m=10, cpu_limit_m=200, memory_bytes=16 * 2**20, memory_limit_bytes=64 * 2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What the operator decided for all pods; one immutable value, so that its hash says which one made a pod."""

    version: str
    revision: str
    image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    limits_store_secret: str = ""  # of the pod's namespace, with the password of the store of global limits
    capture: Capture = Capture.REDIRECT
    weakest_capture: Capture = Capture.REDIRECT
    excluded_namespaces: frozenset[str] = frozenset()
    otel: tuple[tuple[str, str], ...] = ()  # variables of sidecars, sorted
    sidecar: Settings
    amounts: Amounts
    server_limits: Literal["default", "require", "off"] = "off"  # of the application's containers, without their own
    server_amounts: Amounts = SERVER_AMOUNTS
    placement: Literal["warn", "enforce"] = "warn"  # of servers that share a pod or a namespace

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of all of the above; what has its default does not count."""
        return _digest(self)


@functools.lru_cache(maxsize=4)
def _digest(template: Template) -> str:
    content = {
        each.name: value for each in fields(template) if (value := getattr(template, each.name)) != each.default
    } | {
        "sidecar": template.sidecar.to_env(),
        "excluded_namespaces": sorted(template.excluded_namespaces),
    }
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided for one pod."""

    workload: str
    capture: Capture
    asked: Overrides
    probes: str
    port_name: str | None = None  # of the Service-facing port, which moves here in capture mode `remap`
    is_stdio: bool = False
    guaranteed: bool = False
    role: Role = Role.SERVER
    captured_ports: tuple[int, ...] = ()  # of the servers that an agent calls
    is_by_name: bool = False  # a server's own connections go out by host name
    pod_level_resources: bool = False  # ours would push the sum above the pod's own: then we live within it


def init_containers(template: Template, plan: Plan) -> list[JSON]:
    """Return our init containers in order; they go before all others, which are thereby governed too."""
    return [
        *([_net(template, plan)] if plan.capture is Capture.REDIRECT else []),
        *([_relay(template, plan)] if plan.is_stdio else []),
        _sidecar(template, plan),
    ]


def volumes(*, is_stdio: bool = False, audit_bytes: int = 0) -> list[JSON]:
    """Return our volumes: no hostPath, which even the `baseline` standard forbids. *audit_bytes*: of records kept."""
    cache_bytes = CACHE_BYTES + audit_bytes + audit_bytes // 4  # a pod is evicted when it holds more
    return [
        *([{"name": relay.VOLUME, "emptyDir": {"sizeLimit": "8Mi"}}] if is_stdio else []),
        {"name": SPIFFE_VOLUME, "csi": {"driver": SPIFFE_DRIVER, "readOnly": True}},
        {"name": CACHE_VOLUME, "emptyDir": {"sizeLimit": quantity.memory(cache_bytes)}},
        {"name": NO_TOKEN_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}},
    ]


VOLUMES: Final = frozenset(str(each["name"]) for each in volumes(is_stdio=True))


def _sidecar(template: Template, plan: Plan) -> JSON:
    settings = replace(
        template.sidecar,
        workload=plan.workload,
        role=plan.role,
        capture=plan.capture,
        egress=WayOut.HOSTS if plan.is_by_name else WayOut.DIRECT,
        bundle_dir=CACHE_DIR,
        probes=plan.probes,
        log_level=plan.asked.log_level or template.sidecar.log_level,
        limits_store=template.sidecar.limits_store if plan.role is Role.SERVER else "",
    )
    inbound = {"containerPort": INBOUND_PORT, "protocol": "TCP"}
    return _container(SIDECAR, template, template.amounts.adjusted(plan.asked), plan) | {
        "command": ["python", "-m", "sidecar"],
        "restartPolicy": "Always",
        "env": [
            _from_pod("NAMESPACE", "metadata.namespace"),
            _from_pod("POD", "metadata.name"),
            *({"name": name, "value": value} for name, value in sorted(settings.to_env().items())),
            *({"name": name, "value": value} for name, value in template.otel),
            *_store_password(template, plan),
        ],
        "ports": [
            *([({"name": plan.port_name} if plan.port_name else {}) | inbound] if plan.role is Role.SERVER else []),
            {"containerPort": HEALTH_PORT, "name": "sidegate-health", "protocol": "TCP"},
        ],
        "securityContext": _security(USER_ID, {"drop": ["ALL"]}),
        "startupProbe": _probe("/startupz", period_s=1, timeout_s=2, failures=START_BUDGET_S),
        "readinessProbe": _probe("/readyz", period_s=5, timeout_s=3, failures=3),
        "livenessProbe": _probe("/livez", period_s=10, timeout_s=5, failures=6),
        "volumeMounts": [
            {"name": SPIFFE_VOLUME, "mountPath": SPIFFE_DIR, "readOnly": True},
            {"name": CACHE_VOLUME, "mountPath": CACHE_DIR},
            _no_token_mount(),
        ],
    }


def _net(template: Template, plan: Plan) -> JSON:
    return _container(NET, template, NET_AMOUNTS, plan) | {
        "command": ["python", "-m", "sidecar.shell.net", *_captured(plan)],
        "securityContext": _security(0, {"add": ["NET_ADMIN"], "drop": ["ALL"]}),
        "volumeMounts": [_no_token_mount()],
    }


def _relay(template: Template, plan: Plan) -> JSON:
    program = f"import shutil; shutil.copy({relay.SOURCE!r}, {relay.PROGRAM!r})"  # an image may have Python and no cp
    return _container(RELAY, template, NET_AMOUNTS, plan) | {
        "command": ["python", "-I", "-S", "-c", program],
        "securityContext": _security(USER_ID, {"drop": ["ALL"]}),
        "volumeMounts": [{"name": relay.VOLUME, "mountPath": relay.DIRECTORY}, _no_token_mount()],
    }


def _captured(plan: Plan) -> list[str]:
    if plan.is_by_name:
        return [str(WayOut.HOSTS)]
    return [",".join(str(port) for port in plan.captured_ports)] if plan.role is Role.AGENT else []


PROXY: Final = f"http://127.0.0.1:{EGRESS_PORT}"
_DIRECT: Final = "localhost,127.0.0.1,::1"
# Both spellings: programs differ in which they read. HTTPS goes its own way, nobody here could see into it.
PROXY_VARIABLES: Final = tuple(
    {"name": name, "value": value}
    for name, value in (("HTTP_PROXY", PROXY), ("http_proxy", PROXY), ("NO_PROXY", _DIRECT), ("no_proxy", _DIRECT))
)


def proxied(each: JSON) -> JSON:
    """Return container *each* with its plain HTTP going through the sidecar: an agent in capture mode `remap`."""
    return each | {"env": [*(each.get("env") or ()), *PROXY_VARIABLES]}


def unproxied(each: JSON) -> JSON:
    """Return container *each* without these variables."""
    if not any(variable in PROXY_VARIABLES for variable in each.get("env") or ()):
        return each
    kept = [variable for variable in each["env"] if variable not in PROXY_VARIABLES]
    rest = {key: value for key, value in each.items() if key != "env"}
    return rest | ({"env": kept} if kept else {})


def _container(name: str, template: Template, amounts: Amounts, plan: Plan) -> JSON:
    return {
        "name": name,
        "image": template.image,
        "imagePullPolicy": template.image_pull_policy,
        "resources": {} if plan.pod_level_resources else amounts.rendered(guaranteed=plan.guaranteed),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",  # `kubectl describe` then says why it could not start
    }


def _security(user: int, capabilities: JSON) -> JSON:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": capabilities,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsGroup": user,
        "runAsNonRoot": user != 0,
        "runAsUser": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _probe(path: str, *, period_s: int, timeout_s: int, failures: int) -> JSON:
    return {
        "httpGet": {"path": path, "port": HEALTH_PORT, "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "successThreshold": 1,
        "failureThreshold": failures,
    }


def _from_pod(setting: str, field: str) -> JSON:
    return {"name": PREFIX + setting, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": field}}}


def _store_password(template: Template, plan: Plan) -> list[JSON]:
    if not template.limits_store_secret or plan.role is not Role.SERVER:
        return []
    # Without the Secret pods start all the same: of their limits those hold that need no store.
    secret = {"name": template.limits_store_secret, "key": "password", "optional": True}
    return [{"name": f"{PREFIX}LIMITS_STORE_PASSWORD", "valueFrom": {"secretKeyRef": secret}}]


def _no_token_mount() -> JSON:
    # The ServiceAccount admission plugin mounts the API token wherever nothing is mounted at this path.
    return {"name": NO_TOKEN_VOLUME, "mountPath": TOKEN_DIR, "readOnly": True}
