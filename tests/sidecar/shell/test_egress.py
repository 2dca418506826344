"""An agent's plain calls leave as mutual TLS, meet the right server or nobody, and say which agent asked."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority, make_key
from certs.spiffe import SpiffeId
from certs.svid import Svid, X509Snapshot
from certs.tls import ClientCertificate, MutualClient, MutualServer, peer_of
from certs.verify import TrustBundles
from sidecar.core.authorise import Agent
from sidecar.core.profile import AgentRole, Destination, Identity, Profile
from sidecar.errors import Reason
from sidecar.exchange import Exchange
from sidecar.pipeline import Snapshot
from sidecar.shell.egress import MAX_HEAD_BYTES, Egress
from sidecar.shell.egress_listener import EgressListener
from sidecar.shell.serving import Serving
from tests.builders import AGENT, a_call, a_request, a_snapshot
from tests.certs.pki import A_TEST, B_TEST, an_authority, key_der
from tests.fakes import (
    Client,
    FakeObserver,
    FakeServer,
    Heard,
    Script,
    a_path,
    a_server,
    allowing,
    answers,
    echo_script,
    eventually,
    response,
)  # fmt: skip

SERVER, OTHER = SpiffeId.parse("spiffe://a.test/ns/demo/sa/records"), SpiffeId.parse("spiffe://a.test/ns/evil/sa/x")
LIFE = timedelta(minutes=10)


def an_svid(authority: Authority, spiffe_id: SpiffeId, bundles: TrustBundles) -> Svid:
    """An SVID."""
    key, now = make_key(), datetime.now(UTC)
    leaf = authority.sign_svid(spiffe_id, key.public_key(), now=now, lifetime=LIFE, serial=x509.random_serial_number())
    return Svid.parse(spiffe_id, leaf.public_bytes(Encoding.DER), key_der(key), bundles, now=now)


@dataclass
class Out:
    """A running egress, as a proxy on *port*, and what goes with it."""

    port: int
    egress: Egress
    client: MutualClient
    observer: FakeObserver
    serving: Serving
    server_port: int
    bundles: TrustBundles
    svid: Svid

    @property
    def exchanges(self) -> list[Exchange]:
        """What was observed."""
        return self.observer.exchanges

    async def dial(self) -> Client:
        """Connect as the application does."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    def held(self, bundles: TrustBundles) -> X509Snapshot:
        """An update of the Workload API."""
        return X509Snapshot(
            svid=self.svid, bundles=bundles, rejected_domains=frozenset(), received_at=datetime.now(UTC)
        )


def proxied(out: Out, body: bytes = b"", *headers: str, method: str = "POST", host: str = "localhost") -> bytes:
    """A request as an HTTP client sends it to a proxy."""
    lines = [f"{method} http://{host}:{out.server_port}/mcp HTTP/1.1", f"Host: {host}:{out.server_port}", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def an_egress(
    server_port: int,
    authority: Authority,
    bundles: TrustBundles,
    *,
    expected: str = str(SERVER),
    servers: tuple[Destination, ...] | None = None,
    ready: bool = True,
) -> AsyncIterator[Out]:
    """Run the outbound side of an agent that may call localhost:*server_port*."""
    observer, client = FakeObserver(), MutualClient()
    svid = an_svid(authority, AGENT, bundles)
    client.use(svid, bundles)
    async with asyncio.TaskGroup() as tasks:
        serving = Serving(
            upstream=None, observers=[observer], spawn=tasks.create_task, resolve=None, why_not_ready=lambda: None  # type: ignore[arg-type]
        )  # fmt: skip
        named = (Destination(host="localhost", port=server_port, id=expected),) if servers is None else servers
        snapshot = a_snapshot()
        if ready:
            profile = Profile(server=snapshot.profile.server, agent=AgentRole(servers=named))
            serving.snapshot = replace(snapshot, profile=profile)
        egress = Egress(serving, client, own_id=lambda: AGENT, spawn=tasks.create_task, grace_s=5.0)
        listener = EgressListener(egress, port=0, is_redirected=False, max_connections=16)
        accepting = tasks.create_task(listener.run())
        try:
            yield Out(listener.port, egress, client, observer, serving, server_port, bundles, svid)
        finally:
            for connection in tuple(serving.connections):
                connection.abort()
            await eventually(lambda: not serving.connections, what="the connections to be closed")
            accepting.cancel()
            assert serving.in_flight == 0


@asynccontextmanager
async def a_tls_server(script: Script, context: ssl.SSLContext) -> AsyncIterator[tuple[FakeServer, int, list[str]]]:
    """A server behind *context* that does what *script* says; gives it, its port, and who called."""
    fake, callers = FakeServer(script), list[str]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = peer_of(writer.transport)
        callers.append("nobody" if peer is None else str(peer.spiffe_id))
        await fake.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield fake, server.sockets[0].getsockname()[1], callers
    finally:
        server.close()
        await eventually(lambda: fake.open == 0, what="the server's connections to be closed")
        await server.wait_closed()


@asynccontextmanager
async def a_pair(
    script: Script, *, server_id: SpiffeId = SERVER, expected: str = str(SERVER)
) -> AsyncIterator[tuple[Out, FakeServer, list[str]]]:
    """An agent's egress and one server."""
    authority = an_authority()
    bundles = TrustBundles({A_TEST: [authority.certificate]})
    server = MutualServer()
    server.use(an_svid(authority, server_id, bundles), bundles)
    async with (
        a_tls_server(script, server.context) as (fake, port, callers),
        an_egress(port, authority, bundles, expected=expected) as out,
    ):
        yield out, fake, callers


async def test_a_plain_call_leaves_as_mutual_tls_with_the_agents_identity() -> None:
    """Origin form, the application's headers, the stamps; the answer as it came; the connection is kept, both ways."""
    async with a_pair(echo_script()) as (out, fake, callers):
        client = await out.dial()
        for _ in range(2):
            await client.say(proxied(out, a_call(), "Authorization: Bearer user", "X-Own: 1"))
            heard = await client.hear()
            assert heard is not None
            assert heard.line == b"HTTP/1.1 200 OK"
            assert b'"echo"' in heard.body
        await client.close()

    assert callers == [str(AGENT)]
    first, second = fake.heard
    assert first.line == b"POST /mcp HTTP/1.1"
    assert first.body == a_call()
    assert first.values(b"authorization") == [b"Bearer user"]
    assert first.values(b"host") == [b"localhost:%d" % out.server_port]
    assert first.values(b"sidegate-agent-session") == second.values(b"sidegate-agent-session") != [b""]


async def test_the_record_says_who_called_whom() -> None:
    """Outbound, with both identities, the tool, the agent's session; and a span that is the server's parent."""
    async with a_pair(echo_script()) as (out, fake, _):
        client = await out.dial()
        await client.say(proxied(out, a_call("query"), "Sidegate-Agent-Session: run-7", "traceparent: " + TRACE))
        assert await client.hear()
        await client.close()

    exchange = out.exchanges[0]
    assert exchange.outbound is not None
    assert exchange.outbound.server == SERVER
    assert exchange.principal
    assert exchange.principal.workload == AGENT
    assert exchange.message
    assert exchange.message.target
    assert exchange.agent == Agent(session="run-7")
    assert exchange.trace_id == TRACE[3:35]
    assert exchange.parent_id == TRACE[36:52]
    assert fake.heard[0].values(b"traceparent") == [f"00-{TRACE[3:35]}-{exchange.span_id}-01".encode()]
    assert fake.heard[0].values(b"sidegate-agent-session") == [b"run-7"]
    assert (exchange.status, exchange.was_sent) == (200, True)
    assert exchange.upstream_s is not None


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("expected", [str(SERVER), "spiffe://a.test/ns/demo/**", ""])
async def test_a_server_with_another_identity_gets_nothing(expected: str) -> None:
    """Not a byte of the call; the agent is told, and the record says why."""
    async with a_pair(echo_script(), server_id=OTHER, expected=expected) as (out, fake, _):
        client = await out.dial()
        await client.say(proxied(out, a_call(), "Authorization: Bearer secret"))
        heard = await client.hear()
        assert heard is not None
        assert b'"id":7' in heard.body
        assert b"cannot be reached" in heard.body
        await client.close()

    assert fake.heard == []
    exchange = out.exchanges[0]
    assert exchange.refusal is not None
    assert exchange.refusal.reason is Reason.UPSTREAM
    assert "unauthorised" in exchange.refusal.detail
    assert not exchange.was_sent


async def test_an_id_signed_by_a_federated_authority_gets_nothing() -> None:
    """b.test's CA says that it is a.test's server."""
    ours, theirs = an_authority(), an_authority(B_TEST)
    bundles = TrustBundles({A_TEST: [ours.certificate], B_TEST: [theirs.certificate]})
    impostor = MutualServer(client_certificate=ClientCertificate.OPTIONAL)
    impostor.use(an_svid(theirs, SERVER, TrustBundles({A_TEST: [theirs.certificate]})), bundles)
    async with (
        a_tls_server(echo_script(), impostor.context) as (fake, port, _),
        an_egress(port, ours, bundles) as out,
    ):
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        assert await client.hear()
        await client.close()

    assert fake.heard == []
    assert "untrusted-chain" in str(out.exchanges[0].refusal and out.exchanges[0].refusal.detail)


async def test_both_ends_are_governed() -> None:
    """The agent's egress in front of a real sidecar: the server's record names the agent and its session."""
    authority = an_authority()
    bundles = TrustBundles({A_TEST: [authority.certificate]})
    server = MutualServer(client_certificate=ClientCertificate.OPTIONAL)
    server.use(an_svid(authority, SERVER, bundles), bundles)
    strict = Identity(mtls="strict", user="optional", callers=("spiffe://a.test/ns/agents/**",))
    async with (
        a_server(echo_script()) as (_, upstream),
        a_path(a_snapshot(allowing(), identity=strict, port=upstream), tls=server.context) as path,
        an_egress(path.port, authority, bundles) as out,
    ):
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        heard = await client.hear()
        assert heard is not None
        assert b'"echo"' in heard.body
        await client.close()
        stranger = await path.dial()
        await stranger.say(b"POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        refused = await stranger.hear()
        assert refused is not None
        assert refused.line.startswith(b"HTTP/1.1 401")
        await stranger.close()

    called = path.exchanges[0]
    assert called.principal
    assert called.principal.workload == AGENT
    assert called.agent.session == out.exchanges[0].agent.session
    assert called.trace_id == out.exchanges[0].trace_id
    assert called.parent_id == out.exchanges[0].span_id


async def test_an_mcp_session_keeps_its_agent_session_over_connections() -> None:
    """Minted when the session is opened, stamped on all of its calls, whatever connection they use."""

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(response(b"{}", headers=["mcp-session-id: s-1"]))

    async with a_pair(script) as (out, fake, _):
        for body, headers in (
            (a_request("initialize", INITIALIZE), ()),
            (a_call(), ("Mcp-Session-Id: s-1",)),
            (a_call(), ()),
        ):
            client = await out.dial()
            await client.say(proxied(out, body, *headers))
            assert await client.hear()
            await client.close()

    stamps = [heard.values(b"sidegate-agent-session")[0] for heard in fake.heard]
    assert stamps[0] == stamps[1] != stamps[2]
    assert out.exchanges[0].agent.client_name == "planner"


INITIALIZE = {
    "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "planner", "version": "1"},
}  # fmt: skip


async def test_events_pass_one_by_one_and_a_disconnect_reaches_the_server() -> None:
    """Nothing is held back; whoever hangs up hangs up on the server."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    async with a_pair(answers(head + b"9\r\ndata: 1\n\n\r\n")) as (out, fake, _):
        client = await out.dial()
        await client.say(proxied(out, method="GET"))
        await client.until(b"data: 1\n\n\r\n")
        assert fake.open == 1
        await client.close()
        await eventually(lambda: fake.open == 0, what="the server to see it")
        await eventually(lambda: out.exchanges, what="the record")

    assert out.exchanges[0].aborted


async def test_an_answer_without_length_ends_with_its_connection_or_in_chunks() -> None:
    """Whatever framing the server chose, the application can read it."""

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{}")
        writer.close()

    async with a_pair(script) as (out, _, _):
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        heard = await client.hear()
        assert heard is not None
        assert heard.values(b"transfer-encoding") == [b"chunked"]
        assert heard.body == b"{}"
        await client.close()


async def test_before_there_is_a_bundle_nothing_leaves() -> None:
    """Which servers are meant is not known yet; the agent is told to come back."""
    authority = an_authority()
    bundles = TrustBundles({A_TEST: [authority.certificate]})
    async with a_server(echo_script()) as (fake, port), an_egress(port, authority, bundles, ready=False) as out:
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        heard = await client.hear()
        assert heard is not None
        assert heard.line.startswith(b"HTTP/1.1 503")
        await client.close()

    assert fake.heard == []


async def test_an_agent_without_identity_calls_nobody() -> None:
    """A deleted entry ends what is open, and nothing new begins."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    async with a_pair(answers(head + b"9\r\ndata: 1\n\n\r\n")) as (out, fake, _):
        client = await out.dial()
        await client.say(proxied(out, method="GET"))
        await client.until(b"data: 1\n\n\r\n")
        out.client.withdraw()
        out.egress.follow(None)
        await eventually(lambda: fake.open == 0, what="the stream to end")
        await client.close()
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        heard = await client.hear()
        assert heard is not None
        assert heard.line.startswith(b"HTTP/1.1 503")
        await client.close()


async def test_a_server_whose_domain_is_trusted_no_longer_is_left() -> None:
    """Its connection was opened under another bundle."""
    async with a_pair(echo_script()) as (out, fake, _):
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        assert await client.hear()
        out.egress.follow(out.held(out.bundles))
        assert fake.open == 1
        out.egress.follow(out.held(TrustBundles({A_TEST: [an_authority().certificate]})))
        await eventually(lambda: fake.open == 0, what="the connection to end")
        await client.close()


async def test_a_rotated_svid_is_shown_with_the_next_call() -> None:
    """The kept connection of the old one is not used again."""
    async with a_pair(echo_script()) as (out, fake, callers):
        client = await out.dial()
        for _ in range(2):
            await client.say(proxied(out, a_call()))
            assert await client.hear()
            out.client.use(out.svid, out.bundles)
        await client.close()

    assert len(callers) == 2
    assert len(fake.heard) == 2


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HEAD http://localhost:%d/mcp HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (
            b"POST http://localhost:%d/mcp HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
            b"400",
        ),
    ],
)
async def test_what_cannot_be_sent_is_answered_and_recorded(data: bytes, status: bytes) -> None:
    """Nothing goes out."""
    async with a_pair(echo_script()) as (out, fake, _):
        client = await out.dial()
        await client.say(data % out.server_port)
        heard = await client.hear()
        assert heard is not None
        assert heard.line.startswith(b"HTTP/1.1 " + status)
        await client.close()
        await eventually(lambda: out.exchanges, what="the record")

    assert fake.heard == []


async def test_a_head_that_never_ends_is_refused() -> None:
    """Of a later request, too: the parser would keep a field until it ends."""
    async with a_pair(echo_script()) as (out, _, _):
        client = await out.dial()
        await client.say(proxied(out, a_call()))
        assert (await client.hear()) is not None
        await client.say(b"POST /mcp HTTP/1.1\r\nX: " + b"x" * (3 * MAX_HEAD_BYTES))
        heard = await client.hear()
        assert heard is not None
        assert heard.line.startswith(b"HTTP/1.1 413")
        await client.close()


async def test_a_request_that_offers_another_protocol_is_sent_without_the_offer() -> None:
    """Java's client offers h2c with its first request."""
    async with a_pair(echo_script()) as (out, fake, _):
        client = await out.dial()
        await client.say(proxied(out, a_call(), "Connection: Upgrade", "Upgrade: h2c"))
        assert await client.hear()
        await client.close()

    assert fake.heard[0].values(b"upgrade") == []
    assert fake.heard[0].body == a_call()


def test_snapshots_of_servers_have_no_agent_role() -> None:
    """The default is to send nothing anywhere."""
    snapshot: Snapshot = a_snapshot()

    assert snapshot.profile.agent is None
