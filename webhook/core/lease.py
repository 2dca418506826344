"""Decide who leads among replicas, by one Lease object: the algorithm of client-go's leaderelection.

A candidate measures on its own clock how long the Lease has not changed; clocks of different machines are never
compared. Writes carry the version that was read, so of two that try at once one wins.
Source: k8s.io/client-go/tools/leaderelection; API coordination.k8s.io/v1.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from webhook.core.pod import JSON

DURATION_S: Final = 15  # these three are client-go's: how long others wait for a holder that says nothing,
RENEW_DEADLINE_S: Final = 10.0  # when a holder that cannot renew stops to lead,
RETRY_S: Final = 2.0  # and how often each tries


@dataclass(frozen=True, slots=True)
class Observed:
    """A version of the Lease, and when this candidate first saw it (monotonic seconds)."""

    version: str
    since_s: float


def observe(lease: JSON, before: Observed | None, now_s: float) -> Observed:
    """Return since when the Lease is as it is."""
    version = str(lease["metadata"].get("resourceVersion"))
    return before if before is not None and before.version == version else Observed(version, now_s)


def claim(lease: JSON | None, observed: Observed | None, identity: str, now_s: float, now: datetime) -> JSON | None:
    """Return the spec by which *identity* leads from now on, or goes on leading; None while another one does."""
    spec = (lease or {}).get("spec") or {}
    holder = spec.get("holderIdentity") or ""
    is_ours = holder == identity
    duration_s = float(spec.get("leaseDurationSeconds") or DURATION_S)
    if holder and not is_ours and observed is not None and now_s < observed.since_s + duration_s:
        return None
    moment = micro_time(now)
    return {
        "holderIdentity": identity,
        "leaseDurationSeconds": DURATION_S,
        "acquireTime": spec.get("acquireTime", moment) if is_ours else moment,
        "renewTime": moment,
        "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if is_ours or lease is None else 1),
    }


def release(lease: JSON, identity: str, now: datetime) -> JSON | None:
    """Return the spec by which *identity* lets others lead at once; None when it does not lead."""
    spec = lease.get("spec") or {}
    if spec.get("holderIdentity") != identity:
        return None
    moment = micro_time(now)
    return spec | {"holderIdentity": "", "leaseDurationSeconds": 1, "acquireTime": moment, "renewTime": moment}


def micro_time(moment: datetime) -> str:
    """Return *moment* as the API's MicroTime."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
