"""Certificates for the tests of certs: authorities, and leaves with any fault one can ask for."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.authority import Authority, make_key
from certs.spiffe import SpiffeId, TrustDomain
from certs.verify import TrustBundles

# The real time, since OpenSSL asks no other clock; whole seconds, as certificates have no finer ones.
NOW = datetime.now(UTC).replace(microsecond=0)
LIFETIME = timedelta(hours=1)
CA_LIFETIME = timedelta(hours=2)
A_TEST = TrustDomain("a.test")
B_TEST = TrustDomain("b.test")
API = SpiffeId.parse("spiffe://a.test/ns/pay/sa/api")
BOTH_USAGES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def an_authority(domain: TrustDomain = A_TEST, *, now: datetime = NOW, issuer: Authority | None = None) -> Authority:
    """A CA of *domain*, good for CA_LIFETIME."""
    return Authority.make(
        name=f"CA of {domain}",
        key=make_key(),
        now=now,
        lifetime=CA_LIFETIME,
        serial=x509.random_serial_number(),
        trust_domain=domain,
        issuer=issuer,
    )


def bundles_of(**authorities: Authority) -> TrustBundles:
    """Trust by first label: a=ca trusts ca for a.test."""
    return TrustBundles({TrustDomain(f"{label}.test"): [made.certificate] for label, made in authorities.items()})


def key_usage(*, digital_signature: bool = True, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    """A key usage extension with these bits."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def a_leaf(  # one argument per fault
    issuer: Authority,
    *,
    uris: Sequence[str] = (str(API),),
    dns_names: Sequence[str] = (),
    usage: x509.KeyUsage | None = None,
    without_usage: bool = False,
    extended: Iterable[x509.ObjectIdentifier] | None = BOTH_USAGES,
    is_ca: bool | None = False,
    not_before: datetime = NOW - timedelta(minutes=1),
    not_after: datetime = NOW + LIFETIME,
    key: ec.EllipticCurvePrivateKey | None = None,
    extra: x509.ExtensionType | None = None,
) -> bytes:
    """A leaf signed by *issuer*, DER."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.DNSName(name) for name in dns_names]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.certificate.subject)
        .public_key((key or make_key()).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    if not without_usage:
        builder = builder.add_extension(usage or key_usage(), critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
    if is_ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER)


def der(authority: Authority) -> bytes:
    """The certificate of *authority*."""
    return authority.certificate.public_bytes(Encoding.DER)


def key_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as the Workload API sends it."""
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
