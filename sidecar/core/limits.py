"""Decides whether a permitted message is within its limits: token buckets, each for one combination of who and what.

Only this module makes an Admission (tests/architecture), and it needs a Permit: what was refused by policy never
drains a bucket. Law: in any t seconds a bucket grants at most burst + rate * t, whatever the clock does, as long as no
more than MAX_BUCKETS others were used since it was.
"""

import math
from dataclasses import dataclass, field
from typing import Final

from sidecar.core.authorise import Permit
from sidecar.core.message import Tool
from sidecar.core.profile import Limit
from sidecar.errors import Reason, Refusal

MAX_BUCKETS: Final = 10_000  # about 2 MB; unused for longest goes first, as the likeliest to be full again


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Proof that a message was authorised and is within its limits; what `Upstream.send` demands."""

    permit: Permit
    limits: tuple[str, ...]


@dataclass(slots=True)
class Bucket:
    """Tokens left at a moment of the monotonic clock."""

    tokens: float
    at_s: float


@dataclass(slots=True)
class Buckets:
    """All buckets of one sidecar. Mutated by `admit` only."""

    held: dict[tuple[str, ...], Bucket] = field(default_factory=dict)


def admit(permit: Permit, limits: tuple[Limit, ...], buckets: Buckets, now_s: float) -> Admission:
    """Take one token from every limit that applies to *permit*, or none at all.

    *now_s* is monotonic seconds. Raises Refusal(THROTTLED) with retry_after_s rounded up, because a client that
    returns early is refused twice.
    """
    applying = [limit for limit in limits if _applies(limit, permit)]
    filled = [(limit, _filled(limit, permit, buckets, now_s)) for limit in applying]
    waits = [((1 - bucket.tokens) / limit.rate_per_s, limit.name) for limit, bucket in filled if bucket.tokens < 1]
    if waits:
        wait_s, slowest = max(waits)
        raise Refusal(
            Reason.THROTTLED, f"limit {slowest} is reached", detail=slowest, retry_after_s=max(1, math.ceil(wait_s))
        )
    for _, bucket in filled:
        bucket.tokens -= 1
    return Admission(permit=permit, limits=tuple([limit.name for limit in applying]))


def give_back(admission: Admission, limits: tuple[Limit, ...], buckets: Buckets, now_s: float) -> None:
    """Return the tokens of *admission* to their buckets: its message is not sent."""
    for limit in limits:
        if limit.name in admission.limits:
            bucket = _filled(limit, admission.permit, buckets, now_s)
            bucket.tokens = min(float(limit.burst), bucket.tokens + 1)


def _applies(limit: Limit, permit: Permit) -> bool:
    message = permit.question.message
    if message.method not in limit.methods:
        return False
    return not limit.tools or (isinstance(message.target, Tool) and message.target.name in limit.tools)


def _filled(limit: Limit, permit: Permit, buckets: Buckets, now_s: float) -> Bucket:
    """Return the limit's bucket for this permit, filled up to *now_s*."""
    key = (limit.name, *[_part(name, permit) for name in limit.per])
    bucket = buckets.held.pop(key, None)
    if bucket is None:
        bucket = Bucket(tokens=limit.burst, at_s=now_s)
        while len(buckets.held) >= MAX_BUCKETS:
            del buckets.held[next(iter(buckets.held))]
    elapsed_s = max(0.0, now_s - bucket.at_s)  # a clock that steps back grants nothing
    bucket.tokens = min(float(limit.burst), bucket.tokens + elapsed_s * limit.rate_per_s)
    bucket.at_s = max(bucket.at_s, now_s)
    buckets.held[key] = bucket
    return bucket


def _part(name: str, permit: Permit) -> str:
    question = permit.question
    match name:
        case "user":
            user = question.principal.user
            return "" if user is None else f"{user.issuer} {user.id}"
        case "workload":
            return str(question.principal.workload or "")
        case "session":
            return question.session_id or ""  # not the agent's label for it, which the caller makes up
        case _:
            return question.message.target.name if isinstance(question.message.target, Tool) else ""
