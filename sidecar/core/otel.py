"""Reads the standard `OTEL_*` variables: which of them the sidecar honours, their defaults, and what they come to.

Follows OpenTelemetry's specification (configuration/sdk-environment-variables, protocol/exporter): an empty value counts
as unset, and one that cannot be used is told and replaced by the default, because telemetry must not stop a process.
Three defaults are ours: no receiver on localhost is assumed, metrics are pulled unless asked for, logs stay on stderr.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import unquote

Signal = Literal["traces", "metrics", "logs"]
SIGNALS: Final[tuple[Signal, ...]] = ("traces", "metrics", "logs")
Pairs = tuple[tuple[str, str], ...]


def _text(text: str) -> str:
    return text


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return text

    return parse


def _some_of(*allowed: str) -> Callable[[str], frozenset[str]]:
    def parse(text: str) -> frozenset[str]:
        given = frozenset(each.strip() for each in text.split(","))
        if not given <= {*allowed, "none"}:
            raise ValueError(f"a list of {', '.join(allowed)}; or none")
        return given - {"none"}

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text[:12]) <= high):
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _milliseconds(low: int, high: int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        return _whole(low, high)(text) / 1000

    return parse


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise ValueError("a number from 0 to 1")
    return ratio


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")) or any(each.isspace() for each in text):
        raise ValueError("a URL that begins with http:// or https://")
    return text


def _pairs(text: str) -> Pairs:
    """Return `key=value` pairs, percent-encoded as in W3C Baggage."""
    pairs = [each.partition("=") for each in text.split(",") if each.strip()]
    found = tuple((unquote(name.strip()), unquote(value.strip())) for name, _, value in pairs)
    if any(not separator for _, separator, _ in pairs) or any(
        not name or not (name + value).isprintable() for name, value in found
    ):
        raise ValueError("key=value,key=value, percent-encoded")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One that is honoured. *default* is written as the variable would say it."""

    name: str
    default: str
    meaning: str
    parse: Callable[[str], Any]


_SAMPLERS: Final = (
    "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio",
    "always_on", "always_off", "traceidratio",
)  # fmt: skip
_HOUR_MS: Final = 3_600_000


def _of_exporter(infix: str, what: str) -> tuple[Variable, ...]:
    """Return the variables of all OTLP exporters, or (`TRACES_` …) those of one signal, which go first."""
    name, url = f"OTEL_EXPORTER_OTLP_{infix}", "Base URL" if not infix else "URL, its path included,"
    unset = "as for all signals" if infix else ""
    return (
        Variable(name=f"{name}ENDPOINT", default=unset, meaning=f"{url} of the OTLP/HTTP receiver {what}; goes before `SIDEGATE_OTLP_ENDPOINT`, behind the profile's `telemetry.otlp_endpoint`.", parse=_url),  # noqa: E501
        Variable(name=f"{name}HEADERS", default=unset, meaning="Headers of every request, percent-encoded; never sent to a receiver that a profile names.", parse=_pairs),  # noqa: E501
        Variable(name=f"{name}TIMEOUT", default=unset or "10000", meaning="Milliseconds that a request may take.", parse=_milliseconds(1, 600_000)),  # noqa: E501
        Variable(name=f"{name}COMPRESSION", default=unset or "none", meaning="`gzip` or `none`.", parse=_one_of("gzip", "none")),
        Variable(name=f"{name}CERTIFICATE", default=unset, meaning="File (PEM) of the authorities that the receiver is verified by; empty: the system's.", parse=_text),  # noqa: E501
        Variable(name=f"{name}CLIENT_CERTIFICATE", default=unset, meaning="File (PEM) of the certificate that is shown to the receiver.", parse=_text),  # noqa: E501
        Variable(name=f"{name}CLIENT_KEY", default=unset, meaning="File (PEM) of its key.", parse=_text),
        Variable(name=f"{name}PROTOCOL", default=unset or "http/json", meaning="`http/json`; others are not spoken here, and every collector takes this one at port 4318.", parse=_one_of("http/json")),  # noqa: E501
    )  # fmt: skip


def _of_batches(prefix: str, what: str, delay_ms: int) -> tuple[Variable, ...]:
    return (
        Variable(name=f"{prefix}_SCHEDULE_DELAY", default=str(delay_ms), meaning=f"Milliseconds from the first of some {what} to their batch.", parse=_milliseconds(0, _HOUR_MS)),  # noqa: E501
        Variable(name=f"{prefix}_MAX_QUEUE_SIZE", default="2048", meaning=f"How many {what} wait at most; what comes then is dropped and counted.", parse=_whole(1, 65_536)),  # noqa: E501
        Variable(name=f"{prefix}_MAX_EXPORT_BATCH_SIZE", default="512", meaning=f"How many {what} a request holds at most.", parse=_whole(1, 65_536)),  # noqa: E501
    )  # fmt: skip


# What the sidecar honours; docs/reference/otel-variables.md shows it.
TABLE: Final[tuple[Variable, ...]] = (
    Variable(name="OTEL_SDK_DISABLED", default="false", meaning="`true`: no spans, no OTLP metrics, no OTLP logs; trace contexts travel on untouched.", parse=_flag),  # noqa: E501
    Variable(name="OTEL_SERVICE_NAME", default="", meaning="`service.name`; empty: the server's name in policies.", parse=_text),
    Variable(name="OTEL_RESOURCE_ATTRIBUTES", default="", meaning="More attributes of the resource, as `key=value,key=value`; they go before our own.", parse=_pairs),  # noqa: E501
    Variable(name="OTEL_TRACES_EXPORTER", default="otlp", meaning="`otlp` or `none`. No console: stdout carries the audit trail.", parse=_some_of("otlp")),  # noqa: E501
    Variable(name="OTEL_METRICS_EXPORTER", default="prometheus", meaning="`prometheus` (always there, at `/metrics` of the health port), `otlp`, both, or `none`: no OTLP.", parse=_some_of("otlp", "prometheus")),  # noqa: E501
    Variable(name="OTEL_LOGS_EXPORTER", default="none", meaning="`otlp` or `none`; stderr gets the lines in any case.", parse=_some_of("otlp")),  # noqa: E501
    Variable(name="OTEL_TRACES_SAMPLER", default="parentbased_always_on", meaning="One of " + ", ".join(f"`{each}`" for each in _SAMPLERS) + ". A refused message is recorded whatever it says. The profile's `telemetry.sample_ratio` goes before it.", parse=_one_of(*_SAMPLERS)),  # noqa: E501
    Variable(name="OTEL_TRACES_SAMPLER_ARG", default="1.0", meaning="Ratio of the two `traceidratio` samplers.", parse=_ratio),
    *_of_exporter("", "of all signals: `/v1/traces` … is appended"),
    *(each for signal in SIGNALS for each in _of_exporter(f"{signal.upper()}_", f"of {signal}")),
    *_of_batches("OTEL_BSP", "spans", 1000),
    *_of_batches("OTEL_BLRP", "log records", 1000),
    Variable(name="OTEL_METRIC_EXPORT_INTERVAL", default="60000", meaning="Milliseconds from one OTLP export of metrics to the next.", parse=_milliseconds(10, _HOUR_MS)),  # noqa: E501
    Variable(name="OTEL_METRICS_EXEMPLAR_FILTER", default="trace_based", meaning="`trace_based`: histograms name a sampled call in each bucket; `always_off`: they do not.", parse=_one_of("trace_based", "always_off")),  # noqa: E501
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which traces are recorded: by the caller's word where *follows_parent*, otherwise so many of all."""

    follows_parent: bool = True
    ratio: float = 1.0

    def samples(self, trace_id: str, *, has_parent: bool, parent_sampled: bool) -> bool:
        """Say whether the trace is recorded; the same everywhere for one trace id, as OpenTelemetry's own sampler."""
        if has_parent and self.follows_parent:
            return parent_sampled
        return self.ratio >= 1.0 or int(trace_id[16:], 16) < self.ratio * 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Otlp:
    """How one signal reaches its receiver. *url* is whole, and empty where these variables name none."""

    url: str = ""
    headers: Pairs = ()
    timeout_s: float = 10.0
    gzip: bool = False
    ca_file: str = ""
    client_files: tuple[str, str] | None = None  # certificate and key


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """When a batch is sent, and how much waits for it."""

    delay_s: float = 1.0
    queue: int = 2048
    batch: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Otel:
    """What the variables come to."""

    service_name: str = ""
    resource: Pairs = ()
    exported: frozenset[Signal] = frozenset({"traces"})  # over OTLP, where there is a receiver
    sampler: Sampler = Sampler()
    otlp: Mapping[Signal, Otlp] = field(default_factory=lambda: dict.fromkeys(SIGNALS, Otlp()))
    spans: Batching = Batching()
    logs: Batching = Batching()
    metrics_every_s: float = 60.0
    exemplars: bool = True


def read(environment: Mapping[str, str]) -> tuple[Otel, list[str]]:
    """Return what *environment* says, and a sentence for each `OTEL_*` variable that is not honoured as it stands."""
    known = {each.name: each for each in TABLE}
    given, warnings = {}, []
    for name in sorted(environment):
        text = environment[name].strip()
        if not name.startswith("OTEL_") or not text:
            continue
        if name not in known:
            warnings.append(f"{name}: not honoured here")
            continue
        try:
            given[name] = known[name].parse(text)
        except ValueError as error:
            shown = "" if name.endswith("HEADERS") else f"={text!r}"
            warnings.append(f"{name}{shown}: expected {error}; the default holds")

    def value(name: str) -> Any:
        default = known[name].default
        return given[name] if name in given else known[name].parse(default) if default else ()

    exported: set[Signal] = set()
    if not value("OTEL_SDK_DISABLED"):
        exported |= {each for each in SIGNALS if "otlp" in value(f"OTEL_{each.upper()}_EXPORTER")}
    return Otel(
        service_name=value("OTEL_SERVICE_NAME") or "",
        resource=value("OTEL_RESOURCE_ATTRIBUTES"),
        exported=frozenset(exported),
        sampler=_sampler(value("OTEL_TRACES_SAMPLER"), value("OTEL_TRACES_SAMPLER_ARG")),
        otlp={each: _otlp(each, given) for each in SIGNALS},
        spans=_batching("OTEL_BSP", value),
        logs=_batching("OTEL_BLRP", value),
        metrics_every_s=value("OTEL_METRIC_EXPORT_INTERVAL"),
        exemplars=value("OTEL_METRICS_EXEMPLAR_FILTER") == "trace_based",
    ), warnings


def _sampler(name: str, ratio: float) -> Sampler:
    ratios = {"always_on": 1.0, "always_off": 0.0, "traceidratio": ratio}
    return Sampler(follows_parent=name.startswith("parentbased_"), ratio=ratios[name.removeprefix("parentbased_")])


def _otlp(signal: Signal, given: Mapping[str, Any]) -> Otlp:
    """Return how *signal* is exported: its own variables first, then those of all signals."""
    own, all_ = f"OTEL_EXPORTER_OTLP_{signal.upper()}_", "OTEL_EXPORTER_OTLP_"

    def value(what: str, default: Any) -> Any:
        return given.get(own + what, given.get(all_ + what, default))

    base = given.get(f"{all_}ENDPOINT")
    url = given.get(f"{own}ENDPOINT") or (f"{base.rstrip('/')}/v1/{signal}" if base else "")
    certificate, key = value("CLIENT_CERTIFICATE", ""), value("CLIENT_KEY", "")
    return Otlp(
        url=url,
        headers=value("HEADERS", ()),
        timeout_s=value("TIMEOUT", 10.0),
        gzip=value("COMPRESSION", "none") == "gzip",
        ca_file=value("CERTIFICATE", ""),
        client_files=(certificate, key) if certificate and key else None,
    )


def _batching(prefix: str, value: Callable[[str], Any]) -> Batching:
    queue = value(f"{prefix}_MAX_QUEUE_SIZE")
    return Batching(
        delay_s=value(f"{prefix}_SCHEDULE_DELAY"),
        queue=queue,
        batch=min(queue, value(f"{prefix}_MAX_EXPORT_BATCH_SIZE")),
    )
