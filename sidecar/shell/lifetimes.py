"""Ends connections and streams with the identity, the trust or the policy that let them in.

Looks at every connection once a second, and at once when our SVID or the bundles change; cheaper than a timer for each.
A stream that is still allowed is not touched by a new policy bundle: what it brings is judged by the new one anyway.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from certs.errors import UntrustedChain
from certs.svid import X509Snapshot
from certs.verify import Peer, TrustBundles, Usage, verify_peer
from sidecar.core.authorise import authorise
from sidecar.core.lifetime import Stage, is_stream, stage, why_ended
from sidecar.errors import Refusal
from sidecar.exchange import Exchange
from sidecar.pipeline import Snapshot
from sidecar.shell.inbound import Inbound
from sidecar.shell.serving import Serving

log = logging.getLogger(__name__)

REVIEW_S: Final = 1.0


class Lifetimes:
    """`run` in the root TaskGroup; `follow` belongs into X509Source.subscribe."""

    def __init__(
        self, serving: Serving, *, max_age_s: float, grace_s: float, now: Callable[[], float] = time.time
    ) -> None:
        self._serving = serving
        self._max_age_s = max_age_s
        self._grace_s = grace_s
        self._now = now
        self._bundles: TrustBundles | None = None
        self._snapshot: Snapshot | None = None

    async def run(self) -> None:
        """Review for ever."""
        while True:
            await asyncio.sleep(REVIEW_S)
            self.review()

    def follow(self, held: X509Snapshot | None) -> None:
        """Drain everything when our own identity has ended, and the peers that the bundles vouch for no longer."""
        before, self._bundles = self._bundles, None if held is None else held.bundles
        for connection, peer in self._with_peer():
            if held is None:
                self._end(connection, "the server's identity has ended")
            elif before is not None and not self._is_vouched_for(peer, before, held.bundles):
                self._end(connection, "the caller's trust domain vouches for it no longer")

    def review(self) -> None:
        """Look at every connection and at every stream."""
        now_s = self._now()
        snapshot, is_new = self._serving.snapshot, self._serving.snapshot is not self._snapshot
        self._snapshot = snapshot
        for connection, peer in self._with_peer():
            ends_s = peer.not_after.timestamp()
            match stage(connection.opened_s, ends_s, now_s, max_age_s=self._max_age_s, grace_s=self._grace_s):
                case Stage.DUE:
                    connection.retire()
                case Stage.OVER:
                    self._end(connection, "the caller's SVID has ended")
                case Stage.CUT:
                    connection.abort()
        for connection in tuple(self._serving.connections):
            for exchange in connection.streams:
                why = self._why_ended(exchange, snapshot, now_s, is_new=is_new)
                if why is not None:
                    connection.end_streams(why)
                    break

    def _why_ended(self, exchange: Exchange, snapshot: Snapshot | None, now_s: float, *, is_new: bool) -> str | None:
        principal, permit = exchange.principal, exchange.permit
        if snapshot is None or principal is None or permit is None or not is_stream(permit.question.message):
            return None
        why = why_ended(principal, snapshot.profile.identity, snapshot.trust.callers, now_s)
        if why is None and is_new:
            try:
                authorise(permit.question, snapshot.engines, snapshot.revision)
            except Refusal as refusal:
                return refusal.public
        return why

    def _is_vouched_for(self, peer: Peer, before: TrustBundles, bundles: TrustBundles) -> bool:
        domain = peer.spiffe_id.trust_domain
        if set(before.anchors(domain)) <= set(bundles.anchors(domain)):
            return True  # an anchor more takes nothing away, and that is what a rotation looks like
        try:
            verify_peer(
                peer.chain_der,
                bundles,
                now=datetime.fromtimestamp(self._now(), UTC),
                usage=Usage.CLIENT,
                strict_eku=False,
            )
        except UntrustedChain as error:
            log.info("connection ends", extra={"peer": str(peer.spiffe_id), "reason": error.reason})
            return False
        return True

    def _with_peer(self) -> list[tuple[Inbound, Peer]]:
        return [(each, each.peer) for each in self._serving.connections if each.peer is not None]

    def _end(self, connection: Inbound, why: str) -> None:
        """Close now, or after the call under way."""
        connection.retire()
        connection.end_streams(why)
        connection.drain()
