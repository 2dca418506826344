"""Hold the Lease by which one replica does what is to be done once; core/lease.py decides.

Own code, as the `kubernetes` package's leaderelection writes local time for UTC, measures by the wall clock, gives up on
a broken connection and never lets go of the Lease when it stops (see docs/explanation/decisions.md).
Nothing that pods wait for depends on it: admission and bundles are served by all replicas.
"""

import asyncio
import contextlib
import logging
import random
import time
from datetime import UTC, datetime

from webhook.core.lease import RENEW_DEADLINE_S, RETRY_S, Observed, claim, observe, release
from webhook.core.pod import JSON
from webhook.errors import KubeError
from webhook.shell.kube import Kube
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)


class Leadership:
    """One candidate. Mutated by `run` alone."""

    def __init__(self, kube: Kube, metrics: Metrics, *, namespace: str, name: str, identity: str) -> None:
        self._kube = kube
        self._metrics = metrics
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._identity = identity
        self._observed: Observed | None = None
        self._until_s = 0.0  # monotonic

    @property
    def leads(self) -> bool:
        """Whether this replica may act for all; false as soon as it could not renew in time."""
        return time.monotonic() < self._until_s

    async def run(self) -> None:
        """Try for ever; let go of the Lease when cancelled. Without a name, never lead."""
        if not self._name:
            return
        try:
            while True:
                led = self.leads
                try:
                    await self.step()
                except KubeError as error:
                    log.warning("lease not renewed", extra={"error": str(error)})
                if self.leads != led:
                    log.info("leading" if self.leads else "following", extra={"identity": self._identity})
                self._metrics.leading.set(self.leads)
                await asyncio.sleep(RETRY_S * random.uniform(1.0, 1.2))  # noqa: S311 - jitter, as client-go's
        finally:
            with contextlib.suppress(KubeError, TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._release()

    async def step(self) -> None:
        """Take the Lease or renew it, if that is ours to do. Raises KubeError."""
        lease = await self._kube.get(f"{self._collection}/{self._name}")
        now_s = time.monotonic()
        if lease is not None:
            self._observed = observe(lease, self._observed, now_s)
        spec = claim(lease, self._observed, self._identity, now_s, datetime.now(UTC))
        if spec is None:
            self._until_s = 0.0
            return
        try:
            await self._write(lease, spec)
        except KubeError as error:
            if error.status != 409:
                raise
            self._until_s = 0.0  # somebody else was faster
        else:
            self._until_s = now_s + RENEW_DEADLINE_S

    async def _write(self, lease: JSON | None, spec: JSON) -> None:
        if lease is None:
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}}
            await self._kube.create(self._collection, body | {"spec": spec})
        else:
            await self._kube.replace(f"{self._collection}/{self._name}", lease | {"spec": spec})

    async def _release(self) -> None:
        self._until_s = 0.0
        lease = await self._kube.get(f"{self._collection}/{self._name}")
        spec = release(lease, self._identity, datetime.now(UTC)) if lease else None
        if lease and spec:
            await self._write(lease, spec)
