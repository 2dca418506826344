"""Keeps what 2024-11-05 tears apart: a request is posted to one place and answered on a stream that was opened before.

An exchange lasts until its answer has passed on the stream, so that its record has both halves; what the sidecar itself
answers to a POST goes by the stream as well, because a 4xx makes these clients hang. Refuses a request whose id another
one waits under, and more requests than can be kept. MCP 2024-11-05, transports.
"""

from collections.abc import Callable, Sequence
from typing import Final

from sidecar.core.identity import Principal
from sidecar.core.message import RequestId, Shape
from sidecar.core.sse import message
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange

MAX_WAITING: Final = 1024  # posted requests of one client whose answers have not come
RETRY_S: Final = 1


class Stream:
    """One stream under way, and what waits for an answer on it. Mutated by Serving only."""

    def __init__(self, endpoint: str, owner: Principal, say: Callable[[bytes], None]) -> None:
        """*endpoint* is path and query where its *owner* posts; *say* sends bytes on the stream."""
        self.endpoint = endpoint
        self.owner = owner.key
        self._say = say
        self._waiting: dict[RequestId, Exchange] = {}
        self._posted: set[RequestId] = set()  # of those: the POST itself is over

    @property
    def is_awaited(self) -> bool:
        """Say whether an answer is still to come."""
        return bool(self._waiting)

    def say(self, body: bytes) -> None:
        """Send a message of our own to the client."""
        self._say(message(body))

    def expect(self, exchange: Exchange) -> None:
        """Wait for the answer to what is being posted; raises Refusal(MALFORMED or THROTTLED)."""
        asked = exchange.message
        if asked is None or asked.shape is not Shape.REQUEST or asked.id is None:
            return
        if asked.id in self._waiting:
            raise Refusal(Reason.MALFORMED, "a request with this id is under way")
        if len(self._waiting) >= MAX_WAITING:
            raise Refusal(
                Reason.THROTTLED, "too many requests are under way", detail=f"{MAX_WAITING}", retry_after_s=RETRY_S
            )
        self._waiting[asked.id] = exchange

    def settle(self, exchange: Exchange) -> bool:
        """Know that the POST is over; say whether its exchange is, too."""
        request_id = exchange.request_id
        if request_id is None or self._waiting.get(request_id) is not exchange:
            return True
        if exchange.status < 300 and exchange.refusal is None and exchange.aborted is None:
            self._posted.add(request_id)
            return False
        del self._waiting[request_id]
        return True

    def answered(self, request_id: RequestId) -> tuple[Exchange | None, bool]:
        """Return the exchange that a response answers, and whether it is over with that; None: nobody waits for it."""
        exchange = self._waiting.pop(request_id, None)
        is_over = request_id in self._posted
        self._posted.discard(request_id)
        return exchange, is_over

    def end(self) -> Sequence[Exchange]:
        """Return the exchanges that are over because no answer can come any more."""
        left = [self._waiting[each] for each in self._posted]
        self._waiting.clear()
        self._posted.clear()
        return left
