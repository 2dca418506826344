"""Finds secrets and personal data in text, by name: what a content rule's `patterns` mean.

Each detector is a regular expression for RE2, which takes linear time, and where digits alone say little a check of
them: Luhn for cards, mod 97 for IBANs. Prefers a miss to a nuisance: a detector wants what its issuer prints, in its
usual spelling, and does not undo encodings. Sources: the issuers' documentation of their formats; ISO/IEC 7812 (cards),
ISO 13616 (IBAN), RFC 7468 (PEM), RFC 7519 (JWT), Social Security Administration (SSN).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from sidecar.core.profile import Detected

Span = tuple[int, int]
MAX_LOOKS: Final = 50_000  # at candidates of one rule in one message; the dearest take 20 us, and every call waits
LOOK_BYTES: Final = 16  # of a candidate: a longer one takes as many looks more
CARD_DIGITS: Final = range(13, 20)
IBAN_CHARS: Final = range(15, 35)


class TooManyCandidates(Exception):  # noqa: N818 - names what was found
    """A message holds more of what may be it than there is time to check."""


@dataclass(slots=True)
class Looks:
    """How many looks are left for one rule in one message, or in all of a body, and how often it found something."""

    left: int = MAX_LOOKS
    found: int = 0

    def take(self, size_bytes: int) -> None:
        """Look at a candidate; raises TooManyCandidates."""
        self.left -= 1 + size_bytes // LOOK_BYTES
        if self.left < 0:
            raise TooManyCandidates


@dataclass(frozen=True, slots=True)
class Detector:
    """What to look for; *refine*, where given, says which parts of a candidate really are it."""

    pattern: str
    refine: Callable[[bytes], Iterator[Span]] | None = None


def _cards(run: bytes) -> Iterator[Span]:
    """Yield the card numbers in *run*, digits with single spaces or hyphens between them; groups are not cut."""
    groups = [(found.start(), found.end()) for found in re.finditer(rb"\d+", run)]
    first = 0
    while first < len(groups):
        digits, found = b"", None
        for last in range(first, len(groups)):
            digits += run[slice(*groups[last])]
            if len(digits) > CARD_DIGITS[-1]:
                break
            if len(digits) in CARD_DIGITS and digits[:1] in b"23456" and _passes_luhn(digits):
                found = last
        if found is not None:
            yield groups[first][0], groups[found][1]
            first = found
        first += 1


def _passes_luhn(digits: bytes) -> bool:
    odd, even = digits[-1::-2], digits[-2::-2]
    return (sum(digit - 48 for digit in odd) + sum(sum(divmod(2 * (digit - 48), 10)) for digit in even)) % 10 == 0


def _ibans(candidate: bytes) -> Iterator[Span]:
    """Yield the IBAN with which *candidate* begins, if it does; words may follow it."""
    ends = [found.start() for found in re.finditer(rb" |\Z", candidate)]
    for end in reversed(ends):
        compact = candidate[:end].replace(b" ", b"")
        if len(compact) in IBAN_CHARS and _passes_mod_97(compact):
            yield 0, end
            return


def _passes_mod_97(iban: bytes) -> bool:
    return int("".join(str(int(chr(each), 36)) for each in iban[4:] + iban[:4])) % 97 == 1


def _ssns(candidate: bytes) -> Iterator[Span]:
    """Yield *candidate* unless it is a number that is never given out."""
    area, group, serial = candidate.split(b"-")
    if area not in (b"000", b"666") and area < b"900" and group != b"00" and serial != b"0000":
        yield 0, len(candidate)


DETECTORS: Final[Mapping[Detected, Detector]] = {
    "aws-key": Detector(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b"),
    "google-key": Detector(r"\bAIza[0-9A-Za-z_-]{35}"),
    "github-token": Detector(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b"),
    "gitlab-token": Detector(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "slack-token": Detector(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "private-key": Detector(
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"(?s:.*?)(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\z)"
    ),
    "jwt": Detector(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    "credit-card": Detector(r"\b[2-6](?:[ -]?\d){12,}\b", _cards),  # no card begins as milliseconds of our time do
    "iban": Detector(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _ibans),
    "email": Detector(r"[\pL\pN._%+-]+@[\pL\pN-]+(?:\.[\pL\pN-]+)*\.\pL{2,}"),
    "us-ssn": Detector(r"\b\d{3}-\d{2}-\d{4}\b", _ssns),
}
assert set(DETECTORS) == set(get_args(Detected))  # noqa: S101 - the schema of the resources lists the same names


def spans(
    text: bytes, compiled: Any, refine: Callable[[bytes], Iterator[Span]] | None = None, looks: Looks | None = None
) -> Iterator[Span]:
    """Yield where *compiled*, a pattern of RE2, finds something in *text*; overlapping candidates are all looked at.

    Raises TooManyCandidates when there are no *looks* left; None: there always are.
    """
    at = 0
    while at < len(text) and (found := compiled.search(text, at)) is not None:
        start, end = found.span()
        if refine is None:
            if end > start:
                yield start, end
            at = max(end, start + 1)
            continue
        if looks is not None:
            looks.take(end - start)
        inner = [(start + one, start + other) for one, other in refine(text[start:end])]
        yield from inner
        # A candidate may hide the beginning of another one, unless it was looked at as a whole.
        at = inner[-1][1] if inner else end if refine is _cards else start + 1
