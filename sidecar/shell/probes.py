"""Performs the application's probes and lifecycle hooks in the kubelet's place, as the webhook recorded them.

Refuses everything that was not recorded: nothing of a request decides what is asked of the application but which
record it names. As the kubelet does it: certificates are not verified, connections not kept, a redirect is followed on
the same host and is a success elsewhere, a gRPC server is well when it says SERVING.
Source: Kubernetes, pkg/probe and pkg/kubelet/lifecycle; KEP-2727 (gRPC); grpc.health.v1.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

import aiohttp
import msgspec
from grpclib.client import Channel
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from yarl import URL

from sidecar.errors import ConfigError

TIMEOUT_S: Final = 1.0  # the kubelet's own default
MAX_REDIRECTS: Final = 10  # the kubelet's


class HttpHeader(msgspec.Struct, frozen=True, kw_only=True):
    """A header that is sent."""

    name: str
    value: str


class HttpGet(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the kubelet would have asked; its port, which can be a name, was resolved at admission."""

    path: str = "/"
    scheme: str = "HTTP"
    http_headers: tuple[HttpHeader, ...] = ()


class Grpc(msgspec.Struct, frozen=True, kw_only=True):
    """The service whose health is asked for; "" is the server's own."""

    service: str = ""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded probe: an HTTP request, a gRPC health check, or else a connection. A hook has a *token*.

    Probes ask, so whoever comes may ask; hooks act, so they need what only the pod's specification tells.
    """

    port: int
    timeout_s: float = TIMEOUT_S
    http_get: HttpGet | None = msgspec.field(default=None, name="httpGet")
    grpc: Grpc | None = None
    token: str | None = None


Probes = Mapping[str, Mapping[str, Probe]]  # container -> kind of probe or hook -> what to perform


class Unwell(Exception):  # noqa: N818 - an answer, not an error of ours
    """The application did not answer, or not as it should; the text says how."""


def decode(text: str) -> Probes:
    """Return what was recorded; raises ConfigError."""
    try:
        return msgspec.json.decode(text.encode(), type=dict[str, dict[str, Probe]])
    except msgspec.DecodeError as error:
        raise ConfigError(f"SIDEGATE_PROBES: {error}") from error


async def perform(probe: Probe, host: str, *, user_agent: str = "") -> int:
    """Return the HTTP status that tells how the application at *host* answered; raises Unwell when it did not."""
    try:
        async with asyncio.timeout(probe.timeout_s):
            if probe.http_get is not None:
                return await _get(probe.http_get, URL.build(scheme="http", host=host, port=probe.port), user_agent)
            if probe.grpc is not None:
                return await _check(probe.grpc, host, probe.port)
            _, writer = await asyncio.open_connection(host, probe.port)
            writer.close()
            return 200
    except TimeoutError as error:
        raise Unwell(f"no answer within {probe.timeout_s:g} s") from error
    except (OSError, aiohttp.ClientError, GRPCError, StreamTerminatedError, ValueError) as error:
        raise Unwell(f"{type(error).__name__}: {error}") from error


async def _get(get: HttpGet, server: URL, user_agent: str) -> int:
    path = get.path if get.path.startswith("/") else f"/{get.path}"
    url = URL(f"{get.scheme.lower()}://{server.authority}{path}")
    headers = [(header.name, header.value) for header in get.http_headers]
    if user_agent and not any(name.lower() == "user-agent" for name, _ in headers):
        headers.append(("User-Agent", user_agent))  # the kubelet's, which access logs are filtered by
    connector = aiohttp.TCPConnector(force_close=True, ssl=False)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        for _ in range(MAX_REDIRECTS):
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                if not 300 <= response.status < 400:
                    return response.status
                url = url.join(URL(response.headers.get("Location", "")))
                if not response.headers.get("Location") or (url.host, url.port) != (server.host, server.port):
                    return 200
    raise Unwell(f"{MAX_REDIRECTS} redirects")


async def _check(grpc: Grpc, host: str, port: int) -> int:
    async with Channel(host, port) as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest(service=grpc.service))
    status: int = answer.status
    if status != HealthCheckResponse.SERVING:
        raise Unwell(f"grpc: {HealthCheckResponse.ServingStatus.Name(status)}")
    return 200
