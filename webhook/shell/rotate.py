"""Keep the webhook's certificate, what the API server trusts, and the key that signs bundles, as rotation.py plans.

Order matters: trust first (caBundle), then serve. Every replica does this for itself; the Secrets are where they agree,
and a write that comes second starts over from what the first one wrote. A failure leaves what is served as it was.
"""

import asyncio
import base64
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import Authority, make_key
from certs.errors import BadCertificate
from certs.tls import ServingServer
from sidecar.core.keyring import Keyring, key_id
from webhook.config import Settings
from webhook.core.pod import JSON
from webhook.core.rotation import Authorities, Lifetimes, due, needs_leaf
from webhook.core.signing import ROTATE, KeyTimes, SigningKeys
from webhook.core.signing import due as due_keys
from webhook.errors import KubeError
from webhook.shell.kube import Kube
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

PERIOD_S: Final = 10.0  # how soon a lost caBundle is put back; one small read each time
KEY_RETRY_S: Final = 2.0  # while there is no key at all
ATTEMPTS: Final = 5  # more writers than replicas at the same moment
MANAGER: Final = "sidegate"


def utc_now() -> datetime:
    """Return the wall clock, aware."""
    return datetime.now(UTC)


class Rotation:
    """The serving certificate of one replica. Mutated by `step` alone."""

    def __init__(
        self,
        kube: Kube,
        server: ServingServer,
        settings: Settings,
        now: Callable[[], datetime] = utc_now,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._kube = kube
        self._server = server
        self._metrics = metrics or Metrics()
        self._secrets = Secrets(kube, settings.namespace)
        self._service = {"name": settings.service, "namespace": settings.namespace}
        host = f"{settings.service}.{settings.namespace}.svc"
        self._dns_names = [host, f"{host}.cluster.local"]
        self._secret = settings.ca_secret
        self._configuration, self._validating = (
            f"/apis/admissionregistration.k8s.io/v1/{kind}webhookconfigurations/{settings.webhook_configuration}"
            for kind in ("mutating", "validating")
        )
        self._lifetimes = Lifetimes(
            ca=timedelta(seconds=settings.ca_lifetime_s),
            leaf=timedelta(seconds=settings.leaf_lifetime_s),
            staging=timedelta(seconds=settings.staging_s),
        )
        self._now = now
        self._leaf: x509.Certificate | None = None
        self._wake = asyncio.Event()
        self.is_trusted = False
        self.problem = "no certificate yet"

    @property
    def leaf(self) -> x509.Certificate | None:
        """The certificate that is served."""
        return self._leaf

    async def watch(self, leads: Callable[[], bool]) -> None:
        """Step as soon as somebody changes a webhook configuration, if this replica *leads*; the others wait for theirs."""
        async with asyncio.TaskGroup() as tasks:
            for path in (self._configuration, self._validating):
                tasks.create_task(self._watch(path, leads), name="configuration")

    async def _watch(self, path: str, leads: Callable[[], bool]) -> None:
        collection, _, name = path.rpartition("/")
        async for _ in self._kube.follow(collection, name=name):
            if leads():
                self._wake.set()

    async def run(self) -> None:
        """Step for ever."""
        while True:
            try:
                await self.step()
                self.problem = ""
            except (KubeError, BadCertificate) as error:
                # Said in readiness while there is nothing to serve, in the log ever after.
                self.problem = str(error)
                log.error("certificate not renewed", extra={"error": self.problem})  # noqa: TRY400 - the text says it all
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):
                    await self._wake.wait()
            self._wake.clear()

    async def step(self) -> None:
        """Bring Secret, caBundle and leaf up to date. Raises KubeError, BadCertificate."""
        held = await self._authorities()
        self.is_trusted = await self._publish(held.trusted_pem())
        await self._publish_into(self._validating, held.trusted_pem())
        now = self._now()
        if needs_leaf(self._leaf, held.current, now):
            key = make_key()
            leaf = held.current.sign_serving(
                self._dns_names,
                key.public_key(),
                now=now,
                lifetime=self._lifetimes.leaf,
                serial=x509.random_serial_number(),
            )
            self._server.use(leaf.public_bytes(Encoding.PEM), _key_pem(key))
            self._leaf = leaf
            log.info("serving certificate issued", extra={"not_after": leaf.not_valid_after_utc.isoformat()})

    async def _authorities(self) -> Authorities:
        """Return the CAs after every step that is due has been written."""
        for _ in range(ATTEMPTS):
            secret = await self._secrets.read(self._secret)
            held = Authorities.parse(self._secrets.data(secret))
            wanted = due(held, self._now(), self._lifetimes, self._make)
            if wanted is held:
                return wanted
            if await self._secrets.write(self._secret, secret, wanted.data()):
                log.info(
                    "certificate authority changed",
                    extra={"signs": f"{wanted.current.certificate.serial_number:x}", "staged": bool(wanted.staged)},
                )
        raise KubeError(409, f"Secret {self._secret}: other writers were always faster")

    def _make(self) -> Authority:
        return Authority.make(
            name="sidegate webhook CA",
            key=make_key(),
            now=self._now(),
            lifetime=self._lifetimes.ca,
            serial=x509.random_serial_number(),
        )

    async def _publish(self, ca_bundle: bytes) -> bool:
        """Put *ca_bundle* into the webhooks that inject; returns whether there are any. Raises KubeError."""
        found = await self._publish_into(self._configuration, ca_bundle)
        if found is None:
            raise KubeError(404, f"{self._configuration}: not there; is the chart installed?")
        return found

    async def _publish_into(self, path: str, ca_bundle: bytes) -> bool | None:
        """Put *ca_bundle* into our webhooks at *path* where it differs; returns whether there are any, None: no object."""
        configuration = await self._kube.get(path)
        if configuration is None:
            return None
        wanted = base64.b64encode(ca_bundle).decode()
        # By name, and only what calls this Service: others may have put theirs into the same object.
        ours = [
            each
            for each in configuration.get("webhooks") or ()
            if self._service.items() <= (each["clientConfig"].get("service") or {}).items()
        ]
        stale = [each["name"] for each in ours if each["clientConfig"].get("caBundle") != wanted]
        if stale:
            webhooks = [{"name": name, "clientConfig": {"caBundle": wanted}} for name in stale]
            await self._kube.merge(f"{path}?fieldManager={MANAGER}", {"webhooks": webhooks})
            self._metrics.trust_repairs.inc()
            log.info("caBundle published", extra={"webhooks": stale})
        return bool(ours)


class Secrets:
    """Secrets of our own namespace, made and replaced by several replicas at a time."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self._kube = kube
        self._path = f"/api/v1/namespaces/{namespace}/secrets"

    async def read(self, name: str) -> JSON | None:
        """Return the Secret, None when there is none. Raises KubeError."""
        return await self._kube.get(f"{self._path}/{name}")

    @staticmethod
    def data(secret: JSON | None) -> dict[str, bytes]:
        """Return the decoded data of *secret*. Raises BadCertificate."""
        try:
            return {
                key: base64.b64decode(text, validate=True) for key, text in ((secret or {}).get("data") or {}).items()
            }
        except ValueError as error:  # pragma: no cover - the API server stores nothing else
            raise BadCertificate(f"Secret: {error}") from error

    async def write(self, name: str, old: JSON | None, data: dict[str, bytes]) -> bool:
        """Make the Secret, or replace *old*; returns False when somebody was faster. Raises KubeError."""
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        try:
            if old is None:
                body = {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"name": name},
                    "type": "Opaque",
                    "data": encoded,
                }
                await self._kube.create(self._path, body)
            else:
                await self._kube.replace(f"{self._path}/{name}", old | {"data": encoded})
        except KubeError as error:
            if error.status == 409:
                return False
            raise
        return True


class SigningRotation:
    """The keys by which bundles are signed; every replica has the same, from one Secret. Mutated by `step` alone."""

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        use: Callable[[SigningKeys], None],
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """*use* is told of the keys when there are some, and whenever they have changed."""
        self._secrets = Secrets(kube, settings.namespace)
        self._secret = settings.signing_secret
        self._times = KeyTimes(age_s=settings.signing_age_s, overlap_s=settings.signing_overlap_s)
        self._use = use
        self._now = now
        self._used: tuple[int, str] | None = None

    async def run(self) -> None:
        """Step for ever; a failure leaves the keys as they are."""
        while True:
            delay_s = PERIOD_S
            try:
                await self.step()
            except (KubeError, BadCertificate) as error:
                log.error("signing keys not looked after", extra={"error": str(error)})  # noqa: TRY400 - the text says it all
                delay_s = PERIOD_S if self._used else KEY_RETRY_S
            await asyncio.sleep(delay_s)

    async def step(self) -> None:
        """Bring the Secret up to date, and what signs. Raises KubeError, BadCertificate."""
        held = await self._keys()
        identity = (held.term, key_id(held.current.public_key()))  # a Secret may have been put there by hand
        if identity != self._used:
            self._used = identity
            self._use(held)
            log.info("bundles are signed", extra={"term": held.term, "key": identity[1]})

    async def _keys(self) -> SigningKeys:
        """Return the keys after every step that is due has been written."""
        for _ in range(ATTEMPTS):
            secret = await self._secrets.read(self._secret)
            held = SigningKeys.parse(self._secrets.data(secret))
            asked = str((((secret or {}).get("metadata") or {}).get("annotations") or {}).get(ROTATE, ""))
            wanted = due_keys(held, self._now().timestamp(), self._times, make_key, asked)
            if wanted is held:
                return wanted
            if await self._secrets.write(self._secret, secret, wanted.data()):
                log.info(
                    "signing keys changed", extra={"term": wanted.term, "keys": str(Keyring(keys=wanted.believed))}
                )
        raise KubeError(409, f"Secret {self._secret}: other writers were always faster")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
