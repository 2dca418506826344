"""How long connections and streams outlive what opened them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.spiffe import SpiffePattern
from sidecar.core.lifetime import Stage, is_stream, stage, why_ended
from sidecar.core.message import Message, Shape, Subscription, parse
from sidecar.core.profile import Identity, Provider
from tests.builders import NOW_S, STREAM, a_call, a_principal

MAX_AGE_S, GRACE_S = 3600.0, 30.0
CALLERS = (SpiffePattern.parse("spiffe://a.test/**"),)
PROFILE = Identity(
    callers=("spiffe://a.test/**",),
    providers=(Provider(name="corporate", issuer="https://id.test", audiences=("x",)),),
)


@pytest.mark.parametrize(
    ("life_s", "age_s", "expected"),
    [
        (600, 0, Stage.OPEN),
        (600, 569, Stage.OPEN),
        (600, 570, Stage.DUE),
        (600, 599, Stage.DUE),
        (600, 600, Stage.OVER),
        (600, 629, Stage.OVER),
        (600, 630, Stage.CUT),
        (16, 11, Stage.OPEN),
        (16, 12, Stage.DUE),  # of a short life, the last quarter
        (16, 16, Stage.OVER),
        (86_400, 3599, Stage.OPEN),
        (86_400, 3600, Stage.DUE),  # its age alone never cuts a call
        (86_400, 80_000, Stage.DUE),
        (-1, 0, Stage.OVER),
    ],
)
def test_a_connection_is_told_before_it_ends(life_s: float, age_s: float, expected: Stage) -> None:
    """First the next answer is the last one, then nothing new begins, then everything is cut."""
    found = stage(NOW_S, NOW_S + life_s, NOW_S + age_s, max_age_s=MAX_AGE_S, grace_s=GRACE_S)

    assert found is expected


@given(life_s=st.floats(0.1, 1e6), ages_s=st.lists(st.floats(0, 2e6), min_size=2))
def test_stages_only_go_forward_and_nothing_lives_beyond_the_grace(life_s: float, ages_s: list[float]) -> None:
    """Whatever the numbers are."""
    found = [
        stage(NOW_S, NOW_S + life_s, NOW_S + age_s, max_age_s=MAX_AGE_S, grace_s=GRACE_S) for age_s in sorted(ages_s)
    ]

    assert found == sorted(found)
    if max(ages_s) > life_s + GRACE_S + 1:
        assert found[-1] is Stage.CUT


def test_what_has_no_end_of_its_own_is_a_stream() -> None:
    """The client's event stream and a subscription; never a call, however long it takes."""
    listening = Message(
        shape=Shape.REQUEST,
        method="subscriptions/listen",
        params={},
        id=1,
        target=Subscription(resources=("file:///a",), tasks=()),
    )

    assert is_stream(STREAM)
    assert is_stream(listening)
    assert not is_stream(parse(a_call()))


def test_a_stream_goes_on_while_its_opener_may_have_it() -> None:
    """Nothing has changed."""
    assert why_ended(a_principal(), PROFILE, CALLERS, NOW_S) is None
    assert why_ended(a_principal(None), replace_user("optional"), CALLERS, NOW_S) is None


def replace_user(user: str, mtls: str = "strict") -> Identity:
    """The profile with other demands."""
    return Identity(mtls=mtls, user=user, callers=PROFILE.callers, providers=PROFILE.providers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("why", "principal", "identity", "callers", "now_s"),
    [
        ("identity that opened it", a_principal(), PROFILE, CALLERS, NOW_S + 300),
        ("may no longer call", a_principal(), PROFILE, (SpiffePattern.parse("spiffe://b.test/**"),), NOW_S),
        ("SVID is now required", a_principal(workload=None), PROFILE, CALLERS, NOW_S),
        ("user is now required", a_principal(None), PROFILE, CALLERS, NOW_S),
        ("provider is trusted no longer", a_principal(), Identity(callers=PROFILE.callers), CALLERS, NOW_S),
    ],
)  # fmt: skip
def test_a_stream_ends_when_its_opener_could_not_open_it_now(
    why: str, principal: object, identity: Identity, callers: tuple[SpiffePattern, ...], now_s: float
) -> None:
    """A token or certificate ends, or the profile changes."""
    found = why_ended(replace(principal), identity, callers, now_s)  # type: ignore[type-var]

    assert found
    assert why in found
