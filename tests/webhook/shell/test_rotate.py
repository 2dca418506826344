"""The certificate, the caBundle and the signing key, with several replicas and a clock of our own."""

import asyncio
import base64
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import make_key
from certs.errors import BadCertificate
from certs.tls import ServingServer, web_client_context
from sidecar.core.keyring import Keyring, key_id
from tests.webhook.kube_server import KubeServer
from webhook.config import Settings
from webhook.core.signing import ROTATE, SigningKeys
from webhook.errors import KubeError
from webhook.shell.kube import Kube
from webhook.shell.metrics import Metrics
from webhook.shell.rotate import PERIOD_S, Rotation, SigningRotation

SECRETS = "/api/v1/namespaces/sidegate-system/secrets"
CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
SETTINGS = Settings(leaf_lifetime_s=86_400, ca_lifetime_s=90 * 86_400, staging_s=3600)


EC_PEM, RSA_PEM = (
    key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for key in (make_key(), rsa.generate_private_key(public_exponent=65537, key_size=2048))
)


class Clock:
    """A wall clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        """Return the time."""
        return self.now


def a_webhook(name: str, service: str = "sidegate", **client: Any) -> Any:
    """Return one webhook of a configuration."""
    return {"name": name, "clientConfig": {"service": {"name": service, "namespace": "sidegate-system", **client}}}


def a_server(*webhooks: Any) -> KubeServer:
    """Return an API server on which the chart is installed."""
    server = KubeServer()
    server.put(CONFIGURATIONS, {"metadata": {"name": "sidegate"}, "webhooks": list(webhooks or [a_webhook("a")])})
    return server


def ca_bundles(server: KubeServer) -> list[bytes | None]:
    """Return what the API server trusts, webhook by webhook."""
    texts = [each["clientConfig"].get("caBundle") for each in server.objects[CONFIGURATIONS]["sidegate"]["webhooks"]]
    return [base64.b64decode(text) if text else None for text in texts]


async def greets(server: ServingServer, trusted: bytes) -> bool:
    """Return whether a client that trusts *trusted* completes a handshake with *server*, by the Service's name."""
    listener = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=server.context)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        context = web_client_context(anchors_pem=trusted)
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname="sidegate.sidegate-system.svc"
            )
        except (ssl.SSLError, ConnectionError):
            return False
        writer.close()
        await writer.wait_closed()
        return True


async def test_first_step_makes_trusts_and_serves() -> None:
    """From nothing: a CA in the Secret, its certificate in our webhooks only, and a leaf that verifies."""
    server = a_server(a_webhook("a"), a_webhook("b", path="/x"), a_webhook("c", service="other"))
    serving = ServingServer()
    async with server.running() as kube:
        rotation = Rotation(kube, serving, SETTINGS)
        await rotation.step()
        trusted = ca_bundles(server)

        assert (
            trusted[0] == trusted[1] == base64.b64decode(server.objects[SECRETS][SETTINGS.ca_secret]["data"]["ca.crt"])
        )
        assert trusted[2] is None
        assert rotation.is_trusted
        assert await greets(serving, trusted[0] or b"")


async def test_replicas_agree_on_one_ca() -> None:
    """Two replicas that start at the same moment trust one CA, and each serves a leaf of its own."""
    server = a_server()
    servings = [ServingServer(), ServingServer()]
    async with server.running() as kube:
        rotations = [Rotation(kube, serving, SETTINGS) for serving in servings]
        await asyncio.gather(*(rotation.step() for rotation in rotations))
        (trusted,) = ca_bundles(server)

        assert len(x509.load_pem_x509_certificates(trusted or b"")) == 1
        assert [await greets(serving, trusted or b"") for serving in servings] == [True, True]
        assert rotations[0].leaf != rotations[1].leaf


async def test_lost_ca_bundle_is_put_back() -> None:
    """An upgrade that resets the field, or somebody's hand, is undone at the next look."""
    server = a_server()
    async with server.running() as kube:
        rotation = Rotation(kube, ServingServer(), SETTINGS)
        await rotation.step()
        before = ca_bundles(server)
        server.put(CONFIGURATIONS, {"metadata": {"name": "sidegate"}, "webhooks": [a_webhook("a")]})
        await rotation.step()
        writes = [each for each in server.requests if each.startswith("PATCH")]
        await rotation.step()

    assert ca_bundles(server) == before
    assert writes == [each for each in server.requests if each.startswith("PATCH")]  # written only when it differs


async def test_rotation_never_serves_what_is_not_trusted() -> None:
    """Through the change of the CA, at every step, a client that trusts the caBundle gets through."""
    server, clock = a_server(), Clock()
    cas = set()
    async with server.running() as kube:
        rotation = Rotation(kube, ServingServer(now=clock), SETTINGS, clock)
        for hours in (0, 24 * 61, 2, 30, 24 * 61, 2, 30):
            clock.now += timedelta(hours=hours)
            await rotation.step()
            (trusted,) = ca_bundles(server)
            leaf = rotation.leaf
            assert leaf is not None
            issuers = [ca for ca in x509.load_pem_x509_certificates(trusted or b"") if _signed(leaf, ca)]
            assert len(issuers) == 1
            cas.add(issuers[0])

    assert len(cas) == 3


def _signed(leaf: x509.Certificate, ca: x509.Certificate) -> bool:
    key_id = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    return key_id == ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


async def test_secret_that_cannot_be_read_is_left_alone() -> None:
    """The error names it; nothing is overwritten, and readiness says why."""
    server = a_server()
    server.put(SECRETS, {"metadata": {"name": SETTINGS.ca_secret}, "data": {"ca.crt": "eA==", "ca.key": "eA=="}})
    before = server.objects[SECRETS][SETTINGS.ca_secret]
    async with server.running() as kube:
        with pytest.raises(BadCertificate, match="unreadable"):
            await Rotation(kube, ServingServer(), SETTINGS).step()

    assert server.objects[SECRETS][SETTINGS.ca_secret] == before


async def test_missing_configuration_is_said() -> None:
    """Without the chart's webhook there is nobody to be trusted by."""
    async with KubeServer().running() as kube:
        with pytest.raises(KubeError, match="is the chart installed"):
            await Rotation(kube, ServingServer(), SETTINGS).step()


async def test_configuration_without_our_service_is_not_trusted() -> None:
    """Webhooks that call somebody else do not make us ready."""
    async with a_server(a_webhook("a", service="other")).running() as kube:
        rotation = Rotation(kube, ServingServer(), SETTINGS)
        await rotation.step()

    assert not rotation.is_trusted


async def test_failure_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on after an error, and forgets it after a success."""
    monkeypatch.setattr("webhook.shell.rotate.PERIOD_S", 0.0)
    server = a_server()
    server.fail_next = [500]
    async with server.running() as kube, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        rotation = Rotation(kube, ServingServer(), SETTINGS)
        assert rotation.problem == "no certificate yet"
        task = tasks.create_task(rotation.run())
        while rotation.problem or rotation.leaf is None:  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0)
        task.cancel()


class Replica:
    """One replica's view of the signing keys."""

    def __init__(self, kube: Kube, clock: Clock, settings: Settings = SETTINGS) -> None:
        self.used: list[SigningKeys] = []
        self.rotation = SigningRotation(kube, settings, self.used.append, clock)


async def test_replicas_sign_with_one_key() -> None:
    """Whoever comes first makes the key; told once, not at every look."""
    server = KubeServer()
    async with server.running() as kube:
        replicas = [Replica(kube, Clock()) for _ in range(3)]
        await asyncio.gather(*(each.rotation.step() for each in replicas))
        await replicas[0].rotation.step()

    assert len({key_id(each.used[0].current.public_key()) for each in replicas}) == 1
    assert [len(each.used) for each in replicas] == [1, 1, 1]


async def test_signing_key_is_rotated_by_age_and_every_replica_follows() -> None:
    """With the overlap, in which both are believed; whichever replica looks first takes the step for all."""
    server, clock = KubeServer(), Clock()
    async with server.running() as kube:
        first, second = Replica(kube, clock), Replica(kube, clock)
        await first.rotation.step()
        for days in (89, 2, 1):
            clock.now += timedelta(days=days)
            await second.rotation.step()
            await first.rotation.step()

    begun, overlapping, after = first.used
    assert [each.term for each in second.used] == [each.term for each in first.used]
    assert overlapping.believed == (overlapping.current.public_key(), begun.current.public_key())
    assert after.believed == (overlapping.current.public_key(),)
    keyring = Keyring(keys=begun.believed).follow(after.announcements)
    assert str(keyring) == key_id(after.current.public_key())


async def test_operator_asks_for_a_rotation_by_annotating_the_secret() -> None:
    """Once for each new text, whatever the age of the key."""
    server, clock = KubeServer(), Clock()
    async with server.running() as kube:
        replica = Replica(kube, clock)
        await replica.rotation.step()
        secret = server.objects[SECRETS][SETTINGS.signing_secret]
        asked = secret["metadata"] | {"annotations": {ROTATE: "2026-11-22T19:00:00Z stolen"}}
        server.put(SECRETS, secret | {"metadata": asked})
        await replica.rotation.step()
        await replica.rotation.step()

    begun, rotated = replica.used
    assert rotated.believed == (rotated.current.public_key(),)
    assert rotated.term > begun.term


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"signing.key": b"no key"}, "signing.key is no PEM"),
        ({"signing.key": b""}, "signing.key is no PEM"),
        ({"other": b"x"}, "signing.key is expected, found other"),
        ({"signing.key": RSA_PEM}, "must be a P-256 key"),
        ({"signing.key": EC_PEM, "state.json": b"["}, "Expecting value"),
        ({"signing.key": EC_PEM, "state.json": b"[]"}, "no attribute"),
        ({"signing.key": EC_PEM, "state.json": b'{"term": null}'}, "not 'NoneType'"),
        ({"signing.key": EC_PEM, "previous.pub": b"x"}, "no PEM block"),
    ],
)
async def test_signing_key_that_cannot_be_read_is_left_alone(data: dict[str, bytes], why: str) -> None:
    """Replacing it would make every sidecar refuse the next bundle."""
    server = KubeServer()
    encoded = {name: base64.b64encode(content).decode() for name, content in data.items()}
    server.put(SECRETS, {"metadata": {"name": SETTINGS.signing_secret}, "data": encoded})
    async with server.running() as kube:
        with pytest.raises(BadCertificate, match=why):
            await Replica(kube, Clock()).rotation.step()

    assert server.objects[SECRETS][SETTINGS.signing_secret]["data"] == encoded


async def test_signing_goes_on_with_the_last_keys_while_the_secret_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And with the first ones as soon as it can."""
    monkeypatch.setattr("webhook.shell.rotate.KEY_RETRY_S", 0.0)
    monkeypatch.setattr("webhook.shell.rotate.PERIOD_S", 0.0)
    server = KubeServer()
    server.fail_next = [500, 403]
    async with server.running() as kube, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        replica = Replica(kube, Clock())
        task = tasks.create_task(replica.rotation.run())
        while not replica.used:  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0)
        server.fail_next = [500]
        while server.fail_next:  # noqa: ASYNC110 - same
            await asyncio.sleep(0)
        task.cancel()

    assert len(replica.used) == 1


async def test_write_that_always_comes_second_gives_up() -> None:
    """After several conflicts the error says so, instead of spinning."""

    class Busy(Kube):
        def __init__(self) -> None:
            """Have no connection."""

        async def get(self, path: str) -> Any:
            """Find nothing."""

        async def create(self, path: str, body: Any) -> Any:  # noqa: ARG002 - as the real one
            """Come second."""
            raise KubeError(409, "conflict")

    with pytest.raises(KubeError, match="always faster"):
        await Replica(Busy(), Clock()).rotation.step()
    with pytest.raises(KubeError, match="always faster"):
        await Rotation(Busy(), ServingServer(), SETTINGS).step()


async def until(is_so: Callable[[], bool]) -> None:
    """Return when *is_so*; nobody tells."""
    while not is_so():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.01)


async def test_who_leads_puts_a_changed_ca_bundle_back_at_once() -> None:
    """Without waiting for its next round."""
    server = a_server(a_webhook("a"))
    server.objects[CONFIGURATIONS.replace("mutating", "validating")] = {}
    changed = {"metadata": {"name": "sidegate"}, "webhooks": [a_webhook("a", caBundle="eA==")]}
    metrics = Metrics()
    async with server.running() as kube:
        rotation = Rotation(kube, ServingServer(), SETTINGS, metrics=metrics)
        async with asyncio.timeout(PERIOD_S - 1), asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(rotation.run()), tasks.create_task(rotation.watch(lambda: True))]
            await until(lambda: None not in ca_bundles(server))
            trusted = ca_bundles(server)
            server.put(CONFIGURATIONS, changed)
            await until(lambda: ca_bundles(server) == trusted)
            for each in running:
                each.cancel()

    assert metrics.registry.get_sample_value("sidegate_ca_bundle_writes_total") == 2
