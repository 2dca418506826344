"""The sidecar's process settings: every name, default, unit and allowed value, once.

Written as environment by the webhook (`Settings.to_env`), read once by `sidecar/__main__.py` (`Settings.from_env`).
What belongs to one workload and may change while it runs is not here but in the bundle (sidecar/core/profile.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Self

from sidecar.errors import ConfigError

INBOUND_PORT: Final = 15443
HEALTH_PORT: Final = 15020
EGRESS_PORT: Final = 15001
STDIO_PORT: Final = 15010  # of the relay in a stdio server's container, on loopback, unless the profile names another
USER_ID: Final = 15100  # refused for application containers: they could read the sidecar's memory and files
PREFIX: Final = "SIDEGATE_"
# What a server reaches by host name, without what is never public: the init container leaves the rest alone, and its
# NetworkPolicy opens no more than this. All else is a matter of NetworkPolicies, as ever (RFC 6890; 6to4 and Teredo
# carry IPv4 addresses inside).
PUBLIC_RANGES: Final = {
    "0.0.0.0/0": (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/3",
    ),
    "2000::/3": ("2001::/32", "2002::/16"),
}
# Kubernetes' own variables for a Service whose name begins with `sidegate`: a tenant's Service must not stop a pod.
_SERVICE_LINK: Final = re.compile(r"SIDEGATE_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
_HTTP: Final = re.compile(r"https?://[!-~]+")
_SERVICE_URL: Final = re.compile(r"(tcp|udp|sctp)://.*")  # what a link named like one of our ports holds


class Capture(StrEnum):
    """How traffic reaches the sidecar; decides where the original port is read from."""

    REDIRECT = "redirect"  # netfilter sends every TCP port here; the port is asked of the accepted socket
    REMAP = "remap"  # the Service-facing port was moved here
    LISTEN = "listen"  # outside a pod: `sidegate run`


class Role(StrEnum):
    """Which side of a call the application beside us is on."""

    SERVER = "server"  # an MCP server: calls of others are judged on their way in
    AGENT = "agent"  # its own calls to MCP servers leave with its identity


class WayOut(StrEnum):
    """How the connections go out that an MCP server opens itself."""

    DIRECT = "direct"  # past us
    HOSTS = "hosts"  # netfilter sends them here, and the profile says which host names they may have


class LogLevel(StrEnum):
    """Least severe log record that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ShipFormat(StrEnum):
    """As what audit lines are sent on."""

    OTLP = "otlp"  # OTLP/HTTP log records, in JSON
    LINES = "lines"  # a POST of the lines themselves


class RequestLines(StrEnum):
    """Of which messages a line is logged."""

    ALL = "all"
    REFUSED = "refused"
    OFF = "off"


def _one_of(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    def parse(text: str) -> StrEnum:
        try:
            return kind(text)
        except ValueError:
            raise ValueError("one of " + ", ".join(kind)) from None

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Return the parser of a number in these bounds, both included."""

    def parse(text: str) -> float:
        expected = f"a number from {low:g} to {high:g}"
        try:
            value = float(text)
        except ValueError:
            raise ValueError(expected) from None
        if not low <= value <= high:
            raise ValueError(expected)
        return value

    return parse


def port_number(text: str) -> int:
    """Return the port in *text*; raises ValueError saying what is expected."""
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise ValueError("a port from 0 to 65535 (0: any free one)")
    return int(text)


def _size(low: int, high: int) -> Callable[[str], float]:
    parse = number(low, high)

    def size(text: str) -> float:
        return 0.0 if text == "0" else parse(text)

    return size


def _url(text: str) -> str:
    if text and not _HTTP.fullmatch(text):
        raise ValueError("an http or https URL")
    return text


def setting_of(parse: Callable[[str], Any], meaning: str, *, default: Any) -> Any:
    """Return a dataclass field that knows how its text is read, and what the reference page says of it."""
    return field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of them. The name of a field, in upper case behind SIDEGATE_, is the name of its variable."""

    namespace: str = setting_of(str, "Namespace of the pod.", default="")
    pod: str = setting_of(str, "Name of the pod: which bundle to ask for.", default="")
    workload: str = setting_of(str, "Name of the Deployment, StatefulSet … that the pod belongs to.", default="")
    role: Role = setting_of(_one_of(Role), "Whether an MCP server is governed, or an agent's own calls.", default=Role.SERVER)  # fmt: skip
    capture: Capture = setting_of(_one_of(Capture), "How traffic reaches the sidecar.", default=Capture.LISTEN)
    listen_host: str = setting_of(str, "Address the inbound listener binds.", default="::")
    listen_port: int = setting_of(port_number, "Port of the inbound listener.", default=INBOUND_PORT)
    egress: WayOut = setting_of(_one_of(WayOut), "How connections that an MCP server opens itself go out: direct, or through the outbound listener to the hosts that the bundle names.", default=WayOut.DIRECT)  # fmt: skip # noqa: E501
    egress_port: int = setting_of(port_number, "Port of the outbound listener, on loopback, in role agent and with egress hosts.", default=EGRESS_PORT)  # fmt: skip # noqa: E501
    health_host: str = setting_of(str, "Address of the health and metrics listener.", default="::")
    health_port: int = setting_of(port_number, "Port of the health and metrics listener.", default=HEALTH_PORT)
    upstream_host: str = setting_of(
        str, "Address of the MCP server; its port comes with the bundle.", default="127.0.0.1"
    )
    hosts: str = setting_of(str, "Comma-separated authorities under which callers know this server, for Host and Origin checks; empty: any Host, no Origin.", default="")  # fmt: skip # noqa: E501
    spiffe_socket: str = setting_of(str, "Address of the SPIFFE Workload API, as SPIFFE_ENDPOINT_SOCKET; empty: no workload identity.", default="")  # fmt: skip # noqa: E501
    spiffe_id: str = setting_of(str, "SPIFFE ID to use when the agent offers several; empty: the only one.", default="")
    spiffe_hint: str = setting_of(str, "Hint of the SVID to use, likewise; with both, both must match.", default="")
    jwt_bundle_max_age_s: float = setting_of(number(1, 86_400), "Seconds for which keys of JWT-SVIDs are believed after the SPIFFE agent last confirmed them; at most a sixth of the CA's life is advised.", default=900.0)  # fmt: skip # noqa: E501
    connection_max_age_s: float = setting_of(number(1, 2**31), "Seconds after which a connection is closed with the next answer, however long its SVIDs live.", default=3600.0)  # fmt: skip # noqa: E501
    connection_grace_s: float = setting_of(number(0, 3600), "Seconds for which a call under way may go on after its caller's SVID has ended.", default=30.0)  # fmt: skip # noqa: E501
    control_plane: str = setting_of(str, "Base URL of the control plane's bundle endpoint.", default="")
    control_plane_id: str = setting_of(str, "SPIFFE ID that the control plane must show.", default="")
    bundle_keys: str = setting_of(str, "Public keys (PEM, one after the other) one of which must have signed the bundle.", default="")  # fmt: skip # noqa: E501
    bundle_dir: str = setting_of(str, "Directory in which the last good bundle is kept.", default="")
    bundle_max_age_s: float = setting_of(number(0, 2**31), "Seconds after which a bundle that could not be confirmed is no longer enforced and calls are refused; 0: never.", default=0.0)  # fmt: skip # noqa: E501
    audit_sink: str = setting_of(str, "Where audit records go: stdout, or the path of a file.", default="stdout")
    audit_keep_bytes: float = setting_of(_size(2**20, 2**44), "Bytes of audit files that are kept, in eight files at most: the oldest make room; 0: one file, which grows.", default=0.0)  # fmt: skip # noqa: E501
    audit_file_age_s: float = setting_of(number(0, 2**31), "Seconds after which an audit file is ended and the next one begun; 0: never.", default=0.0)  # fmt: skip # noqa: E501
    audit_ship: str = setting_of(_url, "URL to which the lines of the audit file are sent, in order, until they are taken: a base URL for otlp, else where to POST; empty: nobody.", default="")  # fmt: skip # noqa: E501
    audit_ship_format: ShipFormat = setting_of(_one_of(ShipFormat), "As what: log records of OTLP/HTTP, or the lines themselves.", default=ShipFormat.OTLP)  # fmt: skip # noqa: E501
    audit_ship_id: str = setting_of(str, "SPIFFE ID pattern that the receiver must show, and we show ours; empty: HTTPS as the web has it, or none.", default="")  # fmt: skip # noqa: E501
    audit_ship_ca_file: str = setting_of(str, "CA certificates (PEM) of a receiver that is known by its host name; empty: the system's.", default="")  # fmt: skip # noqa: E501
    audit_ship_token_file: str = setting_of(str, "File with a bearer token for the receiver, read anew for each batch; empty: none.", default="")  # fmt: skip # noqa: E501
    otlp_endpoint: str = setting_of(str, "Base URL of an OTLP/HTTP receiver when neither the bundle nor `OTEL_EXPORTER_OTLP_*` names one; empty: none.", default="")  # fmt: skip # noqa: E501
    limits_store: str = setting_of(str, "Valkey or Redis that judges limits of scope global: redis://HOST[:PORT][/DATABASE], redis+sentinel://HOST[:PORT],…/MASTER or redis+cluster://HOST[:PORT],…, with rediss for TLS; empty: none.", default="")  # fmt: skip # noqa: E501
    limits_store_user: str = setting_of(str, "User to log in to it as; empty: the default user.", default="")
    limits_store_password: str = setting_of(str, "Password of that user.", default="")
    limits_store_ca: str = setting_of(str, "Authorities (PEM) one of which must have signed its certificate; empty: the system's.", default="")  # fmt: skip # noqa: E501
    limits_store_timeout_s: float = setting_of(number(0.001, 5), "Seconds that a call waits for it at most; then whenUnavailable of the limit holds.", default=0.05)  # fmt: skip # noqa: E501
    probes: str = setting_of(str, "The kubelet's probes of the application, as JSON; the health listener performs them.", default="{}")  # fmt: skip # noqa: E501
    drain_s: float = setting_of(number(0, 3600), "Seconds that calls in flight may take to finish on shutdown.", default=30.0)  # fmt: skip
    max_connections: float = setting_of(number(1, 100_000), "Inbound connections at a time; more wait in the kernel's queue.", default=1024.0)  # fmt: skip # noqa: E501
    max_processes: float = setting_of(number(1, 512), "Processes of a stdio server at a time; who would need one more is told to come again.", default=64.0)  # fmt: skip # noqa: E501
    process_idle_s: float = setting_of(number(1, 2**31), "Seconds after which an unused process of a stdio server ends, and its session with it.", default=1800.0)  # fmt: skip # noqa: E501
    log_level: LogLevel = setting_of(
        _one_of(LogLevel), "Least severe log record that is written.", default=LogLevel.INFO
    )
    request_log: RequestLines = setting_of(_one_of(RequestLines), "Of which messages a line is logged: all, refused (also those that failed here) or off.", default=RequestLines.ALL)  # fmt: skip # noqa: E501

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> Self:
        """Return the settings in *environment*; raises ConfigError listing every unusable or unknown one."""
        values: dict[str, Any] = {}
        problems: list[str] = []
        known = {PREFIX + each.name.upper(): each for each in fields(cls)}
        for name in sorted(environment):
            if not name.startswith(PREFIX):
                continue
            if name.endswith("_PORT") and _SERVICE_URL.fullmatch(environment[name]):
                continue
            if name not in known:
                if _SERVICE_LINK.fullmatch(name):
                    continue
                problems.append(f"{name}: no such setting; known are {', '.join(sorted(known))}")
                continue
            setting = known[name]
            try:
                values[setting.name] = setting.metadata["parse"](environment[name])
            except ValueError as error:
                problems.append(f"{name}={environment[name]!r}: expected {error}")
        if problems:
            raise ConfigError("\n".join(problems))
        return cls(**values)

    def to_env(self) -> dict[str, str]:
        """Return the environment that `from_env` reads these settings from; defaults are left out."""
        environment: dict[str, str] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != setting.default:
                number = isinstance(value, float) and value.is_integer()
                environment[PREFIX + setting.name.upper()] = str(int(value) if number else value)
        return environment
