"""When which key signs, is believed, is not believed any more; and that no sidecar is left behind."""

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from certs.errors import BadCertificate
from sidecar.core.bundle import Stamp
from sidecar.core.keyring import MAX_ANNOUNCEMENTS, Keyring, PrivateKey, key_id
from webhook.core.signing import KeyTimes, SigningKeys, due

NOW = 1_800_000_000.5
DAY = 86_400.0
TIMES = KeyTimes(age_s=90 * DAY, overlap_s=DAY)


def maker() -> Iterator[PrivateKey]:
    """Yield keys, always the same ones."""
    number = 100
    while True:
        number += 1
        yield ec.derive_private_key(number, ec.SECP256R1())


def names(keys: SigningKeys) -> list[str]:
    """Return the names of the keys that sidecars are to believe."""
    return [key_id(key) for key in keys.believed]


def test_first_key_signs_at_once_and_waits_for_its_age() -> None:
    """Nothing to announce: pods begin with it."""
    keys = maker()
    held = due(None, NOW, TIMES, keys.__next__)

    assert (held.term, held.since_s, held.announcements) == (int(NOW), int(NOW), ())
    assert due(held, NOW + 89 * DAY, TIMES, keys.__next__) is held
    assert held.stamp(7) == Stamp(term=int(NOW), sequence=7)


def test_rotation_by_age_has_an_overlap() -> None:
    """A new key signs, announced by the old; both are believed for the overlap; then the new one alone."""
    keys = maker()
    first = due(None, NOW, TIMES, keys.__next__)
    second = due(first, NOW + 90 * DAY, TIMES, keys.__next__)
    third = due(second, NOW + 91 * DAY, TIMES, keys.__next__)
    begun = Keyring(keys=first.believed)

    assert names(second) == [key_id(second.current.public_key()), *names(first)]
    assert due(second, NOW + 90.9 * DAY, TIMES, keys.__next__) is second
    assert names(third) == [key_id(second.current.public_key())]
    assert first.term < second.term < third.term
    assert begun.follow(second.announcements).keys == second.believed
    assert begun.follow(third.announcements).keys == third.believed
    assert due(third, NOW + 100 * DAY, TIMES, keys.__next__) is third


def test_rotation_is_asked_for_once_by_each_text() -> None:
    """Also while another one is under way."""
    keys = maker()
    first = due(None, NOW, TIMES, keys.__next__)
    second = due(first, NOW + 1, TIMES, keys.__next__, asked="today")
    third = due(second, NOW + 2, TIMES, keys.__next__, asked="today, again")

    assert due(second, NOW + 1, TIMES, keys.__next__, asked="today") is second
    assert names(third) == [key_id(each.current.public_key()) for each in (third, second)]
    assert Keyring(keys=first.believed).follow(third.announcements).keys == third.believed


def test_stolen_key_is_not_believed_any_longer() -> None:
    """No overlap, and nothing that was signed with it brings it back."""
    keys = maker()
    first = due(None, NOW, TIMES, keys.__next__)
    second = due(first, NOW + 1, TIMES, keys.__next__, asked="1 stolen")

    assert names(second) == [key_id(second.current.public_key())]
    assert Keyring(keys=first.believed).follow(second.announcements).keys == second.believed


def test_key_put_there_by_hand_is_taken_over() -> None:
    """Its term begins now: bundles that it signed before are older."""
    (key,) = (next(maker()),)
    held = due(SigningKeys(current=key), NOW, TIMES, maker().__next__, asked="x")

    assert (held.current, held.term, held.announcements) == (key, int(NOW), ())
    assert due(held, NOW, TIMES, maker().__next__, asked="x") is held


def test_terms_grow_also_when_the_clock_goes_back() -> None:
    """Or two steps fall into one second."""
    keys = maker()
    held = due(None, NOW, TIMES, keys.__next__)
    for number in range(3):
        after = due(held, NOW - 1000, TIMES, keys.__next__, asked=str(number))
        assert after.term == held.term + 1
        held = after


def test_secret_is_read_as_it_was_written() -> None:
    """All of it, at each step."""
    keys = maker()
    first = due(None, NOW, TIMES, keys.__next__)
    for held in (first, due(first, NOW, TIMES, keys.__next__, asked="x")):
        read = SigningKeys.parse(held.data())
        assert read is not None
        assert read.data() == held.data()
        assert read.term == held.term
    assert SigningKeys.parse({}) is None


def test_secret_without_key_is_refused() -> None:
    """It is somebody else's."""
    with pytest.raises(BadCertificate, match=r"signing\.key is expected, found tls\.crt"):
        SigningKeys.parse({"tls.crt": b""})


@given(st.lists(st.sampled_from(["age", "overlap", "ask", "stolen", "hour"]), max_size=12), st.integers(0, 11))
def test_every_sidecar_that_was_away_comes_back(steps: list[str], left: int) -> None:
    """Whenever it left: as long as what is handed out reaches back to its key, it follows to the keys of today."""
    keys, now_s = maker(), NOW
    held = due(None, now_s, TIMES, keys.__next__)
    asked, begun, since = "", Keyring(keys=held.believed), 0
    for number, step in enumerate(steps):
        now_s += {"age": 90 * DAY, "overlap": DAY, "hour": 3600.0}.get(step, 1.0)
        if step in ("ask", "stolen"):
            asked = f"{number} {step}"
        after = due(held, now_s, TIMES, keys.__next__, asked)
        since += after is not held
        held = after
        if number == left:
            begun, since = Keyring(keys=held.believed), 0

    if since <= MAX_ANNOUNCEMENTS:
        assert begun.follow(held.announcements).keys == held.believed
    assert len(held.announcements) <= MAX_ANNOUNCEMENTS
