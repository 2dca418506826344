"""The certificate, the caBundle and the signing key, with several replicas and a clock of our own."""

import asyncio
import base64
import ssl
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from certs.errors import BadCertificate
from certs.tls import ServingServer, web_client_context
from tests.webhook.kube_server import KubeServer
from webhook.config import Settings
from webhook.errors import KubeError
from webhook.shell.kube import Kube
from webhook.shell.rotate import Rotation, Secrets, public_pem, signing_key

SECRETS = "/api/v1/namespaces/sidegate-system/secrets"
CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
SETTINGS = Settings(leaf_lifetime_s=86_400, ca_lifetime_s=90 * 86_400, staging_s=3600)


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


async def test_replicas_sign_with_one_key() -> None:
    """Whoever comes first makes the key; its public half is what sidecars get."""
    server = KubeServer()
    async with server.running() as kube:
        secrets = Secrets(kube, "sidegate-system")
        keys = await asyncio.gather(*(signing_key(secrets, "s") for _ in range(3)))

    assert len({public_pem(key) for key in keys}) == 1
    assert public_pem(keys[0]).startswith("-----BEGIN PUBLIC KEY-----\n")


@pytest.mark.parametrize("pem", [b"no key", b""])
async def test_signing_key_that_cannot_be_read_is_left_alone(pem: bytes) -> None:
    """Replacing it would make every sidecar refuse the next bundle."""
    server = KubeServer()
    server.put(SECRETS, {"metadata": {"name": "s"}, "data": {"signing.key": base64.b64encode(pem).decode()}})
    async with server.running() as kube:
        with pytest.raises(BadCertificate, match=r"Secret s: signing\.key"):
            await signing_key(Secrets(kube, "sidegate-system"), "s")


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
        await signing_key(Secrets(Busy(), "n"), "s")
    with pytest.raises(KubeError, match="always faster"):
        await Rotation(Busy(), ServingServer(), SETTINGS).step()
