"""Outbound calls: which are ours, whom they must meet, what is said of the agent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import egress
from sidecar.core.egress import AgentSessions, canonical, find, incoming, outgoing, route, split_authority, target
from sidecar.core.profile import Destination
from sidecar.errors import Reason, Refusal
from tests.builders import AGENT

NAMES = ("records.demo", "records.demo.svc", "records.demo.svc.cluster.local", "Records.Demo.svc.corp.example.")


@pytest.mark.parametrize("host", NAMES)
@pytest.mark.parametrize("named", NAMES)
def test_every_name_of_a_service_is_the_service(host: str, named: str) -> None:
    """However the agent and the profile spell it; without a pattern, any account of the Service's namespace will do."""
    asked = target(b"/mcp", f"{host}:8000")
    server = find(asked, [Destination(host=named, port=8000)], "agents")

    assert server
    found = route(asked, server, "agents", AGENT)
    assert str(found.expected) == "spiffe://a.test/ns/demo/sa/*"
    assert (found.host, found.port) == (host, 8000)


def test_a_short_name_is_of_the_agents_own_namespace() -> None:
    """As its DNS search path has it."""
    assert canonical("records", "agents") == canonical("records.agents.svc", "demo")
    assert canonical("records", "agents") != canonical("records.demo", "agents")


@pytest.mark.parametrize(
    ("host", "namespace"), [("api.corp.example", "x"), ("db-0.db.demo.svc", "x"), ("10.0.0.1", "x"), ("::1", "x")]
)
def test_other_names_stand_for_themselves(host: str, namespace: str) -> None:
    """An outside host, a pod of a StatefulSet, an address."""
    assert canonical(host, namespace).startswith(host) or host == "::1"


@pytest.mark.parametrize("authority", ["records.demo:8001", "records.demo", "billing.demo:8000", "records.other:8000"])
def test_what_the_profile_does_not_name_is_no_business_of_ours(authority: str) -> None:
    """Another port, another Service, another namespace."""
    asked = target(b"/mcp", authority)

    assert find(asked, [Destination(host="records.demo", port=8000)], "agents") is None


def test_the_profiles_pattern_says_whom_to_meet() -> None:
    """Of a federated domain, for instance."""
    server = Destination(host="tools.partner.example", port=443, id="spiffe://b.test/ns/tools/**")
    asked = target(b"http://tools.partner.example:443/mcp", None)

    assert find(asked, [server], "agents") is server
    assert str(route(asked, server, "agents", AGENT).expected) == server.id


@pytest.mark.parametrize(
    ("url", "host", "expected"),
    [
        (b"/mcp?x=1", "records.demo:8000", ("records.demo", 8000, "/mcp?x=1")),
        (b"/", "records.demo", ("records.demo", 80, "/")),
        (b"http://records.demo:8000/mcp?x=1", "other", ("records.demo", 8000, "/mcp?x=1")),
        (b"HTTP://records.demo", None, ("records.demo", 80, "/")),
        (b"/mcp", "[::1]:8000", ("::1", 8000, "/mcp")),
        (b"/mcp", "[::1]", ("::1", 80, "/mcp")),
    ],
)
def test_both_forms_of_a_target_are_read(url: bytes, host: str | None, expected: tuple[str, int, str]) -> None:
    """A proxy gets the absolute form, whose authority counts (RFC 9112, 3.2.2)."""
    asked = target(url, host)

    assert (asked.host, asked.port, asked.path) == expected


@pytest.mark.parametrize(
    ("url", "host"),
    [(b"/mcp", None), (b"/mcp", ""), (b"/mcp", ":80"), (b"/mcp", "a:b"), (b"/mcp", "a:0"), (b"/mcp", "a:70000"),
     (b"*", "a"), (b"ftp://a/", "a"), (b"http:///x", "a"), (b"http://user@a/x", "a"), (b"/mcp", "a:8_0")],
)  # fmt: skip
def test_a_target_without_host_and_port_is_refused(url: bytes, host: str | None) -> None:
    """Where to go must not be guessed."""
    with pytest.raises(Refusal) as refused:
        target(url, host)
    assert refused.value.reason is Reason.MALFORMED


@given(st.text(max_size=60))
def test_any_authority_is_read_or_refused(text: str) -> None:
    """Nothing else comes out."""
    try:
        _, port = split_authority(text, 80)
    except Refusal:
        return
    assert 0 < port <= 65535


def test_what_belongs_to_a_hop_stays_there_and_stamps_cannot_be_forged() -> None:
    """The user's token, MCP's headers and the rest go on byte for byte."""
    headers = [
        (b"host", b"records.demo:8000"), (b"authorization", b"Bearer x"), (b"mcp-session-id", b"s"), (b"connection", b"keep-alive, x-hop"),
        (b"x-hop", b"1"), (b"proxy-connection", b"keep-alive"), (b"sidegate-workload-token", b"t"), (b"sidegate-agent-session", b"forged"),
        (b"traceparent", b"old"), (b"x-forwarded-client-cert", b"URI=spiffe://a.test/admin"),
    ]  # fmt: skip
    sent = outgoing(headers, authority="records.demo:8000", agent_session="7f3a", traceparent=b"00-new")

    assert sent == [
        (b"host", b"records.demo:8000"), (b"authorization", b"Bearer x"), (b"mcp-session-id", b"s"),
        (b"sidegate-agent-session", b"7f3a"), (b"traceparent", b"00-new"),
    ]  # fmt: skip


def test_the_answers_challenge_reaches_the_agent() -> None:
    """It is how the agent learns where to get a token; the hop's own headers do not."""
    answer = [(b"www-authenticate", b"Bearer"), (b"keep-alive", b"5"), (b"transfer-encoding", b"chunked"), (b"x", b"1")]

    assert incoming(answer) == [(b"www-authenticate", b"Bearer"), (b"x", b"1")]


def test_an_agents_session_is_stamped_once_and_its_own_word_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says, else what its MCP session was opened with, else its connection's; bounded."""
    monkeypatch.setattr(egress, "MAX_SESSIONS", 2)
    sessions = AgentSessions(mint=lambda: "minted")
    sessions.remember("mcp-1", "first")

    assert sessions.of("own", "mcp-1", "connection") == "own"
    assert sessions.of(None, "mcp-1", "connection") == "first"
    assert sessions.of(None, "mcp-2", "connection") == "connection"
    assert sessions.of(None, None, "connection") == "connection"
    sessions.remember("mcp-2", "x")
    sessions.remember("mcp-3", "x")
    assert sessions.of(None, "mcp-1", "connection") == "connection"
