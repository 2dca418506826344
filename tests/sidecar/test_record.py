"""Every exchange has one record, bounded and complete; docs/reference/audit-record.schema.json is its schema."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from certs.spiffe import SpiffeId
from certs.verify import Peer
from sidecar.core.authorise import Agent, Difference
from sidecar.core.chain import Chain
from sidecar.core.identity import Principal
from sidecar.core.limits import Admission, Charge, Rule
from sidecar.core.message import Ask, Message, Prompt, Resource, Shape, Subscription, Target, Task, Tool, parse
from sidecar.core.profile import Audit, Limit
from sidecar.core.redaction import encode, redact
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange, Outbound
from sidecar.record import FIELDS, MAX_SUBSCRIBED, MAX_TEXT_CHARS, SCHEMA, Phase, cut, fingerprint, line, timestamp
from tests.sidecar.exchanges import (
    AGENT,
    ALICE,
    STARTED_NS,
    a_call,
    a_connection,
    a_profile,
    a_refused_exchange,
    an_exchange,
    an_unreadable_exchange,
)

SERVER_ID = SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "audit-record.schema.json"


def _written(exchange: Exchange) -> Any:
    text = line(exchange)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    return json.loads(text)


def test_allowed_call_says_who_what_and_why() -> None:
    """An admitted call's record names the human, the workload, the tool, the policy and its revision."""
    record = _written(an_exchange(a_call("read_schema", {"table": "invoices"})))

    assert record["schema"] == SCHEMA
    assert record["time"] == "2026-11-22T12:20:00.123456789Z"
    assert (record["who"]["user"]["id"], record["who"]["user"]["issuer"]) == ("alice", "https://id.test")
    assert str(AGENT) == record["who"]["workload"]
    assert record["message"]["tool"] == "read_schema"
    assert record["arguments"]["content"] == {"table": "invoices"}
    assert record["result"]["content"] == {"content": [{"type": "text", "text": "ok"}]}
    assert (record["decision"]["outcome"], record["decision"]["reason"]) == ("allowed", None)
    assert record["decision"]["policies"] == ["analysts-read"]
    assert record["decision"]["revision"] == "a1b2"
    assert record["limits"] == ["per-user"]


def test_refused_call_says_what_was_asked_and_never_sent() -> None:
    """A denial keeps the question, its reason and the operator's detail; there is no result."""
    record = _written(a_refused_exchange(message=a_call("drop_table", {"name": "invoices"})))

    assert record["decision"] == {
        "outcome": "refused",
        "reason": "denied",
        "detail": "forbid-deletes",
        "policies": [],
        "shadow": [],
        "content": [],
        "revision": "a1b2",
    }
    assert record["message"]["tool"] == "drop_table"
    assert record["arguments"]["content"] == {"name": "invoices"}
    assert record["result"] is None


def test_call_that_failed_behind_us_counts_as_allowed() -> None:
    """It reached the server and may have had its effect: the record must not say that it was stopped."""
    record = _written(an_exchange(refusal=Refusal(Reason.UPSTREAM, "the server closed"), result=None))

    assert (record["decision"]["outcome"], record["decision"]["reason"]) == ("allowed", "upstream")
    assert record["result"]["content"] is None


def test_unreadable_message_has_a_record() -> None:
    """Bytes that are no message leave who is known: the address and the verified SVID."""
    record = _written(an_unreadable_exchange())

    assert record["message"] is None
    assert record["arguments"] is None
    who = {"user": None, "delegation": [], "workload": str(AGENT), "proof": "x509-svid", "client": "10.0.0.9:41234"}
    assert who == record["who"]
    assert record["decision"]["reason"] == "malformed"


def test_before_any_profile_no_content_is_kept() -> None:
    """Nothing says yet what may be kept, so only sizes and hashes are."""
    exchange = a_refused_exchange(Reason.NOT_READY, message=a_call("t", {"a": "private"}))

    record = _written(replace(exchange, profile=None))

    assert record["server"] is None
    assert record["arguments"]["content"] is None
    assert len(record["arguments"]["sha256"]) == 64


def test_secrets_are_hidden_in_arguments_and_results() -> None:
    """The profile's names hold for what goes in and for what comes out."""
    answer = b'{"jsonrpc":"2.0","id":7,"result":{"structuredContent":{"token":"tok-1"}}}'

    text = line(an_exchange(a_call("login", {"user": "a", "Password": "hunter2"}), result=answer))

    assert b"hunter2" not in text
    assert b"tok-1" not in text
    record = json.loads(text)
    assert record["arguments"]["content"] == {"user": "a", "Password": "[redacted]"}
    assert (record["arguments"]["redacted"], record["result"]["redacted"]) == (True, True)
    assert record["result"]["sha256"] != "5e" * 32  # the answer's own hash covers the token


def test_token_claims_and_session_id_are_never_kept() -> None:
    """Only the claims of the schema are; a session id could still be used."""
    text = line(an_exchange())

    assert b"not for the record" not in text
    assert b"8a1f-session" not in text
    assert fingerprint("8a1f-session") == json.loads(text)["session"]


def test_session_standing_in_for_the_agent_session_is_hashed_too() -> None:
    """The pipeline names the MCP session where the caller names no session of its own."""
    text = line(an_exchange(agent=Agent(session="8a1f-session")))

    assert b"8a1f-session" not in text
    assert fingerprint("8a1f-session") == json.loads(text)["agent"]["session"]


def test_hash_mode_keeps_sizes_and_hashes_only() -> None:
    """`audit.arguments: hash` and `audit.results: hash`."""
    profile = a_profile(audit=Audit(arguments="hash", results="hash"))

    record = _written(an_exchange(a_call("t", {"a": "private"}), profile=profile))

    assert (record["arguments"]["content"], record["arguments"]["truncated"]) == (None, False)
    assert record["arguments"]["bytes"] == 15
    assert record["result"]["content"] is None
    assert record["result"]["sha256"] == "5e" * 32


def test_large_content_is_cut_and_says_so() -> None:
    """What exceeds `max_bytes` is kept as the beginning of its text."""
    record = _written(an_exchange(a_call("t", {"a": "x" * 100}), profile=a_profile(audit=Audit(max_bytes=10))))

    assert record["arguments"]["content"] == '{"a":"xxxx'
    assert record["arguments"]["truncated"]
    assert record["arguments"]["bytes"] == 108


@pytest.mark.parametrize("answer", [b"not json", b"[1]", None])
def test_answer_that_cannot_be_read_leaves_size_and_hash(answer: bytes | None) -> None:
    """An answer that was too large or is odd does not break the line."""
    record = _written(an_exchange(result=answer, result_bytes=9_000_000))

    assert (record["result"]["content"], record["result"]["bytes"]) == (None, 9_000_000)


def test_error_of_the_server_is_kept() -> None:
    """A JSON-RPC error is the answer."""
    answer = b'{"jsonrpc":"2.0","id":7,"error":{"code":-32602,"message":"no such tool"}}'

    record = _written(an_exchange(result=answer, error_code=-32602))

    assert record["result"]["content"] == {"code": -32602, "message": "no such tool"}
    assert record["result"]["error_code"] == -32602


def test_prompts_and_resources_are_named() -> None:
    """Each kind of target has its own member."""
    prompt = Message(
        shape=Shape.REQUEST, method="prompts/get", target=Prompt(name="p", arguments={"a": "b"}), params={}
    )
    resource = Message(shape=Shape.REQUEST, method="resources/read", target=Resource(uri="file:///a"), params={})

    assert _named(_written(an_exchange(prompt)), "prompt") == ("p", {"a": "b"})
    assert _named(_written(an_exchange(resource)), "resource") == ("file:///a", None)


def _named(record: Any, kind: str) -> tuple[str, Any]:
    return record["message"][kind], record["arguments"] and record["arguments"]["content"]


def test_what_a_caller_chooses_is_bounded() -> None:
    """A tool's name of a megabyte does not make a record of a megabyte."""
    exchange = an_exchange(
        Message(shape=Shape.REQUEST, method="tools/call", id=1, target=Tool(name="x" * 2**20, arguments={}), params={}),
        connection=a_connection(path="/" + "p" * 2**20),
        protocol_version="v" * 2**20,
        agent=Agent(session="s" * 2**20, client_name="c" * 2**20, client_version="d" * 2**20),
        refusal=Refusal(Reason.DENIED, "", detail="e" * 2**20),
    )

    assert len(line(exchange)) < 8 * (MAX_TEXT_CHARS + 3) + 2048


@given(
    request_id=st.integers() | st.text(st.characters(), max_size=40),
    name=st.text(st.characters(), max_size=40),
    arguments=st.dictionaries(st.text(), st.text(st.characters()) | st.integers() | st.none(), max_size=4),
    code=st.integers(),
    result=st.binary(max_size=60),
)
def test_line_is_total_and_one_line(
    request_id: str | int, name: str, arguments: dict[str, Any], code: int, result: bytes
) -> None:
    """Whatever a caller or server sends, the record is one line of JSON."""
    message = Message(
        shape=Shape.REQUEST,
        method="tools/call",
        id=request_id,
        target=Tool(name=name, arguments=arguments),
        params={},
    )

    profile = a_profile(audit=Audit(redact=()))

    record = _written(an_exchange(message, profile=profile, error_code=code, result=result, session_id=name))

    assert (arguments or {}) == record["arguments"]["content"]


@given(unix_ns=st.integers(min_value=0, max_value=4_000_000_000 * 10**9))
def test_timestamp_keeps_every_nanosecond(unix_ns: int) -> None:
    """Two records of the same second can be put in order."""
    text = timestamp(unix_ns)

    assert len("2026-11-22T12:20:00.123456789Z") == len(text)
    assert unix_ns % 10**9 == int(text[20:29])


def test_caller_refused_before_it_is_a_principal_is_named() -> None:
    """A workload that may not call has a verified SVID all the same."""
    record = _written(a_refused_exchange(Reason.FORBIDDEN_CALLER, principal=None))

    assert str(SpiffeId.parse("spiffe://a.test/ns/agents/sa/planner")) == record["who"]["workload"]


def _paths(value: Any, prefix: str = "") -> set[str]:
    """Return the dotted paths of *value*; below `content` it is the caller's."""
    if not isinstance(value, dict) or prefix.endswith("content."):
        return set()
    return {prefix + key for key in value}.union(*(_paths(value[key], f"{prefix}{key}.") for key in value))


def test_schema_names_every_member_and_no_other() -> None:
    """FIELDS and the record agree; the fullest record shows every member."""
    outbound = Outbound(host="records.demo", port=8000, expected="spiffe://a.test/ns/demo/sa/*", server=AGENT)
    fullest = an_exchange(a_call("t", {"a": 1}), outbound=outbound)
    assert {path for path, _, _ in FIELDS} == _paths(_written(fullest))


def test_outbound_call_says_where_it_went() -> None:
    """Sent only once the server has proven its identity; without, the record says whom we wanted to meet."""
    outbound = Outbound(host="records.demo", port=8000, expected="spiffe://a.test/ns/demo/sa/*", server=AGENT)
    sent = _written(an_exchange(admission=None, permit=None, outbound=outbound))
    kept = _written(a_refused_exchange(Reason.UPSTREAM, outbound=replace(outbound, server=None)))

    assert (sent["direction"], sent["decision"]["outcome"]) == ("outbound", "allowed")
    assert sent["destination"]["workload"] == str(AGENT)
    assert (kept["decision"]["outcome"], kept["destination"]["workload"], kept["result"]) == ("refused", None, None)


def test_a_token_is_told_from_a_certificate() -> None:
    """A bearer token can be stolen, a certificate's key cannot be read from a call."""
    connection = replace(an_exchange().connection, peer=None)

    assert _written(an_exchange(connection=connection))["who"]["proof"] == "jwt-svid"


def test_members_that_may_be_null_say_so() -> None:
    """A reader of the schema is not surprised by null."""
    nullable = {path for path, kind, _ in FIELDS if kind.endswith("?") or kind == "any"}
    bare = [_written(an_unreadable_exchange()), _written(a_refused_exchange()), _written(an_exchange())]

    seen = {path for record in bare for path in _paths(record) if _at(record, path) is None}

    assert seen <= nullable


def _at(record: Any, path: str) -> Any:
    for step in path.split("."):
        record = record[step]
    return record


def test_every_record_is_what_the_published_schema_says() -> None:
    """docs/reference/audit-record.schema.json, by a validator that is not ours."""
    schema = json.loads(PAGE.read_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    outbound = Outbound(host="records.demo", port=8000, expected="spiffe://a.test/ns/demo/sa/*", server=AGENT)
    exchanges = (
        an_exchange(a_call("t", {"a": 1})),
        an_exchange(a_call("t", {"a": "x" * 100}), profile=a_profile(audit=Audit(max_bytes=10))),
        an_exchange(outbound=outbound),
        an_exchange(result=None, aborted="cut", connection=replace(a_connection(), peer=None)),
        a_refused_exchange(),
        an_unreadable_exchange(),
    )
    for text in (*map(line, exchanges), line(an_exchange(), Phase.BEGIN)):
        validator.validate(json.loads(Chain("c1").sealed(text)))

    assert not validator.is_valid(_written(an_exchange()))  # it is no line of a trail before it has its place
    assert not validator.is_valid(json.loads(Chain("c1").sealed(line(an_exchange()))) | {"phase": "middle"})


@pytest.mark.parametrize(
    ("exchange", "outcome"),
    [
        (an_exchange(), "success"),
        (an_exchange(tool_failed=True), "error"),
        (an_exchange(error_code=-32602), "error"),
        (an_exchange(refusal=Refusal(Reason.UPSTREAM, "the server closed")), "error"),
        (an_exchange(aborted="the client closed the connection"), "aborted"),
        (a_refused_exchange(), "refused"),
        (an_unreadable_exchange(), "refused"),
    ],
    ids=["success", "tool", "server", "upstream", "aborted", "refused", "unreadable"],
)
def test_the_outcome_is_one_word(exchange: Exchange, outcome: str) -> None:
    """What a dashboard counts."""
    assert _written(exchange)["outcome"] == outcome


def test_a_begun_call_is_told_as_far_as_it_goes() -> None:
    """Everything but what came of it; and the end says the same of the call."""
    exchange = an_exchange(a_call("t", {"a": 1}), sent_s=0.0005)
    begun, ended = json.loads(line(exchange, Phase.BEGIN)), json.loads(line(exchange))

    assert (begun["phase"], begun["outcome"], begun["result"]) == ("begin", "pending", None)
    same = {key for key in begun if begun[key] == ended[key]}
    assert set(begun) - same == {"phase", "outcome", "result"}


def test_time_is_split_into_judging_waiting_and_the_server_s() -> None:
    """Together no more than the whole."""
    latency = _written(an_exchange(judged_s=0.001, sent_s=0.003, upstream_s=0.010, total_s=0.012))["latency_s"]

    assert latency == {"judge": 0.001, "wait": 0.002, "upstream": 0.007, "total": 0.012}
    assert _written(a_refused_exchange())["latency_s"]["wait"] is None


def test_what_is_kept_of_one_caller_is_never_another_s() -> None:
    """Pieces of JSON are shared between records by the objects they were made of."""
    written = []
    for number in range(3000):
        user = replace(ALICE, id=f"user-{number}")
        principal = Principal(workload=AGENT, user=user, expires_at_s=user.expires_at_s)
        connection = replace(a_connection(), client=f"10.0.0.1:{number}")
        exchange = an_exchange(principal=principal, connection=connection)
        written.append((number, _written(exchange)["who"]))

    assert all(who["user"]["id"] == f"user-{n}" and who["client"] == f"10.0.0.1:{n}" for n, who in written)


def test_readable_message_round_trips_its_id() -> None:
    """An id keeps its type: 7 and "7" are different calls."""
    for request_id in (7, "7"):
        message = parse(orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": "ping"}))
        assert request_id == _written(an_exchange(message))["message"]["id"]


def test_start_is_the_moment_of_the_record() -> None:
    """The record's time is the exchange's start, not the moment of writing."""
    assert timestamp(STARTED_NS) == _written(an_exchange())["time"]


@pytest.mark.parametrize(
    ("target", "member", "value"),
    [
        (Task(id="t-1"), "task", fingerprint("t-1")),
        (Subscription(resources=("x:", "y:"), tasks=("t-1",)), "subscribed", ["x:", "y:"]),
        (Subscription(resources=("x:",) * 1000, tasks=()), "subscribed", ["x:"] * MAX_SUBSCRIBED),
        (
            Ask(method="elicitation/create", mode="url", url="https://x.test/a?code=secret#b"),
            "url",
            "https://x.test/a",
        ),
        (Ask(method="sampling/createMessage"), "url", None),
    ],
)
def test_what_a_message_is_about_is_named(target: Target, member: str, value: Any) -> None:
    """Bounded, and without what opens anything."""
    message = Message(shape=Shape.REQUEST, method="x", id=1, target=target, params={})

    assert _written(an_exchange(message))["message"][member] == value


def _plainly(exchange: Exchange, phase: Phase) -> dict[str, Any]:
    """Return the record of an inbound call of a tool, made the plain way: one dictionary, nothing kept."""
    profile, message, principal, refusal = exchange.profile, exchange.message, exchange.principal, exchange.refusal
    assert profile is not None
    assert message is not None
    assert isinstance(message.target, Tool)
    peer, user = exchange.connection.peer, None if principal is None else principal.user
    workload = (peer and peer.spiffe_id) if principal is None else principal.workload
    session_id, said, is_end = exchange.session_id, exchange.agent, phase is Phase.END
    charges = () if exchange.admission is None else exchange.admission.charges
    names, sent_s = profile.audit.redact, exchange.sent_s
    was_sent = exchange.admission is not None or not is_end
    is_error = refusal is not None or exchange.error_code is not None or exchange.tool_failed
    outcome = "aborted" if exchange.aborted is not None else "error" if is_error else "success"
    stands_in = said.session is not None and said.session == session_id
    arguments = redact(message.target.arguments, names)
    result = None
    if was_sent and is_end:
        assert exchange.result is not None
        content = redact(orjson.loads(exchange.result)["result"], names)
        result = {
            **_content_of(content.data, redacted=content.redacted),
            "bytes": exchange.result_bytes,
            "sha256": content.sha256 if content.redacted else exchange.result_sha256,
            "is_error": exchange.tool_failed,
            "error_code": exchange.error_code,
            "hidden": exchange.hidden,
        }
    return {
        "time": timestamp(exchange.started_ns),
        "schema": SCHEMA,
        "phase": str(phase),
        "outcome": "pending" if not is_end else outcome if was_sent else "refused",
        "trace_id": exchange.trace_id,
        "span_id": exchange.span_id,
        "direction": "inbound",
        "server": {"namespace": "pay", "workload": "billing", "name": "billing"},
        "who": {
            "user": user
            and {
                name: getattr(user, name) for name in ("id", "issuer", "provider", "email", "role", "roles", "groups")
            },
            "delegation": [],
            "workload": None if workload is None else str(workload),
            "proof": None if workload is None else "jwt-svid" if peer is None else "x509-svid",
            "client": exchange.connection.client,
        },
        "destination": None,
        "agent": {
            "session": fingerprint(said.session or "") if stands_in else said.session,
            "client_name": said.client_name,
            "client_version": said.client_version,
        },
        "session": None if session_id is None else fingerprint(session_id),
        "protocol_version": cut(exchange.protocol_version),
        "http": {
            "method": "POST",
            "path": cut(exchange.connection.path),
            "status": exchange.status,
            "removed": exchange.removed,
        },
        "message": {
            "shape": "request",
            "method": message.method,
            "tool": cut(message.target.name),
            **dict.fromkeys(("prompt", "resource", "task")),
            "subscribed": [],
            "url": None,
            "id": message.id,
        },
        "arguments": {
            **_content_of(arguments.data, redacted=arguments.redacted),
            "bytes": arguments.size_bytes,
            "sha256": arguments.sha256,
        },
        "result": result,
        "decision": {
            "outcome": "allowed" if was_sent else "refused",
            "reason": refusal and refusal.reason,
            "detail": refusal and (refusal.detail or refusal.public),
            "policies": exchange.permit.policies if exchange.permit else [],
            "shadow": [{"policy": each.policy, "allowed": each.allowed} for each in exchange.shadow],
            "content": [],
            "revision": exchange.revision,
        },
        "limits": [each.name for each in charges],
        "charges": [
            {
                "limit": each.name,
                "units": each.cost,
                "remaining": each.remaining,
                "warned": each.warned,
                "fallback": each.is_fallback,
                "over": each.is_over,
            }
            for each in charges
        ],
        "latency_s": {
            "judge": _microseconds(exchange.judged_s),
            "wait": None if sent_s is None else _microseconds(max(0.0, sent_s - exchange.judged_s)),
            "upstream": None if exchange.upstream_s is None else _microseconds(exchange.upstream_s - (sent_s or 0.0)),
            "total": _microseconds(exchange.total_s),
        },
        "aborted": exchange.aborted,
    }


def _content_of(data: bytes, *, redacted: bool) -> dict[str, Any]:
    return {"content": orjson.Fragment(data), "truncated": False, "redacted": redacted}


def _microseconds(time_s: float) -> float:
    return int(time_s * 1e6) / 1e6


_PEERS: tuple[Peer | None, ...] = (a_connection().peer, replace(a_connection().peer, spiffe_id=SERVER_ID), None)  # type: ignore[type-var]
_PRINCIPALS = tuple(
    Principal(workload=workload, user=user, expires_at_s=1.0)
    for workload in (AGENT, SERVER_ID, None)
    for user in (ALICE, replace(ALICE, id='bo"b\u00e9', email=None), None)
)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_SOME = st.sampled_from([None, "s-1"])  # few, so that what was kept of one call is found by another
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | _TEXT
    | st.sampled_from(["pass", "to-ken", '{"token":1}']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "token", "Api-Key"]) | _TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
_TIME_S = st.floats(0, 100)
_PROFILE = a_profile()


@st.composite
def _exchanges(draw: st.DrawFn) -> Exchange:
    """Draw a call of a tool, refused or answered."""
    tool, arguments = (
        draw(st.sampled_from(["t", 'qu"ote', "x" * 2000])),
        draw(st.dictionaries(_TEXT, _JSON, max_size=3)),
    )
    path = draw(st.sampled_from(["/mcp", '/"', "/" + "p" * 2000]))
    refused = draw(st.booleans())
    charges = []
    for name in draw(st.lists(st.sampled_from(["per-user", 'o"dd']), max_size=2)):
        charge = Charge(
            Rule(Limit(name=name, rate_per_s=1.0, burst=10), room=1), "alice", draw(st.integers(1, 9)), None
        )
        charge.remaining, charge.wait_s = draw(st.none() | _TIME_S), draw(st.sampled_from([0.0, 1.5]))
        charge.warned, charge.is_fallback = draw(st.sampled_from([0, 80])), draw(st.booleans())
        charges.append(charge)
    permit = an_exchange().permit
    assert permit is not None
    answer = b'{"jsonrpc":"2.0","id":1,"result":%b}' % encode(draw(_JSON))
    sent_s = draw(st.none() | _TIME_S)
    return an_exchange(
        a_call(tool, arguments, request_id=draw(st.integers(-(2**63) + 1, 2**63 - 1) | _TEXT)),
        profile=_PROFILE,
        connection=replace(
            a_connection(path=path),
            peer=draw(st.sampled_from(_PEERS)),
            client=draw(st.sampled_from(["a:1", "[::1]:2"])),
        ),
        principal=draw(st.none() | st.sampled_from(_PRINCIPALS)),
        agent=Agent(session=draw(_SOME), client_name=draw(_SOME), client_version=draw(_SOME)),
        session_id=draw(_SOME),
        protocol_version=draw(st.none() | st.sampled_from(["2025-11-25", "\u00ff" * 2000])),
        revision=draw(st.sampled_from(["a1b2", ""])),
        refusal=draw(st.none() | st.just(Refusal(Reason.UPSTREAM, "cl\u00f6sed")))
        if not refused
        else Refusal(Reason.DENIED, "no"),
        permit=draw(st.none() | st.just(permit)),
        admission=None if refused else Admission(permit=permit, charges=tuple(charges)),
        shadow=draw(st.sampled_from([(), (Difference(policy="p", allowed=True),)])),
        judged_s=draw(_TIME_S),
        sent_s=sent_s,
        upstream_s=draw(st.none() | st.floats(sent_s or 0.0, 200)),
        total_s=draw(_TIME_S),
        status=draw(st.sampled_from([0, 200, 403])),
        removed=draw(st.sampled_from([(), ("x-user", 'q"')])),
        result=answer,
        result_bytes=len(answer),
        error_code=draw(st.none() | st.integers(-(2**31), 2**31)),
        tool_failed=draw(st.booleans()),
        hidden=draw(st.integers(0, 9)),
        aborted=draw(st.none() | _TEXT),
    )


@given(exchange=_exchanges(), phases=st.sampled_from([(Phase.END,), (Phase.BEGIN, Phase.END)]))
def test_line_is_what_the_plain_way_writes(exchange: Exchange, phases: tuple[Phase, ...]) -> None:
    """Byte for byte, whatever was kept of the calls before."""
    for phase in phases:
        assert orjson.dumps(_plainly(exchange, phase)) + b"\n" == line(exchange, phase)
