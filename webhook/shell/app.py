"""The control plane's process: listeners, readiness, the life of its tasks, and a stop that loses no pod.

Ready means: the certificate is served and trusted, the resources are known, and a golden pod comes out right. Neither
readiness nor admission waits for SPIRE: what starts SPIRE may itself be waiting for us. Stopping: readiness fails at
once, calls are served for `linger_s` more, as API servers keep their connections to pods that are going
(kubernetes#127335), each with `Connection: close`; then the listeners close and the tasks end.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import uuid
from collections.abc import Collection, Mapping
from typing import Final

from aiohttp import web

from certs.spiffe import SpiffeId
from certs.tls import MutualClient, MutualServer, ServingServer
from certs.workload import X509Source
from sidecar.config import Capture
from sidecar.core.keyring import pem_of
from webhook.config import Settings, defaults, surroundings, template
from webhook.core.container import Template
from webhook.core.evidence import Origin, repository
from webhook.core.injection import SERVER_LABEL, Inject, NamespacePolicy, decide
from webhook.core.pod import JSON
from webhook.core.reports import Reports
from webhook.core.resources import ServerProfileSpec
from webhook.core.signing import SigningKeys
from webhook.shell.admission import MAX_BODY_BYTES, Admission, NotReady
from webhook.shell.bundles import BundleEndpoint, Bundles
from webhook.shell.controllers import Compile, Controller
from webhook.shell.coverage import Coverage
from webhook.shell.enforcement import Enforcement
from webhook.shell.external import External
from webhook.shell.kube import Kube
from webhook.shell.lease import Leadership
from webhook.shell.metrics import CONTENT_TYPE, Metrics
from webhook.shell.peers import PATH as REPORTS_PATH
from webhook.shell.peers import Peers, ReportsEndpoint
from webhook.shell.rotate import Rotation, SigningRotation
from webhook.shell.status import Statuses
from webhook.shell.surroundings import NetworkPolicies
from webhook.shell.validation import Check, Validation

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 5.0  # for requests in flight once the listeners are closed; long polls are cut then
_GOLDEN: Final[JSON] = {
    "metadata": {"name": "golden", "labels": {SERVER_LABEL: "true"}},
    "spec": {"containers": [{"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}]},
}


class App:
    """One replica of the control plane. Mutated by `run` and the tasks it starts."""

    def __init__(
        self, settings: Settings, *, version: str, kube: Kube, compile_files: Compile, check: Check | None = None
    ) -> None:
        self._check = check
        self._settings = settings
        self._version = version
        self._kube = kube
        self._compile_files = compile_files
        self._metrics = Metrics()
        self._bundles = Bundles()
        self._serving = ServingServer()
        self._mutual = MutualServer()
        self._source = X509Source(settings.spiffe_socket)
        self._rotation = Rotation(kube, self._serving, settings, metrics=self._metrics)
        self._signing = SigningRotation(kube, settings, self._use_keys)
        self._has_keys = asyncio.Event()
        self._reports = Reports()
        self._client = MutualClient()
        host = socket.gethostname()  # the pod's name
        self._leadership = Leadership(
            kube,
            self._metrics,
            namespace=settings.namespace,
            name=settings.lease,
            identity=f"{host}_{uuid.uuid4().hex[:8]}",
        )
        self._peers = Peers(kube, self._client, settings, host)
        self._controller: Controller | None = None
        self._template: Template | None = None
        self._is_stopping = False
        self.ports: dict[str, int] = {}
        self.started = asyncio.Event()

    def template(self) -> Template:
        """Return the template for pods. Raises NotReady until there is a key that signs their bundles."""
        if self._template is None:
            raise NotReady("no key to sign bundles yet")
        return self._template

    def profiles(self, namespace: str) -> Mapping[str, ServerProfileSpec]:
        """Return the profiles of *namespace*. Raises NotReady, BadResource."""
        if self._controller is None:
            raise NotReady("no key to sign bundles yet")
        return self._controller.profiles(namespace)

    def servers(self, namespace: str) -> Collection[str]:
        """Return the MCP servers that are in *namespace* already, as far as that is known."""
        return () if self._controller is None else self._controller.servers(namespace)

    def problems(self) -> list[str]:
        """Return why this replica is not ready; nothing when it is."""
        problems = []
        if self._is_stopping:
            problems.append("stopping")
        if self._rotation.leaf is None:
            problems.append(f"certificate: {self._rotation.problem}")
        elif not self._rotation.is_trusted:
            problems.append("caBundle: no webhook of the configuration calls this Service")
        if self._controller is None or self._template is None:
            problems.append("bundle-signing key: not there yet")
        elif not self._controller.is_synced:
            problems.append("resources: not listed yet")
        elif not passes_golden_pod(self._template):
            problems.append("self-test: the golden pod does not come out right")
        return problems

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until *stop* is set, then for `linger_s` more."""
        async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as listeners:
            running = [
                tasks.create_task(self._source.run(), name="workload-api"),
                tasks.create_task(self._rotation.run(), name="rotation"),
                tasks.create_task(self._signing.run(), name="signing"),
                tasks.create_task(self._rotation.watch(lambda: self._leadership.leads), name="trust"),
                tasks.create_task(self._leadership.run(), name="lease"),
                tasks.create_task(self._control(), name="control"),
            ]
            self._source.subscribe(self._mutual.follow)
            self._source.subscribe(self._client.follow)
            await self._listen(listeners)
            self.started.set()
            await stop.wait()
            self._is_stopping = self._bundles.is_stopping = True
            log.info("stopping", extra={"linger_s": self._settings.linger_s})
            await asyncio.sleep(self._settings.linger_s)
            await listeners.aclose()
            for task in running:
                task.cancel()
        log.info("stopped")

    async def _control(self) -> None:
        await self._has_keys.wait()
        self._controller = Controller(self._bundles, self._compile_files, defaults(self._settings), self._metrics)
        statuses = Statuses(
            self._kube,
            self._controller,
            self._leadership,
            self._reports,
            self._peers,
            self._compile_files,
            self._metrics,
            self._settings.revision,
        )
        network_policies = NetworkPolicies(
            self._kube,
            self._controller,
            self._leadership,
            self._metrics,
            surroundings(self._settings),
            governed=self._settings.governed_namespaces,
            excluded=self.template().excluded_namespaces,
        )
        external = External(self._client, self._settings.external_bundles, self._controller.renew)
        self._controller.external = external
        controller = self._controller
        coverage = Coverage(
            self._kube,
            self._metrics,
            leads=lambda: self._leadership.leads and controller.is_synced,
            profiles=controller.profiles,
            excluded=self.template().excluded_namespaces,
            origin=Origin(repositories=frozenset({repository(self._settings.image)})),
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(external.run(), name="external")
            tasks.create_task(self._controller.run(self._kube), name="controller")
            tasks.create_task(network_policies.run(), name="network-policies")
            if self._settings.weakest_capture == Capture.REMAP:
                enforcement = Enforcement(self._kube, self._leadership, self._metrics, governs=network_policies.governs)
                tasks.create_task(enforcement.run(), name="enforcement")
            if self._settings.status == "write":  # two installations would overwrite each other for ever
                tasks.create_task(statuses.run(), name="status")
                tasks.create_task(coverage.run(), name="coverage")

    def _use_keys(self, keys: SigningKeys) -> None:
        """Sign bundles by *keys* from now on, and tell new pods of them."""
        self._bundles.keys = keys
        self._template = template(self._settings, self._version, pem_of(keys.believed))
        self._metrics.signing_key_since.set(keys.since_s)
        self._has_keys.set()

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        admission = self._application(client_max_size=MAX_BODY_BYTES)
        admission.router.add_post("/mutate/{policy}", Admission(self, self._metrics).mutate)
        admission.router.add_post("/validate", Validation(self._compile_files, self._metrics, self._check).validate)
        bundles = self._application(client_max_size=0)
        trust_domain = SpiffeId.parse(self._settings.control_plane_id).trust_domain
        endpoint = BundleEndpoint(self._bundles, trust_domain, self._metrics, reports=self._reports)
        bundles.router.add_get("/v1/bundles/{pod}", endpoint.get)
        bundles.router.add_get(REPORTS_PATH, ReportsEndpoint(self._reports, self._settings.control_plane_id).get)
        health = self._application(client_max_size=0)
        health.router.add_get("/livez", self._livez)
        health.router.add_get("/healthz", self._livez)
        health.router.add_get("/readyz", self._readyz)
        health.router.add_get("/metrics", self._render)
        for name, application, port, context in (
            ("admission", admission, self._settings.admission_port, self._serving.context),
            ("bundles", bundles, self._settings.bundles_port, self._mutual.context),
            ("metrics", health, self._settings.metrics_port, None),
        ):
            self.ports[name] = await self._serve(stack, application, port, context)
        log.info("serving", extra={"ports": self.ports})

    async def _serve(
        self, stack: contextlib.AsyncExitStack, application: web.Application, port: int, context: ssl.SSLContext | None
    ) -> int:
        # A caller that has gone is not worked for: a long poll would otherwise live on.
        runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=CLOSE_TIMEOUT_S
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        # A socket bound to `::` alone would take IPv6 only: asyncio sets IPV6_V6ONLY. None binds both families.
        host = None if self._settings.listen_host == "::" else self._settings.listen_host
        site = web.TCPSite(runner, host, port, ssl_context=context)
        await site.start()
        address = runner.addresses[0]
        return int(address[1])

    def _application(self, *, client_max_size: int) -> web.Application:
        application = web.Application(client_max_size=client_max_size)
        application.on_response_prepare.append(self._close_when_stopping)
        return application

    async def _close_when_stopping(self, _request: web.Request, response: web.StreamResponse) -> None:
        if self._is_stopping:
            response.force_close()
            response.headers["Connection"] = "close"  # force_close alone comes too late for the header

    async def _livez(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        problems = self.problems()
        return web.Response(status=503 if problems else 200, text="\n".join(problems or ["ok"]) + "\n")

    async def _render(self, _request: web.Request) -> web.Response:
        if self._rotation.leaf is not None:
            self._metrics.leaf_expiry.set(self._rotation.leaf.not_valid_after_utc.timestamp())
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def passes_golden_pod(template_: Template) -> bool:
    """Return whether a plain pod is injected, and left alone the second time."""

    def judged(pod: JSON) -> Inject | None:
        decision = decide(
            pod, namespace="golden", policy=NamespacePolicy.OPTIONAL, profiles={}, template=template_, nonce=""
        )
        return decision if isinstance(decision, Inject) else None

    first = judged(_GOLDEN)
    second = judged(first.pod) if first else None
    return bool(first and first.operations and second and not second.operations)
