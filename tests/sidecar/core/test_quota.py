"""sidecar.core.quota: neither buckets nor windows ever grant more than their rule, whatever the clock does."""

from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.core.quota import SLOTS, Bucket, Window

TIMES = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=60)
SLOT_S = st.sampled_from([1.0, 60.0, 1440.0])


@given(st.integers(1, 50), st.floats(1e-6, 1e4), st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 9))))
def test_bucket_grants_at_most_burst_plus_rate_times_time(
    burst: int, rate: float, calls: list[tuple[float, int]]
) -> None:
    """Steps of the clock, back or far ahead, give nothing that the time they pass over would not have given."""
    bucket, units = Bucket(burst, calls[0][0] if calls else 0.0), 0
    for now_s, cost in calls:
        if bucket.wait_s(cost, rate, burst, now_s) == 0:
            bucket.tokens -= cost
            units += cost
    first = Fraction(calls[0][0]) if calls else Fraction(0)
    passed = Fraction(max([now_s for now_s, _ in calls], default=0.0)) - first

    assert units <= burst + float(max(passed, Fraction(0)) * Fraction(rate)) + 1e-6 * (1 + len(calls))


@given(st.integers(1, 50), st.floats(1e-3, 1e4), st.integers(1, 50), st.floats(0, 1e6))
def test_who_waits_at_a_bucket_as_told_gets_in(burst: int, rate: float, cost: int, now_s: float) -> None:
    """Alone, at any moment after it was emptied."""
    cost = min(cost, burst)
    bucket = Bucket(0.0, 0.0)
    wait_s = bucket.wait_s(cost, rate, burst, now_s)

    assert bucket.wait_s(cost, rate, burst, now_s + wait_s * (1 + 1e-9) + 1e-6) == 0


@given(
    st.integers(1, 30),
    SLOT_S,
    st.lists(st.tuples(st.floats(-100, 200_000), st.integers(1, 9)), max_size=80),
)
@example(1, 1.0, [(2.0, 2), (0.0, 1), (61.0, 1)])  # steps back after a call that was refused
def test_window_holds_at_most_its_amount_in_any_period(
    amount: int, slot_s: float, calls: list[tuple[float, int]]
) -> None:
    """Whichever stretch of the period's length is looked at; a clock that stepped back counts as not moving."""
    window, granted, latest_s = Window(), [], float("-inf")
    for now_s, cost in calls:
        latest_s = max(latest_s, now_s)
        if window.wait_s(cost, amount, slot_s, now_s) == 0:
            window.take(cost)
            granted.append((latest_s, cost))
    for start_s, _ in granted:
        inside = [cost for at_s, cost in granted if start_s <= at_s < start_s + SLOTS * slot_s]

        assert sum(inside) <= amount
    assert window.used == sum(window.units)
    assert len(window.units) == len(window.numbers) <= SLOTS + 1


@given(st.integers(1, 30), SLOT_S, TIMES, st.integers(1, 30))
def test_who_waits_at_a_window_as_told_gets_in(amount: int, slot_s: float, times: list[float], cost: int) -> None:
    """Alone; and never later than a slot after the period has passed."""
    window, now_s = Window(), max(times)
    for at_s in sorted(times):
        if window.wait_s(1, amount, slot_s, at_s) == 0:
            window.take(1)
    cost = min(cost, amount)
    wait_s = window.wait_s(cost, amount, slot_s, now_s)

    assert 0 <= wait_s <= (SLOTS + 1) * slot_s
    assert window.wait_s(cost, amount, slot_s, now_s + wait_s + 1e-6) == 0


@given(st.lists(st.tuples(st.floats(0, 200), st.integers(1, 5)), max_size=40))
def test_what_is_given_back_is_as_if_never_taken(calls: list[tuple[float, int]]) -> None:
    """In whichever slot it was."""
    window, taken = Window(), []
    for now_s, cost in calls:
        window.wait_s(cost, 1000, 1.0, now_s)
        taken.append((cost, window.take(cost)))
    for cost, slot in taken:
        window.give_back(cost, slot)

    assert (window.used, set(window.units)) == (0, {0} if window.units else set())


def test_what_is_given_back_too_late_changes_nothing() -> None:
    """Its slot is over."""
    window = Window()
    window.wait_s(1, 10, 1.0, 0.0)
    slot = window.take(1)
    window.wait_s(1, 10, 1.0, 1000.0)
    window.take(1)
    window.give_back(1, slot)

    assert window.used == 1


def test_units_come_free_at_most_a_slot_late() -> None:
    """The stated resolution: a sixtieth of the period."""
    window = Window()
    window.wait_s(1, 1, 1.0, 0.0)
    window.take(1)

    assert [window.wait_s(1, 1, 1.0, now_s) for now_s in (60.0, 61.0)] == [1.0, 0.0]


def test_more_than_a_window_ever_holds_waits_longest() -> None:
    """No moment would do; the control plane refuses such limits."""
    assert Window().wait_s(3, 2, 1.0, 0.0) == SLOTS + 1
