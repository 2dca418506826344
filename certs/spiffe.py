"""Parse and print SPIFFE IDs, trust domains and the patterns that settings compare them with (pure).

Refuses everything the standard does not allow instead of repairing it: no lower-casing, percent-decoding or trimming.
Two spellings of one identity would be two identities to whoever compares strings.
Source: SPIFFE-ID (spiffe.io, "The SPIFFE Identity and Verifiable Identity Document"), sections 2.1 to 2.4.
"""

import re
from dataclasses import dataclass
from typing import Self

from certs.errors import BadSpiffeId

__all__ = ["SpiffeId", "SpiffePattern", "TrustDomain"]

SCHEME = "spiffe://"
MAX_ID_BYTES = 2048  # SPIFFE-ID section 2.3: implementations must support 2048, must not generate more
MAX_TRUST_DOMAIN_BYTES = 255  # same section
ONE_SEGMENT = "*"
ANY_REST = "**"

# \Z, because $ would accept a trailing newline. ASCII by construction: the classes are spelled out.
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+\Z")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+\Z")


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """The authority part of a SPIFFE ID, such as `prod.example`."""

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > MAX_TRUST_DOMAIN_BYTES:
            raise BadSpiffeId(f"trust domain: longer than {MAX_TRUST_DOMAIN_BYTES} bytes")
        if not _TRUST_DOMAIN.match(self.name):
            raise BadSpiffeId(f"trust domain {self.name!r}: only a-z, 0-9, '.', '_' and '-' are allowed, at least one")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the trust domain written as `prod.example` or, as bundle maps do, `spiffe://prod.example`.

        Raises BadSpiffeId.
        """
        return cls(text.removeprefix(SCHEME))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """The identity of one workload. A trust domain alone is a TrustDomain, never a SpiffeId: no workload may own it."""

    trust_domain: TrustDomain
    segments: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise BadSpiffeId(f"SPIFFE ID {SCHEME}{self.trust_domain}: a workload needs a path")
        for segment in self.segments:
            _check_segment(segment)
        if len(str(self)) > MAX_ID_BYTES:
            raise BadSpiffeId(f"SPIFFE ID: longer than {MAX_ID_BYTES} bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the ID spelled *text*; str() of it is *text* again. Raises BadSpiffeId."""
        domain, segments = _split(text)
        return cls(domain, segments)

    @property
    def path(self) -> str:
        """The path with its leading slash."""
        return "/" + "/".join(self.segments)

    @property
    def namespace(self) -> str | None:
        """The Kubernetes namespace, when the path follows /ns/<namespace>/sa/<service account>."""
        match self.segments:
            case ("ns", namespace, "sa", _):
                return namespace
        return None

    @property
    def service_account(self) -> str | None:
        """The Kubernetes service account, under the same convention."""
        match self.segments:
            case ("ns", _, "sa", service_account):
                return service_account
        return None

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}{self.path}"


@dataclass(frozen=True, slots=True, order=True)
class SpiffePattern:
    """A set of SPIFFE IDs of one trust domain: `*` stands for one segment, a last `**` for one or more.

    Whole segments are compared, never prefixes of text: `/ns/pay/**` must not admit `/ns/payroll/sa/x`.
    A wildcard in the trust domain is refused: whom to trust is said by name.
    """

    trust_domain: TrustDomain
    segments: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise BadSpiffeId(f"pattern {SCHEME}{self.trust_domain}: say {SCHEME}{self.trust_domain}/** for every ID")
        if ANY_REST in self.segments[:-1]:
            raise BadSpiffeId("pattern: '**' is allowed only as the last segment")
        for segment in self.segments:
            if segment not in (ONE_SEGMENT, ANY_REST):
                _check_segment(segment)
        if len(str(self)) > MAX_ID_BYTES:
            raise BadSpiffeId(f"pattern: longer than {MAX_ID_BYTES} bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pattern spelled *text*, an exact ID being the pattern of itself. Raises BadSpiffeId."""
        domain, segments = _split(text)
        return cls(domain, segments)

    @classmethod
    def exactly(cls, spiffe_id: SpiffeId) -> Self:
        """Return the pattern that only *spiffe_id* matches."""
        return cls(spiffe_id.trust_domain, spiffe_id.segments)

    def matches(self, spiffe_id: SpiffeId) -> bool:
        """Say whether *spiffe_id* belongs to the set."""
        if spiffe_id.trust_domain != self.trust_domain:
            return False
        wanted, given = self.segments, spiffe_id.segments
        if wanted[-1] == ANY_REST:
            wanted = wanted[:-1]
            if len(given) <= len(wanted):
                return False
            given = given[: len(wanted)]
        return len(wanted) == len(given) and all(
            want in (ONE_SEGMENT, have) for want, have in zip(wanted, given, strict=True)
        )

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/{'/'.join(self.segments)}"


def _split(text: str) -> tuple[TrustDomain, tuple[str, ...]]:
    """Return trust domain and path segments, the latter not yet checked."""
    if len(text) > MAX_ID_BYTES:
        raise BadSpiffeId(f"SPIFFE ID: longer than {MAX_ID_BYTES} bytes")
    if not text.startswith(SCHEME):
        raise BadSpiffeId(f"SPIFFE ID {text!r}: must start with {SCHEME!r}")
    domain, *segments = text.removeprefix(SCHEME).split("/")
    return TrustDomain(domain), tuple(segments)


def _check_segment(segment: str) -> None:
    if not _SEGMENT.match(segment):
        raise BadSpiffeId(f"path segment {segment!r}: only letters, digits, '.', '_' and '-' are allowed, at least one")
    if segment in (".", ".."):
        raise BadSpiffeId(f"path segment {segment!r}: relative segments are not allowed")
