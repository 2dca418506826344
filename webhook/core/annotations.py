"""The annotations by which a pod adjusts its sidecar, and the labels that decide about it; the reference page is made of both.

Refuses an unknown `sidegate.dev/` annotation and a value outside what its line allows: a misspelt restriction that is
ignored is a hole. Whether to inject is asked of labels only, which the API server can select by.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from sidecar.config import Capture, LogLevel
from sidecar.core.profile import Transport
from webhook.core import quantity
from webhook.errors import Denial, DenyCode

GROUP: Final = "sidegate.dev"
STATUS: Final = f"{GROUP}/status"  # written back by us: information for people, never evidence
AGENT: Final = f"{GROUP}/agent"  # label: the pod calls MCP servers, and is none
INJECTED: Final = f"{GROUP}/injected"  # label, written back: the revision, for selection
CAPTURED: Final = f"{GROUP}/capture"  # label, written back: the capture mode, for NetworkPolicies
EGRESS: Final = f"{GROUP}/egress"  # label, written back: how connections of its own go out, for NetworkPolicies
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_PATH: Final = re.compile(r"/[!-~]{0,511}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the pod asks for; None where it asks for nothing."""

    port: int | None = None
    paths: tuple[str, ...] | None = None
    transport: Transport | None = None
    container: str | None = None
    capture: Capture | None = None
    cpu_m: int | None = None
    cpu_limit_m: int | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    log_level: LogLevel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One line of the other table: *place* is what carries it, *writer* who is to write it."""

    name: str
    place: str
    writer: str
    values: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One line of the table; *field* is the field of Overrides that *parse* gives the value of."""

    name: str
    field: str
    meaning: str
    default: str
    example: str
    parse: Callable[[str], Any]


def _port(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text, re.ASCII) or int(text) > 65535:
        raise ValueError("a port from 1 to 65535")
    return int(text)


def _paths(text: str) -> tuple[str, ...]:
    paths = tuple(text.split(","))
    if not all(_PATH.fullmatch(path) for path in paths):
        raise ValueError("paths that begin with / and hold no white space, separated by commas")
    return paths


def _transport(text: str) -> Transport:
    if text not in get_args(Transport):
        raise ValueError("one of " + ", ".join(get_args(Transport)))
    return text  # type: ignore[return-value]


def _container(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("the name of a container")
    return text


def _capture(text: str) -> Capture:
    if text not in (Capture.REDIRECT, Capture.REMAP):
        raise ValueError(f"{Capture.REDIRECT} or {Capture.REMAP}")
    return Capture(text)


def _log_level(text: str) -> LogLevel:
    try:
        return LogLevel(text)
    except ValueError:
        raise ValueError("one of " + ", ".join(LogLevel)) from None


TABLE: Final = (
    Annotation(
        name="port",
        field="port",
        meaning="Port on which the application speaks MCP.",
        default="the profile's; else the container port named mcp; else the only declared one; with stdio 15010",
        example="8080",
        parse=_port,
    ),
    Annotation(
        name="path",
        field="paths",
        meaning="HTTP paths of the MCP endpoint, separated by commas; nothing else is served.",
        default="the profile's; else /mcp",
        example="/mcp",
        parse=_paths,
    ),
    Annotation(
        name="transport",
        field="transport",
        meaning="How the application speaks MCP: http (Streamable HTTP), sse (HTTP+SSE of 2024-11-05) or stdio.",
        default="the profile's; else http",
        example="stdio",
        parse=_transport,
    ),
    Annotation(
        name="container",
        field="container",
        meaning="The container that is the stdio server; its command is wrapped.",
        default="the only one",
        example="server",
        parse=_container,
    ),
    Annotation(
        name="capture",
        field="capture",
        meaning="How traffic is brought into the sidecar; never weaker than the cluster allows.",
        default="the profile's; else the cluster's",
        example="redirect",
        parse=_capture,
    ),
    Annotation(
        name="cpu",
        field="cpu_m",
        meaning="CPU that is reserved for the sidecar.",
        default="the cluster's",
        example="100m",
        parse=quantity.parse_cpu,
    ),
    Annotation(
        name="cpu-limit",
        field="cpu_limit_m",
        meaning="CPU that the sidecar may use.",
        default="the cluster's",
        example="2",
        parse=quantity.parse_cpu,
    ),
    Annotation(
        name="memory",
        field="memory_bytes",
        meaning="Memory that is reserved for the sidecar.",
        default="the cluster's",
        example="128Mi",
        parse=quantity.parse_memory,
    ),
    Annotation(
        name="memory-limit",
        field="memory_limit_bytes",
        meaning="Memory that the sidecar may use.",
        default="the cluster's",
        example="512Mi",
        parse=quantity.parse_memory,
    ),
    Annotation(
        name="log-level",
        field="log_level",
        meaning="Least severe log record that the sidecar writes.",
        default="the cluster's",
        example="info",
        parse=_log_level,
    ),
)
LABELS: Final = (
    Label(
        name="injection",
        place="namespace",
        writer="who owns the namespace",
        values="`enabled`, `enforced`",
        meaning="`enabled`: pods that a label or a profile picks are governed. `enforced`: every pod is, or is refused.",
    ),
    Label(
        name="break-glass",
        place="namespace",
        writer="who may let pods out; keep it from tenants",
        values="`allowed`",
        meaning="In an `enforced` namespace, pods labelled out are let out.",
    ),
    Label(
        name="revision",
        place="namespace",
        writer="who owns the cluster",
        values="a revision",
        meaning="Which of several installed versions governs the namespace.",
    ),
    Label(
        name="server",
        place="pod",
        writer="the pod's author",
        values="`true`, `false`",
        meaning="The pod is an MCP server and is governed, or is to be left alone, which an `enforced` namespace ignores.",
    ),
    Label(
        name="agent",
        place="pod",
        writer="the pod's author",
        values="`true`, `false`",
        meaning="The pod calls MCP servers; its calls go out through the sidecar, with its identity.",
    ),
    Label(
        name="injected",
        place="pod",
        writer="the webhook",
        values="the revision",
        meaning="For selection; never taken for evidence.",
    ),
    Label(
        name="capture",
        place="pod",
        writer="the webhook",
        values="`redirect`, `remap`",
        meaning="How traffic is brought into the sidecar, for NetworkPolicies; never taken for evidence.",
    ),
    Label(
        name="egress",
        place="pod",
        writer="the webhook",
        values="`hosts`",
        meaning="What the server opens to public addresses passes the sidecar, by host name; for NetworkPolicies.",
    ),
)
_LABELS: Final = frozenset(f"{GROUP}/{each.name}" for each in LABELS)
_BY_NAME: Final = {f"{GROUP}/{each.name}": each for each in TABLE}


def read(annotations: Mapping[str, str]) -> Overrides:
    """Return what *annotations* ask for; raises Denial(ANNOTATION_INVALID) naming key, value and what is allowed."""
    values: dict[str, Any] = {}
    for key in sorted(annotations):
        if not key.startswith(f"{GROUP}/") or key == STATUS:
            continue
        if key not in _BY_NAME:
            hint = "it is a label" if key in _LABELS else f"known are {', '.join(_BY_NAME)}"
            raise Denial(DenyCode.ANNOTATION_INVALID, f"annotation {key}: no such annotation; {hint}")
        line = _BY_NAME[key]
        try:
            values[line.field] = line.parse(annotations[key])
        except ValueError as error:
            raise Denial(
                DenyCode.ANNOTATION_INVALID, f"annotation {key}: {annotations[key][:64]!r} is not {error}"
            ) from error
    return Overrides(**values)
