"""sidecar.pipeline: the stages in their order, and what is known when each of them refuses."""

from dataclasses import replace

import pytest

from sidecar.core.authorise import Verdict
from sidecar.core.connection import Connection
from sidecar.core.identity import UnknownKey
from sidecar.core.limits import Admission
from sidecar.core.message import Shape
from sidecar.core.profile import Identity, Limit, Provider
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import MAX_LABEL_CHARS, Memory, Snapshot, judge, remember
from tests.builders import AGENT, NOW_S, a_call, a_connection, a_peer, a_request, a_snapshot, an_exchange
from tests.fakes import FakeEngine, allowing

INITIALIZE = a_request("initialize", {"clientInfo": {"name": "planner", "version": "1.2"}})


def judged(
    connection: Connection, snapshot: Snapshot | None = None, memory: Memory | None = None
) -> tuple[Exchange, Admission | Refusal]:
    """Judge *connection*; return its record and how it ended."""
    exchange = an_exchange(connection)
    try:
        admission = judge(exchange, snapshot or a_snapshot(allowing()), memory or Memory(), now_s=NOW_S, clock_s=0.0)
    except Refusal as refusal:
        return exchange, refusal
    return exchange, admission


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
