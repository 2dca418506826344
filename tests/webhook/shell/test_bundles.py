"""The bundle endpoint over real mutual TLS: who gets which bundle, and when."""

import asyncio
import secrets
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import aiohttp
import msgspec
import pytest
from aiohttp import web

from certs.authority import make_key
from certs.embedded import EmbeddedDomain
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain
from certs.svid import X509Snapshot
from certs.tls import ClientCertificate, MutualClient, MutualServer
from sidecar.core import bundle, profile
from sidecar.core.bundle import Stamp, decode
from sidecar.core.keyring import Keyring, PrivateKey
from tests.sidecar.questions import SERVER
from webhook.core.reports import Reports
from webhook.core.signing import KeyTimes, SigningKeys, due
from webhook.shell.bundles import MEDIA_TYPE, SMALL_BYTES, BundleEndpoint, Bundles, Entry, Published
from webhook.shell.metrics import Metrics

OURS, OTHERS = (EmbeddedDomain(TrustDomain.parse(name)) for name in ("a.test", "b.test"))
CONTROL_PLANE = SpiffeId.parse("spiffe://a.test/ns/sidegate-system/sa/sidegate")
LEDGER = SpiffeId.parse("spiffe://a.test/ns/payments/sa/ledger")
POD = ("payments", "ledger-0")
FIRST, SECOND = Published(b"one", "r1"), Published(b"two", "r2")


def snapshot(domain: EmbeddedDomain, spiffe_id: SpiffeId) -> X509Snapshot:
    """Return an identity of *domain*, whose members trust both domains."""
    issued = domain.issue(spiffe_id)
    other = OTHERS if domain is OURS else OURS
    return X509Snapshot.parse(
        (issued.spiffe_id, issued.x509_svid, issued.x509_svid_key, issued.bundle),
        {f"spiffe://{other.trust_domain}": other.bundle_der},
        now=datetime.now(UTC),
    )


class Plane:
    """A running endpoint."""

    def __init__(self) -> None:
        self.bundles = Bundles()
        self.metrics = Metrics()
        self.reports = Reports()
        self.ahead = timedelta()
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Plane"]:
        """Serve on a free port."""
        endpoint = BundleEndpoint(
            self.bundles,
            OURS.trust_domain,
            self.metrics,
            lambda: datetime.now(UTC) + self.ahead,
            reports=self.reports,
        )
        server = MutualServer(client_certificate=ClientCertificate.OPTIONAL)
        server.follow(snapshot(OURS, CONTROL_PLANE))
        application = web.Application()
        application.router.add_get("/v1/bundles/{pod}", endpoint.get)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server.context)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    async def somebody_waits(self) -> None:
        """Return when a caller waits for news of POD."""
        entry = self.bundles.find(POD)
        assert entry is not None
        while not entry.waiting:  # noqa: ASYNC110 - lists tell nobody
            await asyncio.sleep(0.01)

    async def ask(
        self,
        caller: SpiffeId = LEDGER,
        *,
        pod: str = "ledger-0",
        headers: Mapping[str, str] | None = None,
        domain: EmbeddedDomain = OURS,
    ) -> tuple[int, str, bytes, Mapping[str, str]]:
        """Return status, content type, body and headers of the answer to *caller*."""
        client = MutualClient()
        client.follow(snapshot(domain, caller))
        context = client.context(SpiffePattern.exactly(CONTROL_PLANE))
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"https://127.0.0.1:{self.port}/v1/bundles/{pod}", ssl=context, headers=headers) as response,
        ):
            return response.status, response.content_type, await response.read(), response.headers


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    """Return an endpoint that knows one pod with a bundle."""
    async with Plane().running() as running:
        running.bundles.track(POD, "ledger")
        running.bundles.publish(POD, FIRST)
        yield running


async def test_pod_gets_its_bundle(plane: Plane) -> None:
    """The bytes, the revision as ETag, OPA's media type."""
    status, media_type, body, headers = await plane.ask()

    assert (status, media_type, body, headers["ETag"]) == (200, MEDIA_TYPE, b"one", '"r1"')
    assert headers["Sidegate-Report-Within"] == "0.00"  # of ten thousand pods, it is five seconds


async def test_known_revision_is_not_sent_again(plane: Plane) -> None:
    """304 at once when the caller does not want to wait."""
    status, _, body, headers = await plane.ask(headers={"If-None-Match": '"r1"'})

    assert (status, body, headers["ETag"]) == (304, b"", '"r1"')


@pytest.mark.parametrize(
    ("caller", "status", "said"),
    [
        ("spiffe://a.test/ns/payments/sa/other", 403, "does not run as service account other"),
        ("spiffe://a.test/ns/other/sa/ledger", 404, "no injected pod other/ledger-0"),
        ("spiffe://a.test/ledger", 403, "not of the form"),
    ],
)
async def test_other_workload_gets_nothing(plane: Plane, caller: str, status: int, said: str) -> None:
    """Namespace and service account come from the SVID, never from the request."""
    got, _, body, _ = await plane.ask(SpiffeId.parse(caller))

    assert got == status
    assert said in body.decode()
    assert f'sidegate_bundle_requests_total{{status="{status}"}} 1.0' in plane.metrics.render().decode()


async def test_what_a_pod_reports_is_noted_for_that_pod_alone(plane: Plane) -> None:
    """With its question; what others say of it is not heard."""
    said = {"Sidegate-Bundle-Revision": "r0", "Sidegate-Bundle-Error": "policy.wasm: does not load"}
    await plane.ask(headers=said)
    await plane.ask(SpiffeId.parse("spiffe://a.test/ns/payments/sa/other"), headers={"Sidegate-Bundle-Revision": "x"})
    heard = plane.reports.alive(datetime.now(UTC).timestamp())

    assert {pod: (each.revision, each.error) for pod, each in heard.items()} == {
        POD: ("r0", "policy.wasm: does not load")
    }


async def test_federated_namesake_gets_nothing(plane: Plane) -> None:
    """A trusted foreign domain may have the same namespace and account: it is still foreign."""
    status, _, body, _ = await plane.ask(SpiffeId.parse("spiffe://b.test/ns/payments/sa/ledger"), domain=OTHERS)

    assert status == 403
    assert "only workloads of a.test" in body.decode()


async def test_caller_without_svid_gets_nothing(plane: Plane) -> None:
    """Even where the listener let it in."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    url = f"https://127.0.0.1:{plane.port}/v1/bundles/ledger-0"
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as response:
        assert response.status == 403
        assert await response.text() == "no SVID was shown"


async def test_unknown_pod_is_not_found(plane: Plane) -> None:
    """The pod may not have reached us yet: the caller is told which one, and to come again."""
    status, _, body, headers = await plane.ask(pod="none")

    assert (status, headers["Retry-After"]) == (404, "1")
    assert b"payments/none" in body


async def test_svid_that_ran_out_since_the_handshake_is_refused(plane: Plane) -> None:
    """A connection may live longer than the identity it was opened with."""
    plane.ahead = timedelta(hours=1)
    status, _, body, headers = await plane.ask()

    assert status == 403
    assert b"expired" in body
    assert headers["Connection"] == "close"


async def test_pod_without_bundle_is_told_why(plane: Plane) -> None:
    """503 with the compiler's words and when to come again."""
    plane.bundles.track(("payments", "new"), "ledger")
    plane.bundles.fail(("payments", "new"), "ledger.cedar:1:1: no policy")
    status, _, body, headers = await plane.ask(pod="new")

    assert (status, headers["Retry-After"]) == (503, "1")
    assert b"ledger.cedar:1:1: no policy" in body


async def test_failure_keeps_the_last_good_bundle(plane: Plane) -> None:
    """A policy that does not compile changes nothing for who has one that did."""
    plane.bundles.fail(POD, "broken")
    status, _, body, _ = await plane.ask()

    assert (status, body) == (200, b"one")


async def test_new_bundle_ends_the_wait(plane: Plane) -> None:
    """A caller that waits gets the next revision as soon as it is published."""
    waiting = asyncio.ensure_future(  # noqa: TID251 - a test has no root TaskGroup
        plane.ask(headers={"If-None-Match": '"r1"', "Prefer": "modes=snapshot;wait=60"})
    )
    async with asyncio.timeout(20):
        await plane.somebody_waits()
        plane.bundles.publish(POD, FIRST)  # the same again is no news
        plane.bundles.publish(POD, SECOND)
        status, _, body, headers = await waiting

    assert (status, body, headers["ETag"]) == (200, b"two", '"r2"')


async def test_conversation_goes_on_after_bundles_that_were_waited_for(plane: Plane) -> None:
    """On one connection: who waited gets the same response as who asked afterwards, time after time."""
    client = MutualClient()
    client.follow(snapshot(OURS, LEDGER))
    context = client.context(SpiffePattern.exactly(CONTROL_PLANE))
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.port, ssl=context)
    heads = []

    async def ask(etag: str, *fields: str) -> None:
        lines = ("GET /v1/bundles/ledger-0 HTTP/1.1", "Host: a.test", f'If-None-Match: "{etag}"', *fields)
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def answered() -> bytes:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        heads.append({line.partition(":")[0]: line.partition(": ")[2] for line in head.split("\r\n") if ":" in line})
        return await reader.readexactly(int(heads[-1]["content-length"]))

    async with asyncio.timeout(20):
        for number in range(1, 4):
            await ask(f"r{number}", "Prefer: wait=60")
            await plane.somebody_waits()
            plane.bundles.publish(POD, Published(b"news", f"r{number + 1}"))
            plane.bundles.publish(POD, Published(b"newer still", f"s{number + 1}"))  # whoever waited does so no more
            assert await answered() == b"news"
            await ask(f"r{number + 1}", "Prefer: wait=60")
            assert await answered() == b"newer still"
            plane.bundles.publish(POD, Published(b"news", f"r{number + 1}"))
        await ask("r1")
        await answered()
    writer.close()
    waited, asked = heads[-3], heads[-1]

    assert {name: waited[name] for name in ("etag", "content-type", "content-length", "sidegate-report-within")} == {
        name: asked[name] for name in ("etag", "content-type", "content-length", "sidegate-report-within")
    }
    assert "date" in waited
    assert "server" not in waited  # it did not take the long way
    assert plane.metrics.registry.get_sample_value("sidegate_bundle_requests_total", {"status": "200"}) == 7


@pytest.mark.parametrize("fields", ["Connection: close", "Content-Length: 1"])
async def test_unusual_requests_are_answered_by_the_http_server(plane: Plane, fields: str) -> None:
    """It alone knows what else has to happen on their connection."""
    client = MutualClient()
    client.follow(snapshot(OURS, LEDGER))
    context = client.context(SpiffePattern.exactly(CONTROL_PLANE))
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.port, ssl=context)
    head = f'GET /v1/bundles/ledger-0 HTTP/1.1\r\nHost: a.test\r\nIf-None-Match: "r1"\r\nPrefer: wait=60\r\n{fields}\r\n\r\n'
    async with asyncio.timeout(20):
        writer.write(head.encode())
        await plane.somebody_waits()
        plane.bundles.publish(POD, SECOND)
        answer = (await reader.readuntil(b"two")).decode()
    writer.close()

    assert ("Connection: close" in answer) is (fields == "Connection: close")
    assert "Server: " in answer


async def test_who_has_the_first_bundle_already_waits_on(plane: Plane) -> None:
    """From the replica before: after a restart, ten thousand do not get what they have."""
    other = ("payments", "ledger-1")
    plane.bundles.track(other, "ledger")
    entry = plane.bundles.find(other)
    assert entry is not None
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        headers = {"If-None-Match": '"r1"', "Prefer": "wait=60"}
        asked = tasks.create_task(plane.ask(pod="ledger-1", headers=headers))
        while not entry.waiting:  # noqa: ASYNC110 - lists tell nobody
            await asyncio.sleep(0.01)
        plane.bundles.publish(other, FIRST)
        assert not entry.waiting
        while not entry.waiting:  # noqa: ASYNC110 - same
            await asyncio.sleep(0.01)
        plane.bundles.publish(other, SECOND)

    assert asked.result()[2] == b"two"


async def test_bundle_that_must_be_signed_first_is_not_handed_out_as_it_is(plane: Plane) -> None:
    """Who waits gets it in the order of things, with the newest stamp."""
    plane.bundles.keys = SigningKeys(current=make_key(), term=3)
    files = {"sidegate.json": profile.encode(profile.Profile(server=SERVER))}
    published = await plane.bundles.sign(files, 7)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(plane.ask(headers={"If-None-Match": '"r1.3"', "Prefer": "wait=60"}))
        await plane.somebody_waits()
        plane.bundles.publish(POD, published, 12)

    assert decode(waiting.result()[2], plane.bundles.keys.believed).stamp.sequence == 12


async def test_response_is_whole_when_its_bundle_is_signed_again_meanwhile(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signer's thread does that at any moment; a body longer than its head says would be the next response."""
    published = Published(b"second", "r2")

    def sign(*_: object, **__: object) -> str:
        published.data = b"the second, signed again"
        return "Mon, 23 Nov 2026 00:00:00 GMT"

    monkeypatch.setattr("webhook.shell.bundles.formatdate", sign)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(plane.ask(headers={"If-None-Match": '"r1"', "Prefer": "wait=60"}))
        await plane.somebody_waits()
        plane.bundles.publish(POD, published)

    assert waiting.result()[2] == b"second"
    assert published.response is not None
    assert published.response.wire.endswith(b"\r\n\r\nsecond")


async def test_stopping_is_said_to_who_waits(plane: Plane) -> None:
    """The HTTP server says `Connection: close` then, and must be let."""
    plane.bundles.is_stopping = True
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(plane.ask(headers={"If-None-Match": '"r1"', "Prefer": "wait=60"}))
        await plane.somebody_waits()
        plane.bundles.publish(POD, SECOND)

    assert "Server" in waiting.result()[3]


async def test_new_signing_keys_are_news_at_the_next_question(plane: Plane) -> None:
    """Not sooner: all sidecars need them, but none at once. The bundle is signed again, with the same content."""
    first = SigningKeys(current=make_key(), term=3)
    second = due(first, 4.0, KeyTimes(age_s=1, overlap_s=9), make_key)
    files = {"sidegate.json": profile.encode(profile.Profile(server=SERVER))}
    plane.bundles.keys = first
    plane.bundles.publish(POD, await plane.bundles.sign(files, 7), 7)
    _, _, before, headers = await plane.ask()
    plane.bundles.keys = second
    plane.bundles.floor = 9
    _, _, after, news = await plane.ask(headers={"If-None-Match": headers["ETag"]})

    keyring = Keyring(keys=first.believed)
    old, new = decode(before, keyring), decode(after, keyring)
    assert old.revision == new.revision
    assert (headers["ETag"], news["ETag"]) == (f'"{old.revision}.3"', f'"{old.revision}.4"')
    assert (old.stamp.sequence, new.stamp.sequence) == (7, 9)
    assert new.keyring.keys == second.believed


async def test_large_bundles_are_signed_beside_the_loop(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission is served by the loop; and what many pods wait for at once is signed once, as the newest of them needs."""
    threads, renewals = [], []
    real = bundle.renew

    def renew(data: bytes, key: PrivateKey, stamp: Stamp) -> bytes:
        threads.append(threading.current_thread())
        renewals.append(stamp.sequence)
        return real(data, key, stamp)

    monkeypatch.setattr(bundle, "renew", renew)
    plane.bundles.keys = SigningKeys(current=make_key(), term=3)
    files = {
        "sidegate.json": profile.encode(profile.Profile(server=SERVER)),
        "policy/p.rego": b"# " + secrets.token_hex(SMALL_BYTES).encode(),
    }
    published = await plane.bundles.sign(files, 7)
    entries = [Entry("ledger") for _ in range(8)]
    for number, entry in enumerate(entries):
        entry.sequence = 10 + number
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        signed = [tasks.create_task(plane.bundles.signed(entry, published)) for entry in entries]

    assert threading.main_thread() not in threads
    assert renewals[-1] == published.stamp.sequence == 17
    assert len(renewals) <= 2  # the first may have begun before the others asked
    assert signed[-1].result() == published.data


async def test_what_was_signed_once_is_not_hashed_again(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the data that takes long, half a second for each megabyte."""
    hashed = []
    real = bundle.hash_of
    monkeypatch.setattr(bundle, "hash_of", lambda name, data: hashed.append(name) or real(name, data))
    plane.bundles.keys = SigningKeys(current=make_key(), term=3)
    files = {"sidegate.json": profile.encode(profile.Profile(server=SERVER)), "data.json": b'{"a":1}'}
    published = await plane.bundles.sign(files, 7)
    entry = Entry("ledger")
    entry.sequence = 8
    hashed.clear()
    data = await plane.bundles.signed(entry, published)

    assert hashed == [".manifest"]
    assert decode(data, plane.bundles.keys.believed).stamp.sequence == 8


async def test_large_data_of_many_workloads_is_hashed_once(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """One policy with megabytes of data may select a thousand workloads."""
    hashed = []
    real = bundle.hash_of
    monkeypatch.setattr(bundle, "hash_of", lambda name, data: hashed.append(name) or real(name, data))
    plane.bundles.keys = SigningKeys(current=make_key(), term=3)
    data = b'{"a":"%b"}' % secrets.token_hex(SMALL_BYTES).encode()
    for port in range(1, 4):
        server = msgspec.structs.replace(SERVER, port=port)
        files = {"sidegate.json": profile.encode(profile.Profile(server=server)), "sets/cluster/a/data.json": data}
        published = await plane.bundles.sign(files, 7)

    assert sorted(hashed) == [".manifest"] * 3 + ["data.json"] + ["sidegate.json"] * 3
    assert decode(published.data, plane.bundles.keys.believed).profile.server.port == 3


async def test_wait_ends_when_the_pod_is_gone(plane: Plane) -> None:
    """Nobody waits for a pod that is not there any more."""
    waiting = asyncio.ensure_future(  # noqa: TID251 - a test has no root TaskGroup
        plane.ask(headers={"If-None-Match": '"r1"', "Prefer": "wait=60"})
    )
    async with asyncio.timeout(20):
        await plane.somebody_waits()
        plane.bundles.forget(POD)
        status, _, _, _ = await waiting

    assert status == 404


async def test_wait_without_news_ends_with_not_modified(plane: Plane) -> None:
    """After the preferred time the caller hears that nothing has changed."""
    status, _, _, _ = await plane.ask(headers={"If-None-Match": '"r1"', "Prefer": "wait=1"})

    assert status == 304


async def test_pod_of_another_account_is_another_pod() -> None:
    """A pod deleted and made again under the same name does not inherit a bundle."""
    bundles = Bundles()
    bundles.track(POD, "ledger")
    bundles.publish(POD, FIRST)
    bundles.track(POD, "ledger")
    entry = bundles.find(POD)
    assert entry is not None
    assert entry.published == FIRST

    bundles.track(POD, "other")
    entry = bundles.find(POD)
    assert entry is not None
    assert entry.published is None
    assert len(bundles) == 1


def test_nothing_is_published_for_unknown_pods() -> None:
    """What is not tracked is not kept."""
    bundles = Bundles()
    bundles.publish(POD, FIRST)
    bundles.fail(POD, "x")
    bundles.forget(POD)

    assert len(bundles) == 0
