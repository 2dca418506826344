"""Which chains prove which identity: one test per rule, each with its reason."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import assume, example, given
from hypothesis import strategies as st

from certs.errors import Expired, PeerReason, UntrustedChain
from certs.verify import TrustBundles, Usage, verify_peer
from tests.certs.pki import (
    A_TEST,
    API,
    B_TEST,
    CA_LIFETIME,
    LIFETIME,
    NOW,
    a_leaf,
    an_authority,
    bundles_of,
    der,
    key_usage,
)

A = an_authority()
B = an_authority(B_TEST)
BOTH = bundles_of(a=A, b=B)


def refusal(chain: list[bytes], bundles: TrustBundles = BOTH, usage: Usage = Usage.CLIENT) -> UntrustedChain:
    """The error that *chain* meets at NOW."""
    with pytest.raises(UntrustedChain) as caught:
        verify_peer(chain, bundles, now=NOW, usage=usage)
    return caught.value


def test_a_good_chain_proves_its_identity() -> None:
    """All that later stages need is in the Peer."""
    leaf = a_leaf(A)

    peer = verify_peer([leaf], BOTH, now=NOW, usage=Usage.CLIENT)

    assert peer.spiffe_id == API
    assert (peer.not_before, peer.not_after) == (NOW - timedelta(minutes=1), NOW + LIFETIME)
    assert peer.serial == x509.load_der_x509_certificate(leaf).serial_number
    assert peer.chain_der == (leaf,)


@pytest.mark.parametrize("usage", list(Usage))
def test_an_id_signed_by_another_domains_authority_is_refused(usage: Usage) -> None:
    """A federated domain cannot forge our identities, though its CA is trusted for its own."""
    forged = a_leaf(B)

    error = refusal([forged], usage=usage)

    assert error.reason is PeerReason.UNTRUSTED_CHAIN
    assert error.serial == x509.load_der_x509_certificate(forged).serial_number


@pytest.mark.parametrize(
    "uris",
    [
        ["spiffe://b.test/x", str(API)],
        [str(API), "spiffe://b.test/x"],
        [str(API), str(API)],
        [str(API), "https://a.test/"],
        [],
    ],
)
def test_a_leaf_needs_exactly_one_uri(uris: list[str]) -> None:
    """Two URIs are the way to smuggle a foreign ID past whoever looks for any match."""
    assert refusal([a_leaf(B, uris=uris)]).reason is PeerReason.BAD_IDENTITY


@pytest.mark.parametrize("uri", ["https://a.test/x", "spiffe://a.test", "spiffe://A.test/x", "spiffe://a.test/x/"])
def test_a_uri_that_is_no_workload_id_is_refused(uri: str) -> None:
    """The ID in a certificate is held to the same grammar."""
    assert refusal([a_leaf(A, uris=[uri])]).reason is PeerReason.BAD_IDENTITY


def test_a_leaf_with_dns_names_only_is_refused() -> None:
    """A serving certificate of the same CA is no workload."""
    assert refusal([a_leaf(A, uris=[], dns_names=["a.test"])]).reason is PeerReason.BAD_IDENTITY


def test_a_leaf_may_have_dns_names_beside_its_id() -> None:
    """X509-SVID allows other kinds of names."""
    chain = [a_leaf(A, dns_names=["api.pay.svc"])]

    assert verify_peer(chain, BOTH, now=NOW, usage=Usage.CLIENT).spiffe_id == API


def test_an_expired_leaf_is_refused() -> None:
    """No leeway after the end."""
    error = refusal([a_leaf(A, not_after=NOW - timedelta(seconds=1))])

    assert isinstance(error, Expired)
    assert error.reason is PeerReason.EXPIRED


def test_a_leaf_of_the_future_is_refused() -> None:
    """No leeway before the beginning either: issuers backdate."""
    error = refusal([a_leaf(A, not_before=NOW + timedelta(seconds=1))])

    assert isinstance(error, Expired)
    assert error.reason is PeerReason.NOT_YET_VALID


def test_a_leaf_that_expires_between_two_handshakes_is_refused_at_the_second() -> None:
    """Nothing keeps the clock of an earlier verification."""
    chain = [a_leaf(A, not_after=NOW + timedelta(seconds=1))]

    assert verify_peer(chain, BOTH, now=NOW, usage=Usage.CLIENT).spiffe_id == API
    with pytest.raises(Expired):
        verify_peer(chain, BOTH, now=NOW + timedelta(seconds=2), usage=Usage.CLIENT)


def test_a_chain_to_an_expired_authority_is_refused() -> None:
    """An anchor in the bundle is trusted only while it is valid."""
    late = NOW + 2 * CA_LIFETIME
    chain = [a_leaf(A, not_after=late + LIFETIME)]

    with pytest.raises(UntrustedChain) as caught:
        verify_peer(chain, BOTH, now=late, usage=Usage.CLIENT)

    assert caught.value.reason is PeerReason.UNTRUSTED_CHAIN


def test_an_unknown_trust_domain_is_refused() -> None:
    """Without a bundle there is no trust."""
    assert refusal([a_leaf(B, uris=["spiffe://b.test/x"])], bundles_of(a=A)).reason is PeerReason.UNKNOWN_TRUST_DOMAIN


def test_a_ca_certificate_is_no_workload() -> None:
    """Not even with a proper ID."""
    assert refusal([a_leaf(A, is_ca=True)]).reason is PeerReason.BAD_USAGE


def test_a_leaf_without_basic_constraints_is_accepted() -> None:
    """They are optional for leaves (X509-SVID, section 4.1)."""
    assert verify_peer([a_leaf(A, is_ca=None)], BOTH, now=NOW, usage=Usage.CLIENT).spiffe_id == API


@pytest.mark.parametrize(
    "usage", [key_usage(digital_signature=False), key_usage(key_cert_sign=True), key_usage(crl_sign=True)]
)
def test_a_leaf_with_the_wrong_key_usage_is_refused(usage: x509.KeyUsage) -> None:
    """The bit digitalSignature is a must; signing certificates or revocation lists is not for workloads."""
    assert refusal([a_leaf(A, usage=usage)]).reason is PeerReason.BAD_USAGE


def test_a_leaf_without_key_usage_is_refused() -> None:
    """X509-SVID, section 4.3: the extension must be set."""
    assert refusal([a_leaf(A, without_usage=True)]).reason is PeerReason.BAD_USAGE


@pytest.mark.parametrize(
    ("usage", "other"),
    [(Usage.CLIENT, ExtendedKeyUsageOID.SERVER_AUTH), (Usage.SERVER, ExtendedKeyUsageOID.CLIENT_AUTH)],
)
def test_a_leaf_for_the_other_end_is_refused_when_strict(usage: Usage, other: x509.ObjectIdentifier) -> None:
    """A server-only certificate calls nobody, and the other way round; the check can be turned off."""
    chain = [a_leaf(A, extended=[other])]

    assert refusal(chain, usage=usage).reason is PeerReason.BAD_USAGE
    assert verify_peer(chain, BOTH, now=NOW, usage=usage, strict_eku=False).spiffe_id == API


def test_a_leaf_without_extended_key_usage_is_accepted() -> None:
    """The extension may be absent (X509-SVID, section 4.4)."""
    assert verify_peer([a_leaf(A, extended=None)], BOTH, now=NOW, usage=Usage.CLIENT).spiffe_id == API


def test_an_unknown_critical_extension_is_refused() -> None:
    """RFC 5280, section 4.2: what is critical and not understood must be refused."""
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")

    assert refusal([a_leaf(A, extra=unknown)]).reason is PeerReason.UNTRUSTED_CHAIN


def test_a_missing_intermediate_is_refused() -> None:
    """The chain must be complete as sent."""
    below = an_authority(issuer=A)

    assert refusal([a_leaf(below)]).reason is PeerReason.UNTRUSTED_CHAIN


def test_an_intermediate_may_be_the_anchor() -> None:
    """Bundles may hold intermediates."""
    below = an_authority(issuer=A)

    peer = verify_peer([a_leaf(below)], bundles_of(a=below), now=NOW, usage=Usage.CLIENT)

    assert peer.spiffe_id == API


def test_no_certificate_is_refused() -> None:
    """Nobody is nobody."""
    assert refusal([]).reason is PeerReason.NO_CERTIFICATE


def test_an_endless_chain_is_refused_unread() -> None:
    """The cost of a handshake is bounded."""
    assert refusal([a_leaf(A)] + [der(A)] * 8).reason is PeerReason.MALFORMED


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_are_refused(blob: bytes) -> None:
    """No input raises anything but UntrustedChain."""
    assert refusal([blob]).reason is PeerReason.MALFORMED


GOOD = a_leaf(A)
# How many bits of the signature's last byte do not count: it is outside what is signed, and changes nothing that is.
UNUSED_BITS = GOOD.rindex(x509.load_der_x509_certificate(GOOD).signature) - 1


# The library warns of a serial number that the flip made negative, before the signature is found wrong.
@pytest.mark.filterwarnings("ignore:Parsed a serial number:cryptography.utils.CryptographyDeprecationWarning")
@example(at=15, flip=128)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_leaf_with_one_altered_byte_is_refused(at: int, flip: int) -> None:
    """Every byte of a certificate counts; a damaged one raises UntrustedChain and nothing else."""
    assume(at != UNUSED_BITS)
    altered = bytearray(GOOD)
    altered[at] ^= flip

    refusal([bytes(altered)])


def test_unreadable_extensions_are_refused() -> None:
    """A name that is no text is malformed, not a crash."""
    leaf = bytearray(GOOD)
    at = leaf.index(b"spiffe://")
    leaf[at] = 0xFF

    assert refusal([bytes(leaf)]).reason is PeerReason.MALFORMED


def test_bundles_know_their_domains() -> None:
    """A domain without anchors is not there at all."""
    bundles = TrustBundles({A_TEST: [A.certificate], B_TEST: []})

    assert bundles.domains == frozenset({A_TEST})
    assert A_TEST in bundles
    assert B_TEST not in bundles
    assert bundles.anchors(A_TEST) == (A.certificate,)
    assert bundles.anchors(B_TEST) == ()


def test_bundles_are_values() -> None:
    """Equal anchors make equal bundles, so that an unchanged update is recognised."""
    assert bundles_of(a=A) == bundles_of(a=A)
    assert hash(bundles_of(a=A)) == hash(bundles_of(a=A))
    assert bundles_of(a=A) != BOTH
