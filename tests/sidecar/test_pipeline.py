"""sidecar.pipeline: the stages in their order, and what is known when each of them refuses."""

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest

from certs.verify import Peer
from sidecar.core.authorise import Difference, Shadow, Verdict
from sidecar.core.claims import Delegated
from sidecar.core.connection import Connection
from sidecar.core.identity import UnknownKey
from sidecar.core.limits import Admission
from sidecar.core.message import Shape
from sidecar.core.profile import Identity, Limit, Provider, StepUp
from sidecar.core.trace import TraceContext
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import MAX_LABEL_CHARS, Batch, Memory, Snapshot, answered, judge, release, remember, scope
from tests.builders import (
    AGENT,
    NOW_S,
    a_call,
    a_connection,
    a_peer,
    a_principal,
    a_question,
    a_request,
    a_snapshot,
    a_user,
    an_exchange,
)
from tests.fakes import FakeEngine, allowing

INITIALIZE = a_request("initialize", {"clientInfo": {"name": "planner", "version": "1.2"}})


def judged(
    connection: Connection, snapshot: Snapshot | None = None, memory: Memory | None = None
) -> tuple[Exchange, Admission | Refusal]:
    """Judge *connection*; return its record and how it ended."""
    exchange = an_exchange(connection)
    try:
        found = judge(exchange, snapshot or a_snapshot(allowing()), memory or Memory(), now_s=NOW_S, clock_s=0.0)
    except Refusal as refusal:
        return exchange, refusal
    assert isinstance(found, Admission)
    return exchange, found


def refused(connection: Connection, snapshot: Snapshot | None = None, memory: Memory | None = None) -> Refusal:
    """Return the refusal of *connection*."""
    _, end = judged(connection, snapshot, memory)
    assert isinstance(end, Refusal)
    return end


def opened(memory: Memory, *, session_id: str = "s1", connection: Connection | None = None) -> None:
    """Let *connection*'s principal open a session."""
    exchange, end = judged(connection or a_connection(INITIALIZE), memory=memory)
    assert isinstance(end, Admission)
    remember(exchange, 200, session_id, memory)
    assert session_id == exchange.session_id


def with_session(body: bytes, session_id: str = "s1", **changes: object) -> Connection:
    """A request within a session."""
    return a_connection(body, headers=[(b"mcp-session-id", session_id.encode())], **changes)  # type: ignore[arg-type]


def test_an_admitted_call_has_a_full_record() -> None:
    """Every stage leaves its value."""
    connection = a_connection(a_call(), peer=a_peer(), headers=[(b"mcp-protocol-version", b"2025-06-18")])
    exchange, admission = judged(connection)

    assert isinstance(admission, Admission)
    assert exchange.admission is admission
    assert exchange.permit is admission.permit
    assert exchange.message is admission.permit.question.message
    assert exchange.principal is admission.permit.question.principal
    assert (exchange.principal.workload, admission.permit.question.protocol_version) == (AGENT, "2025-06-18")
    assert (exchange.trace_id, exchange.started_ns) == (
        admission.permit.question.trace_id,
        admission.permit.question.time_ns,
    )


def test_each_refusal_shows_how_far_the_message_got() -> None:
    """Identity before content, policy before limits: later stages have not run."""
    strict = a_snapshot(allowing(), identity=Identity(callers=("spiffe://a.test/**",)))
    spent = a_snapshot(allowing(), limits=[Limit(name="l", rate_per_s=1, burst=1)])
    memory = Memory()
    judged(a_connection(a_call()), spent, memory)
    far = [
        (exchange.principal is not None, exchange.message is not None, exchange.permit is not None, end.reason)
        for exchange, end in (
            judged(a_connection(a_call(), path="/other")),
            judged(a_connection(b"x"), strict),
            judged(a_connection(b"x")),
            judged(a_connection(a_call()), a_snapshot(allowing("other"))),
            judged(a_connection(a_call()), spent, memory),
        )
        if isinstance(end, Refusal)
    ]

    assert far == [
        (False, False, False, Reason.NOT_FOUND),
        (False, False, False, Reason.UNAUTHENTICATED),
        (True, False, False, Reason.MALFORMED),
        (True, True, False, Reason.DENIED),
        (True, True, True, Reason.THROTTLED),
    ]


@pytest.mark.parametrize(
    ("connection", "reason"),
    [
        (a_connection(a_call(), path="/"), Reason.NOT_FOUND),
        (a_connection(a_call(), path="/mcp/"), Reason.NOT_FOUND),
        (a_connection(a_call(), path="/mcp/..;/admin"), Reason.NOT_FOUND),
        (a_connection(a_call(), path="/MCP"), Reason.NOT_FOUND),
        (a_connection(a_call(), path="/%6dcp"), Reason.NOT_FOUND),
        (a_connection(a_call(), path="//mcp"), Reason.NOT_FOUND),
        (a_connection(method="PUT"), Reason.METHOD_NOT_ALLOWED),
        (a_connection(method="HEAD"), Reason.METHOD_NOT_ALLOWED),
        (a_connection(method="OPTIONS"), Reason.METHOD_NOT_ALLOWED),
        (a_connection(method="PATCH"), Reason.METHOD_NOT_ALLOWED),
        (replace(a_connection(a_call()), headers=[(b"content-type", b"application/json")]), Reason.FORBIDDEN_CALLER),
        (a_connection(a_call(), headers=[(b"host", b"x")]), Reason.MALFORMED),
        (a_connection(a_call(), headers=[(b"origin", b"https://evil.test")]), Reason.FORBIDDEN_CALLER),
        (a_connection(a_call(), headers=[(b"content-encoding", b"gzip")]), Reason.UNSUPPORTED_MEDIA),
        (a_connection(a_call(), headers=[(b"content-type", b"text/plain")]), Reason.MALFORMED),
        (
            replace(a_connection(a_call()), headers=[(b"host", b"x"), (b"content-type", b"text/plain")]),
            Reason.UNSUPPORTED_MEDIA,
        ),
        (
            replace(a_connection(a_call()), headers=[(b"host", b"x"), (b"content-type", b"application/jsonx")]),
            Reason.UNSUPPORTED_MEDIA,
        ),
        (replace(a_connection(a_call()), headers=[(b"host", b"x")]), Reason.UNSUPPORTED_MEDIA),
        (a_connection(b"x", method="GET"), Reason.MALFORMED),
        (a_connection(b"x", method="DELETE"), Reason.MALFORMED),
    ],
)
def test_what_is_not_addressed_to_the_endpoint_is_refused(connection: Connection, reason: Reason) -> None:
    """By path, method, Host, Origin and form, none of them normalised."""
    assert reason is refused(connection).reason


def test_a_configured_host_is_the_only_one() -> None:
    """DNS rebinding: the name by which a browser was fooled is not ours."""
    snapshot = a_snapshot(allowing(), hosts=["mcp.test"])

    assert refused(a_connection(a_call()), snapshot).reason is Reason.FORBIDDEN_CALLER
    assert isinstance(judged(a_connection(a_call()), a_snapshot(allowing(), hosts=["billing.test"]))[1], Admission)


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json; charset=utf-7",  # body-parser decodes it: "+ACI-" becomes a quotation mark
        b"application/json; charset=shift_jis",
        b"application/json; charset=utf-8; charset=utf-7",
        b"application/json; boundary=x",
        b"application/json, application/json",
    ],
)
def test_another_charset_is_refused(kind: bytes) -> None:
    """A server that honours it would read another text than the one that was judged."""
    connection = replace(a_connection(a_call()), headers=[(b"host", b"x"), (b"content-type", kind)])

    assert refused(connection).reason is Reason.UNSUPPORTED_MEDIA


def test_a_content_type_with_parameters_is_json() -> None:
    """As clients write it."""
    headers = [
        (b"host", b"x"),
        (b"content-type", b"Application/JSON; charset=utf-8"),
        (b"content-encoding", b"identity"),
    ]

    assert isinstance(judged(replace(a_connection(a_call()), headers=headers))[1], Admission)


@pytest.mark.parametrize(("method", "shape"), [("GET", Shape.OPEN_STREAM), ("DELETE", Shape.CLOSE_SESSION)])
def test_get_and_delete_are_messages(method: str, shape: Shape) -> None:
    """They take the same way, limits included."""
    limit = Limit(name="streams", rate_per_s=1, burst=1, methods=(shape.value,))
    snapshot, memory = a_snapshot(allowing(), limits=[limit]), Memory()
    exchange, admission = judged(a_connection(method=method), snapshot, memory)

    assert isinstance(admission, Admission)
    assert exchange.message is not None
    assert shape is exchange.message.shape
    assert refused(a_connection(method=method), snapshot, memory).reason is Reason.THROTTLED


def test_an_unknown_key_comes_out_as_that() -> None:
    """So that the shell can look for it."""
    provider = Provider(name="p", issuer="https://id.test", audiences=("a",))
    snapshot = a_snapshot(allowing(), identity=Identity(mtls="permissive", providers=(provider,)))
    token = "eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.eyJpc3MiOiJodHRwczovL2lkLnRlc3QifQ.eHg"  # no key has signed it
    end = refused(a_connection(a_call(), headers=[(b"authorization", f"Bearer {token}".encode())]), snapshot)

    assert isinstance(end, UnknownKey)


# sessions


def test_a_session_belongs_to_the_principal_that_opened_it() -> None:
    """To others it does not exist, whatever they send in it."""
    memory, mine = Memory(), a_peer()
    opened(memory, connection=a_connection(INITIALIZE, peer=mine))
    exchange, end = judged(with_session(a_call(), peer=mine), memory=memory)

    assert isinstance(end, Admission)
    assert exchange.session_id == "s1"
    for body in (a_call(), a_request("ping"), INITIALIZE, b'{"jsonrpc":"2.0","id":1,"result":{}}'):
        assert refused(with_session(body), memory=memory).reason is Reason.NOT_FOUND
    for method in ("GET", "DELETE"):
        assert refused(with_session(b"", method=method), memory=memory).reason is Reason.NOT_FOUND


def test_who_had_a_session_before_cannot_answer_in_it() -> None:
    """Nor can the new owner answer what the server asked the one before."""
    memory = Memory()
    opened(memory)
    memory.asked.add("session s1", 7)
    exchange, _ = judged(a_connection(INITIALIZE, peer=a_peer()), memory=memory)

    assert remember(exchange, 200, "s1", memory)
    assert refused(with_session(ANSWER), memory=memory).reason is Reason.NOT_FOUND
    assert refused(with_session(ANSWER, peer=a_peer()), memory=memory).reason is Reason.UNSOLICITED


def test_only_who_was_told_an_event_resumes_after_it() -> None:
    """A server that keeps all events in one place would replay another caller's."""
    memory = Memory()
    opened(memory)
    told = judged(a_connection(a_call(), peer=a_peer()), memory=memory)[0].principal
    assert told is not None
    memory.told.add(told.key, b"5")
    headers = [(b"last-event-id", b"5"), (b"accept", b"text/event-stream")]
    found = []
    for peer in (a_peer(), None):
        exchange, end = judged(a_connection(method="GET", headers=headers, peer=peer), memory=memory)
        assert isinstance(end, Admission)
        found.append((b"last-event-id" in exchange.connection.values, exchange.removed))

    assert found == [(True, ()), (False, ("last-event-id",))]


def test_two_events_to_resume_after_are_refused() -> None:
    """The one that was told would let another's through: many servers take the first."""
    memory = Memory()
    told = judged(a_connection(a_call(), peer=a_peer()), memory=memory)[0].principal
    assert told is not None
    memory.told.add(told.key, b"5")
    headers = [(b"last-event-id", b"6"), (b"last-event-id", b"5"), (b"accept", b"text/event-stream")]

    refusal = refused(a_connection(method="GET", headers=headers, peer=a_peer()), memory=memory)
    assert (refusal.reason, refusal.public) == (
        Reason.MALFORMED,
        "the header last-event-id is given more than once",
    )


def test_a_refused_session_is_on_record() -> None:
    """Who tries others' ids is seen."""
    exchange, _ = judged(with_session(a_call(), "stolen"))

    assert exchange.session_id == "stolen"


def test_what_the_client_said_of_itself_stays_with_the_session() -> None:
    """Only initialize says it."""
    memory = Memory()
    opened(memory)
    exchange, _ = judged(with_session(a_call()), memory=memory)

    assert (exchange.agent.client_name, exchange.agent.client_version, exchange.agent.session) == (
        "planner",
        "1.2",
        "s1",
    )


@pytest.mark.parametrize("info", [None, [], {"name": 7, "version": ""}])
def test_odd_client_info_is_as_none(info: object) -> None:
    """It is nobody's reason to refuse."""
    exchange, end = judged(a_connection(a_request("initialize", {"clientInfo": info})))

    assert isinstance(end, Admission)
    assert (exchange.agent.client_name, exchange.agent.client_version) == (None, None)


def test_what_a_caller_says_of_itself_is_cut() -> None:
    """It ends in audit records and spans."""
    exchange, _ = judged(
        a_connection(
            a_request("initialize", {"clientInfo": {"name": "x" * 9999}}),
            headers=[(b"sidegate-agent-session", b"y" * 999)],
        )
    )

    assert exchange.agent.client_name is not None
    assert exchange.agent.session is not None
    assert MAX_LABEL_CHARS == len(exchange.agent.client_name) == len(exchange.agent.session)


def test_the_agents_own_session_goes_before_the_mcp_session() -> None:
    """One conversation of an agent uses several servers."""
    memory = Memory()
    opened(memory)
    headers = [(b"mcp-session-id", b"s1"), (b"sidegate-agent-session", b"conversation")]
    sessions = [
        judged(a_connection(a_call(), headers=chosen), memory=memory)[0].agent.session
        for chosen in (headers, headers[1:], [])
    ]

    assert sessions == ["conversation", "conversation", None]


@pytest.mark.parametrize(
    ("body", "method", "status", "stays"),
    [
        (a_call(), "POST", 200, True),
        (a_call(), "POST", 500, True),
        (a_call(), "POST", 404, False),
        (b"", "GET", 404, False),
        (b"", "DELETE", 204, False),
        (b"", "DELETE", 405, True),
        (b"", "DELETE", 404, False),
    ],
)
def test_the_server_says_when_a_session_is_over(body: bytes, method: str, status: int, *, stays: bool) -> None:
    """By answering DELETE well, or anything with 404."""
    memory = Memory()
    opened(memory)
    exchange, end = judged(with_session(body, method=method), memory=memory)
    assert isinstance(end, Admission)
    remember(exchange, status, None, memory)

    assert stays is ("s1" in memory.sessions.opened)


@pytest.mark.parametrize(("status", "session_id"), [(400, "s1"), (500, "s1"), (200, None)])
def test_only_a_good_answer_opens_a_session(status: int, session_id: str | None) -> None:
    """An id on an error is none."""
    memory = Memory()
    exchange, _ = judged(a_connection(INITIALIZE), memory=memory)
    remember(exchange, status, session_id, memory)

    assert memory.sessions.opened == {}


def test_an_id_on_another_answer_opens_nothing() -> None:
    """Or any answer could take over any session."""
    memory = Memory()
    exchange, _ = judged(a_connection(a_call()), memory=memory)
    remember(exchange, 200, "s1", memory)

    assert memory.sessions.opened == {}


def test_nothing_is_remembered_of_what_was_not_read() -> None:
    """A record without message or principal."""
    memory = Memory()
    remember(an_exchange(), 200, "s1", memory)

    assert memory.sessions.opened == {}


# the order of effects


def test_a_shadow_is_on_record_and_changes_nothing() -> None:
    """Whichever way it would have decided; lifecycle messages ask no policy, so no shadow either."""
    denying = FakeEngine(verdict=Verdict(allowed=False))
    strict, lax = Shadow(name="strict", engines=(denying,)), Shadow(name="lax", engines=(allowing(),))
    open_ = replace(a_snapshot(allowing()), shadows=(strict, lax))
    closed = replace(a_snapshot(denying), shadows=(strict, lax))

    passed, admission = judged(a_connection(a_call()), open_)
    stopped, refusal = judged(a_connection(a_call()), closed)
    began, _ = judged(a_connection(INITIALIZE), open_)

    assert isinstance(admission, Admission)
    assert isinstance(refusal, Refusal)
    assert passed.shadow == (Difference(policy="strict", allowed=False),)
    assert stopped.shadow == (Difference(policy="lax", allowed=True),)
    assert began.shadow == ()


def test_a_denied_call_takes_no_token() -> None:
    """Or a caller without right could use up another's limit."""
    limit = Limit(name="l", rate_per_s=1e-6, burst=1, per=())
    memory = Memory()
    denying = a_snapshot(FakeEngine(verdict=Verdict(allowed=False)), limits=[limit])
    allowed = a_snapshot(allowing(), limits=[limit])
    judged(a_connection(a_call()), denying, memory)

    assert isinstance(judged(a_connection(a_call()), allowed, memory)[1], Admission)


def test_the_request_id_is_known_as_early_as_it_can_be() -> None:
    """Of a message that was read, and of one that could not be read further."""
    read, _ = judged(a_connection(a_call(request_id="r")))
    unread, refusal = judged(a_connection(a_request("tools/call", {}, request_id="r")))
    assert isinstance(refusal, Refusal)
    unread.refusal = refusal

    assert (read.request_id, unread.request_id, an_exchange().request_id) == ("r", "r", None)


# 2026-07-28

MODERN = "2026-07-28"
META = {"io.modelcontextprotocol/protocolVersion": MODERN, "io.modelcontextprotocol/clientCapabilities": {}}


def a_modern(
    method: str = "tools/call",
    *headers: tuple[bytes, bytes],
    meta: Mapping[str, object] = META,
    peer: Peer | None = None,
    **params: object,
) -> Connection:
    """A request of 2026-07-28, with the headers that it must have."""
    name = params.get("name", params.get("uri"))
    named = [] if name is None else [(b"mcp-name", str(name).encode())]
    repeated = [(b"mcp-protocol-version", MODERN.encode()), (b"mcp-method", method.encode()), *named]
    return a_connection(a_request(method, {**params, "_meta": meta}), headers=[*repeated, *headers], peer=peer)


def test_a_stateless_request_stands_alone() -> None:
    """It names its client itself, and the id of a session means nothing, whoever's it is."""
    memory = Memory()
    opened(memory, connection=a_connection(INITIALIZE, peer=a_peer()))
    client = {"io.modelcontextprotocol/clientInfo": {"name": "planner", "version": "2"}}
    exchange, end = judged(
        a_modern("tools/call", (b"mcp-session-id", b"s1"), meta={**META, **client}, name="x"), memory=memory
    )

    assert isinstance(end, Admission)
    assert (exchange.session_id, end.permit.question.session_id) == (None, None)
    assert (exchange.agent.client_name, exchange.agent.client_version) == ("planner", "2")
    assert exchange.protocol_version == MODERN


def test_headers_and_body_agree_before_any_policy_is_asked() -> None:
    """The record knows the message by then."""
    engine = allowing()
    connection = a_connection(
        a_request("tools/call", {"name": "x", "_meta": META}),
        headers=[(b"mcp-protocol-version", MODERN.encode()), (b"mcp-method", b"tools/call"), (b"mcp-name", b"y")],
    )
    exchange, end = judged(connection, a_snapshot(engine))

    assert isinstance(end, Refusal)
    assert (end.reason, exchange.request_id, engine.asked) == (Reason.HEADER_MISMATCH, 7, [])


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_the_later_era_uses_post_only(method: str) -> None:
    """Streams and sessions are of the older one."""
    refusal = refused(a_connection(method=method, headers=[(b"mcp-protocol-version", MODERN.encode())]))

    assert (refusal.reason, refusal.revision) == (Reason.METHOD_NOT_ALLOWED, MODERN)


@pytest.mark.parametrize(("method", "version"), [("GET", b"x"), ("DELETE", b"2024-01-01"), ("POST", b"1.0")])
def test_an_unknown_version_is_refused(method: str, version: bytes) -> None:
    """Whatever is asked with it."""
    body = a_call() if method == "POST" else b""
    refusal = refused(a_connection(body, method=method, headers=[(b"mcp-protocol-version", version)]))

    assert (refusal.reason, refusal.revision) == (Reason.UNSUPPORTED_VERSION, None)


def test_a_version_given_twice_is_none() -> None:
    """Servers differ in which of the two they take."""
    headers = [(b"mcp-protocol-version", b"2025-06-18")] * 2

    assert refused(a_connection(a_call(), headers=headers)).reason is Reason.MALFORMED


def test_annotations_that_were_learned_are_held_against_the_headers() -> None:
    """As the tool's schema has them."""
    memory = Memory()
    memory.param_headers.learn([("x", msgspec.Raw(b'{"inputSchema":{"properties":{"r":{"x-mcp-header":"R"}}}}'))])
    call = a_modern("tools/call", (b"mcp-param-r", b"eu"), name="x", arguments={"r": "us"})

    assert refused(call, memory=memory).reason is Reason.HEADER_MISMATCH
    assert isinstance(judged(call)[1], Admission)


# tasks


@pytest.mark.parametrize("method", ["tasks/get", "tasks/result", "tasks/cancel", "tasks/update"])
def test_a_task_belongs_to_whom_it_was_given(method: str) -> None:
    """To others it does not exist."""
    memory, mine = Memory(), a_peer()
    exchange, _ = judged(a_connection(a_call(), peer=mine))
    assert exchange.principal is not None
    memory.tasks.open("t", exchange.principal)
    body = a_request(method, {"taskId": "t"})

    assert isinstance(judged(a_connection(body, peer=mine), memory=memory)[1], Admission)
    assert refused(a_connection(body), memory=memory).reason is Reason.UNKNOWN_TASK
    unknown = refused(a_connection(a_request(method, {"taskId": "u"}), peer=mine), memory=memory)
    assert (unknown.reason, unknown.public) == (Reason.UNKNOWN_TASK, refused(a_connection(body), memory=memory).public)


def test_a_subscription_names_ones_own_tasks() -> None:
    """One that is not refuses them all."""
    memory = Memory()
    exchange, _ = judged(a_connection(a_call()))
    assert exchange.principal is not None
    memory.tasks.open("t", exchange.principal)

    assert isinstance(
        judged(a_modern("subscriptions/listen", notifications={"taskIds": ["t"]}), memory=memory)[1], Admission
    )
    refusal = refused(a_modern("subscriptions/listen", notifications={"taskIds": ["t", "u"]}), memory=memory)
    assert refusal.reason is Reason.UNKNOWN_TASK


# responses and cancellations

ANSWER = b'{"jsonrpc":"2.0","id":7,"result":{}}'
CANCEL = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}'


def test_a_response_answers_what_was_asked_once() -> None:
    """In its own session, by its own id."""
    memory = Memory()
    opened(memory)
    memory.asked.add("session s1", 7)

    assert refused(a_connection(ANSWER), memory=memory).reason is Reason.UNSOLICITED
    assert refused(with_session(ANSWER.replace(b"7", b'"7"')), memory=memory).reason is Reason.UNSOLICITED
    assert isinstance(judged(with_session(ANSWER), memory=memory)[1], Admission)
    assert refused(with_session(ANSWER), memory=memory).reason is Reason.UNSOLICITED


def test_a_response_outside_of_a_session_is_its_principals() -> None:
    """Nobody else was asked."""
    memory, mine = Memory(), a_peer()
    exchange, _ = judged(a_connection(a_call(), peer=mine), memory=memory)
    memory.asked.add(scope(exchange), 7)

    assert refused(a_connection(ANSWER), memory=memory).reason is Reason.UNSOLICITED
    assert isinstance(judged(a_connection(ANSWER, peer=mine), memory=memory)[1], Admission)


def test_a_refused_response_leaves_the_question_open() -> None:
    """Its limit may let it through later."""
    memory = Memory()
    opened(memory)
    memory.asked.add("session s1", 7)
    spent = a_snapshot(allowing(), limits=[Limit(name="l", rate_per_s=1e-6, burst=1, methods=("response", "ping"))])
    judged(a_connection(a_request("ping")), spent, memory)

    assert refused(with_session(ANSWER), spent, memory).reason is Reason.THROTTLED
    assert isinstance(judged(with_session(ANSWER), memory=memory)[1], Admission)


def test_a_cancellation_without_session_needs_a_request_under_way() -> None:
    """Of the same principal, and only while it lasts."""
    memory, mine = Memory(), a_peer()
    cancel, foreign = a_connection(CANCEL, peer=mine), a_connection(CANCEL)
    assert refused(cancel, memory=memory).reason is Reason.UNSOLICITED
    call, _ = judged(a_connection(a_call(), peer=mine), memory=memory)

    assert isinstance(judged(cancel, memory=memory)[1], Admission)
    assert refused(foreign, memory=memory).reason is Reason.UNSOLICITED
    release(call, memory)
    assert refused(cancel, memory=memory).reason is Reason.UNSOLICITED


def test_within_a_session_its_owner_may_cancel() -> None:
    """The session is proof enough, and the server knows its requests."""
    memory = Memory()
    opened(memory)

    assert isinstance(judged(with_session(CANCEL), memory=memory)[1], Admission)
    assert refused(with_session(CANCEL, peer=a_peer()), memory=memory).reason is Reason.NOT_FOUND


@pytest.mark.parametrize("request_id", [b"null", b"7.0", b"{}", b"[7]", b"true"])
def test_a_cancellation_names_a_request(request_id: bytes) -> None:
    """By an id as a request has one."""
    memory = Memory()
    judged(a_connection(a_call(request_id=1)), memory=memory)

    assert refused(a_connection(CANCEL.replace(b"7", request_id)), memory=memory).reason is Reason.UNSOLICITED


def test_nothing_is_left_of_calls_that_are_over() -> None:
    """Admitted or refused, with a session or without."""
    memory = Memory()
    denying = a_snapshot(FakeEngine(verdict=Verdict(allowed=False)))
    opened(memory)
    for connection in (a_connection(a_call()), with_session(a_call()), a_connection(INITIALIZE), a_modern(name="x")):
        for snapshot in (None, denying):
            exchange, end = judged(connection, snapshot, memory)
            if isinstance(end, Admission):
                remember(exchange, 200, "s2", memory)
            release(exchange, memory)

    assert memory.calls.waiting == {}


# batches


def batched(
    *bodies: bytes, snapshot: Snapshot | None = None, memory: Memory | None = None, session: str | None = None
) -> Batch:
    """Judge a batch of *bodies*."""
    body = b"[" + b",".join(bodies) + b"]"
    connection = a_connection(body) if session is None else with_session(body, session)
    exchange = an_exchange(connection)
    found = judge(
        exchange,
        snapshot or a_snapshot(allowing()),
        memory or Memory(),
        now_s=NOW_S,
        clock_s=0.0,
        divide=lambda count: [exchange, *(an_exchange(connection) for _ in range(count - 1))],
    )
    assert isinstance(found, Batch)
    return found


def reasons(batch: Batch) -> list[Reason | None]:
    """Why each message of *batch* was refused."""
    return [None if each.refusal is None else each.refusal.reason for each in batch.exchanges]


def test_a_batch_is_sent_when_all_of_it_may_be() -> None:
    """Each message has its own record, permit and admission; what is sent is the body that was judged."""
    batch = batched(a_call("a", request_id=1), a_request("tools/list", request_id=2))

    assert batch.admission is not None
    assert reasons(batch) == [None, None]
    assert [each.request_id for each in batch.exchanges] == [1, 2]
    assert all(each.admission is not None and each.principal is not None for each in batch.exchanges)
    assert batch.admission.permit.question.message.body == batch.exchanges[0].connection.body


def test_one_refusal_keeps_all_of_a_batch_here() -> None:
    """Each for its own reason; the others are told that they are innocent."""
    batch = batched(
        a_call("allowed", request_id=1),
        a_call("other", request_id=2),
        a_request("tools/destroy", request_id=3),
        ANSWER,
        snapshot=a_snapshot(allowing("allowed")),
    )

    assert batch.admission is None
    assert reasons(batch) == [Reason.NOT_SENT, Reason.DENIED, Reason.UNKNOWN_METHOD, Reason.UNSOLICITED]
    assert all(each.admission is None for each in batch.exchanges)


def test_a_batch_that_is_not_sent_leaves_no_trace() -> None:
    """No token is taken, no call is under way, no question counts as answered."""
    memory = Memory()
    opened(memory)
    memory.asked.add("session s1", 7)
    limit = Limit(name="l", rate_per_s=1e-6, burst=2, per=())
    snapshot = a_snapshot(allowing(), limits=[limit])
    calls = [a_call(request_id=number) for number in (1, 2, 3)]

    assert reasons(batched(ANSWER, *calls, snapshot=snapshot, memory=memory, session="s1")) == [
        Reason.NOT_SENT,
        Reason.NOT_SENT,
        Reason.NOT_SENT,
        Reason.THROTTLED,
    ]
    assert reasons(batched(*calls, snapshot=snapshot, memory=memory))[-1] is Reason.THROTTLED
    assert memory.calls.waiting == {}
    assert batched(ANSWER, *calls[:2], snapshot=snapshot, memory=memory, session="s1").admission is not None


def test_a_batch_in_anothers_session_is_refused_as_http_has_it() -> None:
    """Once, for all of its messages."""
    with pytest.raises(Refusal) as caught:
        batched(a_call(), session="stolen")

    assert caught.value.reason is Reason.NOT_FOUND


def test_where_nobody_can_take_the_parts_a_batch_is_refused() -> None:
    """A shell that answers single messages only."""
    assert "batch" in refused(a_connection(b"[" + a_call() + b"]")).public


def test_a_batch_of_one_is_a_batch() -> None:
    """Its answer is an array."""
    assert len(batched(a_call()).exchanges) == 1


# preflights


def test_a_preflight_needs_no_identity() -> None:
    """Browsers send none with it, and it reaches nobody."""
    strict = a_snapshot(allowing(), identity=Identity(), origins=["https://app.test"])
    headers = [(b"origin", b"https://app.test"), (b"access-control-request-method", b"POST")]
    response = answered(a_connection(method="OPTIONS", headers=headers), strict)

    assert response is not None
    assert (b"access-control-allow-origin", b"https://app.test") in response.headers
    assert answered(a_connection(a_call()), strict) is None


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], Reason.METHOD_NOT_ALLOWED),
        ([(b"origin", b"https://evil.test")], Reason.FORBIDDEN_CALLER),
        ([(b"origin", b"null")], Reason.FORBIDDEN_CALLER),
    ],
)
def test_other_preflights_are_refused(headers: list[tuple[bytes, bytes]], reason: Reason) -> None:
    """By a page that may not call, or by nobody's page."""
    with pytest.raises(Refusal) as caught:
        answered(a_connection(method="OPTIONS", headers=headers), a_snapshot(allowing(), origins=["https://app.test"]))

    assert caught.value.reason is reason


def test_a_listed_page_may_call() -> None:
    """And none that is served under another name."""
    snapshot = a_snapshot(allowing(), origins=["https://app.test"])
    call = a_connection(a_call(), headers=[(b"origin", b"https://app.test")])

    assert isinstance(judged(call, snapshot)[1], Admission)
    assert refused(call).reason is Reason.FORBIDDEN_CALLER


# 2024-11-05


def posted(query: str, body: bytes = b"", *headers: tuple[bytes, bytes], peer: Peer | None = None) -> Connection:
    """A POST to an endpoint of the old transport."""
    return a_connection(body or a_call(), path="/messages", query=query, headers=headers, peer=peer)


def an_old_snapshot() -> Snapshot:
    """A server of HTTP+SSE."""
    return a_snapshot(allowing(), transport="sse", paths=("/sse",))


def test_clients_of_the_old_transport_post_where_they_were_told() -> None:
    """Exactly there, and nobody but the reader of the stream that said so."""
    memory, snapshot, mine = Memory(), an_old_snapshot(), a_peer()
    stream, end = judged(a_connection(method="GET", path="/sse", peer=mine), snapshot, memory)
    assert isinstance(end, Admission)
    assert stream.principal is not None
    memory.sessions.open("/messages?session=1", stream.principal, stream.agent)
    exchange, end = judged(posted("session=1", peer=mine), snapshot, memory)

    assert isinstance(end, Admission)
    assert exchange.message is not None
    assert exchange.message.revision == "2024-11-05"
    for other in (posted("session=1"), posted("session=2", peer=mine), posted("", peer=mine)):
        assert refused(other, snapshot, memory).reason is Reason.NOT_FOUND


def test_the_old_transport_has_neither_batches_nor_delete() -> None:
    """Whatever revision the header names."""
    memory, snapshot = Memory(), an_old_snapshot()
    stream, _ = judged(a_connection(method="GET", path="/sse"), snapshot, memory)
    assert stream.principal is not None
    memory.sessions.open("/messages?s", stream.principal, stream.agent)
    version = (b"mcp-protocol-version", b"2025-03-26")

    assert "batch" in refused(posted("s", b"[" + a_call() + b"]", version), snapshot, memory).public
    assert refused(a_connection(method="DELETE", path="/sse"), snapshot, memory).reason is Reason.METHOD_NOT_ALLOWED
    assert refused(a_connection(method="GET", path="/messages"), snapshot, memory).reason is Reason.NOT_FOUND


def test_a_forged_identity_header_of_ours_is_refused() -> None:
    """Only the sidecar writes it; those of other proxies are taken out and named."""
    forged = a_connection(a_call(), headers=[(b"sidegate-identity", b"x")])
    foreign = a_connection(a_call(), headers=[(b"x-forwarded-user", b"root")])
    exchange = an_exchange(foreign)
    judge(exchange, a_snapshot(allowing()), Memory(), now_s=NOW_S, clock_s=1.0)

    assert exchange.removed == ("x-forwarded-user",)
    with pytest.raises(Refusal, match="sidecar's own") as caught:
        judge(an_exchange(forged), a_snapshot(allowing()), Memory(), now_s=NOW_S, clock_s=1.0)
    assert caught.value.reason is Reason.FORBIDDEN_CALLER


def test_a_scope_is_asked_for_after_the_policies() -> None:
    """What they deny, no consent mends."""
    identity = Identity(mtls="permissive", user="optional", step_up=(StepUp(scopes=("write",), tools=("execute",)),))
    snapshots = {reason: a_snapshot(allowing(*tools), identity=identity) for reason, tools in (
        (Reason.DENIED, ("other",)), (Reason.UNAUTHENTICATED, ("execute",)),
    )}  # fmt: skip
    for reason, snapshot in snapshots.items():
        with pytest.raises(Refusal) as caught:
            judge(an_exchange(a_connection(a_call("execute"))), snapshot, Memory(), now_s=NOW_S, clock_s=1.0)
        assert caught.value.reason is reason


def test_a_delegation_reaches_the_policies() -> None:
    """From the user outward."""
    user = replace(a_user(), delegation=(Delegated(sub="alice", actor="planner"),))
    question = a_question(principal=replace(a_principal(), user=user))

    assert question.document()["delegation"] == [{"sub": "alice", "actor": "planner"}]


# the trace that a message belongs to


MESSAGES_OWN = f"00-{'a' * 32}-{'b' * 16}-00"


def test_context_of_the_message_goes_before_that_of_the_request() -> None:
    """Which becomes a link: the message may travel in another request's connection (SEP-414)."""
    exchange = an_exchange(a_connection(a_request("ping", {"_meta": {"traceparent": MESSAGES_OWN}})))
    exchange.trace_id, exchange.parent_id = "c" * 32, "d" * 16
    judge(exchange, a_snapshot(allowing()), Memory(), now_s=NOW_S, clock_s=0.0)

    assert (exchange.trace_id, exchange.parent_id, exchange.sampled) == ("a" * 32, "b" * 16, False)
    assert exchange.link == TraceContext(trace_id="c" * 32, parent_id="d" * 16, sampled=True)


def test_context_that_both_name_is_no_link() -> None:
    """An instrumented client writes the same into both."""
    exchange = an_exchange(a_connection(a_request("ping", {"_meta": {"traceparent": MESSAGES_OWN}})))
    exchange.trace_id, exchange.parent_id = "a" * 32, "b" * 16
    judge(exchange, a_snapshot(allowing()), Memory(), now_s=NOW_S, clock_s=0.0)

    assert exchange.link is None


def test_batch_has_a_trace_for_each_message() -> None:
    """Each by its own context; one that has none stays in the request's."""
    body = b"[%b,%b]" % (a_request("ping", {"_meta": {"traceparent": MESSAGES_OWN}}), a_request("ping", request_id=8))
    exchange = an_exchange(a_connection(body))
    exchange.trace_id, exchange.parent_id = "c" * 32, "d" * 16
    found = judge(
        exchange,
        a_snapshot(allowing()),
        Memory(),
        now_s=NOW_S,
        clock_s=0.0,
        divide=lambda _: [exchange, replace(an_exchange(exchange.connection), trace_id="c" * 32, parent_id="d" * 16)],
    )

    assert isinstance(found, Batch)
    assert [each.trace_id for each in found.exchanges] == ["a" * 32, "c" * 32]
