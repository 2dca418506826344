"""Health, metrics, the kubelet's probes of the application, and the public key of identity headers, on a port of their own.

Answers nothing else: it is open to the whole pod network. The application's probes and hooks are those that the webhook
recorded at admission (probes.py), never a path from the request; a hook acts, and takes a token that only the pod's
specification tells. Source: KEP-753 (a native sidecar's startup probe gates the application).
"""

import hmac
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from aiohttp import web

from sidecar.shell.metrics import OPENMETRICS, TEXT
from sidecar.shell.probes import Probes, Unwell, perform


class RenderMetrics(Protocol):
    """Writes all metrics."""

    def __call__(self, *, openmetrics: bool) -> str:
        """Return them in Prometheus' own text format, or in OpenMetrics."""
        ...


class Health:
    """The health listener's handlers. *conditions* says, by name, what is not well: empty means ready."""

    def __init__(
        self,
        *,
        upstream_host: str,
        probes: Probes,
        conditions: Callable[[], Mapping[str, str]],
        render_metrics: RenderMetrics,
        jwks: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        self._upstream_host = upstream_host
        self._probes = probes
        self._conditions = conditions
        self._render_metrics = render_metrics
        self._jwks = jwks
        self._started = False

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        application = web.Application()
        application.router.add_get("/livez", self._live)
        application.router.add_get("/startupz", self._startup)
        application.router.add_get("/readyz", self._ready)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/identity/jwks.json", self._identity_keys)
        application.router.add_get("/app-health/{container}/{kind}", self._app_health)
        application.router.add_get("/app-hook/{container}/{kind}/{token}", self._app_hook)
        return application

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})  # that the loop answers is the proof

    async def _startup(self, request: web.Request) -> web.Response:
        """Once started, always started: later trouble is readiness's to tell."""
        response = await self._ready(request)
        self._started = self._started or response.status == 200
        return web.json_response({"started": True}) if self._started else response

    async def _ready(self, _: web.Request) -> web.Response:
        conditions = self._conditions()
        return web.json_response(
            {"ready": not conditions, "conditions": dict(conditions)}, status=503 if conditions else 200
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
        text = self._render_metrics(openmetrics=openmetrics)
        return web.Response(body=text.encode(), headers={"content-type": OPENMETRICS if openmetrics else TEXT})

    async def _identity_keys(self, _: web.Request) -> web.Response:
        """The public keys by which the server behind us verifies `Sidegate-Identity`; 404 where it gets none."""
        keys = self._jwks()
        return web.Response(status=404) if keys is None else web.json_response(keys)

    async def _app_health(self, request: web.Request) -> web.Response:
        probe = self._probes.get(request.match_info["container"], {}).get(request.match_info["kind"])
        if probe is None or probe.token is not None:
            return web.Response(status=404, text="no such probe was recorded\n")
        try:
            status = await perform(probe, self._upstream_host, user_agent=request.headers.get("User-Agent", ""))
        except Unwell as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(status=status)

    async def _app_hook(self, request: web.Request) -> web.Response:
        """Perform a lifecycle hook. The kubelet takes every answer for success, so a failure is no answer."""
        hook = self._probes.get(request.match_info["container"], {}).get(request.match_info["kind"])
        if hook is None or hook.token is None:
            return web.Response(status=404, text="no such hook was recorded\n")
        if not hmac.compare_digest(hook.token.encode(), request.match_info["token"].encode()):
            return web.Response(status=403, text="hooks act, and the whole pod network comes here: not without token\n")
        try:
            await perform(hook, self._upstream_host, user_agent=request.headers.get("User-Agent", ""))
        except Unwell:
            if request.transport is not None:
                request.transport.abort()
        return web.Response()
