"""The sidecar's puller and the control plane's endpoint, as they are, over real mutual TLS."""

import asyncio
from dataclasses import replace

import aiohttp
from aiohttp import web

from certs.tls import MutualClient, MutualServer
from sidecar.core.bundle import revision
from sidecar.shell.bundles import BundleSource
from tests.fakes import eventually
from tests.sidecar.shell.test_bundles import CONTROL_PLANE, POD, SETTINGS, TRUST, Sidecar, a_bundle, an_svid
from webhook.shell.bundles import BundleEndpoint, Bundles, Published
from webhook.shell.metrics import Metrics

KEY = ("pay", "billing-1")


def _published(number: int) -> Published:
    data = a_bundle(number)
    return Published(data, revision({"n": data}))


async def test_pod_gets_its_bundle_and_each_new_one_at_once() -> None:
    """From "no such pod" over the first bundle to the second, in one conversation."""
    bundles, sidecar = Bundles(), Sidecar()
    server, client = MutualServer(), MutualClient()
    server.use(an_svid(CONTROL_PLANE), TRUST)
    client.use(an_svid(POD), TRUST)
    application = web.Application()
    application.router.add_get("/v1/bundles/{pod}", BundleEndpoint(bundles, POD.trust_domain, Metrics()).get)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server.context).start()
    url = f"https://127.0.0.1:{runner.addresses[0][1]}"

    async with aiohttp.ClientSession(auto_decompress=False) as session, asyncio.TaskGroup() as tasks:
        source = BundleSource(replace(SETTINGS, control_plane=url), session, client, sidecar.activate)
        pulling = tasks.create_task(source.run())
        await eventually(lambda: "no injected pod pay/billing-1" in source.detail, what="refusal")
        bundles.track(KEY, "billing")
        bundles.publish(KEY, _published(1))
        await eventually(lambda: sidecar.numbers == [1], what="first bundle")
        bundles.publish(KEY, _published(2))
        await eventually(lambda: sidecar.numbers == [1, 2], what="second bundle")
        pulling.cancel()
    await runner.cleanup()
