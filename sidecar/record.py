"""Turns an exchange into its audit record: who asked what, what was decided and why, and what came of it.

One JSON object, one line, for every message, refused and unreadable ones included; one more before a call is sent, where
the profile wants that. Whatever a caller chooses is bounded, or a record would be as large as the caller likes. Tokens
are never in it; session ids only as a hash, because a record outlives the session by years. What repeats from call to
call is kept as JSON: a record costs a third of what it did. FIELDS is the schema. Pure.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import orjson

from sidecar.core import chain
from sidecar.core.claims import User
from sidecar.core.content import ARGUMENTS, RESULT, compiled, summary
from sidecar.core.message import MAX_ID, Ask, Message, Prompt, Resource, Shape, Subscription, Task, Tool
from sidecar.core.profile import Audit
from sidecar.core.redaction import Content, redact
from sidecar.core.splicing import Scope
from sidecar.exchange import Exchange, Outbound

SCHEMA: Final = "sidegate.audit/v1"
MAX_TEXT_CHARS: Final = 1024  # of a name, URI, path or detail; longer ones end in an ellipsis
MAX_SUBSCRIBED: Final = 32  # URIs; a record stays within a line that log collectors take
SESSION_HASH_CHARS: Final = 16  # of the SHA-256 of a session id: tells sessions apart, opens none

MAX_KEPT: Final = 1024  # pieces of JSON that later records share: callers, clients; about 1 MB

TOOL_ERROR: Final = "tool_error"  # the tool ran, and says that it failed
ABORTED: Final = "aborted"  # the answer did not reach its end


class Phase(StrEnum):
    """Which of a message's two records a line is."""

    BEGIN = "begin"
    END = "end"


class Outcome(StrEnum):
    """What came of a message, in one word."""

    PENDING = "pending"
    REFUSED = "refused"
    SUCCESS = "success"
    ERROR = "error"
    ABORTED = "aborted"


# Path, type, meaning. A row of type `object` is followed by its members; `?`: null when not known or not applicable.
FIELDS: Final[tuple[tuple[str, str, str], ...]] = (
    ("time", "string", "When the message's first byte was read: RFC 3339, UTC, nanoseconds."),
    ("schema", "string", f"`{SCHEMA}`. A new member may appear in v1; a changed or missing one would be v2."),
    (
        "phase",
        "string",
        "`end`: written when the message was over. `begin`: written before it was sent to the server, as `audit.before` says.",
    ),
    (
        "outcome",
        "string",
        "`success`, `error` of the tool or server, `refused`, `aborted` before the answer's end; `pending` in a begin.",
    ),
    ("trace_id", "string", "W3C trace id, 32 hex digits; the caller's, when it sent one."),
    ("span_id", "string", "W3C id of the sidecar's own span, 16 hex digits; unique to this message."),
    (
        "direction",
        "string",
        "`inbound`: a call of the server here; `outbound`: one by the agent here, or a connection.",
    ),
    ("server", "object?", "The workload here, from the bundle: the MCP server, or in agent role the agent."),
    ("server.namespace", "string", "Its Kubernetes namespace."),
    ("server.workload", "string", "Its Deployment, StatefulSet …"),
    ("server.name", "string", "Its name in policies."),
    ("who", "object", "Who asked, as verified."),
    ("who.user", "object?", "The human: verified claims of the access token."),
    ("who.user.id", "string", "The claim that the profile names; `sub` by default."),
    ("who.user.issuer", "string", "The provider's issuer URL."),
    ("who.user.provider", "string", "The provider's name in the profile."),
    ("who.user.email", "string?", "E-mail address."),
    ("who.user.role", "string?", "Role."),
    ("who.user.roles", "array", "Roles."),
    ("who.user.groups", "array", "Groups."),
    ("who.delegation", "array", "Who acts for the user, from the user outward: `sub` and `actor` of each step."),
    ("who.workload", "string?", "The SPIFFE ID of the caller's SVID."),
    ("who.proof", "string?", "How it was proven: `x509-svid` by mutual TLS, `jwt-svid` by a token."),
    ("who.client", "string", "Address and port of the connection's other end."),
    ("destination", "object?", "Where an outbound call went, or a connection that the server here opened itself."),
    (
        "destination.host",
        "string",
        "As the agent or the server named it; the address that was dialled, when it named none.",
    ),
    ("destination.port", "integer", "Its port."),
    ("destination.expected", "string", "The SPIFFE IDs of which it had to prove one; empty for a server's connection."),
    ("destination.address", "string?", "The address that a server's connection was let out to."),
    ("destination.workload", "string?", "The SPIFFE ID that it proved; null when nothing was sent."),
    ("agent", "object", "What the caller says of itself: **self-reported**, never verified."),
    ("agent.session", "string?", "Agent session; where the MCP session stands in for it, the same hash as `session`."),
    ("agent.client_name", "string?", "`clientInfo.name` of `initialize`."),
    ("agent.client_version", "string?", "`clientInfo.version` of `initialize`."),
    ("session", "string?", f"First {SESSION_HASH_CHARS} hex digits of the SHA-256 of `Mcp-Session-Id`."),
    ("protocol_version", "string?", "`MCP-Protocol-Version` of the request."),
    ("http", "object", "The HTTP exchange that carried the message."),
    ("http.method", "string", "`POST`, `GET` or `DELETE`, or whatever was refused."),
    ("http.path", "string", "Path without query."),
    ("http.status", "integer", "Status that the caller got; 0 when it had gone before."),
    ("http.removed", "array", "Headers that never reached the server: claims of who the user is, another's event id."),
    ("message", "object?", "The MCP message; null when it could not be read, or was refused before it was read."),
    ("message.shape", "string", "`request`, `notification`, `response`, `open_stream` or `close_session`."),
    ("message.method", "string", "JSON-RPC method; `sampling/…`, `elicitation/…` and `roots/…` are the server's own."),
    ("message.id", "string or integer?", "JSON-RPC id."),
    ("message.tool", "string?", "Name of the tool."),
    ("message.prompt", "string?", "Name of the prompt."),
    ("message.resource", "string?", "URI of the resource."),
    ("message.task", "string?", "The task, hashed as `session` is."),
    ("message.subscribed", "array", f"URIs of a subscription's resources, the first {MAX_SUBSCRIBED}."),
    ("message.url", "string?", "What an elicitation asks the user to open, without query and fragment."),
    ("arguments", "object?", "Arguments of the tool or prompt; null when the message has none."),
    ("arguments.content", "object or string?", "After redaction; its text's beginning when cut; null with `hash`."),
    ("arguments.truncated", "boolean", "Whether `content` was cut to the profile's `audit.max_bytes`."),
    ("arguments.redacted", "boolean", "Whether a field was hidden; it reads `[redacted]`."),
    ("arguments.bytes", "integer", "Size of the arguments as compact JSON, before redaction."),
    ("arguments.sha256", "string?", "SHA-256 of the compact JSON, after redaction and before the cut."),
    ("result", "object?", "The server's answer; null when the message was never sent to it."),
    ("result.content", "any", "The answer's `result` or `error`, likewise; null also when too large to keep."),
    ("result.truncated", "boolean", "As above."),
    ("result.redacted", "boolean", "As above."),
    ("result.bytes", "integer", "Size of the whole answer."),
    ("result.sha256", "string?", "SHA-256 of the whole answer; of `content` before the cut, when a field was hidden."),
    ("result.is_error", "boolean", "The tool said `isError`."),
    ("result.error_code", "integer?", "Code of the server's JSON-RPC error."),
    ("result.hidden", "integer", "Items taken out of a list, because the caller may not use them."),
    ("decision", "object", "What the sidecar decided."),
    ("decision.outcome", "string", "`allowed`: the message was let through to the server; `refused`: it was not."),
    ("decision.reason", "string?", "Why it went no further; with `allowed`, why the answer did not (`upstream`)."),
    ("decision.detail", "string?", "The same for operators; the caller never sees it."),
    ("decision.policies", "array", "Policies that allowed it."),
    (
        "decision.shadow",
        "array",
        "Policies in shadow mode that would have decided otherwise: `policy`, and `allowed` by it.",
    ),
    (
        "decision.content",
        "array",
        "What content rules found, and never the text itself: `rule`, `action`, `mode`, `where`, `count`.",
    ),
    ("decision.revision", "string", "Revision of the policy bundle that judged; empty when there was none."),
    ("limits", "array", "Names of the limits that the message counts in."),
    (
        "charges",
        "array",
        "What it cost there: `limit`, `units`, `remaining`, `warned` at per cent of a quota; `over`, `fallback`: not enforced.",
    ),
    ("latency_s", "object", "Seconds."),
    ("latency_s.judge", "number", "From the first byte to the decision."),
    ("latency_s.wait", "number?", "From the decision to sending: credentials were fetched, or others asked."),
    ("latency_s.upstream", "number?", "From sending to the server to its answer's first byte."),
    ("latency_s.total", "number", "From the first byte to the last."),
    ("aborted", "string?", "Why the answer did not reach its end."),
)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a line. What it does not name may come in v1, and is to be passed over."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA, **_object("")}
    schema["properties"]["schema"]["const"] = SCHEMA
    schema["properties"]["phase"]["enum"] = list(Phase)
    schema["properties"]["outcome"]["enum"] = list(Outcome)
    return schema


def _object(path: str) -> dict[str, Any]:
    properties = {
        name[len(path) :]: {"description": meaning, **_type(name, kind)}
        for name, kind, meaning in (*FIELDS, *chain.FIELDS)
        if name.startswith(path) and "." not in name[len(path) :]
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


def _type(path: str, kind: str) -> dict[str, Any]:
    if kind == "any":
        return {}
    types = kind.rstrip("?").split(" or ")
    members = _object(f"{path}.") if kind.startswith("object") and "content" not in path else {}
    named = [*types, *(["null"] if kind.endswith("?") else [])]
    return {**members, "type": named[0] if len(named) == 1 else named}


def line(exchange: Exchange, phase: Phase = Phase.END) -> bytes:
    """Return the record of *exchange* as one line, its end included.

    The members stand here in the order of FIELDS, and are joined as JSON: a dictionary of them costs half as much again.
    """
    profile, outbound, connection = exchange.profile, exchange.outbound, exchange.connection
    audit = _STRICTEST if profile is None else profile.audit
    is_end = phase is Phase.END
    was_sent = exchange.was_sent if is_end else True
    outcome = _outcome(exchange) if is_end else "pending"
    began = (  # ids are hex digits, drawn here or read as such (sidecar/core/trace.py)
        f'{{"time":"{timestamp(exchange.started_ns)}","schema":"{SCHEMA}",'
        f'"phase":"{"end" if is_end else "begin"}","outcome":"{outcome}",'  # not `phase.value`, which is dear
        f'"trace_id":"{exchange.trace_id}","span_id":"{exchange.span_id}",'
        f'"direction":"{"inbound" if outbound is None else "outbound"}",'
    )
    return b'%b%b,"http":%b,%b,"result":%b,"decision":%b,%b\n' % (
        began.encode("ascii"),
        _parties(exchange),
        _http(cut(connection.method), cut(connection.path), exchange.status, exchange.removed),
        _asked(exchange, audit),
        _result(exchange, audit) if was_sent and is_end else b"null",
        _decision(exchange, "allowed" if was_sent else "refused"),
        _ended(exchange),
    )


def _ended(exchange: Exchange) -> bytes:
    """Return the last members: limits, charges, times, and what cut the answer off."""
    charges = () if exchange.admission is None else exchange.admission.charges
    # Times are cut to whole microseconds by `// 1`: `round` costs ten times as much, `int` twice.
    judged_s, sent_s, answered_s = exchange.judged_s, exchange.sent_s, exchange.upstream_s
    return _json(
        {
            "limits": [each.rule.limit.name for each in charges],
            "charges": [
                {
                    "limit": each.rule.limit.name,
                    "units": each.cost,
                    "remaining": each.remaining,
                    "warned": each.warned,
                    "fallback": each.is_fallback,
                    "over": each.wait_s > 0,
                }
                for each in charges
            ],
            "latency_s": {
                "judge": judged_s * 1e6 // 1 / 1e6,
                "wait": None if sent_s is None else max(0.0, sent_s - judged_s) * 1e6 // 1 / 1e6,
                "upstream": None if answered_s is None else (answered_s - (sent_s or 0.0)) * 1e6 // 1 / 1e6,
                "total": exchange.total_s * 1e6 // 1 / 1e6,
            },
            "aborted": exchange.aborted,
        }
    )[1:]


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer beyond 64 bits, a lone surrogate: legal JSON, so callers can send it
        return orjson.dumps(_plain(value))


def timestamp(unix_ns: int) -> str:
    """Return the moment as RFC 3339 in UTC with nanoseconds."""
    seconds, rest_ns = divmod(unix_ns, 1_000_000_000)
    return "%s.%09dZ" % (_second(seconds), rest_ns)  # noqa: UP031 - half as dear as an f-string with a width


@lru_cache(maxsize=4)  # calls of the same second share it
def _second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


@lru_cache(maxsize=1024)  # a session makes many calls; an id is 256 characters at most
def fingerprint(session_id: str) -> str:
    """Return what stands for *session_id* where the id itself must not be kept."""
    return sha256(session_id.encode(errors="backslashreplace")).hexdigest()[:SESSION_HASH_CHARS]


def error_type(exchange: Exchange) -> str:
    """Return `error.type` of OpenTelemetry's conventions: a reason, a JSON-RPC code …; empty when all went well."""
    if exchange.refusal is not None:
        return exchange.refusal.reason
    if exchange.error_code is not None:
        return str(exchange.error_code)
    if exchange.tool_failed:
        return TOOL_ERROR
    return "" if exchange.aborted is None else ABORTED


def _outcome(exchange: Exchange) -> str:
    if not exchange.was_sent:
        return "refused"
    if exchange.aborted is not None:
        return "aborted"
    is_error = exchange.refusal is not None or exchange.error_code is not None or exchange.tool_failed
    return "error" if is_error else "success"


_STRICTEST: Final = Audit(arguments="hash", results="hash")  # before there is a profile, nothing says what may be kept


# By identity, as far as it goes: a server, a verified user and workload are the same objects from call to call. Entries
# hold what their keys are the addresses of, so that no other object can have one.
_sessions: dict[tuple[object, ...], tuple[tuple[object, ...], bytes]] = {}


def _parties(exchange: Exchange) -> bytes:
    """Return the members from `server` to `protocol_version`, which the calls of a session share."""
    principal, connection, agent, session_id = (
        exchange.principal,
        exchange.connection,
        exchange.agent,
        exchange.session_id,
    )
    version = cut(exchange.protocol_version)
    if connection.peer is None or exchange.profile is None or exchange.outbound is not None:
        return _written_parties(exchange)
    server, user = exchange.profile.server, None if principal is None else principal.user
    workload = connection.peer.spiffe_id if principal is None else principal.workload
    key = (
        id(server),
        id(user),
        id(workload),
        connection.client,
        agent.session,
        agent.client_name,
        agent.client_version,
        None if session_id is None else fingerprint(session_id),
        version,
    )
    found = _sessions.get(key)
    if found is None:
        while len(_sessions) >= MAX_KEPT:
            del _sessions[next(iter(_sessions))]
        found = _sessions[key] = ((server, user, workload), _written_parties(exchange))
    return found[1]


def _written_parties(exchange: Exchange) -> bytes:
    profile, agent, session_id = exchange.profile, exchange.agent, exchange.session_id
    # Where the MCP session stands in for the agent's own (sidecar/pipeline.py), the hash of that.
    stands_in = agent.session is not None and agent.session == session_id
    server = None if profile is None else profile.server
    parties = {
        "server": None
        if server is None
        else {"namespace": server.namespace, "workload": server.workload, "name": server.name},
        "who": _caller(exchange),
        "destination": None if exchange.outbound is None else _destination(exchange.outbound),
        "agent": {
            "session": fingerprint(agent.session or "") if stands_in else cut(agent.session),
            "client_name": cut(agent.client_name),
            "client_version": cut(agent.client_version),
        },
        "session": None if session_id is None else fingerprint(session_id),
        "protocol_version": cut(exchange.protocol_version),
    }
    return _json(parties)[1:-1]


@lru_cache(maxsize=MAX_KEPT)
def _http(method: str, path: str, status: int, removed: tuple[str, ...]) -> bytes:
    return _json({"method": method, "path": path, "status": status, "removed": [cut(name) for name in removed]})


def _caller(exchange: Exchange) -> dict[str, Any]:
    principal, peer = exchange.principal, exchange.connection.peer
    # A workload that may not call is refused before it becomes a principal; its SVID was verified all the same.
    workload = peer.spiffe_id if principal is None and peer is not None else principal and principal.workload
    user = None if principal is None else principal.user
    return {
        "user": None if user is None else _user(user),
        "delegation": [] if user is None else [{"sub": each.sub, "actor": each.actor} for each in user.delegation],
        "workload": None if workload is None else str(workload),
        "proof": None
        if workload is None
        else "jwt-svid"
        if peer is None and exchange.outbound is None
        else "x509-svid",
        "client": exchange.connection.client,
    }


def _destination(outbound: Outbound) -> dict[str, Any]:
    return {
        "host": cut(outbound.host),
        "port": outbound.port,
        "expected": outbound.expected,
        "address": outbound.address,
        "workload": None if outbound.server is None else str(outbound.server),
    }


def _user(user: User) -> dict[str, Any]:
    """Return *user* without the other claims; bounded by the size of a token (sidecar/core/identity.py)."""
    return {
        "id": user.id,
        "issuer": user.issuer,
        "provider": user.provider,
        "email": user.email,
        "role": user.role,
        "roles": user.roles,
        "groups": user.groups,
    }


_QUERY: Final = re.compile("[?#]")


def _asked(exchange: Exchange, audit: Audit) -> bytes:
    """Return the members `message` and `arguments`; made once for both of a call's records."""
    message = exchange.message
    if message is None:
        return b'"message":null,"arguments":null'
    if exchange.recorded is None:
        target, arguments = message.target, b"null"
        if isinstance(target, _WITH_ARGUMENTS):
            content = arguments_of(exchange, target, audit)
            arguments = b'{%b,"bytes":%d,"sha256":"%b"}' % (
                _kept(content, audit.arguments, audit),
                content.size_bytes,
                content.sha256.encode("ascii"),
            )
        exchange.recorded = b'"message":%b,"arguments":%b' % (_message(message), arguments)
    return exchange.recorded


def _message(message: Message) -> bytes:
    target = message.target
    if type(target) is Tool and len(target.name) <= MAX_TEXT_CHARS:
        described = _call(message.shape, message.method, target.name)
    else:
        described = _json(_described(message))[:-1]
    number = message.id
    if type(number) is int and abs(number) <= MAX_ID:
        return b'%b,"id":%d}' % (described, number)
    return b'%b,"id":%b}' % (described, _json(number))


@lru_cache(maxsize=MAX_KEPT)
def _call(shape: Shape, method: str, tool: str) -> bytes:
    target = Tool(name=tool, arguments={})
    return _json(_described(Message(shape=shape, method=method, target=target, params={})))[:-1]


def _described(message: Message) -> dict[str, Any]:
    target = message.target
    return {
        "shape": message.shape,
        "method": message.method,
        "tool": cut(target.name) if isinstance(target, Tool) else None,
        "prompt": cut(target.name) if isinstance(target, Prompt) else None,
        "resource": cut(target.uri) if isinstance(target, Resource) else None,
        "task": fingerprint(target.id) if isinstance(target, Task) else None,
        "subscribed": [cut(uri) for uri in target.resources[:MAX_SUBSCRIBED]]
        if isinstance(target, Subscription)
        else [],
        # The query may hold what is meant for the user's eyes only.
        "url": cut(_QUERY.split(target.url, maxsplit=1)[0]) if isinstance(target, Ask) and target.url else None,
    }


_WITH_ARGUMENTS: Final = (Tool, Prompt)


def arguments_of(exchange: Exchange, target: Tool | Prompt, audit: Audit) -> Content:
    """Return the arguments without what must not be kept."""
    kept = redact(target.arguments, audit.redact)
    return _without_content(exchange, kept, ARGUMENTS) if exchange.content else kept


def _without_content(exchange: Exchange, content: Content, scope: Scope) -> Content:
    """Return *content* without what content rules found in it."""
    rules = None if exchange.profile is None else compiled(exchange.profile.content)
    if rules is None:
        return content
    where = "arguments" if scope is ARGUMENTS else "results"
    data = rules.redacted(content.data, [each for each in exchange.content if each.where == where], scope)
    return content if data == content.data else Content(data, content.size_bytes, redacted=True)


def _decision(exchange: Exchange, outcome: str) -> bytes:
    refusal, permit, shadow = exchange.refusal, exchange.permit, exchange.shadow
    if refusal is None and permit is not None and not shadow and not exchange.content:
        return _permitted(outcome, permit.policies, exchange.revision)
    decision = {
        "outcome": outcome,
        "reason": None if refusal is None else refusal.reason,
        "detail": None if refusal is None else cut(refusal.detail or refusal.public),
        "policies": [] if permit is None else permit.policies,
        "shadow": [{"policy": each.policy, "allowed": each.allowed} for each in shadow],
        "content": list(summary(exchange.content)),
        "revision": exchange.revision,
    }
    return _json(decision)


@lru_cache(maxsize=MAX_KEPT)
def _permitted(outcome: str, policies: tuple[str, ...], revision: str) -> bytes:
    verdict: dict[str, Any] = {
        "outcome": outcome,
        "reason": None,
        "detail": None,
        "policies": policies,
        "shadow": [],
        "content": [],
    }
    return _json({**verdict, "revision": revision})


def _result(exchange: Exchange, audit: Audit) -> bytes:
    content = answer(exchange, audit)
    digest = content.sha256 if content is not None and content.redacted else exchange.result_sha256
    return b'{%b,"bytes":%d,"sha256":%b,"is_error":%b,"error_code":%b,"hidden":%d}' % (
        _NOTHING_KEPT if content is None else _kept(content, audit.results, audit),
        exchange.result_bytes,
        b"null" if digest is None else b'"%b"' % digest.encode("ascii"),
        _BOOLEANS[exchange.tool_failed],
        b"null" if exchange.error_code is None else _json(exchange.error_code),
        exchange.hidden,
    )


_NOTHING_KEPT: Final = b'"content":null,"truncated":false,"redacted":false'


def answer(exchange: Exchange, audit: Audit) -> Content | None:
    """Return what the server said; None when there was no answer, or none that was kept and can be read."""
    if exchange.result is None:
        return None
    try:
        document = orjson.loads(exchange.result)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    kept = redact(document.get("result", document.get("error")), audit.redact)
    return _without_content(exchange, kept, RESULT) if exchange.content else kept


def _kept(content: Content, how: str, audit: Audit) -> bytes:
    """Return the members that tell of *content*."""
    truncated = how == "full" and len(content.data) > audit.max_bytes
    if how != "full":
        kept = b"null"
    elif truncated:
        kept = _json(content.cut(audit.max_bytes))
    else:
        kept = content.data
    return b'"content":%b,"truncated":%b,"redacted":%b' % (kept, _BOOLEANS[truncated], _BOOLEANS[content.redacted])


_BOOLEANS: Final = (b"false", b"true")


def cut(text: str | None) -> str | None:
    """Return *text*, or its beginning and an ellipsis when it is longer than a record may hold."""
    return text if text is None or len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "…"


def _plain(value: Any) -> Any:
    """Return *value* without what orjson refuses: surrogates escaped, integers beyond 64 bits as text."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case bool():
            return value
        case int():
            return value if -(2**63) <= value < 2**64 else str(value)
        case Mapping():
            return {key: _plain(member) for key, member in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
