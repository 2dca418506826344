"""What sidecars report to the other replicas: asked of each by the one that sums up, over the same mTLS listener.

Nothing about single pods is written to the Kubernetes API for it. A replica that does not answer is left with its last
answer until it is no endpoint of the Service any more or its reports are too old to count. Refuses, on both sides, a
peer that does not show the control plane's own SVID.
"""

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import aiohttp
from aiohttp import web

from certs.errors import CertsError
from certs.spiffe import SpiffeId, SpiffePattern
from certs.tls import MutualClient, peer_of
from webhook.config import Settings
from webhook.core import reports
from webhook.core.reports import PodKey, Report, Reports
from webhook.errors import BadReports, KubeError
from webhook.shell.bundles import utc_now
from webhook.shell.kube import Kube

log = logging.getLogger(__name__)

PATH: Final = "/v1/reports"
TIMEOUT_S: Final = 5.0
MAX_BYTES: Final = 32 * 2**20  # of one answer: MAX_PODS of them, each cut


class ReportsEndpoint:
    """The handler of `/v1/reports`, for other replicas."""

    def __init__(self, heard: Reports, control_plane_id: str) -> None:
        self._heard = heard
        self._expected = SpiffeId.parse(control_plane_id)

    async def get(self, request: web.Request) -> web.Response:
        """Return what this replica heard."""
        peer = peer_of(request.transport) if request.transport else None
        if peer is None or peer.spiffe_id != self._expected or peer.not_after < utc_now():
            raise web.HTTPForbidden(text="reports are for the control plane alone")
        body = reports.encode(self._heard.alive(utc_now().timestamp()))
        return web.Response(body=body, content_type="application/json")


class Peers:
    """The other replicas. Mutated by `ask` alone."""

    def __init__(self, kube: Kube, client: MutualClient, settings: Settings, identity: str) -> None:
        self._kube = kube
        self._client = client
        self._expected = SpiffePattern.exactly(SpiffeId.parse(settings.control_plane_id))
        self._port = settings.bundles_port
        self._identity = identity
        self._slices = (
            f"/apis/discovery.k8s.io/v1/namespaces/{settings.namespace}/endpointslices"
            f"?labelSelector=kubernetes.io%2Fservice-name%3D{settings.service}"
        )
        self._answers: dict[str, Mapping[PodKey, Report]] = {}
        self._problems: dict[str, str] = {}

    async def ask(self, session: aiohttp.ClientSession) -> list[Mapping[PodKey, Report]]:
        """Return what each of the others heard last. Raises KubeError when they cannot be found."""
        addresses = await self._addresses()
        for address in addresses:
            try:
                self._answers[address] = await self._fetch(session, address)
                self._problems.pop(address, None)
            except (aiohttp.ClientError, OSError, TimeoutError, CertsError, BadReports) as error:
                problem = str(error) or type(error).__name__
                if self._problems.get(address) != problem:
                    log.warning("a replica does not tell its reports", extra={"peer": address, "error": problem})
                self._problems[address] = problem
        for known in (self._answers, self._problems):
            for address in known.keys() - addresses:
                known.pop(address, None)
        return list(self._answers.values())

    async def _addresses(self) -> set[str]:
        found = await self._kube.get(self._slices)
        if found is None:
            raise KubeError(404, f"{self._slices}: not there")
        return {
            address
            for each in found.get("items") or ()
            for endpoint in each.get("endpoints") or ()
            if (endpoint.get("targetRef") or {}).get("name") != self._identity
            for address in endpoint.get("addresses") or ()
        }

    async def _fetch(self, session: aiohttp.ClientSession, address: str) -> Mapping[PodKey, Report]:
        host = f"[{address}]" if ":" in address else address
        async with (
            asyncio.timeout(TIMEOUT_S),
            session.get(
                f"https://{host}:{self._port}{PATH}",
                ssl=self._client.context(self._expected),
                allow_redirects=False,
            ) as response,
        ):
            if response.status != HTTPStatus.OK:
                raise BadReports(f"replica {address} answers {response.status}")
            data = await response.content.read(MAX_BYTES + 1)
            while len(data) <= MAX_BYTES and (more := await response.content.read(MAX_BYTES)):
                data += more
            if len(data) > MAX_BYTES:
                raise BadReports(f"replica {address} answers more than {MAX_BYTES} bytes")
            return reports.decode(data)
