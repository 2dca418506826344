"""Identities for one bench: a trust domain of its own, a server's and a client's SVID in it, as files.

The same keys and the same chain length for every target: a handshake and a record cost what the proxy makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from bench.loader import Keys
from bench.targets import Files
from certs.embedded import EmbeddedDomain
from certs.spiffe import SpiffeId, TrustDomain
from certs.svid import split_der

if TYPE_CHECKING:
    from pathlib import Path

SERVER_ID: Final = SpiffeId.parse("spiffe://bench.test/ns/bench/sa/server")
CLIENT_ID: Final = SpiffeId.parse("spiffe://bench.test/ns/bench/sa/agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The trust domain; what servers show, what the loader shows, and a loader without identity."""

    domain: EmbeddedDomain
    server: Files
    client: Keys
    nobody: Keys

    @classmethod
    def made(cls, directory: Path) -> Self:
        """Write the files into *directory*."""
        domain = EmbeddedDomain(TrustDomain.parse("bench.test"), svid_lifetime=timedelta(hours=1))
        anchors = directory / "anchors.pem"
        anchors.write_bytes(_pem(domain.bundle_der))
        certificate, key = _written(directory, domain, CLIENT_ID)
        server_certificate, server_key = _written(directory, domain, SERVER_ID)
        return cls(
            domain=domain,
            server=Files(anchors=anchors, certificate=server_certificate, key=server_key),
            client=Keys(anchors=str(anchors), certificate=str(certificate), key=str(key)),
            nobody=Keys(anchors=str(anchors)),
        )


def _written(directory: Path, domain: EmbeddedDomain, spiffe_id: SpiffeId) -> tuple[Path, Path]:
    """Return the files that hold a fresh SVID's chain and key."""
    svid = domain.issue(spiffe_id)
    name = spiffe_id.segments[-1]
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    certificate.write_bytes(_pem(svid.x509_svid))
    private = load_der_private_key(svid.x509_svid_key, password=None)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, key


def _pem(certificates_der: bytes) -> bytes:
    return b"".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in split_der(certificates_der)
    )
