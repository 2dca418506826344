"""Our own identity as values: an X.509-SVID with its key, and the snapshot that one update gives (pure).

Refuses an SVID that peers would refuse: expired, not chaining to its own bundle, with another ID than announced,
or with the key of another certificate.
A federated bundle that cannot be read costs its own domain only, by name in `rejected_domains`.
Source: SPIFFE Workload API section 5.2 (X.509-SVID profile); X509-SVID section 2.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from certs.errors import BadCertificate, BadSpiffeId, UntrustedChain
from certs.spiffe import SpiffeId, TrustDomain
from certs.verify import UNREADABLE, TrustBundles, Usage, verify_peer

__all__ = ["Svid", "X509Snapshot", "split_der"]

_SEQUENCE = 0x30
_LONG_FORM = 0x80
_MAX_LENGTH_BYTES = 3  # 16 MiB: no certificate is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Svid:
    """An X.509-SVID of ours. The key is in memory only, and not in repr()."""

    spiffe_id: SpiffeId
    chain_der: tuple[bytes, ...] = field(repr=False)
    key_der: bytes = field(repr=False)
    serial: int
    not_before: datetime
    not_after: datetime

    @classmethod
    def parse(cls, spiffe_id: SpiffeId, chain: bytes, key_der: bytes, bundles: TrustBundles, *, now: datetime) -> Self:
        """Return the SVID in *chain* (DER certificates in a row, leaf first) and *key_der* (PKCS#8).

        It is judged at *now* as a peer would judge it. Raises BadCertificate.
        """
        chain_der = split_der(chain)
        try:
            # SPIRE puts both extended key usages in; an issuer that does not is the peers' choice to accept, not ours.
            proven = verify_peer(chain_der, bundles, now=now, usage=Usage.CLIENT, strict_eku=False)
        except UntrustedChain as error:
            raise BadCertificate(f"own SVID: {error}") from error
        if proven.spiffe_id != spiffe_id:
            raise BadCertificate(f"own SVID: announced as {spiffe_id}, but the certificate says {proven.spiffe_id}")
        try:
            key = serialization.load_der_private_key(key_der, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BadCertificate("own SVID: unreadable private key") from error  # never its text: it is a key
        leaf = x509.load_der_x509_certificate(chain_der[0])
        if key.public_key() != leaf.public_key():
            raise BadCertificate("own SVID: the key does not belong to the certificate")
        return cls(
            spiffe_id=spiffe_id,
            chain_der=chain_der,
            key_der=key_der,
            serial=proven.serial,
            not_before=proven.not_before,
            not_after=proven.not_after,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class X509Snapshot:
    """What one accepted update of the Workload API says; replaced whole, never changed."""

    svid: Svid
    bundles: TrustBundles
    rejected_domains: frozenset[str]
    """Federated domains whose bundle could not be read: their members are refused."""
    received_at: datetime

    @classmethod
    def parse(
        cls,
        own: tuple[str, bytes, bytes, bytes],
        federated: Mapping[str, bytes],
        *,
        now: datetime,
    ) -> Self:
        """Return the snapshot of *own* (SPIFFE ID, chain, key, bundle; as the Workload API sends them) and *federated*.

        The map replaces what was there before: a domain that is gone from it is trusted no longer.
        Raises BadCertificate when the own SVID or its bundle cannot be used.
        """
        id_text, chain, key_der, bundle = own
        try:
            spiffe_id = SpiffeId.parse(id_text)
        except BadSpiffeId as error:
            raise BadCertificate(f"own SVID: {error}") from error
        anchors = {spiffe_id.trust_domain: load_bundle(bundle)}
        rejected = set()
        for name, blob in federated.items():
            try:
                domain, certificates = TrustDomain.parse(name), load_bundle(blob)
            except (BadSpiffeId, BadCertificate):
                rejected.add(name)
                continue
            # The own bundle comes with the SVID only; a federated entry must never replace or widen it.
            if domain in anchors:
                rejected.add(name)
            else:
                anchors[domain] = certificates
        bundles = TrustBundles(anchors)
        svid = Svid.parse(spiffe_id, chain, key_der, bundles, now=now)
        return cls(svid=svid, bundles=bundles, rejected_domains=frozenset(rejected), received_at=now)


def load_bundle(blob: bytes) -> tuple[x509.Certificate, ...]:
    """Return the anchors in *blob* (DER certificates in a row, at least one). Raises BadCertificate."""
    try:
        anchors = tuple(x509.load_der_x509_certificate(der) for der in split_der(blob))
    except UNREADABLE as error:
        raise BadCertificate(f"bundle: unreadable certificate: {error}") from error
    if not anchors:
        raise BadCertificate("bundle: empty")
    return anchors


def split_der(blob: bytes) -> tuple[bytes, ...]:
    """Return the DER sequences that stand in a row in *blob*, unread. Raises BadCertificate unless they fill it."""
    return tuple(_sequences(blob))


def _sequences(blob: bytes) -> Iterable[bytes]:
    start = 0
    while start < len(blob):
        if len(blob) < start + 2 or blob[start] != _SEQUENCE:
            raise BadCertificate("certificates: not a row of DER sequences")
        length, body = blob[start + 1], start + 2
        if length >= _LONG_FORM:
            width = length - _LONG_FORM
            if not 1 <= width <= _MAX_LENGTH_BYTES:
                raise BadCertificate("certificates: a DER length out of bounds")
            length, body = int.from_bytes(blob[body : body + width]), body + width
        end = body + length
        if end > len(blob):
            raise BadCertificate("certificates: the last one is cut off")
        yield blob[start:end]
        start = end
