"""Make a certificate authority and sign leaves: serving certificates (DNS names) and X.509-SVIDs (one SPIFFE ID).

Refuses nothing by itself but malformed material; who may have which certificate is the caller's decision.
Pure but for `make_key`: clock and serial are arguments.
Keys are P-256: every peer we meet can use them, and a signature costs microseconds.
Source: RFC 5280 section 4.2; X509-SVID sections 2 to 5; CA/Browser Forum profile for serving certificates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.errors import BadCertificate
from certs.spiffe import SpiffeId, TrustDomain

__all__ = ["Authority", "make_key"]

BACKDATE = timedelta(
    seconds=60
)  # a verifier whose clock lags must not refuse a fresh certificate; nodes drift by seconds


def make_key() -> ec.EllipticCurvePrivateKey:
    """Return a new P-256 private key (the one function here that draws randomness)."""
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A CA certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def make(
        cls,
        *,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        now: datetime,
        lifetime: timedelta,
        serial: int,
        trust_domain: TrustDomain | None = None,
        issuer: Self | None = None,
    ) -> Self:
        """Return a CA named *name*: self-signed, or signed by *issuer*; with *trust_domain*, marked as its CA."""
        builder = (
            _certificate(_name(name), key.public_key(), issuer, now, lifetime, serial)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
        )
        if trust_domain is not None:
            uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")
            builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        return cls(certificate=builder.sign(issuer.key if issuer else key, hashes.SHA256()), key=key)

    @classmethod
    def parse(cls, certificate_pem: bytes, key_pem: bytes) -> Self:
        """Return the CA stored as two PEM texts. Raises BadCertificate, also when they do not belong together."""
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError) as error:
            raise BadCertificate(f"certificate authority: unreadable PEM: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise BadCertificate("certificate authority: the key must be an elliptic-curve key")
        if certificate.public_key() != key.public_key():
            raise BadCertificate("certificate authority: the key does not belong to the certificate")
        return cls(certificate=certificate, key=key)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key in unencrypted PKCS#8 PEM: for a Secret, never for a log or a disk."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def sign_serving(
        self,
        dns_names: Sequence[str],
        public_key: ec.EllipticCurvePublicKey,
        *,
        now: datetime,
        lifetime: timedelta,
        serial: int,
    ) -> x509.Certificate:
        """Return a server certificate for *dns_names* (at least one). Raises BadCertificate."""
        if not dns_names:
            raise BadCertificate("serving certificate: at least one DNS name is needed")
        # The subject stays empty and the names critical: a common name is limited to 64 signs, Service names are not.
        return self._sign_leaf(
            [x509.DNSName(name) for name in dns_names],
            [ExtendedKeyUsageOID.SERVER_AUTH],
            _certificate(x509.Name([]), public_key, self, now, lifetime, serial),
        )

    def sign_svid(
        self,
        spiffe_id: SpiffeId,
        public_key: ec.EllipticCurvePublicKey,
        *,
        now: datetime,
        lifetime: timedelta,
        serial: int,
    ) -> x509.Certificate:
        """Return an X.509-SVID for *spiffe_id*, good for both ends of a connection."""
        return self._sign_leaf(
            [x509.UniformResourceIdentifier(str(spiffe_id))],
            [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            _certificate(x509.Name([]), public_key, self, now, lifetime, serial),
        )

    def _sign_leaf(
        self,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        builder: x509.CertificateBuilder,
    ) -> x509.Certificate:
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(self.key, hashes.SHA256())
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: Authority | None,
    now: datetime,
    lifetime: timedelta,
    serial: int,
) -> x509.CertificateBuilder:
    """Return what a CA and a leaf have in common; no *issuer* means self-signed."""
    issuer_key = issuer.key.public_key() if issuer else public_key
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
