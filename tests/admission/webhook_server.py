"""The webhook's own handlers over HTTPS on loopback, in a thread: for the real API server to ask.

    with WebhookServer({"a": World(template, profiles)}) as server:
        server.configuration("name", {"namespace-1": ("a", "enforced")})    # a MutatingWebhookConfiguration

Each world has a path of its own, so that one server stands for differently configured control planes.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import Authority, make_key
from certs.tls import ServingServer
from webhook.shell.admission import MAX_BODY_BYTES, Admission
from webhook.shell.metrics import Metrics

if TYPE_CHECKING:
    from types import TracebackType

    from webhook.core.container import Template
    from webhook.core.resources import ServerProfileSpec

START_S = 30


@dataclass(frozen=True, slots=True)
class World:
    """What a control plane knows: the operator's template, and profiles that are the same in every namespace."""

    made: Template
    known: Mapping[str, ServerProfileSpec] = field(default_factory=dict)

    def template(self) -> Template:
        """Return the template."""
        return self.made

    def servers(self, namespace: str) -> frozenset[str]:  # noqa: ARG002 - the protocol's
        """Return none."""
        return frozenset()

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:  # noqa: ARG002 - the protocol's
        """Return the profiles."""
        return self.known


class WebhookServer:
    """Use as a context manager; leaving the block ends the thread."""

    def __init__(self, worlds: Mapping[str, World]) -> None:
        self._worlds = worlds
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="webhook", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._port = 0
        self._ca = b""

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        if not self._ready.wait(START_S):
            raise TimeoutError(f"the webhook did not start within {START_S} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    def configuration(self, name: str, namespaces: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        """Return the configuration by which pods of each namespace are judged: its world, and what its labels mean."""
        return {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": name},
            "webhooks": [
                {
                    "name": f"{namespace}.inject.sidegate.dev",
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "failurePolicy": "Fail",
                    "reinvocationPolicy": "IfNeeded",
                    "clientConfig": {
                        "url": f"https://localhost:{self._port}/{world}/mutate/{policy}",
                        "caBundle": base64.b64encode(self._ca).decode(),
                    },
                    "rules": [
                        {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                    ],
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                }
                for namespace, (world, policy) in namespaces.items()
            ],
        }

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        for name, world in self._worlds.items():
            application.router.add_post(f"/{name}/mutate/{{policy}}", Admission(world, Metrics()).mutate)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        serving = ServingServer()
        self._ca = certified(serving)
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=serving.context)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()


def certified(serving: ServingServer) -> bytes:
    """Give *serving* a certificate for localhost; returns the CA that signed it, in PEM."""
    now, key = datetime.now(UTC) - timedelta(minutes=1), make_key()
    authority = Authority.make(
        name="test-webhook-ca",
        key=make_key(),
        now=now,
        lifetime=timedelta(days=1),
        serial=x509.random_serial_number(),
    )
    leaf = authority.sign_serving(
        ["localhost"], key.public_key(), now=now, lifetime=timedelta(hours=12), serial=x509.random_serial_number()
    )
    serving.use(leaf.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return authority.certificate_pem
