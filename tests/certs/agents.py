"""Run Workload API servers and sources inside a test, and wait for what they do."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffeId
from certs.workload import Timing, X509Source
from tests.certs.pki import A_TEST, API

PATIENCE_S = 10.0
FAST = Timing(
    dial_s=0.5,
    lost_min_s=0.01,
    lost_max_s=0.05,
    denied_min_s=0.01,
    denied_max_s=0.05,
    patience_min_s=0.2,
    reserve_s=0.0,
)


class Runs(Protocol):
    """Anything that works inside a TaskGroup until it is cancelled."""

    async def run(self) -> None:
        """Work."""


@asynccontextmanager
async def running(*parts: Runs) -> AsyncIterator[None]:
    """Run *parts* while the block lasts."""
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(part.run()) for part in parts]
        try:
            yield
        finally:
            for task in started:
                task.cancel()


async def eventually(holds: Callable[[], bool], *, within_s: float = PATIENCE_S) -> None:
    """Return once *holds* does; polls, because what is waited for happens in another task or process."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - see above: there is no event for everything
            await asyncio.sleep(0.01)


async def ready(*sources: X509Source) -> None:
    """Return once all *sources* have an SVID."""
    async with asyncio.timeout(PATIENCE_S):
        for source in sources:
            await source.wait_ready()


@contextmanager
def a_socket() -> Iterator[Path]:
    """A path for a unix socket: short, as the kernel allows 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        yield Path(folder) / "agent.sock"


def an_agent(
    socket: Path,
    *ids: SpiffeId,
    domain: EmbeddedDomain | None = None,
    identities: Sequence[Identity] = (),
    federated: Sequence[EmbeddedDomain] = (),
) -> EmbeddedWorkloadApi:
    """An embedded agent that rotates only when told to."""
    return EmbeddedWorkloadApi(
        socket,
        domain or EmbeddedDomain(A_TEST),
        identities=identities or [Identity(spiffe_id=spiffe_id) for spiffe_id in ids or (API,)],
        federated=federated,
        rotation_s=3600,
        in_cluster=False,
    )
