"""Says an audit record in the words of a SIEM: Elastic Common Schema, or OCSF's API Activity (class 6003).

One table, which docs/reference/audit-record.md shows. What has no word there is left out, and the record itself remains
what is proven: neither form carries the chain's links. ECS 9.4; OCSF 1.8.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

Format = Literal["ecs", "ocsf"]


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Where a member of the record goes; empty: nowhere."""

    source: str
    ecs: str = ""
    ocsf: str = ""
    to_ecs: Callable[[Any], Any] = _same
    to_ocsf: Callable[[Any], Any] = _same


def _milliseconds(time: str) -> int:
    """Return Unix time; *time* is as sidecar/record.py writes it."""
    return int(datetime.fromisoformat(time[:19] + "+00:00").timestamp()) * 1000 + int(time[20:23])


def _address(client: str) -> str | None:
    return client.rpartition(":")[0].strip("[]") or None


def _port(client: str) -> int | None:
    port = client.rpartition(":")[2]
    return int(port) if port.isdecimal() else None


_OUTCOMES: Final = {"success": "success", "error": "failure", "refused": "failure", "aborted": "failure"}
_STATUS: Final = {"success": 1, "failure": 2}  # OCSF status_id; 0: unknown
_READS: Final = ("resources/read", "tools/list", "prompts/list", "prompts/get", "resources/list", "tasks/get")

TABLE: Final[tuple[Row, ...]] = (
    Row(source="time", ecs="@timestamp", ocsf="time", to_ocsf=_milliseconds),
    Row(
        source="outcome",
        ecs="event.outcome",
        to_ecs=lambda outcome: _OUTCOMES.get(outcome, "unknown"),
        ocsf="status_id",
        to_ocsf=lambda outcome: _STATUS.get(_OUTCOMES.get(outcome, ""), 0),
    ),
    Row(
        source="decision.outcome",
        ecs="event.type",
        to_ecs=lambda outcome: ["allowed" if outcome == "allowed" else "denied"],
        ocsf="action_id",
        to_ocsf=lambda outcome: 1 if outcome == "allowed" else 2,
    ),
    Row(source="decision.outcome", ocsf="disposition_id", to_ocsf=lambda outcome: 1 if outcome == "allowed" else 2),
    Row(source="decision.reason", ecs="event.reason", ocsf="status_code"),
    Row(source="decision.detail", ecs="error.message", ocsf="status_detail"),
    Row(
        source="decision.policies",
        ecs="rule.name",
        ocsf="actor.authorizations",
        to_ocsf=lambda policies: [{"decision": "allowed", "policy": {"name": each}} for each in policies],
    ),
    Row(source="decision.revision", ecs="rule.version", ocsf="policy.version"),
    Row(source="trace_id", ecs="trace.id", ocsf="metadata.correlation_uid"),
    Row(source="span_id", ecs="span.id", ocsf="api.request.uid"),
    Row(source="chain.seq", ecs="event.sequence", ocsf="metadata.sequence"),
    Row(source="direction", ecs="network.direction"),
    Row(source="server.name", ecs="service.name", ocsf="api.service.name"),
    Row(source="server.namespace", ecs="orchestrator.namespace", ocsf="dst_endpoint.domain"),
    Row(source="server.workload", ecs="orchestrator.resource.name", ocsf="dst_endpoint.svc_name"),
    Row(source="who.user.id", ecs="user.id", ocsf="actor.user.uid"),
    Row(source="who.user.issuer", ecs="user.domain", ocsf="actor.user.domain"),
    Row(source="who.user.email", ecs="user.email", ocsf="actor.user.email_addr"),
    Row(source="who.user.roles", ecs="user.roles"),
    Row(
        source="who.user.groups",
        ecs="user.group.name",
        ocsf="actor.user.groups",
        to_ocsf=lambda groups: [{"name": each} for each in groups],
    ),
    Row(source="who.workload", ecs="gen_ai.agent.id", ocsf="actor.app_uid"),
    Row(source="agent.client_name", ecs="gen_ai.agent.name", ocsf="actor.app_name"),
    Row(source="agent.session", ecs="labels.agent_session", ocsf="actor.session.uid"),
    Row(source="who.client", ecs="client.ip", to_ecs=_address, ocsf="src_endpoint.ip", to_ocsf=_address),
    Row(source="who.client", ecs="client.port", to_ecs=_port, ocsf="src_endpoint.port", to_ocsf=_port),
    Row(source="destination.host", ecs="server.address", ocsf="dst_endpoint.hostname"),
    Row(source="destination.port", ecs="server.port", ocsf="dst_endpoint.port"),
    Row(source="message.method", ecs="event.action", ocsf="api.operation"),
    Row(
        source="message.tool",
        ecs="gen_ai.tool.name",
        ocsf="resources",
        to_ocsf=lambda tool: [{"name": tool, "type": "tool"}],
    ),
    Row(source="message.resource", ecs="url.original"),
    Row(source="arguments.content", ecs="gen_ai.tool.call.arguments", ocsf="api.request.data"),
    Row(source="result.content", ecs="gen_ai.tool.call.result", ocsf="api.response.data"),
    Row(source="result.error_code", ecs="error.code", to_ecs=str, ocsf="api.response.code"),
    Row(source="http.method", ecs="http.request.method", ocsf="http_request.http_method"),
    Row(source="http.path", ecs="url.path", ocsf="http_request.url.path"),
    Row(source="http.status", ecs="http.response.status_code", ocsf="http_response.code"),
    Row(
        source="latency_s.total",
        ecs="event.duration",
        to_ecs=lambda seconds: round(seconds * 1e9),
        ocsf="duration",
        to_ocsf=lambda seconds: round(seconds * 1e3),
    ),
)


def said(record: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """Return *record* in the words of *form*."""
    document = _ecs(record) if form == "ecs" else _ocsf(record)
    for row in TABLE:
        target, convert = (row.ecs, row.to_ecs) if form == "ecs" else (row.ocsf, row.to_ocsf)
        value = _at(record, row.source) if target else None
        made = None if value is None else convert(value)
        if made not in (None, []):
            _put(document, target, made)
    return document


def settled(records: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield one record of each message: its end, or in the end the beginning of what has none."""
    begun: dict[Any, Mapping[str, Any]] = {}
    for record in records:
        if record.get("phase") == "begin":
            begun[record.get("span_id")] = record
        else:
            begun.pop(record.get("span_id"), None)
            yield record
    yield from begun.values()


def _ecs(record: Mapping[str, Any]) -> dict[str, Any]:
    kind = {"kind": "event", "category": ["api"], "module": "sidegate", "dataset": "sidegate.audit"}
    return {"ecs": {"version": "9.4.0"}, "event": {"id": _uid(record), **kind}, "orchestrator": {"type": "kubernetes"}}


def _ocsf(record: Mapping[str, Any]) -> dict[str, Any]:
    activity = 2 if _at(record, "message.method") in _READS else 99
    product = {"name": "Sidegate", "vendor_name": "Sidegate"}
    return {
        "category_uid": 6,
        "class_uid": 6003,
        "activity_id": activity,
        "type_uid": 600300 + activity,
        "severity_id": 1,
        "metadata": {"version": "1.8.0", "product": product, "uid": _uid(record), "profiles": ["security_control"]},
        # Required there, and not known of what was refused before it was read.
        "actor": {"app_name": "unknown"},
        "api": {"operation": "unknown"},
        "src_endpoint": {"name": "unknown"},
    }


def _uid(record: Mapping[str, Any]) -> str:
    return f"{_at(record, 'chain.id')}:{_at(record, 'chain.seq')}"


def _at(record: Any, path: str) -> Any:
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        document = document.setdefault(key, {})
    document[last] = value
