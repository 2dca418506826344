"""Decides how long a connection, and a stream on it, may outlive the proofs that opened it. Pure.

A certificate is judged once, in the handshake; without this, a connection kept alive would keep its peer's identity for
ever. First comes a friendly phase, in which the next answer says `Connection: close`, so that no call is lost: the
client opens another with its present SVID. X509-SVID, section 5; found in practice 148 s after the client's SVID ended.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from certs.spiffe import SpiffePattern
from sidecar.core.identity import Principal
from sidecar.core.message import Message, Shape, Subscription
from sidecar.core.profile import Identity

RESERVE_S: Final = 30.0  # before the end: a client that calls twice a minute is told in time
RESERVE_SHARE: Final = 4  # of a short life, a quarter


class Stage(IntEnum):
    """How far a connection's life has gone."""

    OPEN = 0
    DUE = 1  # the next answer is its last
    OVER = 2  # no new call; what is under way may end
    CUT = 3  # nothing may go on


def stage(opened_s: float, ends_s: float, now_s: float, *, max_age_s: float, grace_s: float) -> Stage:
    """Return the stage of a connection opened at *opened_s*, whose peer's SVID ends at *ends_s* (Unix time)."""
    if now_s >= ends_s + grace_s:
        return Stage.CUT
    if now_s >= ends_s:
        return Stage.OVER
    due_s = ends_s - min(RESERVE_S, (ends_s - opened_s) / RESERVE_SHARE)
    return Stage.DUE if now_s >= min(due_s, opened_s + max_age_s) else Stage.OPEN


def is_stream(message: Message) -> bool:
    """Say whether *message* opened something that has no end of its own; a call ends with its answer."""
    return message.shape is Shape.OPEN_STREAM or isinstance(message.target, Subscription)


def why_ended(principal: Principal, identity: Identity, callers: Sequence[SpiffePattern], now_s: float) -> str | None:
    """Return why a stream that *principal* opened may not go on under the profile of now; None when it may."""
    if now_s >= principal.expires_at_s:
        return "the identity that opened it has ended"
    workload, user = principal.workload, principal.user
    if workload is None:
        if identity.mtls == "strict":
            return "an SVID is now required"
    elif not any(pattern.matches(workload) for pattern in callers):
        return "this workload may no longer call"
    if user is None:
        return "a user is now required" if identity.user == "required" else None
    vouching = {(each.name, each.issuer) for each in identity.providers}
    return None if (user.provider, user.issuer) in vouching else "the user's provider is trusted no longer"
