"""What telemetry is called: every attribute of a span, every instrument, every field of a log line, once.

Names and buckets are those of OpenTelemetry's semantic conventions for MCP (semantic-conventions-genai, status
Development, 2026) and of its general ones; what they have no name for begins with `sidegate.`. The reference pages are
made of these tables, and the tests hold what a real collector received to them.
"""

from dataclasses import dataclass
from typing import Final, Literal

Side = Literal["both", "server", "client"]
Level = Literal["always", "where it applies", "opt-in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """An attribute of a span; *side* says on which kind."""

    name: str
    side: Side
    level: Level
    meaning: str
    kind: Literal["string", "int"] = "string"
    ours: bool = False  # not of the conventions


def _own(name: str, side: Side, level: Level, meaning: str) -> Attribute:
    return Attribute(name=f"sidegate.{name}", side=side, level=level, meaning=meaning, ours=True)


_SOMETIMES: Final = "where it applies"

ATTRIBUTES: Final[tuple[Attribute, ...]] = (
    Attribute(name="mcp.method.name", side="both", level="always", meaning="JSON-RPC method; `open_stream` and `close_session` are HTTP's GET and DELETE."),  # noqa: E501
    Attribute(name="gen_ai.operation.name", side="both", level=_SOMETIMES, meaning="`execute_tool`, of `tools/call`."),
    Attribute(name="gen_ai.tool.name", side="both", level=_SOMETIMES, meaning="The tool."),
    Attribute(name="gen_ai.prompt.name", side="both", level=_SOMETIMES, meaning="The prompt."),
    Attribute(name="mcp.resource.uri", side="both", level=_SOMETIMES, meaning="The resource; never in the span's name."),
    Attribute(name="mcp.protocol.version", side="both", level=_SOMETIMES, meaning="`MCP-Protocol-Version`."),
    Attribute(name="mcp.session.id", side="both", level=_SOMETIMES, meaning="`Mcp-Session-Id`; worth nothing to another principal."),
    Attribute(name="jsonrpc.request.id", side="both", level=_SOMETIMES, meaning="Of a request."),
    Attribute(name="error.type", side="both", level=_SOMETIMES, meaning="Reason of the refusal (refusals.md), JSON-RPC code, `tool_error` (the tool said `isError`) or `aborted`. On the client side only what the server did."),  # noqa: E501
    Attribute(name="rpc.response.status_code", side="both", level=_SOMETIMES, meaning="JSON-RPC code of the server's error."),
    Attribute(name="network.transport", side="both", level="always", meaning="`tcp`, or `pipe` toward a stdio server; not on a question of the server's own."),  # noqa: E501
    Attribute(name="network.protocol.name", side="both", level=_SOMETIMES, meaning="`http`."),
    Attribute(name="client.address", side="server", level=_SOMETIMES, meaning="The other end of the connection."),
    Attribute(name="client.port", side="server", level=_SOMETIMES, meaning="Its port.", kind="int"),
    Attribute(name="server.address", side="client", level=_SOMETIMES, meaning="The server as the sidecar calls it."),
    Attribute(name="server.port", side="client", level=_SOMETIMES, meaning="Its port.", kind="int"),
    Attribute(name="gen_ai.tool.call.arguments", side="server", level="opt-in", meaning="The arguments after redaction, cut as in the audit record; with the profile's `telemetry.content`."),  # noqa: E501
    Attribute(name="gen_ai.tool.call.result", side="server", level="opt-in", meaning="The result, likewise."),
    _own("decision", "server", "always", "`allowed` or `refused`; in agent role on the client's span, as all that follow."),
    _own("policy.revision", "server", _SOMETIMES, "Revision of the bundle that judged."),
    _own("agent.session", "server", _SOMETIMES, "Agent session; **self-reported**."),
    _own("agent.client_name", "server", _SOMETIMES, "`clientInfo.name`; **self-reported**."),
    _own("workload.spiffe_id", "server", _SOMETIMES, "SPIFFE ID of the caller's SVID."),
    _own("user.id", "server", _SOMETIMES, "The user, from the verified token."),
    _own("user.issuer", "server", _SOMETIMES, "Who issued it."),
    _own("peer.spiffe_id", "client", _SOMETIMES, "In agent role: the SPIFFE ID that the server proved."),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Instrument:
    """A metric, by OpenTelemetry's name and UCUM unit; in braces is what is counted."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    ours: bool = True

    @property
    def exposed(self) -> str:
        """Return the name in Prometheus, as OpenTelemetry's compatibility specification translates it."""
        name = self.name.replace(".", "_")
        unit = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        if unit and not name.endswith(unit):
            name += unit
        return f"{name}_total" if self.kind == "counter" else name


# Seconds; semantic conventions for MCP, mcp.server.operation.duration.
OPERATION_BUCKETS_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
DECISION_BUCKETS_S: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_OPERATION: Final = ("mcp.method.name", "gen_ai.tool.name", "error.type")
_DURATION: Final = "Time from the first byte of an admitted message to the last of its answer."


def _operation(side: str) -> Instrument:
    return Instrument(
        name=f"mcp.{side}.operation.duration", kind="histogram", unit="s", meaning=_DURATION,
        labels=_OPERATION, buckets=OPERATION_BUCKETS_S, ours=False,
    )  # fmt: skip


def _count(name: str, unit: str, meaning: str, *labels: str) -> Instrument:
    return Instrument(name=f"sidegate.{name}", kind="counter", unit=unit, meaning=meaning, labels=labels)


def _gauge(name: str, unit: str, meaning: str, *labels: str) -> Instrument:
    return Instrument(name=f"sidegate.{name}", kind="gauge", unit=unit, meaning=meaning, labels=labels)


SERVER_OPERATION: Final = _operation("server")
CLIENT_OPERATION: Final = _operation("client")
DECISION: Final = Instrument(
    name="sidegate.decision.duration", kind="histogram", unit="s", buckets=DECISION_BUCKETS_S,
    meaning="Time from the first byte to the decision: what governing adds before the server has the message.",
)  # fmt: skip
REFUSALS: Final = _count("refusals", "{message}", "Messages refused.", "reason")
DENIALS: Final = _count("denials", "{message}", "Messages that policy refused, by what decided: a rule, or `no rule allows it`.", "rule")  # fmt: skip # noqa: E501
CALLS: Final = _count("calls", "{message}", "Requests judged, by who called what and what was decided.", "caller", "gen_ai.tool.name", "decision")  # fmt: skip # noqa: E501
SPEND: Final = _count("limit.spend", "{unit}", "Units that admitted messages cost under a limit, by who called what.", "limit", "caller", "gen_ai.tool.name")  # fmt: skip # noqa: E501
LIMITED: Final = _count("limit.refusals", "{message}", "Messages that a limit refused.", "limit")
OVER: Final = _count("limit.over", "{message}", "Messages that a limit in shadow mode would have refused.", "limit")
WARNINGS: Final = _count("limit.warnings", "{message}", "Messages that crossed a step of a quota, by the step in per cent.", "limit", "percent")  # fmt: skip # noqa: E501
FALLBACKS: Final = _count("limit.fallbacks", "{message}", "Messages that were judged without the store of global limits.", "limit")  # fmt: skip # noqa: E501
STORE_UNANSWERED: Final = _count("limit.store_unanswered", "{message}", "Messages to which that store gave no answer in time.")  # fmt: skip
HANDSHAKES: Final = _count("handshake_refusals", "{handshake}", "TLS handshakes refused.", "reason")
CROSSINGS: Final = _count("egress_connections", "{connection}", "Connections that the server opened itself: let out by `name` or by `address`, or refused, by why.", "outcome")  # fmt: skip # noqa: E501
HIDDEN: Final = _count("hidden_items", "{item}", "List items hidden from callers.")
DIFFERENCES: Final = _count("shadow_differences", "{message}", "Messages that a policy in shadow mode would have decided otherwise.", "policy", "allowed")  # fmt: skip # noqa: E501
CONTENT: Final = _count("content_matches", "{match}", "What content rules found.", "rule", "action", "mode", "where")
IN_FLIGHT: Final = _gauge("in_flight", "{message}", "Messages under way.")
BUNDLE_INFO: Final = _gauge("bundle.info", "", "The policy bundle in force.", "revision")
BUNDLE_AGE: Final = _gauge("bundle.age", "s", "Time since the control plane last confirmed the bundle.")
BUNDLE_REFUSALS: Final = _count("bundle.refusals", "{bundle}", "Bundles that were offered and refused; the one before stays in force.")  # fmt: skip # noqa: E501
SVID_EXPIRY: Final = _gauge("svid.expiry_timestamp", "s", "Unix time at which the SVID in use expires.")
SVID_LIFETIME: Final = _gauge("svid.lifetime", "s", "For how long the SVID in use was issued.")
READY: Final = _gauge("ready", "", "1: ready for calls; 0: not, and /readyz says why.")
AUDIT_FAILURES: Final = _count("audit_failures", "{write}", "Failed audit writes.")
AUDIT_LOST: Final = _count("audit_lost", "{record}", "Audit records that were never written, or deleted before anybody had them.")  # fmt: skip # noqa: E501
AUDIT_SHIPPED: Final = _count("audit_shipped", "{record}", "Audit records sent to their receiver: taken by it, or refused for good.", "outcome")  # fmt: skip # noqa: E501
AUDIT_RETRIES: Final = _count("audit_retries", "{request}", "Requests to the receiver of audit records that failed, and were made again.")  # fmt: skip # noqa: E501
AUDIT_WAITING: Final = _gauge("audit.waiting", "By", "Audit records that wait for their receiver.")
DROPPED: Final = _count("telemetry_dropped", "{item}", "Spans, metrics and log records that reached no receiver.", "signal")  # fmt: skip
QUESTIONS: Final = _count("provider_questions", "{question}", "Questions to identity providers.", "provider", "question", "outcome")  # fmt: skip # noqa: E501

INSTRUMENTS: Final[tuple[Instrument, ...]] = (
    SERVER_OPERATION, CLIENT_OPERATION, DECISION, REFUSALS, DENIALS, CALLS, SPEND, LIMITED, OVER, WARNINGS, FALLBACKS,
    STORE_UNANSWERED, HANDSHAKES, CROSSINGS, HIDDEN, DIFFERENCES, CONTENT, IN_FLIGHT, READY, BUNDLE_INFO, BUNDLE_AGE, BUNDLE_REFUSALS,
    SVID_EXPIRY, SVID_LIFETIME, AUDIT_FAILURES, AUDIT_LOST, AUDIT_SHIPPED, AUDIT_RETRIES, AUDIT_WAITING, DROPPED, QUESTIONS,
)  # fmt: skip

# Field, type, meaning; `?`: left out when not known. One line for each message, and nothing that a caller may keep private.
LINE_FIELDS: Final[tuple[tuple[str, str, str], ...]] = (
    ("time", "string", "When the message was over: RFC 3339, UTC, milliseconds."),
    ("level", "string", "`info`; `error` where the fault is ours or the server's."),
    ("logger", "string", "`sidecar.requests`."),
    ("message", "string", "`request`."),
    ("trace_id", "string", "W3C trace id; the audit record and the spans have the same."),
    ("span_id", "string", "W3C id of the span toward the client."),
    ("direction", "string", "`inbound` or `outbound`."),
    ("method", "string?", "JSON-RPC method; left out when the message could not be read."),
    ("target", "string?", "Name of the tool or prompt; host and port of a connection that went out."),
    ("http_status", "integer", "Status that the caller got; 0 when it had gone before."),
    ("decision", "string", "`allowed` or `refused`."),
    ("error_type", "string?", "As on the span."),
    ("judged_s", "number", "Seconds from the first byte to the decision."),
    ("total_s", "number", "Seconds from the first byte to the last."),
)
