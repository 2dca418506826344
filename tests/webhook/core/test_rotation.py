"""The life of the webhook's CA, walked through with a clock of our own."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority, make_key
from certs.errors import BadCertificate
from webhook.core.rotation import Authorities, Lifetimes, due, needs_leaf

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
LIFETIMES = Lifetimes(ca=timedelta(days=90), leaf=timedelta(days=7), staging=timedelta(hours=1))
KEYS = [make_key() for _ in range(3)]
_serials = itertools.count(1)


def an_authority(made: datetime, key: ec.EllipticCurvePrivateKey = KEYS[0]) -> Authority:
    """Return a CA made at *made*."""
    return Authority.make(name="test", key=key, now=made, lifetime=LIFETIMES.ca, serial=next(_serials))


def never() -> Authority:
    """Stand for the maker of CAs where none may be made."""
    raise AssertionError("no CA was to be made")


def test_first_replica_makes_a_ca() -> None:
    """An empty Secret gets a CA, which alone is trusted."""
    made = due(None, NOW, LIFETIMES, lambda: an_authority(NOW))

    assert made.trusted_pem() == made.current.certificate_pem


def test_young_ca_is_kept() -> None:
    """Before two thirds of its life are over nothing happens: the very same value comes back."""
    held = Authorities(current=an_authority(NOW))

    assert due(held, NOW + timedelta(days=59), LIFETIMES, never) is held


def test_old_ca_is_overlapped_never_replaced_at_once() -> None:
    """Stage, wait, promote, wait for the last leaf, forget; trusted before it signs and after it has signed."""
    old, new = an_authority(NOW), an_authority(NOW + timedelta(days=61), KEYS[1])
    held = due(Authorities(current=old), NOW + timedelta(days=61), LIFETIMES, lambda: new)
    assert (held.current, held.staged) == (old, new)
    assert held.trusted_pem() == old.certificate_pem + new.certificate_pem

    staged_at = new.certificate.not_valid_before_utc
    assert due(held, staged_at + timedelta(minutes=59), LIFETIMES, never) is held

    held = due(held, staged_at + LIFETIMES.staging, LIFETIMES, never)
    assert held == Authorities(current=new, retired=old.certificate)
    assert held.trusted_pem() == new.certificate_pem + old.certificate_pem

    promoted_at = staged_at + LIFETIMES.staging
    assert due(held, promoted_at + timedelta(days=6, hours=23), LIFETIMES, never) is held
    assert due(held, promoted_at + LIFETIMES.leaf, LIFETIMES, never) == Authorities(current=new)


def test_expired_ca_is_replaced_at_once() -> None:
    """Nothing that it signed is good any more, so there is nothing to overlap with."""
    new = an_authority(NOW + timedelta(days=91), KEYS[1])
    held = due(Authorities(current=an_authority(NOW)), NOW + timedelta(days=91), LIFETIMES, lambda: new)

    assert held == Authorities(current=new)


def test_every_leaf_served_is_trusted_at_every_moment_of_two_years() -> None:
    """Replicas that look once an hour always serve a leaf of a CA that is in the caBundle."""
    now, held, leaf, replaced = NOW, None, None, 0
    while now < NOW + timedelta(days=730):
        before = held
        held = due(held, now, LIFETIMES, lambda at=now: an_authority(at, KEYS[next(_serials) % 3]))  # type: ignore[misc]
        if before and held.current != before.current:
            replaced += 1
        if leaf is not None:
            trusted = {held.current.certificate, held.retired, held.staged and held.staged.certificate}
            assert leaf[1] in trusted
            assert now < leaf[0].not_valid_after_utc
        if leaf is None or leaf[1] != held.current.certificate or needs_leaf(leaf[0], held.current, now):
            signed = held.current.sign_serving(
                ["a.test"], KEYS[2].public_key(), now=now, lifetime=LIFETIMES.leaf, serial=next(_serials)
            )
            leaf = (signed, held.current.certificate)
        now += timedelta(hours=12)
    assert replaced >= 10


def test_leaf_is_needed_when_missing_old_or_of_another_ca() -> None:
    """A leaf is signed anew at two thirds of its life and when another CA signs now."""
    authority, other = an_authority(NOW), an_authority(NOW, KEYS[1])
    leaf = authority.sign_serving(
        ["a.test"], KEYS[2].public_key(), now=NOW, lifetime=LIFETIMES.leaf, serial=next(_serials)
    )

    assert needs_leaf(None, authority, NOW)
    assert not needs_leaf(leaf, authority, NOW + timedelta(days=4))
    assert needs_leaf(leaf, authority, NOW + timedelta(days=5))
    assert needs_leaf(leaf, other, NOW)


def test_secret_holds_what_was_put_in() -> None:
    """What is written is what is read."""
    held = Authorities(
        current=an_authority(NOW),
        staged=an_authority(NOW, KEYS[1]),
        retired=an_authority(NOW, KEYS[2]).certificate,
    )
    read = Authorities.parse(held.data())

    assert read is not None
    assert read.data() == held.data()
    assert Authorities.parse({}) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"tls.crt": b"x"}, "ca.crt and ca.key are expected, found tls.crt"),
        ({"ca.crt": b"x", "ca.key": b"x"}, "unreadable"),
        (Authorities(current=an_authority(NOW)).data() | {"retired.crt": b"x"}, "retired.crt"),
    ],
)
def test_secret_that_cannot_be_read_is_refused(data: dict[str, bytes], said: str) -> None:
    """It is not overwritten: API servers trust what is in it."""
    with pytest.raises(BadCertificate, match=said):
        Authorities.parse(data)
