"""sidecar.core.tally: what the store is asked, and how its numbers are read; the scripts run in tests/wire."""

from itertools import count

import pytest

from sidecar.core.limits import Charge, Ledger, Reservation, admit
from sidecar.core.profile import Limit, Quota, Weight
from sidecar.core.tally import LEASE_MS, claim, ended, read_answer, renewed, returned
from tests.builders import a_permit, a_principal

QUOTAS = (Quota(amount=100, period="minute"), Quota(amount=1000, period="day", warn_at_percent=(50,)))


def charges_of(*limits: Limit, user: str = "alice") -> tuple[Charge, ...]:
    """Return what the store is asked of a call."""
    reservation = admit(a_permit(principal=a_principal(user)), limits, Ledger(), 0.0)
    assert isinstance(reservation, Reservation)
    return reservation.shared


def a_limit(**changes: object) -> Limit:
    """Return a limit of all replicas."""
    return Limit(**{"name": "calls", "scope": "global", "rate_per_s": 0.5, "burst": 10, **changes})  # type: ignore[arg-type]


ALL = a_limit(quotas=QUOTAS, concurrent=3, weight=Weight(default=2))
LEASES = [f"r:{number}" for number in range(3)]


def test_a_claim_names_every_part_of_every_limit() -> None:
    """In the order in which the script reads them."""
    asked = claim(charges_of(ALL, a_limit(name="other", mode="shadow")), "pay", iter(LEASES))

    assert [key.rpartition(":")[2] for key in asked.keys] == ["bucket", "minute", "day", "under-way", "bucket"]
    assert asked.arguments == (
        "5",
        *("b", "10", "0.5", "2", "", "0"),
        *("w", "100", "1000", "2", "", "0"),
        *("w", "1000", "1440000", "2", "", "0"),
        *("c", "3", LEASE_MS, "1", "r:0", "0"),
        *("b", "10", "0.5", "1", "", "2"),
    )


def test_keys_of_a_namespace_live_on_one_node_and_name_nobody() -> None:
    """A hash tag for the cluster; callers by a hash, so that who reads the store learns no identities."""
    alice, bob = (claim(charges_of(ALL, user=user), "pay", iter(LEASES)).keys for user in ("alice", "bob"))

    assert {key.partition("}")[0] for key in alice + bob} == {"{sidegate/pay"}
    assert not set(alice) & set(bob)
    assert "alice" not in " ".join(alice)


def test_the_longest_wait_of_a_limit_is_its_wait() -> None:
    """And the least that is left is what is left, calls under way apart."""
    asked = claim(charges_of(ALL), "pay", iter(LEASES))
    (fits,) = read_answer(asked, [0, 8, 0, 0, 98, 7, 0, 500, 3, 0, 2, 0])
    (waits,) = read_answer(asked, [1500, -1, 0, 9000, -2, 0, 0, 900, 0, 0, 2, 0])

    assert (fits.wait_s, fits.remaining, fits.marks, fits.warned) == (0.0, 8, (0, 7, 3, 0), 50)
    assert (waits.wait_s, waits.marks, waits.warned) == (9.0, (), 0)


def test_where_one_limit_refuses_nothing_was_taken_for_the_others() -> None:
    """A limit in shadow mode refuses nothing."""
    asked = claim(charges_of(a_limit(), a_limit(name="other")), "pay", iter(LEASES))
    shadowed = claim(charges_of(a_limit(), a_limit(name="other", mode="shadow")), "pay", iter(LEASES))
    numbers = [0, 5, 1, 2000, -1, 0]

    assert [each.marks for each in read_answer(asked, numbers)] == [(), ()]
    assert [each.marks for each in read_answer(shadowed, numbers)] == [(1,), ()]


def test_what_was_taken_is_given_back_part_by_part() -> None:
    """To the slot in which it was; nothing where nothing was taken."""
    (charge,) = charges_of(ALL)
    claim((charge,), "pay", iter(LEASES))

    assert [each.arguments for each in returned(charge, (0, 7, 3, 0), "pay")] == [
        ("b", "2", "0", "r:0"),
        ("w", "2", "7", "r:0"),
        ("w", "2", "3", "r:0"),
        ("c", "2", "0", "r:0"),
    ]
    assert list(returned(charge, (), "pay")) == []


@pytest.mark.parametrize(("make", "verb"), [(ended, "c"), (renewed, "r")])
def test_a_lease_is_ended_or_renewed_where_it_is_held(make: object, verb: str) -> None:
    """By its own key."""
    (charge,) = charges_of(ALL)
    asked = claim((charge,), "pay", (f"r:{number}" for number in count(4)))
    charge.marks = (0, 7, 3, 0)
    (change,) = make((charge,), "pay")  # type: ignore[operator]
    charge.marks = ()

    assert (change.key, change.arguments) == (asked.keys[3], (verb, LEASE_MS, "0", "r:4"))
    assert list(make((charge,), "pay")) == []  # type: ignore[operator]
