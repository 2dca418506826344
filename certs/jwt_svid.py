"""Fetch JWT-SVIDs for an audience, and keep each until half its life is over.

A JWT-SVID is our client assertion at a token endpoint. It is a bearer token: it is never printed and never logged.
Refuses tokens for another ID or audience than asked for, and those about to expire; a kept one outlasts a lost agent.
Its signature is not checked here: it came from our agent, and whoever receives it checks it.
Source: JWT-SVID sections 3 and 4; SPIFFE Workload API section 6.
"""

import asyncio
import base64
import binascii
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from grpclib.client import Channel, UnaryUnaryMethod

from certs.errors import WorkloadApiError, WorkloadReason
from certs.messages import METADATA, METHODS, messages
from certs.spiffe import SpiffeId
from certs.workload import agent_errors, socket_path

__all__ = ["JwtSvid", "JwtSvidSource"]

DEADLINE_S = 4.0  # an agent answers in 2 to 20 ms; its server may be across a network
MAX_KEPT = 64  # audiences; a few token endpoints are usual
RESERVE = timedelta(seconds=10)  # a token must still be valid when it arrives


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtSvid:
    """A JWT-SVID of ours."""

    spiffe_id: SpiffeId
    audience: str
    token: str = field(repr=False)
    issued_at: datetime
    expires_at: datetime

    @classmethod
    def parse(cls, token: str, spiffe_id: SpiffeId, audience: str, *, now: datetime) -> Self:
        """Return the token with its times. Raises WorkloadApiError (malformed) unless it is what was asked for."""
        claims = _claims(token)
        # RFC 7519, section 4.1.3: one audience may stand without a list around it.
        if claims.get("sub") != str(spiffe_id) or claims.get("aud") not in (audience, [audience]):
            raise WorkloadApiError(WorkloadReason.MALFORMED, "JWT-SVID: not for the ID and audience asked for")
        expires, issued = claims.get("exp"), claims.get("iat")
        if type(expires) is not int:
            raise WorkloadApiError(WorkloadReason.MALFORMED, "JWT-SVID: exp must be a whole number")
        return cls(
            spiffe_id=spiffe_id,
            audience=audience,
            token=token,
            issued_at=datetime.fromtimestamp(issued, UTC) if type(issued) is int else now,
            expires_at=datetime.fromtimestamp(expires, UTC),
        )

    def is_fresh(self, now: datetime) -> bool:
        """Say whether less than half the life is over."""
        return now < self.issued_at + (self.expires_at - self.issued_at) / 2 and self.is_usable(now)

    def is_usable(self, now: datetime) -> bool:
        """Say whether the token will still be valid when it arrives."""
        return now < self.expires_at - RESERVE


class _Slot:
    """The token of one audience; its lock makes concurrent callers wait for one fetch."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.held: JwtSvid | None = None


class JwtSvidSource:
    """JWT-SVIDs by audience. Mutated by `fetch` alone."""

    def __init__(self, address: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = socket_path(address)
        self._now = now
        self._slots: OrderedDict[tuple[SpiffeId, str], _Slot] = OrderedDict()

    async def fetch(self, spiffe_id: SpiffeId, audience: str) -> JwtSvid:
        """Return a JWT-SVID of *spiffe_id* for *audience*, kept or new.

        Raises WorkloadApiError when there is neither; the caller must then send nothing.
        """
        slot = self._slots.setdefault((spiffe_id, audience), _Slot())
        self._slots.move_to_end((spiffe_id, audience))
        while len(self._slots) > MAX_KEPT:
            self._slots.popitem(last=False)
        async with slot.lock:
            if slot.held is None or not slot.held.is_fresh(self._now()):
                try:
                    slot.held = await self._ask(spiffe_id, audience)
                except WorkloadApiError as error:
                    # A withdrawn identity ends at once; any other trouble may be over before the kept token is.
                    if error.reason is WorkloadReason.NO_IDENTITY:
                        slot.held = None
                    if slot.held is None or not slot.held.is_usable(self._now()):
                        raise
            return slot.held

    async def _ask(self, spiffe_id: SpiffeId, audience: str) -> JwtSvid:
        # In a task of its own, as in certs.workload: grpclib cancels whoever waits on a lost connection.
        async with asyncio.TaskGroup() as tasks:
            answer = tasks.create_task(self._call(spiffe_id, audience), name="fetch-jwt-svid")
        response = answer.result()
        if isinstance(response, WorkloadApiError):
            raise response
        if len(response.svids) != 1:
            raise WorkloadApiError(WorkloadReason.MALFORMED, f"{len(response.svids)} JWT-SVIDs where one was asked for")
        return JwtSvid.parse(response.svids[0].svid, spiffe_id, audience, now=self._now())

    async def _call(self, spiffe_id: SpiffeId, audience: str) -> Any:
        """Return the JWTSVIDResponse, or the WorkloadApiError: raised here, it would come out wrapped in a group."""
        channel = Channel(path=self._path)
        method = UnaryUnaryMethod(channel, f"{METHODS}FetchJWTSVID", messages.JWTSVIDRequest, messages.JWTSVIDResponse)
        request = messages.JWTSVIDRequest(audience=[audience], spiffe_id=str(spiffe_id))
        try:
            with agent_errors(self._path):
                async with asyncio.timeout(DEADLINE_S):
                    return await method(request, metadata=METADATA)
        except WorkloadApiError as error:
            return error
        finally:
            channel.close()


def _claims(token: str) -> dict[str, Any]:
    """Return the payload of *token*, unverified. Raises WorkloadApiError (malformed), without quoting the token."""
    try:
        _, payload, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, binascii.Error):
        claims = None
    if not isinstance(claims, dict):
        raise WorkloadApiError(WorkloadReason.MALFORMED, "JWT-SVID: not a JWT")
    return claims
