"""Keep this process's X.509-SVID and bundles current: one stream from the SPIFFE Workload API, and its state machine.

Publishes a snapshot only when every check of certs.svid passes; else the last good one stays until it expires.
Refuses to guess: several identities without a configured choice are none; a withdrawn or expired one ends at once.
The agent reports neither expiry nor its own freezing: the clock here decides, and silence means dialling again.
Source: SPIFFE Workload API, sections 4 to 6; back-off after go-spiffe.
"""

import asyncio
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, NoReturn

from grpclib.client import Channel, UnaryStreamMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from certs.errors import CertsError, WorkloadApiError, WorkloadReason
from certs.messages import METADATA, METHODS, messages
from certs.spiffe import SpiffeId
from certs.svid import X509Snapshot

__all__ = ["Selection", "Timing", "WorkloadState", "WorkloadStream", "X509Source", "agent_errors", "socket_path"]

Subscriber = Callable[[X509Snapshot | None], None]


class WorkloadState(StrEnum):
    """How things stand, in the word that readiness shows."""

    STARTING = "starting"
    NO_AGENT = "no-agent"
    NO_IDENTITY = "no-identity"
    MALFORMED = "malformed"
    AMBIGUOUS = "ambiguous"
    EXPIRED = "expired"
    EXPIRING = "expiring"
    DEGRADED = "degraded"
    READY = "ready"


# What an error means while there is no SVID to go on with.
_STATE_WITHOUT_SVID = {
    WorkloadReason.NO_AGENT: WorkloadState.NO_AGENT,
    WorkloadReason.SILENT: WorkloadState.NO_AGENT,
    WorkloadReason.REJECTED: WorkloadState.NO_AGENT,
    WorkloadReason.NO_IDENTITY: WorkloadState.NO_IDENTITY,
    WorkloadReason.MALFORMED: WorkloadState.MALFORMED,
    WorkloadReason.AMBIGUOUS: WorkloadState.AMBIGUOUS,
}
_ANSWERED_NO = (WorkloadReason.NO_IDENTITY, WorkloadReason.REJECTED)
_REASON_OF_STATUS = {
    Status.PERMISSION_DENIED: WorkloadReason.NO_IDENTITY,
    Status.INVALID_ARGUMENT: WorkloadReason.REJECTED,
    Status.UNIMPLEMENTED: WorkloadReason.REJECTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which of several SVIDs is ours: by SPIFFE ID, by hint, or by both. With neither there must be one ID only."""

    spiffe_id: SpiffeId | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Waits, in seconds."""

    dial_s: float = 5.0
    """For connecting and for the first message: a healthy agent answers in milliseconds."""
    lost_min_s: float = 0.1
    lost_max_s: float = 5.0
    """Back-off while the agent cannot be reached; short, since a restarting agent is back in about a second."""
    denied_min_s: float = 1.0
    denied_max_s: float = 30.0
    """Back-off while the agent answers no: each try is an attestation and an error line in its log."""
    patience_min_s: float = 5.0
    """The least time a silent stream is left alone."""
    reserve_s: float = 5.0
    """Remaining life below which we stop being ready, so that traffic has moved away when the SVID ends."""


def socket_path(address: str) -> str:
    """Return the path in *address*, `unix:/path` or `unix:///path`. Raises WorkloadApiError (rejected)."""
    path = address.removeprefix("unix:")
    if path.startswith("//"):
        path = path.removeprefix("//")
    if not address.startswith("unix:") or not path.startswith("/"):
        raise WorkloadApiError(
            WorkloadReason.REJECTED, f"Workload API address {address!r}: allowed are unix:/path and unix:///path"
        )
    return path


@contextmanager
def agent_errors(path: str) -> Iterator[None]:
    """Raise as WorkloadApiError whatever a call to the agent at *path* raises."""
    try:
        yield
    except GRPCError as error:
        reason = _REASON_OF_STATUS.get(error.status, WorkloadReason.NO_AGENT)
        raise WorkloadApiError(reason, f"agent answered {error.status.name}: {error.message or ''}") from error
    except TimeoutError as error:
        raise WorkloadApiError(WorkloadReason.SILENT, "agent is silent") from error
    except (OSError, StreamTerminatedError, ProtocolError) as error:
        raise WorkloadApiError(WorkloadReason.NO_AGENT, f"{path}: {error}") from error


class WorkloadStream(ABC):
    """One stream of the Workload API, opened again whenever it ends, fails or falls silent."""

    METHOD: ClassVar[tuple[str, Any, Any]]
    """Name, request and response of the method."""

    def __init__(self, address: str, timing: Timing | None) -> None:
        self._path = socket_path(address)
        self._timing = timing or Timing()
        self._lost = _Backoff(self._timing.lost_min_s, self._timing.lost_max_s)
        self._denied = _Backoff(self._timing.denied_min_s, self._timing.denied_max_s)

    async def run(self) -> None:
        """Follow until cancelled. Belongs into the process's TaskGroup."""
        while True:
            # Each stream in a task of its own: grpclib reports a lost stream by cancelling whoever waits on it,
            # and a cancellation of ours in the same moment would be lost with it.
            async with asyncio.TaskGroup() as tasks:
                stream = tasks.create_task(self._follow_stream(), name="workload-api-stream")
            waits = self._denied if stream.result() in _ANSWERED_NO else self._lost
            await asyncio.sleep(waits.next_s())

    @abstractmethod
    def _accept(self, update: Any) -> None:
        """Take *update* over when all of it is good; else note the trouble and go on."""

    @abstractmethod
    def _note(self, trouble: WorkloadApiError) -> None:
        """Know why there is no stream, or none to be used."""

    @abstractmethod
    def _patience_s(self) -> float:
        """Return how long the stream may be silent."""

    def _be_content(self) -> None:
        """Begin the waits anew: the agent has said something good."""
        self._lost.reset()
        self._denied.reset()

    async def _follow_stream(self) -> WorkloadReason:
        """Take in what one stream brings until it ends. Returns why it ended."""
        channel = Channel(path=self._path)
        try:
            with agent_errors(self._path):
                await self._receive(channel)
        except WorkloadApiError as trouble:
            self._note(trouble)
            return trouble.reason
        finally:
            channel.close()

    async def _receive(self, channel: Channel) -> NoReturn:
        name, request, response = self.METHOD
        method = UnaryStreamMethod(channel, METHODS + name, request, response)
        async with method.open(metadata=METADATA) as stream:
            async with asyncio.timeout(self._timing.dial_s):
                await stream.send_message(request(), end=True)
                update = await stream.recv_message()
            while update is not None:
                self._accept(update)
                async with asyncio.timeout(self._patience_s()):
                    update = await stream.recv_message()
            async with asyncio.timeout(self._timing.dial_s):
                await stream.recv_trailing_metadata()  # raises the status that ended the stream, unless it is OK
        raise WorkloadApiError(WorkloadReason.NO_AGENT, "agent closed the stream")


class X509Source(WorkloadStream):
    """The current X.509-SVID and bundles. Mutated by `run` alone, on the loop that runs it."""

    METHOD = ("FetchX509SVID", messages.X509SVIDRequest, messages.X509SVIDResponse)

    def __init__(
        self,
        address: str,
        *,
        selection: Selection | None = None,
        timing: Timing | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(address, timing)
        self._selection = selection or Selection()
        self._now = now
        self._snapshot: X509Snapshot | None = None
        self._trouble: WorkloadApiError | None = None
        self._digest = b""  # of the update that gave the snapshot: agents repeat themselves
        self._subscribers: list[Subscriber] = []
        self._ready = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def current(self) -> X509Snapshot | None:
        """The snapshot to use now; None when there never was one, it was withdrawn, or its SVID has expired."""
        snapshot = self._snapshot
        return snapshot if snapshot is not None and self._now() <= snapshot.svid.not_after else None

    @property
    def state(self) -> WorkloadState:
        """The state at this moment, by our own clock."""
        if self._snapshot is None:
            return WorkloadState.STARTING if self._trouble is None else _STATE_WITHOUT_SVID[self._trouble.reason]
        remaining_s = self._remaining_s(self._snapshot)
        if remaining_s < 0:
            return WorkloadState.EXPIRED
        if remaining_s < self._timing.reserve_s:
            return WorkloadState.EXPIRING
        return WorkloadState.READY if self._trouble is None else WorkloadState.DEGRADED

    @property
    def detail(self) -> str:
        """One line about the state for whoever asks why."""
        about = (
            f"{self._snapshot.svid.spiffe_id} until {self._snapshot.svid.not_after:%FT%TZ}" if self._snapshot else ""
        )
        return "; ".join(part for part in (about, str(self._trouble or "")) if part)

    @property
    def is_ready(self) -> bool:
        """Whether traffic may be sent here."""
        return self.state in (WorkloadState.READY, WorkloadState.DEGRADED)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call *subscriber* now and at every change, on the loop: a snapshot to use, or None to stop at once.

        A CertsError from it refuses the update as malformed; anything else ends `run`.
        """
        self._subscribers.append(subscriber)
        subscriber(self.current)

    async def wait_ready(self) -> None:
        """Return once there is a snapshot. The caller sets the timeout."""
        await self._ready.wait()

    async def run(self) -> None:
        """Keep the snapshot current until cancelled. Belongs into the process's TaskGroup."""
        try:
            await super().run()
        finally:
            self._unwatch_expiry()

    def _patience_s(self) -> float:
        """Return how long the stream may be silent: agents renew at half life, so at two thirds something is wrong."""
        least_s = self._timing.patience_min_s
        if self._snapshot is None:
            return least_s
        svid, remaining_s = self._snapshot.svid, self._remaining_s(self._snapshot)
        life_s = (svid.not_after - svid.not_before).total_seconds()
        # Then ever sooner, but not at a steady rate: with a long life that would be hundreds of attestations.
        return max(least_s, remaining_s - life_s / 3, remaining_s / 4)

    def _accept(self, update: Any) -> None:
        """Take *update* (an X509SVIDResponse) over when all of it is good; else note the trouble and go on."""
        digest = hashlib.sha256(update.SerializeToString(deterministic=True)).digest()
        if digest != self._digest:
            try:
                svid = self._choose(update.svids)
                own = (svid.spiffe_id, svid.x509_svid, svid.x509_svid_key, svid.bundle)
                snapshot = X509Snapshot.parse(own, update.federated_bundles, now=self._now())
                self._publish(snapshot)
            except WorkloadApiError as error:
                self._note(error)
                return
            except CertsError as error:
                self._note(WorkloadApiError(WorkloadReason.MALFORMED, str(error)))
                return
            self._snapshot, self._digest = snapshot, digest
            self._ready.set()
            self._watch_expiry(snapshot)
        self._trouble = None
        self._be_content()

    def _choose(self, svids: Sequence[Any]) -> Any:
        """Return the X509SVID message that is ours. Raises WorkloadApiError."""
        wanted_id, hint = self._selection.spiffe_id, self._selection.hint
        found = [
            svid
            for svid in svids
            if (wanted_id is None or svid.spiffe_id == str(wanted_id)) and (hint is None or svid.hint == hint)
        ]
        offered = ", ".join(f"{svid.spiffe_id} (hint {svid.hint!r})" for svid in svids) or "nothing"
        if not found:
            raise WorkloadApiError(WorkloadReason.NO_IDENTITY, f"agent offers {offered}: none is the configured one")
        if len({svid.spiffe_id for svid in found}) > 1:
            raise WorkloadApiError(WorkloadReason.AMBIGUOUS, f"agent offers {offered}: configure which ID is ours")
        return found[0]  # several with one ID are the same identity; the agent's first is its default

    def _note(self, trouble: WorkloadApiError) -> None:
        """Remember *trouble*; a withdrawn identity is given up at once, anything else leaves the last good snapshot."""
        self._trouble = trouble
        if trouble.reason is WorkloadReason.NO_IDENTITY and self._snapshot is not None:
            self._snapshot, self._digest = None, b""
            self._ready.clear()
            self._unwatch_expiry()
            self._publish(None)

    def _unwatch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    def _watch_expiry(self, snapshot: X509Snapshot) -> None:
        """Tell subscribers when the SVID of *snapshot* ends, unless it is replaced or withdrawn first."""
        self._unwatch_expiry()
        remaining_s = self._remaining_s(snapshot)
        if remaining_s < 0:
            self._ready.clear()
            self._publish(None)
        else:
            # The wall clock may step: look again at least every minute.
            self._expiry = asyncio.get_running_loop().call_later(
                min(remaining_s + 0.001, 60), self._watch_expiry, snapshot
            )

    def _publish(self, snapshot: X509Snapshot | None) -> None:
        for subscriber in self._subscribers:
            subscriber(snapshot)

    def _remaining_s(self, snapshot: X509Snapshot) -> float:
        return (snapshot.svid.not_after - self._now()).total_seconds()


class _Backoff:
    """Doubling waits with jitter, so that a node's workloads do not all dial a restarted agent at once."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s = self._wait_s = least_s
        self._most_s = most_s

    def next_s(self) -> float:
        wait_s, self._wait_s = self._wait_s, min(self._wait_s * 2, self._most_s)
        return wait_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is no secret

    def reset(self) -> None:
        self._wait_s = self._least_s
