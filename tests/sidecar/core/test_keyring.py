"""Which keys are believed after others, and which never."""

import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.core.keyring import TYPE, Keyring, announce, key_id, pem_of, public_keys, sign
from sidecar.errors import BundleError

OLD, NEW, LATER, FOREIGN = (ec.derive_private_key(number, ec.SECP256R1()) for number in (11, 12, 13, 14))
BEGUN = Keyring(keys=(OLD.public_key(),))
BOTH = announce([NEW.public_key(), OLD.public_key()], 5, OLD)
NEW_ALONE = announce([NEW.public_key()], 6, NEW)
NEXT = announce([LATER.public_key()], 7, NEW)


def names(keyring: Keyring) -> list[str]:
    """Return the names of the keys that are believed."""
    return [key_id(key) for key in keyring.keys]


def test_announced_keys_replace_those_before() -> None:
    """Both while they overlap; then the old one, stolen or not, is not believed any more."""
    overlapping = BEGUN.follow([BOTH])
    after = overlapping.follow([BOTH, NEW_ALONE])

    assert names(overlapping) == [key_id(NEW.public_key()), key_id(OLD.public_key())]
    assert (names(after), after.term) == ([key_id(NEW.public_key())], 6)
    assert after.verify(sign(b"x", OLD)) is None
    assert after.verify(sign(b"x", NEW)) == (b"x", "JWT")


def test_who_was_away_follows_from_its_own_key_to_todays() -> None:
    """Over several rotations at once, from wherever it stands."""
    for begun in (BEGUN, Keyring(keys=(NEW.public_key(),))):
        assert names(begun.follow([BOTH, NEW_ALONE, NEXT])) == [key_id(LATER.public_key())]


def test_announcement_of_a_term_that_is_over_is_left_out() -> None:
    """Played again, it does not bring the old key back."""
    after = BEGUN.follow([BOTH, NEW_ALONE])

    assert after.follow([BOTH]) == after
    assert after.follow([announce([OLD.public_key()], 6, NEW)]) == after


@pytest.mark.parametrize(
    "token",
    [
        announce([FOREIGN.public_key()], 9, FOREIGN),
        sign(json.dumps({"keys": pem_of([FOREIGN.public_key()]), "term": 9}).encode(), OLD),
        sign(b"no JSON", OLD, typ=TYPE),
        sign(b'{"term": 9}', OLD, typ=TYPE),
        sign(b'{"term": 9, "keys": "none"}', OLD, typ=TYPE),
        sign(json.dumps({"keys": pem_of([FOREIGN.public_key()]), "term": "9"}).encode(), OLD, typ=TYPE),
        sign(json.dumps({"keys": pem_of([FOREIGN.public_key()]), "term": 2**60}).encode(), OLD, typ=TYPE),
        sign(b"[]", OLD, typ=TYPE),
        "no.jwt",
        "",
    ],
)
def test_announcement_that_does_not_hold_changes_nothing(token: str) -> None:
    """By an unknown key, of another type, without a term of its own."""
    assert BEGUN.follow([token]) == BEGUN


def test_keys_are_written_as_they_are_read() -> None:
    """PEM, one block after the other."""
    keys = [OLD.public_key(), NEW.public_key()]

    assert [key_id(key) for key in public_keys(pem_of(keys))] == [key_id(key) for key in keys]
    assert str(BEGUN) == key_id(OLD.public_key())
    assert str(Keyring(keys=())) == "none"


def test_signature_names_its_key_and_is_the_same_each_time() -> None:
    """Replicas of the control plane must not differ."""
    assert sign(b"x", OLD) == sign(b"x", OLD)
    assert jwt.get_unverified_header(sign(b"x", OLD)) == {
        "alg": "ES256",
        "kid": key_id(OLD.public_key()),
        "typ": "JWT",
    }


def test_text_without_keys_is_refused() -> None:
    """Nothing would ever verify."""
    with pytest.raises(BundleError, match="no PEM block"):
        Keyring.parse("keys")
