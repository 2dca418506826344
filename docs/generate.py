"""Write the reference pages that are made of code: `python docs/generate.py`; with --check, fail if one is out of date."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

import sidecar.config
import sidecar.record
import webhook.config
from sidecar.core import chain, conventions, otel, profile
from sidecar.core.agreement import ParamHeaders, check
from sidecar.core.asks import ASKS, FOLLOW_UPS
from sidecar.core.connection import Connection
from sidecar.core.identity import trust
from sidecar.core.message import GONE, NOTIFICATIONS, REQUESTS, Listing, Message, Shape, Subscription, Task, Tool
from sidecar.core.replies import answer
from sidecar.core.revision import CAPABILITIES, VERSION, Revision
from sidecar.errors import Reason, Refusal
from sidecar.pipeline import CANCELLED, Snapshot, read
from sidecar.shell import metrics
from webhook.core import annotations, contract, quantity, resources, siem
from webhook.core.surroundings import decode_peers, decode_reach

REFERENCE: Final = Path(__file__).parent / "reference"
NOTE: Final = "<!-- Made by docs/generate.py from the code; edit the code. -->\n"


def pages() -> Iterator[tuple[str, str]]:
    """Yield (file name, text) of every generated page."""
    yield "sidecar-settings.md", _settings("Settings of the sidecar", sidecar.config)
    yield "control-plane-settings.md", _settings("Settings of the control plane", webhook.config)
    yield "annotations.md", _annotations()
    yield "profile.md", _profile()
    yield "custom-resources.md", _resources()
    yield "refusals.md", _refusals()
    yield "methods.md", _methods()
    yield "spans.md", _spans()
    yield "metrics.md", _metrics()
    yield "log-fields.md", _log_fields()
    yield "otel-variables.md", _otel_variables()
    yield "policy-input.md", _policy_input()
    yield "audit-record.md", _filled("audit-record.md", fields=_fields(), chain=_chain(), siem=_siem())
    yield "audit-record.schema.json", json.dumps(sidecar.record.json_schema(), indent=1) + "\n"
    yield "revisions.md", _filled("revisions.md", taken=_taken(), denied=_denied())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _settings(title: str, module: Any) -> str:
    rows = [
        (
            f"`{module.PREFIX}{field.name.upper()}`",
            f"`{spelt}`" if (spelt := _spelt(field)) else "",
            field.metadata["meaning"],
        )
        for field in dataclasses.fields(module.Settings)
    ]
    text = (
        "Read once from the environment; an unknown or unusable one stops the process with a message that names it.\n"
    )
    return f"{NOTE}# {title}\n\n{text}\n{_table(('variable', 'default', 'meaning'), rows)}"


def _spelt(field: Any) -> str:
    """Return the default of a setting as its variable would say it."""
    match field.default:
        case int() as amount if field.metadata["parse"] is quantity.parse_cpu:
            return quantity.cpu(amount)
        case int() as amount if field.metadata["parse"] is quantity.parse_memory:
            return quantity.memory(amount)
        case tuple() as peers if field.metadata["parse"] in (decode_peers, decode_reach):
            return json.dumps(
                [{key: value for key, value in msgspec.to_builtins(each).items() if value} for each in peers]
            )
        case tuple() as names:
            return ",".join(names)
        case float() as number:
            return f"{number:.15g}"
        case other:
            return str(other)


CHANGED = """\
## What changes in a pod

Everything else comes out as it went in, in its order, unknown fields included.

- Our own init containers go first: `sidegate-net` (capture mode `redirect`), `sidegate-relay` (a stdio server), `sidegate`.
- Our own volumes go first: `sidegate-spiffe`, `sidegate-cache`, `sidegate-no-token`, `sidegate-relay`.
- The labels and the annotation that the webhook writes; the pull secrets of the sidecar's image are appended.
- Startup, liveness and readiness probes by HTTP, HTTPS, TCP and gRPC, and HTTP hooks, point at the sidecar's port 15020.
  They are performed there as the kubelet would. Thresholds, exec, sleep, and what is aimed at another host stay.
- In capture mode `remap` the name of the MCP port moves from the application's port to the sidecar's; Services follow it.
- In capture mode `remap` an agent's containers get `HTTP_PROXY` and `NO_PROXY`.
- Containers of a server get the limits of CPU and memory that they lack, with requests, unless the operator has it otherwise.
- The command of a stdio server is wrapped in the relay.
"""


def _annotations() -> str:
    labels = [
        (f"`{annotations.GROUP}/{each.name}`", each.place, each.writer, each.values, each.meaning)
        for each in annotations.LABELS
    ]
    rows = [
        (f"`{annotations.GROUP}/{each.name}`", f"`{each.example}`", each.default, each.meaning)
        for each in annotations.TABLE
    ]
    return (
        f"{NOTE}# Labels and annotations\n\n"
        "## Labels\n\nThey decide whether a pod is governed: the API server selects by them. "
        "A value of a pod's that is not listed is refused.\n\n"
        f"{_table(('label', 'on a', 'written by', 'values', 'meaning'), labels)}\n"
        "## Annotations\n\nOn a pod's template; they adjust what the sidecar does. "
        f"An unknown `{annotations.GROUP}/` annotation, or a value that its line does not allow, is refused.\n\n"
        f"{_table(('annotation', 'example', 'default', 'meaning'), rows)}\n"
        f"The webhook writes `{annotations.STATUS}`: version, revision, hash of the settings, capture mode, port. "
        "It is information for people, never evidence.\n\n"
        f"{CHANGED}"
    )


def _profile() -> str:
    text = "`sidegate.json` in a bundle. Unknown fields are refused.\n"
    return f"{NOTE}# The profile of a workload\n\n{text}{_records(profile)}"


def _resources() -> str:
    text = (
        f"In `sidegate.dev/{resources.VERSION}`; each table is the `spec` of a kind, or a part of one.\n"
        "A workload gets what is selected for its pod: a namespace can tighten what the cluster says, never widen it.\n"
    )
    return f"{NOTE}# Custom resources\n\n{text}{_records(resources)}"


def _records(module: Any) -> str:
    """Return a section for each record that *module* defines."""
    parts = []
    for record in vars(module).values():
        is_record = isinstance(record, type) and issubclass(record, module.Record) and record is not module.Record
        if not is_record:
            continue
        rows = []
        for field in msgspec.inspect.type_info(record).fields:
            required = field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
            default = "required" if required else f"`{msgspec.json.encode(_default(field)).decode()}`"
            rows.append((f"`{field.encode_name}`", _type_name(field.type), default))
        parts.append(f"\n## {record.__name__}\n\n{record.__doc__}\n\n{_table(('field', 'type', 'default'), rows)}")
    return "".join(parts)


def _default(field: Any) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def _type_name(kind: Any) -> str:
    match kind:
        case msgspec.inspect.LiteralType(values=values):
            return " | ".join(f"`{value}`" for value in values)
        case msgspec.inspect.VarTupleType(item_type=item) | msgspec.inspect.ListType(item_type=item):
            return f"list of {_type_name(item)}"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_type_name(each) for each in types)
        case msgspec.inspect.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case msgspec.inspect.NoneType():
            return "null"
        case msgspec.inspect.IntType(ge=low, le=high):
            return "integer" + (f", {low} to {high}" if low is not None and high is not None else "")
        case _:
            return type(kind).__name__.removesuffix("Type").lower().replace("str", "string").replace("dict", "object")


def _refusals() -> str:
    rows = []
    for reason in Reason:
        shown = [
            answer(Refusal(reason, ""), _call(revision)) for revision in (Revision.V2025_11_25, Revision.V2026_07_28)
        ]
        old, new = (f"{each.status} / {msgspec.json.decode(each.body)['error']['code']}" for each in shown)
        rows.append((f"`{reason}`", old, "the same" if new == old else new))
    text = (
        "Every message that does not pass has one of these reasons: in the answer, the audit record, the metric and the log.\n"
        "HTTP status and JSON-RPC code are those of a refused call; what could not be read at all is answered with HTTP 400.\n"
    )
    return f"{NOTE}# Refusals\n\n{text}\n{_table(('reason', 'up to 2025-11-25', 'from 2026-07-28 on'), rows)}"


def _call(revision: Revision) -> Message:
    target = Tool(name="x", arguments={})
    return Message(shape=Shape.REQUEST, method="tools/call", id=1, target=target, params={}, revision=revision)


def _filled(name: str, **tables: str) -> str:
    """Return the page *name*, which is written by hand, with its tables made anew."""
    text = (REFERENCE / name).read_text()
    for table, made in tables.items():
        start, end = f"<!-- table: {table} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{made}{end}{rest.partition(end)[2]}"
    return text


def _taken() -> str:
    """Return what of a client's messages is read in each revision, found out by reading them."""
    rows = [(what, *(_read(revision, what) for revision in Revision)) for what in _SAMPLES]
    return _table(("", *Revision), rows)


# HTTP method, the messages of the body, and the headers that are left out or changed.
_SAMPLES: Final[dict[str, tuple[str, tuple[str, ...], dict[bytes, bytes | None]]]] = {
    "a request": ("POST", ("request",), {}),
    "a batch": ("POST", ("request", "notification"), {}),
    "a client's response": ("POST", ("response",), {}),
    "GET": ("GET", (), {}),
    "DELETE": ("DELETE", (), {}),
    "a request without `Mcp-Method`": ("POST", ("request",), {b"mcp-method": None}),
    "a request without `Mcp-Name`": ("POST", ("request",), {b"mcp-name": None}),
    "a request whose `Mcp-Name` names another tool": ("POST", ("request",), {b"mcp-name": b"y"}),
}


def _read(revision: Revision, sample: str) -> str:
    method, messages, changes = _SAMPLES[sample]
    version = None if revision is Revision.V2024_11_05 else revision.encode()
    headers = {b"mcp-protocol-version": version}
    if messages == ("request",):
        headers |= {b"mcp-method": b"tools/call", b"mcp-name": b"x"}
    meta = {VERSION: str(revision), CAPABILITIES: {}} if revision.is_modern else {}
    written = {
        "request": {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "x", "_meta": meta}},
        "notification": {"jsonrpc": "2.0", "method": "notifications/progress"},
        "response": {"jsonrpc": "2.0", "id": 1, "result": {}},
    }
    body = [written[message] for message in messages]
    connection = Connection(
        peer=None,
        client="",
        method=method,
        path="/mcp",
        query="",
        headers=[(name, value) for name, value in (headers | changes).items() if value is not None],
        body=msgspec.json.encode(body[0] if len(body) == 1 else body) if body else b"",
    )
    transport: Any = "sse" if revision is Revision.V2024_11_05 else "http"
    server = profile.Server(namespace="", workload="", name="", port=1, transport=transport)
    snapshot = Snapshot(
        profile=profile.Profile(server=server), revision="", engines=(), trust=trust(profile.Identity(), {})
    )
    found = None
    try:
        found = read(connection, snapshot)
        if isinstance(found, Message):
            check(connection, found, ParamHeaders())
    except Refusal as refusal:
        status = answer(refusal, found if isinstance(found, Message) else None).status
        return f"`{refusal.reason}`, HTTP {status}"
    return "read"


def _denied() -> str:
    """Return the body of a denied call of a tool, in each shape."""
    rows = []
    for shape in ("error", "tool_error", "conceal"):
        for revision in (Revision.V2025_11_25, Revision.V2026_07_28):
            response = answer(Refusal(Reason.DENIED, "policy does not allow …"), _call(revision), shape)
            era = "from 2026-07-28 on" if revision.is_modern else "up to 2025-11-25"
            rows.append((f"`{shape}`", era, str(response.status), f"`{response.body.decode()}`"))
    return _table(("`denied`", "", "HTTP status", "body"), rows)


def _fields() -> str:
    rows = [(f"`{path}`", kind, meaning) for path, kind, meaning in sidecar.record.FIELDS]
    return _table(("member", "type", "meaning"), rows)


def _chain() -> str:
    return _table(("member", "type", "meaning"), [(f"`{path}`", kind, said) for path, kind, said in chain.FIELDS])


def _siem() -> str:
    rows = [(f"`{row.source}`", row.ecs and f"`{row.ecs}`", row.ocsf and f"`{row.ocsf}`") for row in siem.TABLE]
    return _table(("record", "ECS", "OCSF"), rows)


def _methods() -> str:
    rows = [
        (f"`{method}`" + (", up to 2025-11-25" if method in GONE else ""), _judged_on(method)) for method in REQUESTS
    ]
    rows += [(f"`{method}`", WHOSE if method == CANCELLED else PASSES) for method in sorted(NOTIFICATIONS)]
    rows.append(("a response", WHOSE))
    asked = [(f"`{method}`", "policy, on the server: `input.method` is the method") for method in sorted(ASKS)]
    asked += [(f"`{method}`", "nothing: reaches no more than what was asked before") for method in sorted(FOLLOW_UPS)]
    text = "What a client may send, and what it is authorised on. A method that is not here is refused.\n"
    more = "What a server may ask of a client. A method that is not here is refused towards the server.\n"
    head = ("method", "authorised on")
    return f"{NOTE}# Methods\n\n{text}\n{_table(head, rows)}\n{more}\n{_table(head, asked)}"


PASSES: Final = "nothing: passes from an identified caller"
WHOSE: Final = "whose request it is about"


def _judged_on(method: str) -> str:
    if method == "completion/complete":
        return "the prompt or resource whose values it asks for"
    match REQUESTS[method]({"name": "x", "uri": "x", "taskId": "x"}):
        case None:
            return PASSES
        case Listing():
            return "each item of the answer"
        case Task():
            return "whose task it is"
        case Subscription():
            return "each resource that it names, as if it were read; whose tasks they are"
        case target:
            return type(target).__name__.lower()


def _spans() -> str:
    sides = {"both": "both", "server": "SERVER", "client": "CLIENT"}
    rows = [
        (f"`{each.name}`", each.kind, sides[each.side], each.level, each.meaning) for each in conventions.ATTRIBUTES
    ]
    text = (
        "Each message has a SERVER span toward the client; if it was sent on, a CLIENT span toward the server is its child. "
        "In agent role there is one CLIENT span.\n"
        "Names are those of OpenTelemetry's semantic conventions for MCP; what begins with `sidegate.` is ours.\n"
        "The name is `{mcp.method.name} {tool or prompt}`, or the method alone.\n"
        "The parent is the `traceparent` in `params._meta`, otherwise that of the HTTP request, which is a link where there are both.\n"
        "`_meta` travels on as it came; the header that the server gets names our CLIENT span. "
        "Without a receiver the caller's own context travels on.\n"
    )
    return f"{NOTE}# Spans\n\n{text}\n{_table(('attribute', 'type', 'span', 'there', 'meaning'), rows)}"


def _metrics() -> str:
    rows = [
        (
            f"`{each.exposed}`",
            f"`{each.name}`",
            each.kind,
            f"`{each.unit}`" if each.unit else "",
            ", ".join(f"`{label.replace('.', '_')}`" for label in each.labels),
            each.meaning,
        )
        for each in conventions.INSTRUMENTS
    ]
    text = (
        "At `/metrics` of the sidecar's health port, as Prometheus' text or OpenMetrics, which names a sampled call in each "
        "bucket (exemplar); and over OTLP where `OTEL_METRICS_EXPORTER` says so, with dots in the labels' names.\n"
        f"A tool gets a series of its own with its first successful call, {metrics.MAX_TOOLS} of them at most; "
        f"callers {metrics.MAX_CALLERS}, rules {metrics.MAX_RULES}. All others share `{metrics.OTHER}`.\n"
        "Users and sessions are never labels: the audit trail counts for those. "
        "A rule's label is what the policy itself says: keep personal data out of its reasons.\n"
    )
    head = ("in Prometheus", "in OTLP", "kind", "unit", "labels", "meaning")
    return f"{NOTE}# Metrics of the sidecar\n\n{text}\n{_table(head, rows)}"


def _log_fields() -> str:
    rows = [
        (f"`{name}`", kind.rstrip("?"), "no" if kind.endswith("?") else "yes", meaning)
        for name, kind, meaning in conventions.LINE_FIELDS
    ]
    text = (
        "One JSON object on stderr for each message that was judged; `SIDEGATE_REQUEST_LOG` says of which.\n"
        "Other lines have `time`, `level`, `logger` and `message`, and facts of their own.\n"
        "Nothing that the audit trail may hide is in it: no user, no arguments, no result.\n"
        "Where nobody reads stderr, lines are dropped and counted (`sidegate_telemetry_dropped_total`); calls never wait.\n"
    )
    return f"{NOTE}# Log lines of the sidecar\n\n{text}\n{_table(('field', 'type', 'always', 'meaning'), rows)}"


def _otel_variables() -> str:
    rows = [(f"`{each.name}`", f"`{each.default}`" if each.default else "", each.meaning) for each in otel.TABLE]
    text = (
        "Of the sidecar; with the chart, `telemetry.otel` sets them. Those that are not here are not honoured, and a warning "
        "in the log says so.\n"
        "As the specification has it, an empty value counts as unset, and an unusable one is told and replaced by the default.\n"
        "A certificate that cannot be read stops the sidecar.\n"
    )
    return f"{NOTE}# OTEL_* variables\n\n{text}\n{_table(('variable', 'default', 'meaning'), rows)}"


def _policy_input() -> str:
    rows = [
        (f"`input.{name}`", kind.replace("?", " or null").replace("[]", " array"), meaning)
        for name, kind, meaning in contract.FIELDS
    ]
    actions = [(f'`Action::"{name}"`', f"`{resource}`") for name, resource in contract.ACTIONS.items()]
    text = (
        f"Version `{contract.VERSION}`: a member may be added in v1; a changed or missing one would be v2.\n"
        "`any` is what the caller or the identity provider wrote.\n"
    )
    cedar = (
        'In Cedar the principal is `User::"<issuer>#<id>"` in its `Role`s and `Group`s, without a user '
        '`Workload::"<SPIFFE ID>"`, without either `Anonymous::"anonymous"`; the rest is in `context`: `args` (of the tool or '
        "prompt), `claims`, `method`, `workload`, `agent`, `request`, `delegation`, `elicitation`. What is null is absent.\n"
    )
    return (
        f"{NOTE}# What a policy sees\n\n{text}\n{_table(('field', 'type', 'meaning'), rows)}\n"
        f"## Cedar\n\n{cedar}\n{_table(('action', 'resource'), actions)}\n"
        f"The schema that policies are validated against:\n\n```cedarschema\n{contract.cedar_schema()}```\n\n"
        f"## JSON Schema\n\n```json\n{json.dumps(contract.json_schema(), indent=1)}\n```\n"
    )


def main() -> int:
    """Write or check the pages; return the exit status."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, text in pages():
        path = REFERENCE / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; hint: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
