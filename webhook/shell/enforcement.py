"""Find out whether NetworkPolicy is really enforced around pods in capture mode `remap`, which stands and falls with it.

The API server takes policies on every cluster, and some networks ignore them. So the replica that leads dials such pods
itself: on the sidecar's health port, which is open to it, and on the ports of the application, which are open to
nobody. If both answer, the pod is exposed: that is logged with its name and counted. If neither does, nothing is known.
Sends no byte to an application, treats no pod differently for what it finds, and dials none of a namespace that is not
governed: there the label is anybody's.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from sidecar.config import HEALTH_PORT, Capture
from webhook.core import pod as pods
from webhook.core.annotations import CAPTURED
from webhook.core.container import CONTAINERS
from webhook.core.pod import JSON
from webhook.errors import Denial
from webhook.shell.bundles import PodKey
from webhook.shell.controllers import PODS
from webhook.shell.kube import Change, Gone, Kube, Listed, Put
from webhook.shell.lease import Leadership
from webhook.shell.metrics import Metrics

log = logging.getLogger(__name__)

PERIOD_S: Final = 5.0
AGAIN_S: Final = 300.0  # a network's policies are not switched off by the minute
SOON_S: Final = 10.0  # of a pod that is starting, and of one that the network may not have caught up with
DIAL_S: Final = 2.0  # a pod of the same cluster answers in milliseconds
MAX_DIALS: Final = 20  # a step
MAX_PORTS: Final = 16  # of a pod, which may declare thousands; any that answers shows what the network is worth
EXPOSED: Final = "NetworkPolicy is not enforced: the application can be reached past its sidecar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A pod: its addresses, the application's ports, when to dial it next, and what was found."""

    addresses: tuple[str, ...]
    ports: tuple[int, ...]
    due_s: float = 0.0
    is_exposed: bool | None = None  # None: not known


class Enforcement:
    """Mutated by its own tasks alone, which all run on one loop."""

    def __init__(
        self,
        kube: Kube,
        leadership: Leadership,
        metrics: Metrics,
        *,
        governs: Callable[[str], bool],
        health_port: int = HEALTH_PORT,
    ) -> None:
        """*governs* says whether a namespace is governed."""
        self._kube = kube
        self._leadership = leadership
        self._metrics = metrics
        self._governs = governs
        self._health_port = health_port
        self._targets: dict[PodKey, Target] = {}

    async def run(self) -> None:
        """Follow the pods, and dial for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="remapped-pods")
            while True:
                await self.step()
                await asyncio.sleep(PERIOD_S)

    async def _follow(self) -> None:
        async for change in self._kube.follow(PODS, f"{CAPTURED}={Capture.REMAP}"):
            self.apply(change)

    def apply(self, change: Change) -> None:
        """Take in a change of the pods in mode `remap`."""
        match change:
            case Listed(items):
                before, self._targets = self._targets, {}
                for item in items:
                    self._put(item, before)
            case Put(item):
                self._put(item, self._targets)
            case Gone(item):
                self._targets.pop(_key(item), None)

    def _put(self, item: JSON, before: dict[PodKey, Target]) -> None:
        target, known = _target(item), before.get(_key(item))
        if target is None:
            self._targets.pop(_key(item), None)
        elif known is not None and (known.addresses, known.ports) == (target.addresses, target.ports):
            self._targets[_key(item)] = known
        else:
            self._targets[_key(item)] = target

    async def step(self) -> None:
        """Dial the pods whose time has come, if that is this replica's to do."""
        if not self._leadership.leads:
            self._count([])
            return
        now_s = asyncio.get_running_loop().time()
        governed = {key: target for key, target in self._targets.items() if self._governs(key[0])}
        due = sorted(
            (key for key, target in governed.items() if target.due_s <= now_s),
            key=lambda key: self._targets[key].due_s,
        )[:MAX_DIALS]
        async with asyncio.TaskGroup() as tasks:
            asked = {key: tasks.create_task(self._is_exposed(self._targets[key])) for key in due}
        for key, answer in asked.items():
            before = self._targets.get(key)
            if before is None:
                continue
            is_exposed = answer.result()
            # Silence counts for long when it is heard twice: an application starts to listen after its sidecar.
            is_proven = is_exposed is False and before.is_exposed is False
            wait_s = AGAIN_S if is_proven else SOON_S
            self._targets[key] = replace(before, due_s=now_s + wait_s, is_exposed=is_exposed)
            if is_exposed and not before.is_exposed:
                log.error(EXPOSED, extra={"pod": "/".join(key)})
        self._count([self._targets[key].is_exposed for key in governed if key in self._targets])

    def _count(self, found: list[bool | None]) -> None:
        self._metrics.remapped_pods.labels("exposed").set(found.count(True))
        self._metrics.remapped_pods.labels("closed").set(found.count(False))
        self._metrics.remapped_pods.labels("unknown").set(found.count(None))

    async def _is_exposed(self, target: Target) -> bool | None:
        """Return what is found at all addresses together: a network may enforce policies for IPv4 alone."""
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._is_exposed_at(each, target.ports)) for each in target.addresses]
        found = {each.result() for each in asked}
        return True if True in found else None if None in found else False

    async def _is_exposed_at(self, address: str, ports: tuple[int, ...]) -> bool | None:
        if not await _answers(address, self._health_port):
            return None  # it is not up, or we may not dial it at all: silence elsewhere would prove nothing
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(_answers(address, port)) for port in ports[:MAX_PORTS]]
        return any(each.result() for each in asked)


async def _answers(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True


def _target(item: JSON) -> Target | None:
    """Return whom to dial; None for a pod without an address or without a port of its own."""
    status = item.get("status") or {}
    addresses = [each.get("ip") for each in status.get("podIPs") or ()] or [status.get("podIP")]
    try:
        spec = pods.read(item).spec
    except Denial:
        return None
    ports = {
        port.container_port
        for each in (*(spec.init_containers or ()), *spec.containers)
        for port in each.ports or ()
        if each.name not in CONTAINERS and port.protocol in (None, "TCP")
    }
    known = tuple(each for each in addresses if each)
    return Target(addresses=known, ports=tuple(sorted(ports))) if known and ports else None


def _key(item: JSON) -> PodKey:
    return item["metadata"]["namespace"], item["metadata"]["name"]
