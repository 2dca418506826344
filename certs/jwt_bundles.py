"""Keep the keys that check JWT-SVIDs current: the second stream of the Workload API.

Keys are believed for `max_age_s` after an agent last confirmed them: a healthy stream is silent for hours, so it is
opened anew three times in that span. Afterwards, and at once when our own identity is withdrawn, there are none, and
every token is refused.
Source: SPIFFE Workload API section 6.2; JWT-SVID section 6.
"""

import asyncio
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from certs.errors import WorkloadApiError, WorkloadReason
from certs.jwt_verify import JwtBundles
from certs.messages import messages
from certs.workload import Timing, WorkloadStream

__all__ = ["JwtBundleSource"]

Subscriber = Callable[[JwtBundles | None], None]
CONFIRMATIONS = 3  # in `max_age_s`: two may be missed


class JwtBundleSource(WorkloadStream):
    """The current keys. Mutated by `run` alone, on the loop that runs it."""

    METHOD = ("FetchJWTBundles", messages.JWTBundlesRequest, messages.JWTBundlesResponse)

    def __init__(
        self,
        address: str,
        *,
        max_age_s: float,
        timing: Timing | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(address, timing)
        self._max_age_s = max_age_s
        self._now = now
        self._bundles: JwtBundles | None = None
        self._digest = b""
        self._confirmed_at = datetime.min.replace(tzinfo=UTC)
        self._subscribers: list[Subscriber] = []
        self._staleness: asyncio.TimerHandle | None = None
        self.detail = "no keys for JWT-SVIDs yet"

    @property
    def current(self) -> JwtBundles | None:
        """The keys to use now; None when there are none, or none that were confirmed lately."""
        return self._bundles if self._now() < self._confirmed_at + timedelta(seconds=self._max_age_s) else None

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call *subscriber* now and at every change, on the loop: keys to use, or None to refuse every token."""
        self._subscribers.append(subscriber)
        subscriber(self.current)

    async def run(self) -> None:
        """Keep the keys current until cancelled. Belongs into the process's TaskGroup."""
        try:
            await super().run()
        finally:
            self._unwatch()

    def _patience_s(self) -> float:
        return self._max_age_s / CONFIRMATIONS

    def _accept(self, update: Any) -> None:
        was_stale = self.current is None
        self._confirmed_at, self.detail = self._now(), ""
        self._be_content()
        digest = hashlib.sha256(update.SerializeToString(deterministic=True)).digest()
        if digest != self._digest:
            self._bundles, self._digest = JwtBundles.parse(update.bundles), digest
            was_stale = True
        if self._bundles is not None and self._bundles.rejected_domains:
            self.detail = f"unreadable keys of {', '.join(sorted(self._bundles.rejected_domains))}"
        if was_stale:
            self._publish()
        self._watch()

    def _note(self, trouble: WorkloadApiError) -> None:
        if trouble.reason is WorkloadReason.SILENT and self.current is not None:
            return  # silence is usual here; only that nobody answers to a new stream makes keys old
        self.detail = str(trouble)
        if trouble.reason is WorkloadReason.NO_IDENTITY and self._bundles is not None:
            self._bundles, self._digest = None, b""
            self._unwatch()
            self._publish()

    def _watch(self) -> None:
        """Tell subscribers when the keys are too old."""
        self._unwatch()
        left_s = (self._confirmed_at - self._now()).total_seconds() + self._max_age_s
        if left_s <= 0:
            self._publish()
        else:
            # The wall clock may step: look again at least every minute.
            self._staleness = asyncio.get_running_loop().call_later(min(left_s + 0.001, 60), self._watch)

    def _unwatch(self) -> None:
        if self._staleness is not None:
            self._staleness.cancel()

    def _publish(self) -> None:
        for subscriber in self._subscribers:
            subscriber(self.current)
