"""Write what is so of each custom resource into its status, by the one replica that holds the Lease.

Only what has changed is written, at most MAX_WRITES a second; mere counts of pods wait SETTLE_S after the last write of
that resource, so that a roll-out of ten thousand pods is a few writes. A policy that no bundle proves to compile is
compiled by itself, once for each generation, and is believed what its status says already.
"""

import asyncio
import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import aiohttp

from webhook.core import resources
from webhook.core.conditions import find, merge
from webhook.core.reports import PodKey, Report, Reports, newest
from webhook.core.status import Held, Source, Tally, counted, judge, needs_trial, tally
from webhook.errors import BadPolicy, KubeError
from webhook.shell.bundles import utc_now
from webhook.shell.controllers import Compile, Controller
from webhook.shell.kube import Kube
from webhook.shell.lease import Leadership
from webhook.shell.metrics import Metrics
from webhook.shell.peers import Peers
from webhook.shell.validation import ANY, alone

log = logging.getLogger(__name__)

PERIOD_S: Final = 1.0
PODS_PER_S: Final = 2000  # a step over ten thousand pods and a thousand policies takes 80 ms, and is made every 6 s
PODS_AT_ONCE: Final = 1000  # 5 ms, then the loop serves others
RESOURCES_AT_ONCE: Final = 200  # 4 ms
SETTLE_S: Final = 5.0
ECHO_S: Final = 10.0  # until what was written is seen again; then it is written again
MAX_WRITES: Final = 20  # a second
RETRY_MAX_S: Final = 600.0  # of what the API server refuses; doubled from ECHO_S until then
MAX_TRIALS: Final = 4  # a step; each may take seconds
TRIAL_TIMEOUT_S: Final = 10.0
MANAGER: Final = "sidegate-status"
_PLURALS: Final[Mapping[str, str]] = {kind.name: kind.plural for kind in resources.KINDS}


@dataclass(frozen=True, slots=True)
class Written:
    """The last write of a resource's status, and when (Unix time); *failures* in a row, when it was not taken."""

    status: Mapping[str, Any]
    at_s: float
    generation: int
    failures: int = 0


class Statuses:
    """Mutated by `step` alone."""

    def __init__(
        self,
        kube: Kube,
        controller: Controller,
        leadership: Leadership,
        reports: Reports,
        peers: Peers,
        compile_files: Compile,
        metrics: Metrics,
        revision: str,
    ) -> None:
        self._revision = revision
        self._kube = kube
        self._controller = controller
        self._leadership = leadership
        self._reports = reports
        self._peers = peers
        self._compile_files = compile_files
        self._metrics = metrics
        self._written: dict[Source, Written] = {}
        self._trials: dict[Source, tuple[int, str]] = {}  # generation, and what the compiler said

    async def run(self) -> None:
        """Step for ever."""
        async with aiohttp.ClientSession() as session:
            while True:
                if self._leadership.leads and self._controller.is_synced:
                    try:
                        await self.step(session, utc_now())
                    except KubeError as error:
                        log.warning("status not written", extra={"error": str(error)})
                else:
                    self._written.clear()
                    self._metrics.reporting_pods.set(0)
                await asyncio.sleep(self._period_s())

    def _period_s(self) -> float:
        return PERIOD_S + len(self._controller.sources) / PODS_PER_S

    async def step(self, session: aiohttp.ClientSession, now: datetime) -> int:
        """Write what is due; returns how many were written. Raises KubeError."""
        heard = newest([self._reports.alive(now.timestamp()), *await self._peers.ask(session)])
        self._metrics.reporting_pods.set(len(heard))
        tallies = await self._tally(heard)
        held = self._controller.resources()
        await self._try(held, tallies)
        for source in (self._written.keys() | self._trials.keys()) - held.keys():
            self._written.pop(source, None)
            self._trials.pop(source, None)
        due: list[tuple[float, Source, Mapping[str, Any]]] = []
        for number, (source, each) in enumerate(held.items()):
            if number % RESOURCES_AT_ONCE == 0:
                await asyncio.sleep(0)
            wanted = self._wanted(source, each, tallies.get(source, Tally()), now)
            if wanted is not None:
                due.append((self._written[source].at_s if source in self._written else 0.0, source, wanted))
        # Who was written longest ago first: some that change all the time leave the others their share.
        due.sort(key=operator.itemgetter(0))
        chosen = due[: max(1, int(MAX_WRITES * self._period_s()))]
        for _, source, wanted in chosen:
            await self._write(source, wanted, held[source].generation, now)
        return len(chosen)

    async def _tally(self, heard: Mapping[PodKey, Report]) -> dict[Source, Tally]:
        """Count, a few pods at a time: admission is served by the same loop."""
        tallies: dict[Source, Tally] = {}
        others = self._controller.others(self._revision)
        pods = list(self._controller.sources.items())
        for start in range(0, len(pods), PODS_AT_ONCE):
            tally(pods[start : start + PODS_AT_ONCE], self._controller.states, heard, others, tallies)
            await asyncio.sleep(0)
        return tallies

    def _wanted(self, source: Source, held: Held, found: Tally, now: datetime) -> Mapping[str, Any] | None:
        """Return the status to write now, None when none is due."""
        conditions = judge(held, found, self._problem(source, held))
        if conditions is None:
            return None
        before = held.status.get("conditions") or []
        wanted = {
            "conditions": merge(before, conditions, held.generation, now),
            "distributed": counted(found),
        }
        if wanted == {"conditions": before, "distributed": held.status.get("distributed")}:
            return None
        last = self._written.get(source)
        if last is not None:
            age_s = now.timestamp() - last.at_s
            if last.failures and last.generation == held.generation and age_s < _pause_s(last.failures):
                return None
            if age_s < ECHO_S and last.status == wanted:
                return None
            if age_s < SETTLE_S and _essence(last.status) == _essence(wanted):
                return None
        return wanted

    def _problem(self, source: Source, held: Held) -> str | None:
        """Return what the compiler said of a policy by itself, None when it was not asked about this generation."""
        generation, problem = self._trials.get(source, (-1, ""))
        return problem if generation == held.generation else None

    async def _try(self, held: Mapping[Source, Held], tallies: Mapping[Source, Tally]) -> None:
        """Compile by themselves the policies that no bundle proves to compile."""
        tried = 0
        for source in needs_trial(held, tallies):
            each = held[source]
            if self._problem(source, each) is not None or tried >= MAX_TRIALS:
                continue
            known = find(each.status.get("conditions") or (), "Compiled", each.generation)
            if known is not None and known.get("status") in ("True", "False"):
                self._trials[source] = (each.generation, "" if known["status"] == "True" else str(known["message"]))
                continue
            tried += 1
            try:
                async with asyncio.timeout(TRIAL_TIMEOUT_S):
                    await self._compile_files([alone(source[2], each.spec)], ANY)
            except BadPolicy as error:
                self._trials[source] = (each.generation, str(error))
            except (TimeoutError, OSError) as error:
                log.warning("policy not compiled", extra={"policy": "/".join(source), "error": str(error) or "no time"})
            else:
                self._trials[source] = (each.generation, "")

    async def _write(self, source: Source, status: Mapping[str, Any], generation: int, now: datetime) -> None:
        kind, namespace, name = source
        where = f"namespaces/{namespace}/" if namespace else ""
        path = f"/apis/sidegate.dev/{resources.VERSION}/{where}{_PLURALS[kind]}/{name}/status?fieldManager={MANAGER}"
        failures = self._written[source].failures if source in self._written else 0
        self._written[source] = Written(status, now.timestamp(), generation)
        try:
            await self._kube.merge_object(path, {"status": dict(status)})
        except KubeError as error:
            if not error.status:
                raise
            self._written[source] = Written(status, now.timestamp(), generation, failures + 1)
            if error.status != 404:  # deleted meanwhile
                log.warning("status not written", extra={"resource": "/".join(source), "error": str(error)})
        else:
            self._metrics.status_writes.inc()


def _pause_s(failures: int) -> float:
    """Return after how long what was refused so often in a row is tried again."""
    return float(min(RETRY_MAX_S, ECHO_S * 2 ** min(failures - 1, 10)))


def _essence(status: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what of *status* cannot wait: all but the counts."""
    return [(each["type"], each["status"], each["observedGeneration"]) for each in status["conditions"]]
