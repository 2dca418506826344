"""One replica of the control plane, whole: real TLS on every listener, a real Workload API, a small API server."""

import asyncio
import base64
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import jsonpatch
import msgspec
import pytest

from certs.authority import make_key
from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain
from certs.tls import MutualClient, web_client_context
from certs.workload import X509Source
from sidecar.config import Capture
from sidecar.core import bundle
from sidecar.core.keyring import pem_of
from tests.webhook.core.golden_cases import TEMPLATE
from tests.webhook.kube_server import PODS, KubeServer
from webhook.config import Settings, defaults, template
from webhook.core import resources
from webhook.shell import opa
from webhook.shell.app import App, passes_golden_pod
from webhook.shell.controllers import path_of

CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
CONTROL_PLANE = SpiffeId.parse("spiffe://a.test/ns/sidegate-system/sa/sidegate")
LEDGER = SpiffeId.parse("spiffe://a.test/ns/payments/sa/ledger")
PATIENCE_S = 60.0  # for what takes a second on an idle machine
POD = {
    "metadata": {"name": "ledger-0", "namespace": "payments", "labels": {"app": "ledger"}},
    "spec": {
        "serviceAccountName": "ledger",
        "containers": [{"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}],
    },
}
SELECTOR = {"matchLabels": {"app": "ledger"}}


def a_resource(name: str, **spec: Any) -> Any:
    """Return a custom resource of namespace payments."""
    return {"metadata": {"name": name, "namespace": "payments"}, "spec": {"selector": SELECTOR} | spec}


def a_cluster() -> KubeServer:
    """Return an API server with the chart installed, one profile and one policy."""
    server = KubeServer()
    service = {"name": "sidegate", "namespace": "sidegate-system", "path": "/mutate/optional"}
    webhook = {"name": "optional.inject.sidegate.dev", "clientConfig": {"service": service}}
    server.put(CONFIGURATIONS, {"metadata": {"name": "sidegate"}, "webhooks": [webhook]})
    server.objects[PODS] = {}
    for kind in resources.KINDS:
        server.objects[path_of(kind)] = {}
    server.put(path_of(resources.SERVER_PROFILE), a_resource("ledger", server={"name": "ledger"}))
    server.put(path_of(resources.POLICY), a_resource("all", cedar="permit(principal, action, resource);"))
    return server


@dataclass
class Running:
    """A replica and what surrounds it."""

    app: App
    server: KubeServer
    stop: asyncio.Event
    client: MutualClient
    session: aiohttp.ClientSession

    async def get(self, path: str) -> tuple[int, str]:
        """Return status and text of the health listener."""
        async with self.session.get(f"http://127.0.0.1:{self.app.ports['metrics']}{path}") as response:
            return response.status, await response.text()

    async def ready(self) -> None:
        """Return when the replica says that it is ready."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.get("/readyz"))[0] != 200:  # noqa: ASYNC110 - that is what a kubelet does
                await asyncio.sleep(0.05)

    async def review(self, pod: Any) -> tuple[Any, Any]:
        """Return response and headers of the admission of *pod*, as an API server asks for it."""
        (webhook,) = self.server.objects[CONFIGURATIONS]["sidegate"]["webhooks"]
        trusted = base64.b64decode(webhook["clientConfig"]["caBundle"])
        request = {
            "uid": "u",
            "operation": "CREATE",
            "namespace": "payments",
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "object": pod,
        }
        async with self.session.post(
            f"https://127.0.0.1:{self.app.ports['admission']}{webhook['clientConfig']['service']['path']}",
            json={"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request},
            ssl=web_client_context(anchors_pem=trusted),
            server_hostname="sidegate.sidegate-system.svc",
        ) as response:
            return (await response.json())["response"], response.headers

    async def bundle(self, **headers: str) -> tuple[int, bytes, str]:
        """Return status, body and ETag of what the sidecar of ledger-0 gets."""
        async with self.session.get(
            f"https://127.0.0.1:{self.app.ports['bundles']}/v1/bundles/ledger-0",
            ssl=self.client.context(SpiffePattern.exactly(CONTROL_PLANE)),
            headers=headers,
        ) as response:
            return response.status, await response.read(), response.headers.get("ETag", "")

    async def bundle_eventually(self) -> tuple[bytes, str]:
        """Return body and ETag once there is a bundle."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, body, etag = await self.bundle()
                if status == 200:
                    return body, etag
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running(tmp_path: Path, **settings: Any) -> AsyncIterator[Running]:
    """Run a replica with a Workload API of its own; a second one gives the sidecar of ledger-0 its SVID."""
    domain, server, stop = EmbeddedDomain(TrustDomain.parse("a.test")), a_cluster(), asyncio.Event()
    apis = [
        EmbeddedWorkloadApi(tmp_path / name, domain, identities=[Identity(spiffe_id=each)], in_cluster=False)
        for name, each in (("plane", CONTROL_PLANE), ("ledger", LEDGER))
    ]
    base = Settings(
        listen_host="127.0.0.1",
        admission_port=0,
        bundles_port=0,
        metrics_port=0,
        linger_s=0.0,
        spiffe_socket=apis[0].address,
        control_plane_id=str(CONTROL_PLANE),
    )
    client, source = MutualClient(), X509Source(apis[1].address)
    compile_files = functools.partial(opa.files, opa=opa.Opa(Path("/nowhere/opa")))  # these policies are Cedar only
    async with (
        server.running() as kube,
        aiohttp.ClientSession() as session,
        asyncio.TaskGroup() as tasks,
    ):
        app = App(replace(base, **settings), version="0.1.0", kube=kube, compile_files=compile_files)
        around = [tasks.create_task(api.run()) for api in apis]
        async with asyncio.timeout(PATIENCE_S):
            for api in apis:
                await api.started.wait()
            around.append(tasks.create_task(source.run()))
            source.subscribe(client.follow)
            await source.wait_ready()
            replica = tasks.create_task(app.run(stop))
            await app.started.wait()
        yield Running(app, server, stop, client, session)
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await replica
        for task in around:
            task.cancel()


async def test_pod_is_injected_and_its_sidecar_gets_what_its_namespace_says(tmp_path: Path) -> None:
    """From the creation of a pod to the bundle that its sidecar verifies with the key it was injected with."""
    async with running(tmp_path) as plane:
        await plane.ready()
        response, _ = await plane.review(POD)
        pod = jsonpatch.apply_patch(POD, msgspec.json.decode(base64.b64decode(response["patch"])))
        plane.server.put(PODS, pod)
        body, etag = await plane.bundle_eventually()

    (keys,) = [
        each["value"] for each in pod["spec"]["initContainers"][1]["env"] if each["name"] == "SIDEGATE_BUNDLE_KEYS"
    ]
    got = bundle.decode(body, bundle.public_keys(keys))
    assert etag == f'"{got.revision}.{got.stamp.term:x}"'
    assert got.stamp.sequence == int(plane.server.objects[PODS]["payments/ledger-0"]["metadata"]["resourceVersion"])
    assert (got.profile.server.name, got.profile.server.port, got.profile.server.workload) == (
        "ledger",
        8080,
        "ledger-0",
    )
    assert got.profile.policies[0].cedar
    assert "cedar/all.cedar" in got.files


async def test_changed_policy_reaches_a_waiting_sidecar_and_a_broken_one_does_not(tmp_path: Path) -> None:
    """The last good bundle stays while a policy does not compile; the next good one is pushed."""
    policies = path_of(resources.POLICY)
    async with running(tmp_path) as plane:
        await plane.ready()
        response, _ = await plane.review(POD)
        plane.server.put(PODS, jsonpatch.apply_patch(POD, msgspec.json.decode(base64.b64decode(response["patch"]))))
        _, first = await plane.bundle_eventually()

        plane.server.put(policies, a_resource("all", cedar="permit(nobody"))
        async with asyncio.timeout(PATIENCE_S):
            while "sidegate_bundle_failing_pods 1.0" not in (await plane.get("/metrics"))[1]:  # noqa: ASYNC110 - a scrape
                await asyncio.sleep(0.05)
        assert (await plane.bundle(**{"If-None-Match": first}))[0] == 304

        plane.server.put(policies, a_resource("all", cedar="forbid(principal, action, resource);"))
        status, _, second = await plane.bundle(**{"If-None-Match": first, "Prefer": "wait=50"})

    assert (status, second != first) == (200, True)


async def test_readiness_says_what_is_missing(tmp_path: Path) -> None:
    """Not ready before the resources are known, and alive all the same."""
    async with running(tmp_path, webhook_configuration="absent") as plane:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, text = await plane.get("/readyz")
                assert status == 503
                if "is the chart installed" in text and "resources" not in text:
                    break
                await asyncio.sleep(0.05)

        assert await plane.get("/livez") == (200, "ok\n")


async def test_metrics_show_when_the_certificate_expires(tmp_path: Path) -> None:
    """So that somebody can be told before it does."""
    async with running(tmp_path) as plane:
        await plane.ready()
        _, text = await plane.get("/metrics")

    (line,) = [each for each in text.splitlines() if each.startswith("sidegate_serving_certificate_expiry")]
    assert float(line.split()[1]) > 1.7e9


async def test_stopping_replica_serves_on_and_says_so(tmp_path: Path) -> None:
    """After the signal: not ready, still answering, and every connection is closed after its answer."""
    async with running(tmp_path, linger_s=5.0) as plane:
        await plane.ready()
        plane.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            while (await plane.get("/readyz"))[0] == 200:  # noqa: ASYNC110 - that is what a kubelet does
                await asyncio.sleep(0.01)
        response, headers = await plane.review(POD)

    assert response["allowed"]
    assert headers["Connection"] == "close"


async def test_a_second_installation_keeps_the_policies_of_its_namespaces_and_leaves_the_status(tmp_path: Path) -> None:
    """The first one has let go of them; both would write the same status for ever."""
    fences = "/apis/networking.k8s.io/v1/namespaces/payments/networkpolicies"
    async with running(tmp_path, status="leave") as plane:
        namespace = {"metadata": {"name": "payments", "labels": {"sidegate.dev/injection": "enabled"}}}
        plane.server.objects["/apis/networking.k8s.io/v1/networkpolicies"] = {}
        plane.server.put("/api/v1/namespaces", namespace)
        async with asyncio.timeout(PATIENCE_S):
            while len(plane.server.objects.get(fences, {})) < 2:  # noqa: ASYNC110 - as the API server does it
                await asyncio.sleep(0.05)
        assert set(plane.server.objects[fences]) == {"payments/sidegate", "payments/sidegate.ledger"}
        assert not [path for path, _ in plane.server.patches if path.endswith("/status")]


async def test_bundles_are_for_svids_only(tmp_path: Path) -> None:
    """Without a client certificate there is no answer at all."""
    async with running(tmp_path) as plane:
        await plane.ready()
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            async with plane.session.get(f"https://127.0.0.1:{plane.app.ports['bundles']}/v1/bundles/x", ssl=context):
                pass


def test_golden_pod_is_the_self_test() -> None:
    """A template that cannot inject a plain pod makes the replica unready."""
    assert passes_golden_pod(TEMPLATE)
    assert not passes_golden_pod(replace(TEMPLATE, excluded_namespaces=frozenset({"golden"})))


def test_template_is_what_the_settings_say() -> None:
    """Sidecars get our address, our name, our key, and a socket of the same name in their own directory."""
    key = make_key()
    settings = Settings(
        control_plane_id=str(CONTROL_PLANE),
        spiffe_socket="unix:/elsewhere/agent.sock",
        namespace="gate",
        capture="remap",
    )
    made = template(settings, "1", pem_of([key.public_key()]))

    assert made.sidecar.control_plane == "https://sidegate.gate.svc:8443"
    assert made.sidecar.control_plane_id == str(CONTROL_PLANE)
    assert made.sidecar.spiffe_socket == "unix:/spiffe-workload-api/agent.sock"
    assert made.sidecar.bundle_keys == pem_of([key.public_key()])
    assert made.capture is Capture.REMAP
    assert {"gate", "kube-system"} <= made.excluded_namespaces


def test_defaults_are_what_the_settings_say() -> None:
    """Including the content of audit records."""
    got = defaults(Settings(mtls="permissive", user="optional", audit_content="hash", otlp_endpoint="http://c:4318"))

    assert (got.mtls, got.user, got.audit.arguments, got.audit.results) == ("permissive", "optional", "hash", "hash")
    assert got.telemetry.otlp_endpoint == "http://c:4318"
    assert defaults(Settings()).telemetry.otlp_endpoint is None
