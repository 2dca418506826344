"""sidecar.shell.listener: who gets in, by which port, with TLS or without, and how many at a time."""

import asyncio
import socket
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority, make_key
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain
from certs.svid import Svid
from certs.tls import ClientCertificate, MutualClient, MutualServer
from certs.verify import TrustBundles
from sidecar.config import Capture
from sidecar.shell import listener
from sidecar.shell.listener import Listener, original_port
from sidecar.shell.serving import Serving
from sidecar.shell.upstream import Upstream
from tests.builders import AGENT, a_call, a_snapshot
from tests.certs.pki import key_der
from tests.fakes import Client, a_path, a_server, allowing, echo_script, eventually, post

CALL = a_call()
NOW = datetime.now(UTC)
SERVER = SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing")
A_TEST = TrustDomain("a.test")


def an_authority() -> tuple[Authority, TrustBundles]:
    """A CA that lives now, and the trust in it."""
    authority = Authority.make(
        name="CA",
        key=make_key(),
        now=NOW,
        lifetime=timedelta(days=1),
        serial=x509.random_serial_number(),
        trust_domain=A_TEST,
    )
    return authority, TrustBundles({A_TEST: [authority.certificate]})


def an_svid(authority: Authority, bundles: TrustBundles, spiffe_id: SpiffeId) -> Svid:
    """An SVID that lives now."""
    key = make_key()
    leaf = authority.sign_svid(
        spiffe_id, key.public_key(), now=NOW, lifetime=timedelta(hours=12), serial=x509.random_serial_number()
    )
    return Svid.parse(spiffe_id, leaf.public_bytes(Encoding.DER), key_der(key), bundles, now=datetime.now(UTC))


def contexts(*, client_id: SpiffeId = AGENT, known: bool = True) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The TLS of a sidecar and of a caller, whose CA the sidecar may not know."""
    authority, bundles = an_authority()
    other, others = (authority, bundles) if known else an_authority()
    server = MutualServer(client_certificate=ClientCertificate.OPTIONAL)
    server.use(an_svid(authority, bundles, SERVER), bundles)
    client = MutualClient()
    client.use(an_svid(other, others, client_id), bundles)
    return server.context, client.context(SpiffePattern.exactly(SERVER))


async def dial(port: int, context: ssl.SSLContext | None) -> Client:
    """Open a connection, with TLS or without."""
    name = "sidecar" if context is not None else None
    return Client(*await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name))


async def test_tls_and_plaintext_share_the_port() -> None:
    """Told apart by the first byte; the certificate's ID is the caller's."""
    server_tls, client_tls = contexts()
    async with (
        a_server(echo_script()) as (_, port),
        a_path(a_snapshot(allowing(), port=port), tls=server_tls) as path,
    ):
        for context in (client_tls, None, client_tls):
            client = await dial(path.port, context)
            await client.say(post(CALL))
            answer = await client.hear()
            assert answer is not None
            assert answer.line == b"HTTP/1.1 200 OK"
            await client.close()

    assert [each.principal and each.principal.workload for each in path.exchanges] == [AGENT, None, AGENT]


async def test_a_stranger_does_not_get_in() -> None:
    """A certificate of a CA that is not trusted ends the handshake; the next caller is served."""
    server_tls, stranger = contexts(known=False)
    async with (
        a_server(echo_script()) as (server, port),
        a_path(a_snapshot(allowing(), port=port), tls=server_tls, max_connections=1) as path,
    ):
        answer = b""
        with suppress(ssl.SSLError, ConnectionError):  # TLS 1.3: the client's side of the handshake may end well
            client = await dial(path.port, stranger)
            await client.say(post(CALL))
            answer = await client.rest()
        assert answer == b""
        plain = await dial(path.port, None)
        await plain.say(post(CALL))
        assert await plain.hear() is not None
        await plain.close()

    assert len(server.heard) == 1


@pytest.mark.parametrize("first", [b"\x16\x03\x01\x02\x00\x01", b""], ids=["TLS without TLS", "nothing"])
async def test_who_cannot_be_served_is_closed(first: bytes) -> None:
    """TLS where there is no identity yet, and who leaves without a word."""
    async with a_path(a_snapshot(allowing()), max_connections=1) as path:
        client = await dial(path.port, None)
        if first:
            await client.say(first)
            with suppress(ConnectionResetError):  # what was not read is reset
                assert await client.rest() == b""
        await client.close()
        following = await dial(path.port, None)  # the place is free again
        await following.say(b"PUT /mcp HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await following.hear() is not None
        await following.close()

    assert len(path.exchanges) == 1


async def test_a_silent_client_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said nothing in time."""
    monkeypatch.setattr(listener, "FIRST_BYTE_S", 0.05)
    async with a_path(a_snapshot(allowing()), max_connections=1) as path:
        silent, following = await dial(path.port, None), await dial(path.port, None)
        await following.say(b"PUT /mcp HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await following.hear() is not None
        assert await silent.rest() == b""
        await silent.close()
        await following.close()


async def test_a_stuck_handshake_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It began one and went silent."""
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.1)
    server_tls, _ = contexts()
    async with a_path(a_snapshot(allowing()), tls=server_tls, max_connections=1) as path:
        silent, following = await dial(path.port, None), await dial(path.port, None)
        await silent.say(b"\x16\x03\x01")
        await following.say(b"PUT /mcp HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await following.hear() is not None
        await silent.close()
        await following.close()


async def test_more_connections_than_places_wait_their_turn() -> None:
    """In the kernel; none is refused."""
    async with (
        a_server(echo_script()) as (_, port),
        a_path(a_snapshot(allowing(), port=port), max_connections=2) as path,
    ):
        clients = [await dial(path.port, None) for _ in range(6)]
        for client in clients:
            await client.say(post(CALL, "Connection: close"))
        answers = [await client.rest() for client in clients]
        for client in clients:
            await client.close()

    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)


async def test_stopping_to_accept_leaves_calls_alone() -> None:
    """Draining: who is in stays in, who waits for the first byte is closed."""
    async with a_server(echo_script()) as (_, port), a_path(a_snapshot(allowing(), port=port)) as path:
        inside, silent = await dial(path.port, None), await dial(path.port, None)
        await inside.say(post(CALL))
        assert await inside.hear() is not None
        path.accepting.cancel()
        await eventually(path.accepting.done, what="the end of accepting")
        assert await silent.rest() == b""
        await inside.say(post(CALL))
        assert await inside.hear() is not None
        with pytest.raises(ConnectionRefusedError):
            await dial(path.port, None)
        await inside.close()
        await silent.close()


@pytest.mark.parametrize(
    ("dialled", "is_served"),
    [("mcp", True), ("own", True), ("other", False)],
)
async def test_redirected_connections_must_have_been_going_to_the_server(
    monkeypatch: pytest.MonkeyPatch, dialled: str, *, is_served: bool
) -> None:
    """Any other port of the pod is not ours to open; it is told and closed."""
    async with (
        a_server(echo_script()) as (_, port),
        a_path(a_snapshot(allowing(), port=port), capture=Capture.REDIRECT) as path,
    ):
        ports = {"mcp": port, "own": path.port, "other": 22}
        monkeypatch.setattr(listener, "original_port", lambda _: ports[dialled])
        client = await dial(path.port, None)
        await client.say(post(CALL, "Connection: close"))
        answer = b""
        with suppress(ConnectionResetError):
            answer = await client.rest()
        await client.close()

    assert answer.startswith(b"HTTP/1.1 200 OK") is is_served
    assert [told for _, told in path.refused_ports] == ([] if is_served else [22])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_that_was_not_redirected_was_going_here(host: str) -> None:
    """Without an entry of connection tracking."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening, socket.socket(family) as dialling:
        listening.bind((host, 0))
        listening.listen()
        dialling.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            assert original_port(accepted) == listening.getsockname()[1]


async def test_both_families_are_served_on_one_port() -> None:
    """As a pod with two addresses needs it."""
    async with asyncio.TaskGroup() as tasks:
        serving = Serving(
            upstream=Upstream("127.0.0.1", tasks.create_task),
            observers=[],
            spawn=tasks.create_task,
            resolve=lambda _: asyncio.sleep(0),
            why_not_ready=lambda: None,
        )
        both = Listener(
            serving,
            host="::",
            port=0,
            capture=Capture.LISTEN,
            tls=None,
            max_connections=4,
            refused_port=lambda *_: None,
        )
        accepting = tasks.create_task(both.run())
        for host in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(host, both.port)
            writer.write(b"PUT /mcp HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
            writer.close()
            await writer.wait_closed()
        await eventually(lambda: not serving.connections, what="the ends of the connections")
        accepting.cancel()
