"""The certificate authority: what it signs passes strict verifiers, and stored material is checked."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.verification import PolicyBuilder, Store

from certs.authority import Authority, make_key
from certs.errors import BadCertificate
from certs.verify import Usage, verify_peer
from tests.certs.pki import A_TEST, API, NOW, an_authority, bundles_of

DAY = timedelta(days=1)


def test_a_serving_certificate_passes_the_web_verifier_for_its_names_only() -> None:
    """What the webhook shows must satisfy a verifier of server names."""
    authority = Authority.make(name="webhook CA", key=make_key(), now=NOW, lifetime=DAY, serial=7)
    leaf = authority.sign_serving(
        ["sidegate.sidegate.svc", "localhost"], make_key().public_key(), now=NOW, lifetime=DAY, serial=8
    )
    builder = PolicyBuilder().store(Store([authority.certificate])).time(NOW)

    builder.build_server_verifier(x509.DNSName("sidegate.sidegate.svc")).verify(leaf, [])
    with pytest.raises(x509.verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("other.sidegate.svc")).verify(leaf, [])
    assert (authority.certificate.serial_number, leaf.serial_number) == (7, 8)


def test_a_serving_certificate_without_names_is_refused() -> None:
    """A certificate for nobody helps nobody."""
    with pytest.raises(BadCertificate, match="at least one DNS name"):
        an_authority().sign_serving([], make_key().public_key(), now=NOW, lifetime=DAY, serial=1)


@pytest.mark.parametrize("usage", list(Usage))
def test_an_svid_is_good_for_both_ends(usage: Usage) -> None:
    """A workload is client and server with one SVID."""
    authority = an_authority()
    leaf = authority.sign_svid(API, make_key().public_key(), now=NOW, lifetime=timedelta(minutes=5), serial=1)

    peer = verify_peer([leaf.public_bytes(Encoding.DER)], bundles_of(a=authority), now=NOW, usage=usage)

    assert peer.spiffe_id == API
    assert peer.not_after == NOW + timedelta(minutes=5)


def test_an_svid_signed_by_an_intermediate_chains_to_the_root() -> None:
    """Nested authorities work."""
    root = an_authority()
    below = an_authority(issuer=root)
    leaf = below.sign_svid(API, make_key().public_key(), now=NOW, lifetime=timedelta(minutes=5), serial=1)
    chain = [certificate.public_bytes(Encoding.DER) for certificate in (leaf, below.certificate)]

    assert verify_peer(chain, bundles_of(a=root), now=NOW, usage=Usage.CLIENT).spiffe_id == API


def test_the_authority_of_a_trust_domain_carries_its_name() -> None:
    """X509-SVID, section 3.1: a signing certificate should name its trust domain."""
    names = an_authority().certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert [f"spiffe://{A_TEST}"] == names.get_values_for_type(x509.UniformResourceIdentifier)


def test_an_authority_survives_storing() -> None:
    """What goes into a Secret comes back out."""
    authority = an_authority()

    stored = Authority.parse(authority.certificate_pem, authority.key_pem)

    assert authority.certificate == stored.certificate
    assert authority.key_pem == stored.key_pem


def test_the_key_is_not_printed() -> None:
    """repr() goes to logs."""
    assert "key" not in repr(an_authority())


def test_a_key_of_another_certificate_is_refused() -> None:
    """A half-updated Secret must not be used."""
    with pytest.raises(BadCertificate, match="does not belong"):
        Authority.parse(an_authority().certificate_pem, an_authority().key_pem)


@pytest.mark.parametrize(("certificate_pem", "key_pem"), [(b"", None), (None, b"nonsense")])
def test_unreadable_material_is_refused(certificate_pem: bytes | None, key_pem: bytes | None) -> None:
    """A damaged Secret is an error that says so."""
    good = an_authority()
    with pytest.raises(BadCertificate, match="unreadable PEM"):
        Authority.parse(
            good.certificate_pem if certificate_pem is None else certificate_pem,
            good.key_pem if key_pem is None else key_pem,
        )


def test_a_key_of_another_kind_is_refused() -> None:
    """Only elliptic-curve keys sign here."""
    key = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(BadCertificate, match="elliptic-curve"):
        Authority.parse(an_authority().certificate_pem, key)
