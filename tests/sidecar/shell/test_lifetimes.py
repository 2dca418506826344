"""Connections and streams end with what let them in: over real mutual TLS, on a clock that the test turns."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority, make_key
from certs.spiffe import SpiffeId, SpiffePattern
from certs.svid import Svid, X509Snapshot
from certs.tls import MutualClient, MutualServer
from certs.verify import TrustBundles
from sidecar.core.authorise import Verdict
from sidecar.core.profile import Identity
from sidecar.shell.lifetimes import Lifetimes
from tests.builders import a_call, a_request, a_snapshot
from tests.certs.pki import A_TEST, B_TEST, an_authority, key_der
from tests.fakes import Client, FakeEngine, Heard, Path, a_path, a_server, allowing, eventually, post, response

SERVER, BOT = SpiffeId.parse("spiffe://a.test/ns/pay/sa/billing"), SpiffeId.parse("spiffe://b.test/ns/agents/sa/bot")
CALLERS = ("spiffe://a.test/**", "spiffe://b.test/ns/*/sa/*")
OPTIONAL = Identity(mtls="strict", user="optional", callers=CALLERS)
LIFE_S, GRACE_S = 600.0, 30.0
GET = b"GET /mcp HTTP/1.1\r\nHost: billing.test\r\nAccept: text/event-stream\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def an_svid(authority: Authority, spiffe_id: SpiffeId, bundles: TrustBundles) -> Svid:
    """An SVID of LIFE_S."""
    key, now = make_key(), datetime.now(UTC)
    leaf = authority.sign_svid(
        spiffe_id, key.public_key(), now=now, lifetime=timedelta(seconds=LIFE_S), serial=x509.random_serial_number()
    )
    return Svid.parse(spiffe_id, leaf.public_bytes(Encoding.DER), key_der(key), bundles, now=now)


@dataclass
class Meeting:
    """A caller of b.test, connected to a sidecar of a.test, whose clock is turned by `turn`."""

    path: Path
    lifetimes: Lifetimes
    client: Client
    own: Svid
    bundles: TrustBundles
    engine: FakeEngine
    turned_s: float = 0.0

    def turn(self, seconds: float) -> None:
        """Let time pass, and the sidecar look."""
        self.turned_s += seconds
        self.lifetimes.review()

    def bundles_become(self, bundles: TrustBundles) -> None:
        """Bring an update of the Workload API."""
        self.lifetimes.follow(
            X509Snapshot(svid=self.own, bundles=bundles, rejected_domains=frozenset(), received_at=datetime.now(UTC))
        )

    async def call(self) -> Heard | None:
        """Make a call on the one connection; None: it is closed."""
        try:
            await self.client.say(post(a_call()))
            return await self.client.hear()
        except (ConnectionError, ssl.SSLError):
            return None


Script = Callable[[Heard, asyncio.StreamWriter], Awaitable[None]]


async def answering(heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Answer a call; keep a stream open."""
    if heard.line.startswith(b"GET") or b"subscriptions/listen" in heard.body:
        writer.write(EVENTS + b"9\r\n: hello\n\n\r\n")
    else:
        writer.write(response(b'{"jsonrpc":"2.0","id":7,"result":{}}'))


@asynccontextmanager
async def a_meeting(script: Script = answering, *, identity: Identity = OPTIONAL) -> AsyncIterator[Meeting]:
    """Connect the two."""
    ours, theirs = an_authority(), an_authority(B_TEST)
    bundles = TrustBundles({A_TEST: [ours.certificate], B_TEST: [theirs.certificate]})
    own = an_svid(ours, SERVER, bundles)
    server, caller = MutualServer(), MutualClient()
    server.use(own, bundles)
    caller.use(an_svid(theirs, BOT, bundles), bundles)
    engine = allowing()
    async with (
        a_server(script) as (_, port),
        a_path(a_snapshot(engine, identity=identity, port=port), tls=server.context) as path,
    ):
        context = caller.context(SpiffePattern.exactly(SERVER))
        streams = await asyncio.open_connection("127.0.0.1", path.port, ssl=context, server_hostname="x")
        began_s = datetime.now(UTC).timestamp()
        lifetimes = Lifetimes(path.serving, max_age_s=3600, grace_s=GRACE_S, now=lambda: began_s + meeting.turned_s)
        meeting = Meeting(path, lifetimes, Client(*streams), own, bundles, engine)
        meeting.bundles_become(bundles)
        await eventually(lambda: path.serving.connections, what="the connection")
        meeting.turn(0)
        yield meeting
        await meeting.client.close()


async def test_a_connection_is_told_to_close_before_its_svid_ends_and_loses_no_call() -> None:
    """The answer under way is whole; the client connects again with its present SVID."""
    async with a_meeting() as meeting:
        first = await meeting.call()
        meeting.turn(LIFE_S - 20)
        last = await meeting.call()

        assert first is not None
        assert first.values(b"connection") == []
        assert last is not None
        assert last.values(b"connection") == [b"close"]
        assert await meeting.client.rest() == b""


async def test_an_idle_connection_is_closed_when_its_svid_ends() -> None:
    """Without a word."""
    async with a_meeting() as meeting:
        assert await meeting.call()
        meeting.turn(LIFE_S)
        assert await meeting.client.rest() == b""
        await eventually(lambda: not meeting.path.serving.connections, what="the end")


async def test_a_call_under_way_may_end_within_the_grace_and_not_beyond() -> None:
    """What was allowed when it began; but no call is a way to live for ever."""
    going_on = asyncio.Event()

    async def slow(_: Heard, writer: asyncio.StreamWriter) -> None:
        await going_on.wait()
        writer.write(response(b'{"jsonrpc":"2.0","id":7,"result":{}}'))

    async with a_meeting(slow) as meeting:
        await meeting.client.say(post(a_call()))
        await eventually(lambda: meeting.path.serving.in_flight, what="the call")
        meeting.turn(LIFE_S)
        going_on.set()
        answer = await meeting.client.hear()
        assert answer is not None
        assert answer.values(b"connection") == [b"close"]

    going_on.clear()
    async with a_meeting(slow) as meeting:
        await meeting.client.say(post(a_call()))
        await eventually(lambda: meeting.path.serving.in_flight, what="the call")
        meeting.turn(LIFE_S + GRACE_S)
        with suppress(ConnectionError, ssl.SSLError):
            assert await meeting.client.rest() == b""
        await eventually(lambda: meeting.path.exchanges, what="the record")
        assert meeting.path.exchanges[0].aborted
        going_on.set()


async def _open_stream(meeting: Meeting, request: bytes = GET) -> None:
    await meeting.client.say(request)
    await meeting.client.until(b": hello\n\n\r\n")


async def _ended(meeting: Meeting) -> str | None:
    """Return why the stream ended, once the client has seen its proper end."""
    assert await meeting.client.rest() == b"0\r\n\r\n"
    return meeting.path.exchanges[-1].aborted


async def test_a_stream_ends_with_the_identity_that_opened_it() -> None:
    """In order: the last chunk, then the close."""
    async with a_meeting() as meeting:
        await _open_stream(meeting)
        meeting.turn(LIFE_S - 5)
        assert meeting.path.serving.in_flight == 1
        meeting.turn(10)
        assert "SVID has ended" in str(await _ended(meeting))


async def test_a_stream_whose_opener_may_not_call_any_longer_ends() -> None:
    """A new profile reaches what is open."""
    async with a_meeting() as meeting:
        await _open_stream(meeting)
        narrowed = Identity(mtls="strict", user="optional", callers=("spiffe://a.test/**",))
        snapshot = meeting.path.serving.snapshot
        assert snapshot is not None
        meeting.path.serving.snapshot = replace(a_snapshot(meeting.engine, identity=narrowed), revision="r2")
        meeting.turn(1)
        assert await _ended(meeting) == "this workload may no longer call"


LISTEN = post(
    a_request(
        "subscriptions/listen",
        {
            "notifications": {"resourceSubscriptions": ["file:///a"]},
            "_meta": {
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientCapabilities": {},
            },
        },
    ),
    "MCP-Protocol-Version: 2026-07-28",
    "Mcp-Method: subscriptions/listen",
    "Accept: application/json, text/event-stream",
)


async def test_a_subscription_that_a_new_policy_forbids_ends() -> None:
    """What opened it is judged again, once, when the policy has changed."""
    async with a_meeting() as meeting:
        await _open_stream(meeting, LISTEN)
        meeting.engine.verdict = Verdict(allowed=False)
        meeting.turn(1)
        assert meeting.path.serving.in_flight == 1
        snapshot = meeting.path.serving.snapshot
        assert snapshot is not None
        meeting.path.serving.snapshot = replace(snapshot, revision="r2")
        meeting.turn(1)
        assert "policy does not allow" in str(await _ended(meeting))


async def test_a_removed_federated_bundle_ends_its_domains_connections() -> None:
    """Streams and idle connections at once; a domain that stays is not touched."""
    async with a_meeting() as meeting:
        await _open_stream(meeting)
        more = an_authority(B_TEST).certificate
        anchors = {domain: meeting.bundles.anchors(domain) for domain in (A_TEST, B_TEST)}
        meeting.bundles_become(TrustBundles({**anchors, B_TEST: [*anchors[B_TEST], more]}))
        assert meeting.path.serving.in_flight == 1
        meeting.bundles_become(TrustBundles({A_TEST: anchors[A_TEST]}))
        assert "vouches for it no longer" in str(await _ended(meeting))


async def test_a_replaced_authority_ends_what_the_old_one_vouched_for() -> None:
    """The domain is still there, the CA that signed is not."""
    async with a_meeting() as meeting:
        assert await meeting.call()
        other = an_authority(B_TEST).certificate
        meeting.bundles_become(TrustBundles({A_TEST: meeting.bundles.anchors(A_TEST), B_TEST: [other]}))
        assert await meeting.client.rest() == b""


async def test_our_own_deleted_entry_ends_every_connection() -> None:
    """A call under way gets its answer; streams and idle connections end."""
    async with a_meeting() as meeting:
        await _open_stream(meeting)
        meeting.lifetimes.follow(None)
        assert "server's identity has ended" in str(await _ended(meeting))
