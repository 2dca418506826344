"""sidecar.core.connection: which headers are read, and which travel on."""

import pytest

from sidecar.core import connection as module
from sidecar.core.connection import MAX_CACHED_BYTES, forged_headers, forwarded_headers, returned_headers
from sidecar.errors import Reason, Refusal
from tests.builders import a_connection


def test_a_header_is_read_by_its_name() -> None:
    """Absent is None, and not empty."""
    connection = a_connection(headers=[(b"accept", b"*/*"), (b"empty", b"")])

    assert tuple(connection.header(name) for name in (b"accept", b"empty", b"absent")) == ("*/*", "", None)


def test_a_header_given_twice_is_refused_where_it_is_read() -> None:
    """Servers differ in which of the two they take."""
    connection = a_connection(headers=[(b"mcp-session-id", b"a"), (b"mcp-session-id", b"a")])

    with pytest.raises(Refusal, match="mcp-session-id is given more than once") as caught:
        connection.header(b"mcp-session-id")

    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    "name",
    [
        b"authorization",
        b"connection",
        b"content-length",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"keep-alive",
        b"mcp_session_id",
        b"origin",
        b"proxy-authorization",
        b"sidegate-agent-session",
        b"sidegate-user",
        b"te",
        b"traceparent",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-forwarded-client-cert",
        b"x-forwarded-for",
        b"x_anything",
    ],
)
def test_what_belongs_to_this_hop_does_not_travel_on(name: bytes) -> None:
    """Neither hop-by-hop fields, nor credentials, nor ours, nor aliases of any."""
    assert forwarded_headers([(name, b"1"), (b"accept", b"*/*")]) == [(b"accept", b"*/*")]


def test_other_headers_travel_on_byte_for_byte() -> None:
    """Order, repetition and odd bytes included: routing headers are compared by servers."""
    headers = [(b"mcp-name", b"=?base64?eA==?="), (b"x", b"1"), (b"x", b"\xff\t2"), (b"last-event-id", b"9")]

    assert headers == forwarded_headers(headers)


def test_nominated_headers_do_not_travel_on() -> None:
    """RFC 9110, 7.6.1."""
    headers = [(b"connection", b"close, X-Hop ,\tX-Too"), (b"x-hop", b"1"), (b"x-too", b"1"), (b"x", b"1")]

    assert [(b"x", b"1")] == forwarded_headers(headers) == returned_headers(headers)


def test_a_caller_cannot_hide_from_the_server_what_was_judged() -> None:
    """MCP's own headers are end to end whatever Connection says."""
    headers = [(b"connection", b"mcp-session-id"), (b"mcp-session-id", b"s")]

    assert forwarded_headers(headers) == [(b"mcp-session-id", b"s")]


def test_the_servers_headers_travel_back() -> None:
    """But for those of its own hop."""
    headers = [(b"mcp-session-id", b"s"), (b"content-length", b"3"), (b"transfer-encoding", b"chunked"), (b"x_y", b"1")]

    assert returned_headers(headers) == [(b"mcp-session-id", b"s"), (b"x_y", b"1")]


def test_a_session_that_nobody_proved_stays_here() -> None:
    """A stateless message has none; a server that does not know those would use it all the same."""
    headers = [(b"mcp-session-id", b"s"), (b"mcp-name", b"x")]

    assert forwarded_headers(headers, in_session=False) == [(b"mcp-name", b"x")]


@pytest.mark.parametrize(
    "name",
    [
        b"x-forwarded-user",
        b"x-forwarded-email",
        b"x-forwarded-access-token",
        b"x-auth-request-user",
        b"x-auth-request-groups",
        b"x-remote-user",
        b"remote-user",
        b"x-goog-authenticated-user-email",
        b"x-goog-iap-jwt-assertion",
        b"x-ms-client-principal-name",
        b"x-amzn-oidc-identity",
        b"cf-access-jwt-assertion",
        b"tailscale-user-login",
        b"impersonate-user",
        b"ssl-client-verify",
        b"client-cert",
        b"sidegate-identity",
    ],
)
def test_a_caller_cannot_say_who_the_user_is(name: bytes) -> None:
    """Whichever proxy the server believes; what was taken out is known for the record."""
    headers = [(b"accept", b"x"), (name, b"root")]

    assert forwarded_headers(headers) == [(b"accept", b"x")]
    assert forged_headers(headers) == (name.decode(),)


def test_what_is_ours_to_read_is_no_forgery() -> None:
    """It does not travel on all the same."""
    headers = [(b"sidegate-agent-session", b"s"), (b"sidegate-workload-token", b"t"), (b"dpop", b"p")]

    assert forwarded_headers(headers) == []
    assert forged_headers(headers) == ()


@pytest.mark.parametrize("name", [b"www-authenticate", b"authentication-info", b"dpop-nonce"])
def test_the_servers_own_challenge_stays_behind(name: bytes) -> None:
    """It names another URL, and clients would look for their provider there."""
    assert returned_headers([(name, b"x"), (b"content-type", b"y")]) == [(b"content-type", b"y")]


@pytest.mark.parametrize("length", [1, MAX_CACHED_BYTES + 1])
def test_names_of_any_length_are_sorted_out_alike(length: int) -> None:
    """What is kept for the next request is bounded; long names are looked at each time."""
    kept = module._sort.cache_info().currsize
    headers = [(b"n" * length, b"1"), (b"x-forwarded-user", b"eve"), (b"a_b", b"2"), (b"mcp-name", b"3")]

    assert forwarded_headers(headers) == [headers[0], headers[3]]
    assert forged_headers(headers) == ("x-forwarded-user",)
    assert module._sort.cache_info().currsize <= kept + (length == 1)


def test_no_headers_are_none() -> None:
    """An empty list is sorted out, too."""
    assert (forwarded_headers([]), forged_headers([])) == ([], ())
