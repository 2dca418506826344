"""Counts, for metrics, the pods that should be governed beside those that are; webhook/core/survey.py tells them apart.

Lists pods anew each time, in labelled namespaces only and on the replica that leads: a watch of all pods would hold the
whole cluster in memory for one number. Away from the API server the last counts stay, and their age grows. Sidecars of
another release beside this one count, too, if their image is of the same repository; `sidegate status` looks closer.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from webhook.core.evidence import Origin
from webhook.core.injection import INJECTION_LABEL, policy_of
from webhook.core.resources import ServerProfileSpec
from webhook.core.survey import State, Surveyed, survey
from webhook.errors import BadResource, KubeError
from webhook.shell.kube import Kube
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

EVERY_S: Final = 60.0
LOOK_S: Final = 2.0  # who has just come to lead looks soon
SHOWN: Final = (State.GOVERNED, State.STARTING, State.UNGOVERNED)


class Coverage:
    """Mutates the gauges of *metrics* while *leads* says so; *profiles* are those of a namespace."""

    def __init__(
        self,
        kube: Kube,
        metrics: Metrics,
        *,
        leads: Callable[[], bool],
        profiles: Callable[[str], Mapping[str, ServerProfileSpec]],
        excluded: frozenset[str],
        origin: Origin,
    ) -> None:
        """*excluded* names namespaces that are left alone, whatever their labels say; *origin* says whose sidecars are ours."""
        self._kube = kube
        self._metrics = metrics
        self._leads = leads
        self._profiles = profiles
        self._excluded = excluded
        self._origin = origin

    async def run(self) -> None:
        """Count every minute; never returns."""
        while True:
            if not self._leads():
                self._metrics.pods.clear()  # another replica knows
                self._metrics.servers.clear()
                await asyncio.sleep(LOOK_S)
                continue
            try:
                await self.count()
            except KubeError as error:
                log.warning("pods not counted", extra={"error": str(error)})
            await asyncio.sleep(EVERY_S)

    async def count(self) -> None:
        """Count now; raises KubeError."""
        found: dict[str, list[Surveyed]] = {}
        for each in await self._kube.list_all("/api/v1/namespaces", INJECTION_LABEL):
            name, labels = each["metadata"]["name"], each["metadata"].get("labels") or {}
            policy = policy_of(labels)
            if policy is None or name in self._excluded:
                continue
            try:
                profiles = self._profiles(name)
            except BadResource:  # its pods are refused, so they should be governed
                profiles = {}
            pods = await self._kube.list_all(f"/api/v1/namespaces/{name}/pods")
            found[name] = list(survey(pods, policy, profiles, self._origin))
        self._metrics.pods.clear()  # namespaces that are gone
        self._metrics.servers.clear()
        for name, surveyed in found.items():
            states = Counter(pod.state for pod in surveyed)
            self._metrics.servers.labels(name).set(len({pod.server for pod in surveyed if pod.server}))
            for state in SHOWN:
                self._metrics.pods.labels(name, state).set(states[state])
        self._metrics.pods_counted.set(time.time())
