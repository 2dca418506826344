"""Health, metrics, the kubelet's probes of the application, and the public key of identity headers, on a port of their own.

Answers nothing else: it is open to the whole pod network. The application's probes are those that the webhook recorded
at admission, never a path from the request. Kubernetes probes: KEP-753 (a native sidecar's startup probe gates the
application), KEP-2727 (gRPC).
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web

from sidecar.errors import ConfigError

PROBE_TIMEOUT_S: Final = 1.0  # the kubelet's own default


class HttpHeader(msgspec.Struct, frozen=True, kw_only=True):
    """A header that the probe sends."""

    name: str
    value: str


class HttpGet(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the kubelet would have asked; its port, which can be a name, was resolved at admission."""

    path: str = "/"
    scheme: str = "HTTP"
    http_headers: tuple[HttpHeader, ...] = ()


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded probe: an HTTP request, or else a connection."""

    port: int
    timeout_s: float = PROBE_TIMEOUT_S
    http_get: HttpGet | None = msgspec.field(default=None, name="httpGet")


Probes = Mapping[str, Mapping[str, Probe]]  # container -> kind of probe -> probe


def decode_probes(text: str) -> Probes:
    """Return the recorded probes; raises ConfigError."""
    try:
        return msgspec.json.decode(text.encode(), type=dict[str, dict[str, Probe]])
    except msgspec.DecodeError as error:
        raise ConfigError(f"SIDEGATE_PROBES: {error}") from error


class Health:
    """The health listener's handlers. *conditions* says, by name, what is not well: empty means ready."""

    def __init__(
        self,
        *,
        upstream_host: str,
        probes: Probes,
        conditions: Callable[[], Mapping[str, str]],
        render_metrics: Callable[[], str],
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

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self._render_metrics(), content_type="text/plain", charset="utf-8")

    async def _identity_keys(self, _: web.Request) -> web.Response:
        """The public keys by which the server behind us verifies `Sidegate-Identity`; 404 where it gets none."""
        keys = self._jwks()
        return web.Response(status=404) if keys is None else web.json_response(keys)

    async def _app_health(self, request: web.Request) -> web.Response:
        probe = self._probes.get(request.match_info["container"], {}).get(request.match_info["kind"])
        if probe is None:
            return web.Response(status=404, text="no such probe was recorded\n")
        try:
            async with asyncio.timeout(probe.timeout_s):
                status = await self._perform(probe)
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            return web.Response(status=503, text=f"{type(error).__name__}: {error}\n")
        return web.Response(status=status)

    async def _perform(self, probe: Probe) -> int:
        """Return the HTTP status with which the application's answer is told."""
        if probe.http_get is None:
            _, writer = await asyncio.open_connection(self._upstream_host, probe.port)
            writer.close()
            return 200
        get = probe.http_get
        url = f"{get.scheme.lower()}://{self._upstream_host}:{probe.port}{get.path}"
        # As the kubelet: no verification, no kept connection, a redirect is a success.
        connector = aiohttp.TCPConnector(force_close=True, ssl=False)
        headers = [(header.name, header.value) for header in get.http_headers]
        async with (
            aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
            session.get(url, headers=headers, allow_redirects=False) as response,
        ):
            return 200 if 300 <= response.status < 400 else response.status
