"""Our own SVID: what an update of the Workload API must look like to be used."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from certs.authority import make_key
from certs.errors import BadCertificate
from certs.svid import X509Snapshot, split_der
from tests.certs.pki import A_TEST, API, B_TEST, LIFETIME, NOW, a_leaf, an_authority, der, key_der

A = an_authority()
B = an_authority(B_TEST)
KEY = make_key()
OWN = (str(API), a_leaf(A, key=KEY), key_der(KEY), der(A))


def test_a_good_update_becomes_a_snapshot() -> None:
    """SVID and all bundles, ready to use."""
    snapshot = X509Snapshot.parse(OWN, {"spiffe://b.test": der(B)}, now=NOW)

    assert snapshot.svid.spiffe_id == API
    assert snapshot.svid.chain_der == (OWN[1],)
    assert snapshot.svid.serial == x509.load_der_x509_certificate(OWN[1]).serial_number
    assert snapshot.svid.not_after == NOW + LIFETIME
    assert snapshot.bundles.domains == {A_TEST, B_TEST}
    assert snapshot.rejected_domains == frozenset()
    assert snapshot.received_at == NOW


def test_the_key_is_not_printed() -> None:
    """repr() goes to logs."""
    assert "key" not in repr(X509Snapshot.parse(OWN, {}, now=NOW))


@pytest.mark.parametrize("blob", [b"", b"nonsense", der(B)[:-1], der(B) + b"\0", b"\x30\x03\x02\x01\x00"], ids=repr)
def test_a_bad_federated_bundle_costs_its_own_domain_only(blob: bytes) -> None:
    """A partner's mistake must not take our identity down."""
    snapshot = X509Snapshot.parse(OWN, {"spiffe://b.test": blob, "spiffe://c.test": der(B)}, now=NOW)

    assert snapshot.rejected_domains == {"spiffe://b.test"}
    assert snapshot.bundles.domains == {A_TEST, B_TEST.parse("c.test")}


def test_a_federated_bundle_of_an_impossible_domain_is_left_out() -> None:
    """The name is judged like any trust domain."""
    snapshot = X509Snapshot.parse(OWN, {"spiffe://B.test/x": der(B)}, now=NOW)

    assert snapshot.rejected_domains == {"spiffe://B.test/x"}


def test_a_federated_bundle_cannot_replace_our_own() -> None:
    """Our anchors come with our SVID, from nowhere else."""
    snapshot = X509Snapshot.parse(OWN, {"spiffe://a.test": der(B)}, now=NOW)

    assert snapshot.bundles.anchors(A_TEST) == (A.certificate,)
    assert snapshot.rejected_domains == {"spiffe://a.test"}


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (("spiffe://a.test", *OWN[1:]), "needs a path"),
        (("spiffe://a.test/other", *OWN[1:]), "announced as spiffe://a.test/other"),
        ((OWN[0], b"", *OWN[2:]), "no certificate"),
        ((OWN[0], b"\x30\x01", *OWN[2:]), "cut off"),
        ((OWN[0], a_leaf(A, key=KEY, not_after=NOW - timedelta(seconds=1)), *OWN[2:]), "expired"),
        ((OWN[0], a_leaf(B, key=KEY), *OWN[2:]), "does not chain"),
        ((*OWN[:2], b"nonsense", OWN[3]), "unreadable private key"),
        ((*OWN[:2], key_der(make_key()), OWN[3]), "does not belong"),
        ((*OWN[:3], b""), "bundle: empty"),
        ((*OWN[:3], b"\x30\x03\x02\x01\x00"), "bundle: unreadable"),
    ],
)
def test_an_unusable_own_svid_is_refused(own: tuple[str, bytes, bytes, bytes], why: str) -> None:
    """What peers would refuse is not taken over."""
    with pytest.raises(BadCertificate, match=why):
        X509Snapshot.parse(own, {}, now=NOW)


def test_an_unreadable_key_is_not_quoted() -> None:
    """The error about a key goes to logs, the key must not."""
    with pytest.raises(BadCertificate) as caught:
        X509Snapshot.parse((*OWN[:2], OWN[2][:-1] + b"?", OWN[3]), {}, now=NOW)

    assert str(caught.value) in (
        "own SVID: unreadable private key",
        "own SVID: the key does not belong to the certificate",
    )


def test_certificates_in_a_row_are_told_apart() -> None:
    """The Workload API joins certificates without separators."""
    below = an_authority(issuer=A).certificate.public_bytes(Encoding.DER)

    assert split_der(OWN[1] + below + der(A)) == (OWN[1], below, der(A))


@pytest.mark.parametrize(
    "blob", [b"\x30", b"\x31\x00", b"\x30\x80", b"\x30\x84\x00\x00\x00\x01x", b"\x30\x82\x01", b"\x30\x02x"]
)
def test_what_is_no_row_of_sequences_is_refused(blob: bytes) -> None:
    """Every byte must belong to a sequence of definite, plausible length."""
    with pytest.raises(BadCertificate, match="certificates:"):
        split_der(blob)


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_splitting_undoes_joining(bodies: list[bytes]) -> None:
    """Any sequences, of any length, come back as they were."""

    def encode(body: bytes) -> bytes:
        if len(body) < 0x80:
            return bytes([0x30, len(body)]) + body
        return b"\x30\x82" + len(body).to_bytes(2) + body

    parts = tuple(encode(body) for body in bodies)

    assert parts == split_der(b"".join(parts))


@given(st.binary(max_size=64))
def test_splitting_loses_nothing(blob: bytes) -> None:
    """Any bytes either are refused or come back whole."""
    try:
        parts = split_der(blob)
    except BadCertificate:
        return

    assert blob == b"".join(parts)
