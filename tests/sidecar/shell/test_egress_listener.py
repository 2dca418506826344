"""What an application opens itself: ours, another's, or another protocol; and where it was going."""

import asyncio
import socket
from contextlib import suppress

import pytest

from certs.verify import TrustBundles
from sidecar.shell.egress_listener import _first_line, _origin_form, original_address
from tests.builders import AGENT, a_call
from tests.certs.pki import A_TEST, an_authority
from tests.fakes import Client, a_server, echo_script
from tests.sidecar.shell.test_egress import Out, a_pair, an_egress, proxied


async def test_other_plain_requests_pass_untouched_and_unrecorded() -> None:
    """A proxy's client has all its HTTP go this way; what the profile does not name is forwarded in origin form."""
    authority = an_authority()
    bundles = TrustBundles({A_TEST: [authority.certificate]})
    async with a_server(echo_script()) as (fake, port), an_egress(port, authority, bundles, servers=()) as out:
        client = await out.dial()
        await client.say(proxied(out, a_call(), "Proxy-Connection: keep-alive", "Authorization: Bearer own"))
        heard = await client.hear()
        assert heard is not None
        assert b'"echo"' in heard.body
        await client.close()

    assert out.exchanges == []
    assert fake.heard[0].line == b"POST /mcp HTTP/1.1"
    assert fake.heard[0].values(b"connection") == [b"close"]
    assert fake.heard[0].values(b"proxy-connection") == []
    assert fake.heard[0].values(b"authorization") == [b"Bearer own"]


async def _tunnel(out: Out) -> Client:
    """Ask for a tunnel, as some clients do for plain HTTP too; behind it, all is as in capture mode redirect."""
    client = await out.dial()
    await client.say(f"CONNECT 127.0.0.1:{out.server_port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
    return client


def origin(out: Out, body: bytes, *, host: str = "localhost") -> bytes:
    """A request as it is sent to its server."""
    head = f"POST /mcp HTTP/1.1\r\nHost: {host}:{out.server_port}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_a_captured_connection_is_governed_by_the_name_in_its_request() -> None:
    """The address is where the application dialled; the name says which identity must be there."""
    async with a_pair(echo_script()) as (out, fake, callers):
        client = await _tunnel(out)
        await client.say(origin(out, a_call()))
        heard = await client.hear()
        assert heard is not None
        assert b'"echo"' in heard.body
        await client.say(origin(out, a_call(), host="elsewhere"))
        misled = await client.hear()
        assert misled is not None
        assert b"another server" in misled.body
        await client.close()

    assert callers == [str(AGENT)]
    assert len(fake.heard) == 1
    assert [each.was_sent for each in out.exchanges] == [True, False]


@pytest.mark.parametrize(
    "first", [b"\x16\x03\x01 not ours", b"PING x", b"PING x\r\n", b"GET /metrics HTTP/1.1\r\nHost: other\r\n\r\n"]
)
async def test_a_captured_connection_that_is_not_ours_passes_byte_for_byte(
    first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another protocol, or HTTP to another name: both ways, and with its half-closes."""
    monkeypatch.setattr("sidecar.shell.egress_listener.QUIET_S", 0.05)
    heard = bytearray()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(100):
            heard.extend(piece)
            writer.write(piece.upper())
        writer.write(b"end")
        writer.close()

    authority = an_authority()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with an_egress(port, authority, TrustBundles({A_TEST: [authority.certificate]})) as out:
        client = await _tunnel(out)
        await client.say(first)
        assert await client.until(first[-3:].upper()) == first.upper()
        client.writer.write_eof()
        assert await client.rest() == b"end"
        await client.close()
    server.close()
    await server.wait_closed()

    assert bytes(heard) == first
    assert out.exchanges == []


async def test_a_server_that_speaks_first_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As databases and mail servers do: an application that says nothing is not waited for."""
    monkeypatch.setattr("sidecar.shell.egress_listener.QUIET_S", 0.05)

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        writer.close()

    authority = an_authority()
    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with an_egress(port, authority, TrustBundles({A_TEST: [authority.certificate]})) as out:
        client = await _tunnel(out)
        assert await client.rest() == b"220 hello\r\n"
        await client.close()
    server.close()
    await server.wait_closed()


async def test_a_client_that_names_no_destination_is_turned_away() -> None:
    """A proxy has nowhere to send it."""
    authority = an_authority()
    async with an_egress(1, authority, TrustBundles({A_TEST: [authority.certificate]})) as out:
        for data in (b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT nowhere HTTP/1.1\r\n\r\n", b"\x16\x03\x01"):
            client = await out.dial()
            await client.say(data)
            with suppress(ConnectionResetError):  # what it said was not read
                assert await client.rest() == b""
            await client.close()


async def test_a_destination_that_does_not_answer_ends_the_connection() -> None:
    """The agent is told so, as proxies do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        authority = an_authority()
        async with an_egress(port, authority, TrustBundles({A_TEST: [authority.certificate]}), servers=()) as out:
            client = await out.dial()
            await client.say(proxied(out, method="GET"))
            assert (await client.rest()).startswith(b"HTTP/1.1 502")
            await client.close()


def test_a_forwarded_head_is_in_origin_form() -> None:
    """Host from the target (RFC 9112, 3.2.2); nothing of the proxy's hop; the connection ends with the answer."""
    head = (
        b"GET http://a.example:81/x?y HTTP/1.1\r\nHOST: other\r\nProxy-Connection: keep-alive\r\n"
        b"Connection: keep-alive\r\nAccept: */*\r\n\r\n"
    )

    assert _origin_form(head, "/x?y", "a.example:81") == (
        b"GET /x?y HTTP/1.1\r\nHost: a.example:81\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    )


def test_two_hosts_are_none() -> None:
    """Which of them the server would take is not known."""
    assert _first_line(b"GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n") == (b"/", None)


def test_a_connection_that_nobody_redirected_has_no_original_address() -> None:
    """It came straight here."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with (
            socket.create_server((host, 0), family=family) as listening,
            socket.create_connection(listening.getsockname()[:2]),
            listening.accept()[0] as accepted,
        ):
            assert original_address(accepted) is None
