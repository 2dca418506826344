"""Decide which SPIFFE ID a peer's certificate chain proves (pure).

A leaf is verified only against the anchors of its own trust domain:
with one merged store any federated domain could forge the IDs of every other.
Refuses leaves without exactly one SPIFFE URI, CA certificates, wrong key usage, expired ones without leeway.
URI name constraints on a CA are not supported by the validator, which then refuses the chain.
Source: X509-SVID sections 2, 4 and 5; RFC 5280 section 6, performed by cryptography's verifier.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError

from certs.errors import BadSpiffeId, Expired, PeerReason, UntrustedChain
from certs.spiffe import SpiffeId, TrustDomain

__all__ = ["Peer", "TrustBundles", "Usage", "verify_peer"]

UNREADABLE = (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""What reading a certificate and its extensions raises, whatever the bytes."""
MAX_CHAIN = 8  # certificates a peer may send; SPIRE sends 1, nested SPIRE 2 or 3; path building grows with it
MAX_INTERMEDIATES = 4

_CA_POLICY = ExtensionPolicy.webpki_defaults_ca()
# The rules for leaves stand in _check_leaf, where each has its own reason; unknown critical extensions stay refused.
_LEAF_POLICY = ExtensionPolicy.permit_all()


class Usage(StrEnum):
    """Which end of the connection the peer is; the value is the extended key usage it needs."""

    CLIENT = "clientAuth"
    SERVER = "serverAuth"


_USAGE_OID = {Usage.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH, Usage.SERVER: ExtendedKeyUsageOID.SERVER_AUTH}


class TrustBundles:
    """The trust anchors of each trust domain; immutable. A domain without anchors is not in it."""

    __slots__ = ("_anchors", "_stores")

    def __init__(self, anchors: Mapping[TrustDomain, Iterable[x509.Certificate]]) -> None:
        held = {domain: tuple(certificates) for domain, certificates in anchors.items()}
        self._anchors = MappingProxyType(
            {domain: certificates for domain, certificates in held.items() if certificates}
        )
        # Stores are safe to keep; verifiers are not (see verify_peer).
        self._stores = {domain: Store(list(certificates)) for domain, certificates in self._anchors.items()}

    @property
    def domains(self) -> frozenset[TrustDomain]:
        """The domains whose members can be verified."""
        return frozenset(self._anchors)

    def anchors(self, domain: TrustDomain) -> tuple[x509.Certificate, ...]:
        """Return the anchors of *domain*, none when it is unknown."""
        return self._anchors.get(domain, ())

    def store(self, domain: TrustDomain) -> Store | None:
        """Return the anchors of *domain* alone, as the verifier wants them."""
        return self._stores.get(domain)

    def __contains__(self, domain: TrustDomain) -> bool:
        return domain in self._anchors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrustBundles) and self._anchors == other._anchors

    def __hash__(self) -> int:
        return hash(frozenset(self._anchors.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, as its certificate proved at one moment. Nothing else makes one."""

    spiffe_id: SpiffeId
    serial: int
    not_before: datetime
    not_after: datetime
    chain_der: tuple[bytes, ...] = field(repr=False)
    """The chain as sent, leaf first, so that a live connection can be judged again when bundles change."""


def verify_peer(
    chain_der: Sequence[bytes],
    bundles: TrustBundles,
    *,
    now: datetime,
    usage: Usage,
    strict_eku: bool = True,
) -> Peer:
    """Return the peer that *chain_der* (leaf first) proves at *now*.

    With *strict_eku* the leaf must name *usage*; without it any extended key usage passes, as in go-spiffe.
    Raises Expired when the leaf is outside its validity, UntrustedChain for every other doubt.
    """
    leaf, *intermediates = _load(chain_der)
    spiffe_id = _check_leaf(leaf, now, usage, strict_eku=strict_eku)
    store = bundles.store(spiffe_id.trust_domain)
    if store is None:
        raise UntrustedChain(
            PeerReason.UNKNOWN_TRUST_DOMAIN, f"no bundle for {spiffe_id.trust_domain}", serial=leaf.serial_number
        )
    # Built for this handshake: a verifier keeps the clock it was built with, and a cached one accepts expired leaves.
    # ClientVerifier in both directions, because ServerVerifier insists on DNS or IP names.
    verifier = (
        PolicyBuilder()
        .store(store)
        .time(now)
        .max_chain_depth(MAX_INTERMEDIATES)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, intermediates)
    except VerificationError as error:
        raise UntrustedChain(
            PeerReason.UNTRUSTED_CHAIN,
            f"{spiffe_id} does not chain to the bundle of its trust domain: {error}",
            serial=leaf.serial_number,
        ) from error
    return Peer(
        spiffe_id=spiffe_id,
        serial=leaf.serial_number,
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        chain_der=tuple(chain_der),
    )


def _load(chain_der: Sequence[bytes]) -> list[x509.Certificate]:
    if not chain_der:
        raise UntrustedChain(PeerReason.NO_CERTIFICATE, "no certificate was presented")
    if len(chain_der) > MAX_CHAIN:
        raise UntrustedChain(PeerReason.MALFORMED, f"a chain of {len(chain_der)} certificates; at most {MAX_CHAIN}")
    try:
        return [x509.load_der_x509_certificate(der) for der in chain_der]
    except UNREADABLE as error:
        raise UntrustedChain(PeerReason.MALFORMED, f"unreadable certificate: {error}") from error


def _check_leaf(leaf: x509.Certificate, now: datetime, usage: Usage, *, strict_eku: bool) -> SpiffeId:
    """Return the leaf's SPIFFE ID. Raises UntrustedChain for each rule about the leaf alone."""
    serial = leaf.serial_number
    try:
        extensions = leaf.extensions
    except UNREADABLE as error:
        raise UntrustedChain(PeerReason.MALFORMED, f"unreadable extensions: {error}", serial=serial) from error
    spiffe_id = _identity(extensions, serial)
    if now < leaf.not_valid_before_utc:
        raise Expired(PeerReason.NOT_YET_VALID, f"{spiffe_id}: valid from {leaf.not_valid_before_utc}", serial=serial)
    if now > leaf.not_valid_after_utc:
        raise Expired(PeerReason.EXPIRED, f"{spiffe_id}: expired {leaf.not_valid_after_utc}", serial=serial)
    fault = _usage_fault(extensions, usage, strict_eku=strict_eku)
    if fault is not None:
        raise UntrustedChain(PeerReason.BAD_USAGE, f"{spiffe_id}: {fault}", serial=serial)
    return spiffe_id


def _identity(extensions: x509.Extensions, serial: int) -> SpiffeId:
    """Return the one SPIFFE ID in the leaf (X509-SVID section 2: exactly one URI SAN)."""
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        uris = []
    else:
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    # Two URIs are how a federated CA smuggles a foreign ID past software that looks for any match.
    if len(uris) != 1:
        raise UntrustedChain(PeerReason.BAD_IDENTITY, f"{len(uris)} URI names; exactly one is needed", serial=serial)
    try:
        return SpiffeId.parse(uris[0])
    except BadSpiffeId as error:
        raise UntrustedChain(PeerReason.BAD_IDENTITY, str(error), serial=serial) from error


def _usage_fault(extensions: x509.Extensions, usage: Usage, *, strict_eku: bool) -> str | None:
    """Return what is wrong with the leaf's usages (X509-SVID section 4), or None."""
    try:
        key_usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return "no key usage"
    if not key_usage.digital_signature or key_usage.key_cert_sign or key_usage.crl_sign:
        return "key usage must be digitalSignature without keyCertSign and cRLSign"
    for extension in extensions:
        match extension.value:
            case x509.BasicConstraints(ca=True):
                return "a CA certificate is no workload"
            case x509.ExtendedKeyUsage() as extended if strict_eku and _USAGE_OID[usage] not in extended:
                return f"extended key usage lacks {usage}"
    return None
