"""Plan the life of the webhook's own CA: what has to happen next, from what is held and what time it is.

A new CA is trusted (staged) before it signs and the old one still trusted after, so that at every moment each API
server trusts the leaf that each replica serves. Everything follows from the certificates; replicas need no leader,
as all plan the same from one Secret and its resourceVersion lets one of them win. Refuses a Secret that cannot be read:
replacing it silently would cut off every API server that trusts it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority
from certs.errors import BadCertificate

RENEW_AT: Final = 2 / 3  # of a lifetime: two thirds used leaves one third to notice that renewal fails


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long a CA and a leaf are good for, and how long a CA is trusted before it signs."""

    ca: timedelta
    leaf: timedelta
    staging: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorities:
    """The CA that signs, the one that will, and the certificate of the one that did."""

    current: Authority
    staged: Authority | None = None
    retired: x509.Certificate | None = None

    @classmethod
    def parse(cls, data: Mapping[str, bytes]) -> Self | None:
        """Return what a Secret's *data* holds, None when it is empty. Raises BadCertificate."""
        if not data:
            return None
        if "ca.crt" not in data or "ca.key" not in data:
            raise BadCertificate(f"Secret of the CA: ca.crt and ca.key are expected, found {', '.join(sorted(data))}")
        staged = None
        if "staged.crt" in data and "staged.key" in data:
            staged = Authority.parse(data["staged.crt"], data["staged.key"])
        try:
            retired = x509.load_pem_x509_certificate(data["retired.crt"]) if "retired.crt" in data else None
        except ValueError as error:
            raise BadCertificate(f"Secret of the CA: retired.crt: {error}") from error
        return cls(current=Authority.parse(data["ca.crt"], data["ca.key"]), staged=staged, retired=retired)

    def data(self) -> dict[str, bytes]:
        """Return the data of the Secret that `parse` reads these from."""
        data = {"ca.crt": self.current.certificate_pem, "ca.key": self.current.key_pem}
        if self.staged:
            data |= {"staged.crt": self.staged.certificate_pem, "staged.key": self.staged.key_pem}
        if self.retired:
            data["retired.crt"] = self.retired.public_bytes(Encoding.PEM)
        return data

    def trusted_pem(self) -> bytes:
        """Return the caBundle: every CA that may have signed a leaf that is being served, or soon will."""
        staged = self.staged.certificate_pem if self.staged else b""
        retired = self.retired.public_bytes(Encoding.PEM) if self.retired else b""
        return self.current.certificate_pem + staged + retired


def due(held: Authorities | None, now: datetime, lifetimes: Lifetimes, make: Callable[[], Authority]) -> Authorities:
    """Return what to hold now: *held* itself when nothing is due, else the result of one step, with a CA by *make*."""
    if held is None or now >= held.current.certificate.not_valid_after_utc:
        return Authorities(current=make())
    taken_over = held.current.certificate.not_valid_before_utc + lifetimes.staging
    if held.retired and now >= taken_over + lifetimes.leaf:  # its last leaf has expired
        return replace(held, retired=None)
    if held.staged and now >= held.staged.certificate.not_valid_before_utc + lifetimes.staging:
        return Authorities(current=held.staged, retired=held.current.certificate)
    if held.staged is None and is_due(held.current.certificate, now):
        return replace(held, staged=make())
    return held


def needs_leaf(leaf: x509.Certificate | None, authority: Authority, now: datetime) -> bool:
    """Return whether a new leaf has to be signed: none, growing old, or by another CA than signs now."""
    if leaf is None or is_due(leaf, now):
        return True
    try:
        leaf.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):  # another CA signed it
        return True
    return False


def is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether two thirds of the certificate's life are over."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= start + (end - start) * RENEW_AT
