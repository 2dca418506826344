"""sidecar.core.origin: under which names callers reach the server, and which pages may call it."""

import pytest

from sidecar.core.connection import Connection
from sidecar.core.origin import check_host, check_origin, preflight, shared
from sidecar.errors import Reason, Refusal
from tests.builders import a_connection

HOSTS = frozenset({"mcp.test", "mcp.test:8443", "[::1]"})
APP = "https://app.test"


def from_page(origin: bytes, *more: tuple[bytes, bytes]) -> Connection:
    """A request by a page of *origin*."""
    return a_connection(headers=[(b"origin", origin), *more], method="OPTIONS")


def under(host: bytes) -> Connection:
    """A request that says *host*."""
    connection = a_connection()
    object.__setattr__(connection, "values", {b"host": host})
    return connection


@pytest.mark.parametrize("host", [b"mcp.test", b"MCP.test", b"mcp.test:8443", b"mcp.test:1", b"[::1]", b"[::1]:15443"])
def test_a_host_of_ours_is_served(host: bytes) -> None:
    """In any case (RFC 9110, 4.2.3), and on every port where the list names none."""
    check_host(under(host), HOSTS)


@pytest.mark.parametrize(
    "host", [b"evil.test", b"mcp.test.", b"mcp.test:", b"mcp.test:x", b"a.mcp.test", b"", b"::1", b"mcp.test:8443:1"]
)
def test_any_other_host_is_refused(host: bytes) -> None:
    """DNS rebinding: the name by which a browser was fooled is not ours."""
    with pytest.raises(Refusal) as caught:
        check_host(under(host), HOSTS)

    assert caught.value.reason is Reason.FORBIDDEN_CALLER


def test_a_host_with_a_port_stands_for_that_port_only() -> None:
    """As it is written in the profile."""
    with pytest.raises(Refusal, match="not served"):
        check_host(under(b"mcp.test:1"), {"mcp.test:8443"})


@pytest.mark.parametrize("origin", [b"https://mcp.test", b"http://mcp.test", APP.encode()])
def test_an_origin_of_ours_may_call(origin: bytes) -> None:
    """Whatever the scheme where it is our own name, because TLS may end before us; others as they are listed."""
    check_origin(from_page(origin), HOSTS, (APP,))


def test_without_an_origin_there_is_nothing_to_judge() -> None:
    """Only browsers send one."""
    check_origin(a_connection(), (), ())


@pytest.mark.parametrize(
    "origin",
    [b"null", b"", b"https://evil.test", b"mcp.test", b"https://mcp.test:9", b"https://", b"http://app.test", b"*"],
)
def test_any_other_origin_is_refused(origin: bytes) -> None:
    """A browser's page of another site."""
    with pytest.raises(Refusal) as caught:
        check_origin(from_page(origin), HOSTS, (APP,))

    assert caught.value.reason is Reason.FORBIDDEN_CALLER


def test_two_origins_are_none() -> None:
    """Servers and proxies differ in which of them they take."""
    with pytest.raises(Refusal, match="more than once"):
        check_origin(from_page(APP.encode(), (b"origin", b"https://evil.test")), HOSTS, (APP,))


def test_a_preflight_is_answered_for_a_listed_page() -> None:
    """With the headers of MCP, and those of tools that it asks for; never with `*`."""
    asked = (b"access-control-request-headers", b"Mcp-Param-Region,x-evil, mcp-param-a\x0b")
    response = preflight(from_page(APP.encode(), (b"access-control-request-method", b"POST"), asked), (APP,))
    headers = dict(response.headers)

    assert (response.status, response.body) == (204, b"")
    assert headers[b"access-control-allow-origin"] == APP.encode()
    assert headers[b"vary"] == b"Origin"
    allowed = headers[b"access-control-allow-headers"].split(b", ")
    assert {b"authorization", b"mcp-session-id", b"mcp-name", b"mcp-param-region"} <= set(allowed)
    assert b"x-evil" not in allowed
    assert not any(b"\x0b" in each for each in allowed)
    assert not any(b"*" in value for value in headers.values())


@pytest.mark.parametrize(
    "connection",
    [
        a_connection(method="OPTIONS"),
        from_page(b"https://mcp.test", (b"access-control-request-method", b"POST")),
        from_page(APP.encode()),
    ],
)
def test_other_options_requests_are_refused(connection: Connection) -> None:
    """No page that may call sends them, or they are no preflight."""
    with pytest.raises(Refusal) as caught:
        preflight(connection, (APP,))

    assert caught.value.reason is Reason.METHOD_NOT_ALLOWED


def test_a_response_is_shared_with_the_page_that_asked() -> None:
    """The server's own CORS headers do not count: it never saw the origin."""
    headers = ((b"mcp-session-id", b"s"), (b"access-control-allow-origin", b"*"), (b"access-control-max-age", b"1"))

    assert list(shared(headers, None, (APP,))) == [(b"mcp-session-id", b"s")]
    assert list(shared(headers, "https://mcp.test", (APP,))) == [(b"mcp-session-id", b"s")]
    found = list(shared(headers, APP, (APP,)))
    assert found[:3] == [
        (b"mcp-session-id", b"s"),
        (b"access-control-allow-origin", APP.encode()),
        (b"vary", b"Origin"),
    ]
    assert found[3][0] == b"access-control-expose-headers"
