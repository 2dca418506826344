"""sidecar.core.detectors: what counts as a secret or as personal data, and what only looks like it."""

import pytest
import re2

from sidecar.core.detectors import DETECTORS, spans
from sidecar.core.profile import Detected

JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"
PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----"


def found(name: Detected, text: str) -> list[str]:
    """What the detector *name* finds in *text*."""
    data, detector = text.encode(), DETECTORS[name]
    places = spans(data, re2.compile(detector.pattern.encode()), detector.refine)
    return [data[start:end].decode() for start, end in places]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("aws-key", "id=AKIAIOSFODNN7EXAMPLE,", ["AKIAIOSFODNN7EXAMPLE"]),
        ("google-key", "AIza" + "a" * 35, ["AIza" + "a" * 35]),
        ("github-token", f"ghp_{'a1' * 18} github_pat_{'b' * 22}", ["ghp_" + "a1" * 18, "github_pat_" + "b" * 22]),
        ("gitlab-token", f"glpat-{'x' * 20}", [f"glpat-{'x' * 20}"]),
        ("slack-token", "token xoxb-12345-abcdef!", ["xoxb-12345-abcdef"]),
        ("private-key", f"key: {PEM} end", [PEM]),
        ("private-key", "-----BEGIN PRIVATE KEY-----\nMHcC, and no end", ["-----BEGIN PRIVATE KEY-----\nMHcC, and no end"]),
        ("jwt", f"Bearer {JWT}", [JWT]),
        ("credit-card", "4111111111111111", ["4111111111111111"]),
        ("credit-card", "pay 4111 1111 1111 1111, now", ["4111 1111 1111 1111"]),
        ("credit-card", "5500-0000-0000-0004", ["5500-0000-0000-0004"]),
        ("credit-card", "order 1234 4111 1111 1111 1111 9", ["4111 1111 1111 1111"]),
        ("iban", "AB12 DE89 3704 0044 0532 0130 00 NEXT WORD", ["DE89 3704 0044 0532 0130 00"]),
        ("iban", "GB82WEST12345698765432", ["GB82WEST12345698765432"]),
        ("email", "mail nora.o'neil@mail.example.org.", ["neil@mail.example.org"]),
        ("email", "zoë@beispiel.de", ["zoë@beispiel.de"]),
        ("us-ssn", "078-05-1120", ["078-05-1120"]),
    ],
)  # fmt: skip
def test_what_it_names_is_found(name: Detected, text: str, expected: list[str]) -> None:
    """Wherever it stands, and nothing around it."""
    assert expected == found(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("aws-key", "AKIAIOSFODNN7EXAMPLEX"),
        ("aws-key", "XAKIAIOSFODNN7EXAMPLE"),
        ("github-token", "ghp_short"),
        ("private-key", "-----BEGIN PUBLIC KEY-----\nMHcC\n-----END PUBLIC KEY-----"),
        ("jwt", "eyJhbGciOi.something.else"),
        ("credit-card", "4111111111111112"),
        ("credit-card", "1111111111111117"),
        ("credit-card", "2026-11-22 19:03:07"),
        ("credit-card", "41111111111111110000000"),
        ("iban", "DE88370400440532013000"),
        ("email", "nora@localhost"),
        ("us-ssn", "000-12-3456"),
        ("us-ssn", "900-12-3456"),
        ("us-ssn", "123-00-4567"),
        ("us-ssn", "1234-05-1120"),
    ],
)
def test_what_only_looks_like_it_is_left(name: Detected, text: str) -> None:
    """A rule that fires at everything is soon turned off."""
    assert found(name, text) == []
