"""sidecar.core.limits: no bucket grants more than its rule, and a refusal says when to come back."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import limits as module
from sidecar.core.authorise import Permit
from sidecar.core.limits import Admission, Buckets, admit, give_back
from sidecar.core.message import parse
from sidecar.core.profile import Limit
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_permit, a_principal, a_request


def a_limit(*, burst: int = 2, rate_per_s: float = 1.0, **changes: object) -> Limit:
    """Two at once, one a second."""
    return Limit(**{"name": "calls", "burst": burst, "rate_per_s": rate_per_s, **changes})  # type: ignore[arg-type]


def is_granted(permit: Permit, limits: tuple[Limit, ...], buckets: Buckets, now_s: float) -> bool:
    """Say whether *permit* was admitted."""
    try:
        admit(permit, limits, buckets, now_s)
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
    buckets, permit, limit = Buckets(), a_permit(), a_limit(burst=burst, rate_per_s=rate)
    grants = sum(is_granted(permit, (limit,), buckets, now_s) for now_s in times)
    first = times[0] if times else 0.0
    elapsed = Fraction(max([first, *times])) - Fraction(first)

    assert grants <= burst + float(elapsed * Fraction(rate)) + 1e-6


@given(st.integers(1, 20), st.floats(0.01, 100))
def test_a_client_that_waits_as_told_is_admitted(burst: int, rate: float) -> None:
    """retry_after_s is rounded up, so the first retry succeeds."""
    buckets, permit, limit = Buckets(), a_permit(), a_limit(burst=burst, rate_per_s=rate)
    for _ in range(burst):
        admit(permit, (limit,), buckets, 0.0)
    with pytest.raises(Refusal) as caught:
        admit(permit, (limit,), buckets, 0.0)
    wait_s = caught.value.retry_after_s

    assert wait_s is not None
    assert is_granted(permit, (limit,), buckets, float(wait_s))


def test_a_refusal_names_the_slowest_limit_and_takes_nothing() -> None:
    """Either every limit gives a token or none does."""
    buckets, permit = Buckets(), a_permit()
    wide, narrow = a_limit(name="wide", burst=2), a_limit(name="narrow", burst=1, rate_per_s=0.1)
    admit(permit, (wide, narrow), buckets, 0.0)
    with pytest.raises(Refusal) as caught:
        admit(permit, (wide, narrow), buckets, 0.0)

    assert (caught.value.public, caught.value.retry_after_s) == ("limit narrow is reached", 10)
    assert admit(permit, (wide,), buckets, 0.0) == Admission(permit=permit, limits=("wide",))


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
    ],
)
def test_each_combination_has_its_own_bucket(per: tuple[str, ...], other: Permit) -> None:
    """One caller's use is not another's."""
    mine = a_permit(session="mine")
    limit = a_limit(burst=1, per=per, methods=("tools/call", "ping"))
    buckets = Buckets()

    assert [is_granted(each, (limit,), buckets, 0.0) for each in (mine, mine, other)] == [True, False, True]


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
    names = admit(a_permit(), (a_limit(**changes),), Buckets(), 0.0).limits  # type: ignore[arg-type]

    assert (("calls",) if applies else ()) == names


def test_a_limit_of_tools_spares_what_is_no_tool() -> None:
    """A listing has no tool's name."""
    limit = a_limit(methods=("tools/list",), tools=("read_schema",))

    assert admit(a_permit(parse(a_request("tools/list"))), (limit,), Buckets(), 0.0).limits == ()


def test_the_number_of_buckets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one unused for longest goes first."""
    monkeypatch.setattr(module, "MAX_BUCKETS", 2)
    buckets = Buckets()
    for user in ("a", "b", "a", "c"):
        admit(a_permit(principal=a_principal(user)), (a_limit(per=("user",)),), buckets, 0.0)

    assert [key[1] for key in buckets.held] == ["https://id.test a", "https://id.test c"]


def test_what_is_not_sent_costs_nothing() -> None:
    """A message that was admitted and then stays here, because another one of its batch was refused."""
    limits, buckets = (a_limit(burst=1, rate_per_s=1e-6),), Buckets()
    admission = admit(a_permit(), limits, buckets, 0.0)
    give_back(admission, limits, buckets, 0.0)

    assert is_granted(a_permit(), limits, buckets, 0.0)
    assert not is_granted(a_permit(), limits, buckets, 0.0)


def test_giving_back_never_overfills() -> None:
    """The burst stays the burst."""
    limits, buckets = (a_limit(burst=1, rate_per_s=1.0),), Buckets()
    give_back(admit(a_permit(), limits, buckets, 0.0), limits, buckets, 9.0)

    assert is_granted(a_permit(), limits, buckets, 9.0)
    assert not is_granted(a_permit(), limits, buckets, 9.0)
