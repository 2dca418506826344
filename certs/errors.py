"""What can go wrong with identities: an error says which rule was broken, and refused peers and agents have a reason.

Reasons are enums because audit records, metrics and readiness print them; nobody branches on the text of an error.
"""

from enum import StrEnum

__all__ = [
    "BadCertificate",
    "BadSpiffeId",
    "BadToken",
    "CertsError",
    "Expired",
    "PeerReason",
    "UntrustedChain",
    "WorkloadApiError",
    "WorkloadReason",
]


class PeerReason(StrEnum):
    """Why a handshake was refused."""

    NO_CERTIFICATE = "no-certificate"
    MALFORMED = "malformed"
    BAD_IDENTITY = "bad-identity"
    UNKNOWN_TRUST_DOMAIN = "unknown-trust-domain"
    UNTRUSTED_CHAIN = "untrusted-chain"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    BAD_USAGE = "bad-usage"
    UNAUTHORISED = "unauthorised"
    SESSION_RESUMED = "session-resumed"
    OWN_SVID_MISSING = "own-svid-missing"
    OWN_SVID_EXPIRED = "own-svid-expired"
    TLS = "tls"


class WorkloadReason(StrEnum):
    """Why the Workload API gave no usable identity."""

    NO_AGENT = "no-agent"
    NO_IDENTITY = "no-identity"
    MALFORMED = "malformed"
    AMBIGUOUS = "ambiguous"
    SILENT = "silent"
    REJECTED = "rejected"


class CertsError(Exception):
    """Anything this package refuses."""


class BadSpiffeId(CertsError):  # noqa: N818 - the names say what is wrong; the parent says that it is an error
    """The text is no SPIFFE ID, trust domain or pattern."""


class BadCertificate(CertsError):  # noqa: N818 - same
    """Our own certificate, key or trust anchor cannot be used."""


class BadToken(CertsError):  # noqa: N818 - same
    """A caller's JWT-SVID proves no identity."""


class UntrustedChain(CertsError):  # noqa: N818 - same
    """A peer's certificate chain proves no identity; *serial* is the leaf's, when it could be read."""

    def __init__(self, reason: PeerReason, detail: str, *, serial: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.serial = serial


class Expired(UntrustedChain):
    """The peer's leaf is outside its validity (reason `expired` or `not-yet-valid`)."""


class WorkloadApiError(CertsError):
    """The Workload API refused, failed, or sent what cannot be used."""

    def __init__(self, reason: WorkloadReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
