"""sidecar.core.limits: no bucket grants more than its rule, and a refusal says when to come back."""

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import limits as module
from sidecar.core.authorise import Permit
from sidecar.core.limits import Admission, Judgement, Ledger, Reservation, admit, crossed, give_back, release, settle
from sidecar.core.message import parse
from sidecar.core.profile import Limit, Quota, Weight
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_permit, a_principal, a_request


def a_limit(*, burst: int = 2, rate_per_s: float = 1.0, **changes: object) -> Limit:
    """Two at once, one a second."""
    return Limit(**{"name": "calls", "burst": burst, "rate_per_s": rate_per_s, **changes})  # type: ignore[arg-type]


def a_quota(amount: int = 2, **changes: object) -> Limit:
    """Two an hour, with a warning at the half."""
    quota = Quota(amount=amount, period="hour", warn_at_percent=(50,))
    return Limit(**{"name": "budget", "quotas": (quota,), **changes})  # type: ignore[arg-type]


def a_shared(**changes: object) -> Limit:
    """Eight at once over all replicas."""
    return Limit(**{"name": "calls", "burst": 8, "rate_per_s": 1e-6, "scope": "global", **changes})  # type: ignore[arg-type]


def admitted(permit: Permit, limits: tuple[Limit, ...], ledger: Ledger, now_s: float = 0.0) -> Admission:
    """Return the admission of *permit*, which needs no store."""
    admission = admit(permit, limits, ledger, now_s)
    assert isinstance(admission, Admission)
    return admission


def _names(admission: Admission) -> tuple[str, ...]:
    return tuple(each.name for each in admission.charges)


def reserved(ledger: Ledger, *limits: Limit) -> Reservation:
    """Return the reservation of a call, which needs the store."""
    reservation = admit(a_permit(), ledger.limits or limits, ledger, 0.0)
    assert isinstance(reservation, Reservation)
    return reservation


def said(wait_s: float = 0.0) -> tuple[Judgement, ...]:
    """Return what the store says of one charge."""
    return (Judgement(wait_s=wait_s, remaining=7.0, marks=() if wait_s else (0,)),)


def is_granted(permit: Permit, limits: tuple[Limit, ...], ledger: Ledger, now_s: float) -> bool:
    """Say whether *permit* was admitted."""
    try:
        admit(permit, limits, ledger, now_s)
    except Refusal as refusal:
        return refusal.reason is not Reason.THROTTLED
    return True


@given(
    st.integers(1, 5),
    st.floats(1e-6, 1e4),
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), max_size=60),
)
def test_grants_never_exceed_burst_plus_rate_times_elapsed(burst: int, rate: float, times: list[float]) -> None:
    """Whatever the clock does, steps back included: only real progress fills the bucket."""
    ledger, permit, limit = Ledger(), a_permit(), a_limit(burst=burst, rate_per_s=rate)
    grants = sum(is_granted(permit, (limit,), ledger, now_s) for now_s in times)
    first = times[0] if times else 0.0
    elapsed = Fraction(max([first, *times])) - Fraction(first)

    assert grants <= burst + float(elapsed * Fraction(rate)) + 1e-6


@given(st.integers(1, 20), st.floats(0.01, 100))
def test_a_client_that_waits_as_told_is_admitted(burst: int, rate: float) -> None:
    """retry_after_s is rounded up, so the first retry succeeds."""
    ledger, permit, limit = Ledger(), a_permit(), a_limit(burst=burst, rate_per_s=rate)
    for _ in range(burst):
        admit(permit, (limit,), ledger, 0.0)
    with pytest.raises(Refusal) as caught:
        admit(permit, (limit,), ledger, 0.0)
    wait_s = caught.value.retry_after_s

    assert wait_s is not None
    assert is_granted(permit, (limit,), ledger, float(wait_s))


def test_a_refusal_names_the_slowest_limit_and_takes_nothing() -> None:
    """Either every limit gives a token or none does."""
    ledger, permit = Ledger(), a_permit()
    wide, narrow = a_limit(name="wide", burst=2), a_limit(name="narrow", burst=1, rate_per_s=0.1)
    admit(permit, (wide, narrow), ledger, 0.0)
    with pytest.raises(Refusal) as caught:
        admit(permit, (wide, narrow), ledger, 0.0)

    assert (caught.value.public, caught.value.retry_after_s) == ("limit narrow is reached", 10)
    assert _names(admitted(permit, (wide, narrow), Ledger())) == ("wide", "narrow")
    assert ledger.rules["wide"].counts.units == 1


@pytest.mark.parametrize(
    ("per", "other"),
    [
        (("user",), a_permit(principal=a_principal("bob"))),
        (("user",), a_permit(principal=a_principal(None))),
        (("workload",), a_permit(principal=a_principal(workload=None))),
        (("session",), a_permit(session="other")),
        (("session",), a_permit()),
        (("tool",), a_permit(a_call("other"))),
        (("tool",), a_permit(a_request("ping"))),
        (("user", "workload", "session", "agent_session", "tool", "server"), a_permit(session="other")),
    ],
)
def test_each_combination_has_its_own_bucket(per: tuple[str, ...], other: Permit) -> None:
    """One caller's use is not another's."""
    mine = a_permit(session="mine")
    limit = a_limit(burst=1, per=per, methods=("tools/call", "ping"))
    ledger = Ledger()

    assert [is_granted(each, (limit,), ledger, 0.0) for each in (mine, mine, other)] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "applies"),
    [
        ({}, True),
        ({"methods": ("prompts/get",)}, False),
        ({"tools": ("read_schema",)}, True),
        ({"tools": ("other",)}, False),
    ],
)
def test_a_limit_applies_to_its_methods_and_tools(changes: dict[str, object], *, applies: bool) -> None:
    """Others are admitted without it."""
    names = _names(admitted(a_permit(), (a_limit(**changes),), Ledger()))  # type: ignore[arg-type]

    assert (("calls",) if applies else ()) == names


def test_a_limit_of_tools_spares_what_is_no_tool() -> None:
    """A listing has no tool's name."""
    limit = a_limit(methods=("tools/list",), tools=("read_schema",))

    assert _names(admitted(a_permit(parse(a_request("tools/list"))), (limit,), Ledger())) == ()


def test_callers_of_one_server_share_an_account_where_per_says_so() -> None:
    """The pod is the server."""
    limits, ledger = (a_limit(burst=1, per=("server",)),), Ledger()

    assert [is_granted(a_permit(principal=a_principal(user)), limits, ledger, 0.0) for user in "ab"] == [True, False]


def test_a_quota_is_used_up_and_says_when_it_is_not() -> None:
    """To the second: the hour, and a sixtieth of it."""
    limits, ledger = (a_quota(),), Ledger()
    for now_s in (0.0, 60.0):
        admitted(a_permit(), limits, ledger, now_s)
    with pytest.raises(Refusal) as caught:
        admit(a_permit(), limits, ledger, 120.0)

    assert (caught.value.public, caught.value.retry_after_s) == ("limit budget is reached", 3600 + 60 - 120)
    assert is_granted(a_permit(), limits, ledger, 3660.0)
    assert not is_granted(a_permit(), limits, ledger, 3660.0)


def test_a_quota_warns_once_when_its_step_is_passed() -> None:
    """The answer stays as it is; the record and the metrics say so."""
    limits, ledger = (a_quota(4),), Ledger()
    warned = [admitted(a_permit(), limits, ledger).charges[0].warned for _ in range(4)]

    assert warned == [0, 50, 0, 0]
    assert ledger.rules["budget"].counts.warnings == {50: 1}


@given(st.integers(1, 1000), st.lists(st.integers(1, 9), max_size=50))
def test_each_step_is_passed_at_most_once_on_the_way_up(amount: int, costs: list[int]) -> None:
    """However much one message costs."""
    quota = Quota(amount=amount, period="hour", warn_at_percent=(10, 50, 90))
    used, steps = 0, []
    for cost in costs:
        used += cost
        steps.append(crossed(quota, amount, used, cost))

    assert len([each for each in steps if each]) <= 3
    assert max(steps, default=0) == max((each for each in (10, 50, 90) if used >= amount * each / 100), default=0)


def test_a_heavy_call_takes_as_many_units_as_it_costs() -> None:
    """And says how many are left."""
    limits, ledger = (a_limit(burst=10, rate_per_s=1e-6, weight=Weight(tools={"read_schema": 4})),), Ledger()
    charges = [admitted(a_permit(), limits, ledger).charges[0] for _ in range(2)]
    with pytest.raises(Refusal):
        admit(a_permit(), limits, ledger, 0.0)

    assert [(each.cost, each.remaining) for each in charges] == [(4, 6.0), (4, 2.0)]
    assert ledger.rules["calls"].counts.units == 8
    assert is_granted(a_permit(a_call("other")), limits, ledger, 0.0)


def test_calls_at_a_time_end_once() -> None:
    """An end that is told twice must not make room twice."""
    limits, ledger = (Limit(name="at-once", concurrent=2),), Ledger()
    first, _ = (admitted(a_permit(), limits, ledger) for _ in range(2))
    with pytest.raises(Refusal, match="at-once") as caught:
        admit(a_permit(), limits, ledger, 0.0)
    release(first.charges)
    release(first.charges)

    assert caught.value.public == "limit at-once is reached: too many calls are under way"
    assert caught.value.retry_after_s == 1
    assert [is_granted(a_permit(), limits, ledger, 0.0) for _ in range(2)] == [True, False]


def test_a_body_that_is_too_long_is_refused_for_good() -> None:
    """To come again would not help, so nothing says when."""
    limits, ledger = (a_limit(max_bytes=100),), Ledger()
    with pytest.raises(Refusal) as caught:
        admit(a_permit(), limits, ledger, 0.0, 101)

    assert (caught.value.public, caught.value.retry_after_s) == ("limit calls: 101 bytes are more than its 100", None)
    assert isinstance(admit(a_permit(), limits, ledger, 0.0, 100), Admission)
    assert ledger.rules["calls"].counts.units == 1


def test_a_limit_in_shadow_mode_counts_and_refuses_nothing() -> None:
    """Another one that is enforced still speaks."""
    shadow = a_limit(name="shadow", burst=1, rate_per_s=1e-6, mode="shadow", max_bytes=10)
    limits, ledger = (shadow, a_limit(burst=2, rate_per_s=1e-6)), Ledger()
    granted = [is_granted(a_permit(), limits, ledger, 0.0) for _ in range(3)]
    admission = admit(a_permit(a_request("ping")), limits, ledger, 0.0, 11)

    assert granted == [True, True, False]
    assert admission == Admission(permit=admission.permit)
    assert (ledger.rules["shadow"].counts.units, ledger.rules["shadow"].counts.over) == (1, 1)


def test_a_limit_in_shadow_mode_counts_long_bodies() -> None:
    """As what would have been refused."""
    limits, ledger = (a_limit(mode="shadow", max_bytes=10),), Ledger()

    assert isinstance(admit(a_permit(), limits, ledger, 0.0, 11), Admission)
    assert ledger.rules["calls"].counts.over == 1


def test_accounts_at_rest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as good as new ones."""
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 2)
    limits, ledger = (a_limit(burst=1, per=("user",)),), Ledger()
    for number, user in enumerate("abcd"):
        admit(a_permit(principal=a_principal(user)), limits, ledger, 10.0 * number)

    assert [key[1] for key in ledger.rules["calls"].accounts] == ["c", "d"]  # type: ignore[index]


@pytest.mark.parametrize("limit", [a_limit(burst=1, rate_per_s=1e-6, per=("user",)), a_quota(1, per=("user",))])
def test_no_flood_of_callers_makes_a_used_limit_new(limit: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room, newcomers share one account, and nobody's is forgotten."""
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 2)
    ledger = Ledger()
    granted = [is_granted(a_permit(principal=a_principal(user)), (limit,), ledger, 0.0) for user in "abcdeab"]

    assert granted == [True, True, True, False, False, False, False]


def test_a_limit_that_stays_remembers_what_was_used() -> None:
    """A new bundle must not be a fresh start."""
    ledger, held = Ledger(), a_limit(burst=2, rate_per_s=1e-6)
    admit(a_permit(), (held,), ledger, 0.0)
    changed = (a_limit(burst=1, rate_per_s=2e-6), a_quota(5))

    assert is_granted(a_permit(), changed, ledger, 0.0)
    assert not is_granted(a_permit(), changed, ledger, 0.0)


def test_what_is_not_sent_costs_nothing() -> None:
    """A message that was admitted and then stays here, because another one of its batch was refused."""
    limit = a_limit(burst=1, rate_per_s=1e-6, quotas=(Quota(amount=1, period="day"),), concurrent=1)
    limits, ledger = (limit,), Ledger()
    admission = admitted(a_permit(), limits, ledger)
    give_back(admission.charges)
    give_back(admission.charges)

    assert is_granted(a_permit(), limits, ledger, 0.0)
    assert not is_granted(a_permit(), limits, ledger, 0.0)
    assert ledger.rules["calls"].counts.admitted == 1


def test_giving_back_never_overfills() -> None:
    """The burst stays the burst."""
    limits, ledger = (a_limit(burst=1, rate_per_s=1.0),), Ledger()
    admission = admitted(a_permit(), limits, ledger)
    give_back(admission.charges)

    assert is_granted(a_permit(), limits, ledger, 9.0)
    assert not is_granted(a_permit(), limits, ledger, 9.0)


# scope global


def test_a_global_limit_needs_the_store() -> None:
    """Until then there is no admission; what the store grants becomes one."""
    ledger = Ledger()
    reservation = reserved(ledger, a_shared())
    admission = settle(reservation, said(), 0.0)

    assert (reservation.charges, _names(admission)) == ((), ("calls",))
    assert (admission.charges[0].remaining, admission.charges[0].is_fallback) == (7.0, False)
    assert ledger.rules["calls"].counts.units == 1


def test_what_the_store_refuses_is_refused() -> None:
    """With its word of when."""
    ledger = Ledger()
    with pytest.raises(Refusal) as caught:
        settle(reserved(ledger, a_shared()), said(2.5), 0.0)

    assert (caught.value.public, caught.value.retry_after_s) == ("limit calls is reached", 3)
    assert ledger.rules["calls"].counts.refused == 1


def test_the_pods_own_limits_are_judged_before_the_store() -> None:
    """Both must admit, and what the pod charged is given back by whoever settles."""
    ledger = Ledger()
    limits = (a_limit(name="own", burst=1, rate_per_s=1e-6), a_shared(name="all"))
    reservation = admit(a_permit(), limits, ledger, 0.0)
    assert isinstance(reservation, Reservation)
    with pytest.raises(Refusal, match="all"):
        settle(reservation, said(9.0), 0.0)
    give_back(reservation.charges)

    assert isinstance(admit(a_permit(), limits, ledger, 0.0), Reservation)
    with pytest.raises(Refusal, match="own"):
        admit(a_permit(), limits, ledger, 0.0)


def test_without_the_store_a_closed_limit_refuses() -> None:
    """The default: soon it may be back."""
    with pytest.raises(Refusal) as caught:
        settle(reserved(Ledger(), a_shared()), None, 0.0)

    assert (caught.value.public, caught.value.retry_after_s) == ("limit calls cannot be judged now", 1)


def test_without_the_store_an_open_limit_admits_and_says_so() -> None:
    """In the record and in the metrics."""
    ledger = Ledger()
    admission = settle(reserved(ledger, a_shared(when_unavailable="open")), None, 0.0)

    assert admission.charges[0].is_fallback
    assert ledger.rules["calls"].counts.fallback == 1


def test_without_the_store_each_replica_grants_its_part() -> None:
    """Of eight, four replicas grant two each, of everything that the limit counts."""
    limit = a_shared(
        when_unavailable="local", replicas=4, quotas=(Quota(amount=9, period="day"),), concurrent=10, burst=11
    )
    ledger, granted = Ledger(), 0
    for _ in range(5):
        with contextlib.suppress(Refusal):
            settle(reserved(ledger, limit), None, 0.0)
            granted += 1

    assert granted == 2


def test_what_the_store_granted_here_counts_in_the_share() -> None:
    """Or each loss of the store would grant the share once more."""
    ledger, limit = Ledger(), a_shared(when_unavailable="local", replicas=4)
    for _ in range(3):
        settle(reserved(ledger, limit), said(), 0.0)
    with pytest.raises(Refusal, match="calls"):
        settle(reserved(ledger, limit), None, 0.0)


def test_bytes_of_a_message_need_no_store() -> None:
    """A cap is the same for all replicas without asking any."""
    limit = Limit(name="long", max_bytes=10, scope="global")

    assert isinstance(admit(a_permit(), (limit,), Ledger(), 0.0, 10), Admission)


def test_in_shadow_mode_the_store_refuses_nothing() -> None:
    """Neither by its word nor by its absence."""
    ledger, limit = Ledger(), a_shared(mode="shadow")
    settle(reserved(ledger, limit), said(5.0), 0.0)
    settle(reserved(ledger, limit), None, 0.0)

    assert ledger.rules["calls"].counts.over == 2
