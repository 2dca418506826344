"""Who leads, by what client-go's algorithm says."""

from datetime import UTC, datetime
from typing import Any

from webhook.core.lease import DURATION_S, Observed, claim, observe, release

NOON = datetime(2026, 11, 22, 12, 0, 0, 5, tzinfo=UTC)


def a_lease(holder: str, version: str = "7", **spec: Any) -> Any:
    """Return a Lease of *holder*."""
    return {"metadata": {"resourceVersion": version}, "spec": {"holderIdentity": holder, **spec}}


def test_nobody_leads_yet() -> None:
    """Who comes first makes the Lease."""
    assert claim(None, None, "a", 0.0, NOON) == {
        "holderIdentity": "a",
        "leaseDurationSeconds": DURATION_S,
        "acquireTime": "2026-11-22T12:00:00.000005Z",
        "renewTime": "2026-11-22T12:00:00.000005Z",
        "leaseTransitions": 0,
    }


def test_a_holder_that_renews_is_left_alone() -> None:
    """Whatever the times in the Lease say: clocks of two machines are not compared."""
    lease = a_lease("b", renewTime="1999-01-01T00:00:00.000000Z", leaseDurationSeconds=15)

    assert claim(lease, Observed("7", 100.0), "a", 114.9, NOON) is None


def test_a_holder_that_is_silent_is_replaced() -> None:
    """After its own duration, measured by the candidate."""
    lease = a_lease("b", leaseDurationSeconds=15, leaseTransitions=4, acquireTime="x")
    spec = claim(lease, Observed("7", 100.0), "a", 115.0, NOON)

    assert spec is not None
    assert (spec["holderIdentity"], spec["leaseTransitions"], spec["acquireTime"]) == ("a", 5, spec["renewTime"])


def test_a_renewal_keeps_when_it_was_acquired() -> None:
    """Only renewTime moves."""
    spec = claim(a_lease("a", acquireTime="then", leaseTransitions=2), Observed("7", 0.0), "a", 5.0, NOON)

    assert spec is not None
    assert (spec["acquireTime"], spec["leaseTransitions"]) == ("then", 2)


def test_a_released_lease_is_free_at_once() -> None:
    """A replica that stops costs nobody fifteen seconds."""
    held = a_lease("b", leaseDurationSeconds=15)
    freed = release(held, "b", NOON)

    assert freed is not None
    assert freed["holderIdentity"] == ""
    assert claim({"metadata": {}, "spec": freed}, Observed("8", 100.0), "a", 100.0, NOON) is not None
    assert release(held, "a", NOON) is None


def test_silence_is_counted_from_the_last_change() -> None:
    """Seen again unchanged, a Lease gets no younger; changed, it is new."""
    first = observe(a_lease("b"), None, 10.0)

    assert observe(a_lease("b"), first, 20.0) == first == Observed("7", 10.0)
    assert observe(a_lease("b", "8"), first, 20.0) == Observed("8", 20.0)
