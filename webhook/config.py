"""The control plane's settings: every name, default, unit and allowed value, once; read once, by `webhook/__main__.py`.

And what follows from them: the template of every pod, and what a workload gets that says nothing itself.
Refuses an unknown `SIDEGATE_` variable and every unusable value, all of them in one message.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from ipaddress import ip_network
from typing import Any, Final, Literal, Self

import msgspec

from certs.errors import BadSpiffeId
from certs.spiffe import SpiffeId
from sidecar.config import (
    PREFIX,
    PUBLIC_RANGES,
    Capture,
    LogLevel,
    RequestLines,
    ShipFormat,
    number,
    port_number,
    setting_of,
)
from sidecar.config import Settings as SidecarSettings
from sidecar.core.profile import Audit, Telemetry
from sidecar.core.store import read_address
from sidecar.errors import ConfigError
from webhook.core import quantity
from webhook.core.container import AUDIT_FILE, SPIFFE_DIR, Amounts, Template
from webhook.core.effective import Defaults, network_of
from webhook.core.resources import PeerSpec, ReachSpec
from webhook.core.surroundings import ANY_NAMESPACE, DNS_PORT, Surroundings, decode_peers, decode_reach
from webhook.errors import BadSetting

DAY_S: Final = 86_400


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return text

    return parse


def _store(text: str) -> str:
    if text:
        try:
            read_address(text)
        except ConfigError as error:
            raise ValueError(str(error).partition("expected ")[2]) from error
    return text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("something; it must not be empty")
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _prefixes(text: str) -> tuple[str, ...]:
    for prefix in _names(text):
        if not re.fullmatch(r"https?://[^/?#@\s]+/[^?#@%\s]*", prefix):
            raise ValueError("beginnings of URLs with a slash after the host, such as https://bundles.example.org/mcp/")
    return _names(text)


def _ranges(text: str) -> tuple[str, ...]:
    expected = "public address ranges, separated by commas, such as 203.0.113.0/24,2001:db8::/32"
    try:
        found = [ip_network(each) for each in _names(text)]
    except ValueError:
        raise ValueError(expected) from None
    wholes = [ip_network(each) for each in PUBLIC_RANGES]
    is_within = [any(each.version == whole.version and each.subnet_of(whole) for whole in wholes) for each in found]  # type: ignore[arg-type]
    if not all(is_within) or set(found) & set(wholes):  # an exception is less than the whole in a NetworkPolicy
        raise ValueError(expected)
    return tuple(str(each) for each in found)


def _otel(text: str) -> tuple[tuple[str, str], ...]:
    expected = 'OTEL_* variables as a JSON object of strings, such as {"OTEL_TRACES_SAMPLER":"always_off"}'
    try:
        found = msgspec.json.decode(text, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(expected) from None
    if not all(re.fullmatch("OTEL_[A-Z_]+", name) for name in found):
        raise ValueError(expected)
    return tuple(sorted(found.items()))


def _spiffe_id(text: str) -> str:
    try:
        return str(SpiffeId.parse(text))
    except BadSpiffeId as error:
        raise ValueError(
            f"a SPIFFE ID such as spiffe://example.org/ns/sidegate-system/sa/sidegate ({error})"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of them. The name of a field, in upper case behind SIDEGATE_, is the name of its variable."""

    # What runs where.
    namespace: str = setting_of(_filled, "Namespace of the control plane itself.", default="sidegate-system")
    service: str = setting_of(_filled, "Name of the Service in front of the control plane.", default="sidegate")
    webhook_configuration: str = setting_of(
        _filled, "Name of the MutatingWebhookConfiguration whose caBundle is kept up to date.", default="sidegate"
    )
    lease: str = setting_of(
        str,
        "Name of the Lease whose holder does for all replicas what one has to do; empty: none does.",
        default="sidegate",
    )
    status: Literal["write", "leave"] = setting_of(
        _one_of("write", "leave"),
        "Whether the status of custom resources is written and pods are counted, or left to another installation.",
        default="write",
    )
    kubeconfig: str = setting_of(str, "Path of a kubeconfig file; empty: the pod's service account.", default="")
    listen_host: str = setting_of(str, "Address that all listeners bind.", default="::")
    admission_port: int = setting_of(port_number, "Port of the admission webhook.", default=10250)
    bundles_port: int = setting_of(port_number, "Port of the bundle endpoint.", default=8443)
    metrics_port: int = setting_of(port_number, "Port of health and metrics.", default=9090)
    spiffe_hint: str = setting_of(
        str, "Hint of the SVID that sidecars use when the agent offers them several; empty: the only one.", default=""
    )
    spiffe_socket: str = setting_of(
        str,
        "Address of the SPIFFE Workload API, as SPIFFE_ENDPOINT_SOCKET; sidecars find a socket of the same name.",
        default="unix:/spiffe-workload-api/spire-agent.sock",
    )
    opa: str = setting_of(_filled, "Path of the opa program, which compiles Rego.", default="/opa")
    linger_s: float = setting_of(
        number(0, 300), "Seconds to go on serving after the signal to stop, while callers learn of it.", default=10.0
    )
    log_level: str = setting_of(_one_of(*LogLevel), "Least severe log record that is written.", default="info")

    # Serving certificate and bundle signature.
    ca_secret: str = setting_of(_filled, "Secret that holds the webhook's CA.", default="sidegate-webhook-ca")
    signing_secret: str = setting_of(
        _filled, "Secret that holds the key by which bundles are signed.", default="sidegate-bundle-signing"
    )
    signing_age_s: float = setting_of(
        number(60, 3650 * DAY_S), "Seconds after which a new key signs bundles.", default=90.0 * DAY_S
    )
    signing_overlap_s: float = setting_of(
        number(1, 3650 * DAY_S),
        "Seconds for which the key before is still believed; replicas must have noticed by then.",
        default=3600.0,
    )
    ca_lifetime_s: float = setting_of(
        number(600, 3650 * DAY_S), "Seconds that the webhook's CA is good for.", default=365.0 * DAY_S
    )
    leaf_lifetime_s: float = setting_of(
        number(60, 90 * DAY_S), "Seconds that a serving certificate is good for.", default=7.0 * DAY_S
    )
    staging_s: float = setting_of(number(1, DAY_S), "Seconds that a new CA is trusted before it signs.", default=3600.0)

    # What is put into pods.
    image: str = setting_of(_filled, "Image of the sidecar.", default="sidegate/sidecar:latest")
    image_pull_policy: str = setting_of(
        _one_of("Always", "IfNotPresent", "Never"), "When the sidecar's image is pulled.", default="IfNotPresent"
    )
    image_pull_secrets: tuple[str, ...] = setting_of(
        _names,
        "Names of Secrets for pulling it, comma-separated; they must exist in every governed namespace.",
        default=(),
    )
    revision: str = setting_of(_filled, "Value of the label sidegate.dev/injected on pods.", default="default")
    capture: str = setting_of(
        _one_of(Capture.REDIRECT, Capture.REMAP), "How traffic is brought into the sidecar.", default=Capture.REDIRECT
    )
    weakest_capture: str = setting_of(
        _one_of(Capture.REDIRECT, Capture.REMAP),
        "The weakest mode that a pod or a profile may choose instead.",
        default=Capture.REDIRECT,
    )
    excluded_namespaces: tuple[str, ...] = setting_of(
        _names,
        "Namespaces never touched, comma-separated; our own and the cluster's always belong to them.",
        default=("kube-system", "kube-public", "kube-node-lease"),
    )
    external_bundles: tuple[str, ...] = setting_of(
        _prefixes,
        "Beginnings of the URLs of external OPA bundles that policies may name, comma-separated; empty: none.",
        default=(),
    )
    control_plane_id: str = setting_of(
        _spiffe_id, "SPIFFE ID of the control plane, which sidecars demand of it.", default=""
    )
    sidecar_cpu: int = setting_of(quantity.parse_cpu, "CPU reserved for a sidecar.", default=50)
    sidecar_cpu_limit: int = setting_of(quantity.parse_cpu, "CPU that a sidecar may use.", default=1000)
    sidecar_memory: int = setting_of(quantity.parse_memory, "Memory reserved for a sidecar.", default=96 * 2**20)
    sidecar_memory_limit: int = setting_of(quantity.parse_memory, "Memory that a sidecar may use.", default=256 * 2**20)
    server_limits: Literal["default", "require", "off"] = setting_of(
        _one_of("default", "require", "off"),
        "What becomes of servers' containers without limits: they get these, are refused, or are left as they are.",
        default="default",
    )
    server_cpu: int = setting_of(quantity.parse_cpu, "CPU reserved for such a container.", default=50)
    server_cpu_limit: int = setting_of(quantity.parse_cpu, "CPU that it may use.", default=2000)
    server_memory: int = setting_of(quantity.parse_memory, "Memory reserved for it.", default=128 * 2**20)
    server_memory_limit: int = setting_of(quantity.parse_memory, "Memory that it may use.", default=2 * 2**30)
    placement: Literal["warn", "enforce"] = setting_of(
        _one_of("warn", "enforce"),
        "What becomes of servers that share a pod or a namespace: their authors are warned, or they are refused.",
        default="warn",
    )
    sidecar_log_level: str = setting_of(
        _one_of(*LogLevel), "Least severe log record that sidecars write.", default="info"
    )
    sidecar_request_log: str = setting_of(
        _one_of(*RequestLines), "Of which messages sidecars log a line: all, refused or off.", default="all"
    )
    sidecar_otel: tuple[tuple[str, str], ...] = setting_of(
        _otel, "OTEL_* variables of sidecars, as a JSON object (otel-variables.md).", default=()
    )
    bundle_max_age_s: float = setting_of(
        number(0, 2**31),
        "Seconds after which a sidecar refuses calls when its bundle could not be confirmed; 0: never.",
        default=0.0,
    )

    # What a workload gets that says nothing else; a namespace can only tighten it.
    mtls: Literal["strict", "permissive"] = setting_of(
        _one_of("strict", "permissive"), "Whether callers must show an SVID (strict) or may.", default="strict"
    )
    user: Literal["required", "optional"] = setting_of(
        _one_of("required", "optional"), "Whether a call needs a user's access token.", default="required"
    )
    jwt_svid: Literal["off", "allowed"] = setting_of(
        _one_of("off", "allowed"), "Whether profiles may let a JWT-SVID stand in for mTLS.", default="off"
    )
    audit_content: Literal["full", "hash"] = setting_of(
        _one_of("full", "hash"), "Whether audit records hold arguments and results, or their hashes.", default="full"
    )
    audit_before: Literal["off", "changes", "all"] = setting_of(
        _one_of("off", "changes", "all"),
        "Which calls are recorded once more before they are sent: none, tools/call, or all.",
        default="changes",
    )
    audit_when_full: Literal["refuse", "drop"] = setting_of(
        _one_of("refuse", "drop"),
        "What happens to calls of which no record can be kept; drop: records are lost, and counted.",
        default="refuse",
    )

    # Where audit records go; no namespace can change it.
    audit_sink: Literal["stdout", "file"] = setting_of(
        _one_of("stdout", "file"), "A sidecar's standard output, or files in a volume of its own.", default="stdout"
    )
    audit_keep: int = setting_of(
        quantity.parse_memory, "How large these files may become together, in each pod.", default=256 * 2**20
    )
    audit_ship: str = setting_of(
        str, "URL to which each sidecar sends the lines of its files: a base URL for otlp; empty: nobody.", default=""
    )
    audit_ship_format: str = setting_of(
        _one_of(*ShipFormat), "As what: log records of OTLP/HTTP, or the lines themselves.", default="otlp"
    )
    audit_ship_id: str = setting_of(
        str, "SPIFFE ID pattern that the receiver must show by mutual TLS; empty: HTTPS as the web has it.", default=""
    )
    otlp_endpoint: str = setting_of(str, "Base URL of an OTLP/HTTP receiver for spans; empty: none.", default="")
    limits_store: str = setting_of(
        _store,
        "URL of the Valkey or Redis that judges limits of scope global for all replicas; empty: none.",
        default="",
    )
    limits_store_user: str = setting_of(str, "User to log in to it as; empty: the default user.", default="")
    limits_store_secret: str = setting_of(
        str,
        "Secret of every governed namespace with the user's password under the key password; empty: no password.",
        default="",
    )
    limits_store_ca: str = setting_of(
        str, "Authorities (PEM) one of which must have signed its certificate; empty: the system's.", default=""
    )
    limits_store_timeout_s: float = setting_of(
        number(0.001, 5),
        "Seconds that a call waits for it at most; then whenUnavailable of the limit holds.",
        default=0.05,
    )

    # What is put around governed servers.
    governed_namespaces: str = setting_of(
        _filled,
        "Label selector of the namespaces that this release governs.",
        default="sidegate.dev/injection in (enabled,enforced)",
    )
    network_policy: Literal["enforce", "ingress", "off"] = setting_of(
        _one_of("enforce", "ingress", "off"),
        "Whether NetworkPolicies let through only what is named: both ways, only inward, or none are made.",
        default="enforce",
    )
    network_dns: tuple[ReachSpec, ...] = setting_of(
        decode_reach,
        "Where DNS is asked, as JSON: a list as spec.egress of MCPServerProfile; ports are 53 unless named.",
        default=(ReachSpec(namespace="kube-system", pod_labels={"k8s-app": "kube-dns"}),),
    )
    network_egress: tuple[ReachSpec, ...] = setting_of(
        decode_reach, "Where all governed servers may connect to besides, likewise.", default=()
    )
    network_private: tuple[str, ...] = setting_of(
        _ranges,
        "Address ranges of pods, Services and nodes that look public, comma-separated: host names open none of them.",
        default=(),
    )
    network_metrics_from: tuple[PeerSpec, ...] = setting_of(
        decode_peers,
        "Who may read health and metrics of sidecars, as JSON: a list as spec.ingress of MCPServerProfile.",
        default=(PeerSpec(namespace=ANY_NAMESPACE),),
    )

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> Self:
        """Return the settings in *environment*; raises BadSetting listing every unusable, unknown or missing one."""
        values: dict[str, Any] = {}
        problems: list[str] = []
        known = {PREFIX + each.name.upper(): each for each in fields(cls)}
        for name in sorted(environment):
            if not name.startswith(PREFIX):
                continue
            if name not in known:
                problems.append(f"{name}: no such setting; known are {', '.join(sorted(known))}")
                continue
            setting = known[name]
            try:
                values[setting.name] = setting.metadata["parse"](environment[name])
            except ValueError as error:
                problems.append(f"{name}={environment[name]!r}: expected {error}")
        if f"{PREFIX}CONTROL_PLANE_ID" not in environment:
            problems.append(f"{PREFIX}CONTROL_PLANE_ID: missing; expected the control plane's SPIFFE ID")
        if problems:
            raise BadSetting("\n".join(problems))
        return cls(**values)


def template(settings: Settings, version: str, bundle_keys: str) -> Template:
    """Return what pods are made of, by the operator's *settings*; *bundle_keys* (PEM) verify their bundles."""
    return Template(
        version=version,
        revision=settings.revision,
        image=settings.image,
        image_pull_policy=settings.image_pull_policy,
        image_pull_secrets=settings.image_pull_secrets,
        limits_store_secret=settings.limits_store_secret,
        capture=Capture(settings.capture),
        weakest_capture=Capture(settings.weakest_capture),
        excluded_namespaces=frozenset({*settings.excluded_namespaces, settings.namespace}),
        otel=settings.sidecar_otel,
        sidecar=SidecarSettings(
            spiffe_hint=settings.spiffe_hint,
            spiffe_socket=f"unix:{SPIFFE_DIR}/{settings.spiffe_socket.rpartition('/')[2]}",  # one driver serves both
            control_plane=f"https://{settings.service}.{settings.namespace}.svc:8443",
            control_plane_id=settings.control_plane_id,
            bundle_keys=bundle_keys,
            bundle_max_age_s=settings.bundle_max_age_s,
            otlp_endpoint=settings.otlp_endpoint,
            limits_store=settings.limits_store,
            limits_store_user=settings.limits_store_user,
            limits_store_ca=settings.limits_store_ca,
            limits_store_timeout_s=settings.limits_store_timeout_s,
            log_level=LogLevel(settings.sidecar_log_level),
            request_log=RequestLines(settings.sidecar_request_log),
            **_trail(settings),
        ),
        amounts=Amounts(
            cpu_m=settings.sidecar_cpu,
            cpu_limit_m=settings.sidecar_cpu_limit,
            memory_bytes=settings.sidecar_memory,
            memory_limit_bytes=settings.sidecar_memory_limit,
        ),
        server_limits=settings.server_limits,
        placement=settings.placement,
        server_amounts=Amounts(
            cpu_m=settings.server_cpu,
            cpu_limit_m=settings.server_cpu_limit,
            memory_bytes=settings.server_memory,
            memory_limit_bytes=settings.server_memory_limit,
        ),
    )


def _stores(settings: Settings) -> tuple[str, ...]:
    """Return a URL for each host by which the limits store is reached."""
    if not settings.limits_store:
        return ()
    nodes = read_address(settings.limits_store).nodes
    return tuple(f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}" for host, port in nodes)


def _trail(settings: Settings) -> dict[str, Any]:
    """Return what sidecars are told of the audit trail; raises BadSetting."""
    if settings.audit_sink == "stdout":
        if settings.audit_ship:
            raise BadSetting(f"{PREFIX}AUDIT_SHIP={settings.audit_ship!r}: only with {PREFIX}AUDIT_SINK=file")
        return {}
    return {
        "audit_sink": AUDIT_FILE,
        "audit_keep_bytes": float(settings.audit_keep),
        "audit_ship": settings.audit_ship,
        "audit_ship_format": ShipFormat(settings.audit_ship_format),
        "audit_ship_id": settings.audit_ship_id,
    }


def surroundings(settings: Settings) -> Surroundings:
    """Return what is put around governed servers."""
    return Surroundings(
        name=settings.service,
        namespace=settings.namespace,
        trust_domain=str(SpiffeId.parse(settings.control_plane_id).trust_domain),
        mode=settings.network_policy,
        is_permissive=settings.mtls == "permissive",
        weakest_capture=Capture(settings.weakest_capture),
        urls=tuple(url for url in (settings.otlp_endpoint, settings.audit_ship, *_stores(settings)) if url),
        dns=settings.network_dns,
        egress=settings.network_egress,
        metrics_from=settings.network_metrics_from,
        private=settings.network_private,
    )


def defaults(settings: Settings) -> Defaults:
    """Return what a workload gets that says nothing else."""
    content = settings.audit_content
    reach = [network_of(each, (DNS_PORT,)) for each in settings.network_dns]
    reach += [network_of(each) for each in settings.network_egress]
    return Defaults(
        networks=tuple(each for each in reach if each is not None),
        private=settings.network_private,
        mtls=settings.mtls,
        user=settings.user,
        jwt_svid=settings.jwt_svid,
        audit=Audit(
            arguments=content, results=content, before=settings.audit_before, when_full=settings.audit_when_full
        ),
        telemetry=Telemetry(otlp_endpoint=settings.otlp_endpoint or None),
    )
