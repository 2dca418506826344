"""SPIFFE IDs, trust domains and patterns."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.errors import BadSpiffeId
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain

# The grammar of SPIFFE-ID section 2, written a second time and differently: whole texts instead of parts.
WHOLE = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/(?!\.{1,2}(/|\Z))[a-zA-Z0-9._-]+)+\Z")

domains = st.text(string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=40)
segments = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=20).filter(
    lambda text: text not in (".", "..")
)
ids = st.builds(
    lambda domain, path: f"spiffe://{domain}/{'/'.join(path)}", domains, st.lists(segments, min_size=1, max_size=6)
)
nearly_ids = st.builds(
    lambda text, sign, at: text[: at % (len(text) + 1)] + sign + text[at % (len(text) + 1) :],
    ids,
    st.sampled_from([*"/.%?#@:*A \n\0\\é~", "//", "/..", "spiffe://", ""]),
    st.integers(0, 200),
)


@given(ids)
def test_an_id_is_printed_as_it_was_read(text: str) -> None:
    """Parsing and printing are inverse."""
    assert text == str(SpiffeId.parse(text))


@given(st.one_of(nearly_ids, st.text(), st.text().map("spiffe://".__add__)))
def test_exactly_what_the_standard_allows_is_read(text: str) -> None:
    """The parser accepts a text if and only if the grammar of the standard does, and never raises anything else."""
    try:
        SpiffeId.parse(text)
    except BadSpiffeId:
        accepted = False
    else:
        accepted = True

    assert accepted == bool(WHOLE.match(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must start with"),
        ("https://a.test/x", "must start with"),
        ("SPIFFE://a.test/x", "must start with"),
        ("spiffe://A.test/x", "trust domain"),
        ("spiffe:///x", "trust domain"),
        ("spiffe://user@a.test/x", "trust domain"),
        ("spiffe://a.test:8443/x", "trust domain"),
        ("spiffe://a.te%73t/x", "trust domain"),
        ("spiffe://a.test", "needs a path"),
        ("spiffe://a.test/", "path segment"),
        ("spiffe://a.test/x/", "path segment"),
        ("spiffe://a.test//x", "path segment"),
        ("spiffe://a.test/x/../y", "relative"),
        ("spiffe://a.test/./y", "relative"),
        ("spiffe://a.test/x%2fy", "path segment"),
        ("spiffe://a.test/x?y", "path segment"),
        ("spiffe://a.test/x#y", "path segment"),
        ("spiffe://a.test/x\n", "path segment"),
        ("spiffe://a.test/ü", "path segment"),
        ("spiffe://a.test/*", "path segment"),
        (f"spiffe://{'a' * 256}/x", "longer than 255"),
        (f"spiffe://a.test/{'x' * 2048}", "longer than 2048"),
    ],
)
def test_a_malformed_id_is_refused_and_the_rule_named(text: str, why: str) -> None:
    """An error says which rule was broken."""
    with pytest.raises(BadSpiffeId, match=why):
        SpiffeId.parse(text)


def test_the_longest_allowed_id_is_read() -> None:
    """2048 bytes with a trust domain of 255 are within the standard."""
    text = f"spiffe://{'a' * 255}/"
    text += "x" * (2048 - len(text))

    assert text == str(SpiffeId.parse(text))


def test_an_id_made_from_parts_is_checked_as_well() -> None:
    """There is no way round the length limit by construction."""
    with pytest.raises(BadSpiffeId, match="longer than 2048"):
        SpiffeId(TrustDomain("a.test"), ("x" * 2048,))


def test_the_kubernetes_convention_gives_namespace_and_service_account() -> None:
    """/ns/<namespace>/sa/<service account> is read, and nothing that only resembles it."""
    pod = SpiffeId.parse("spiffe://a.test/ns/pay/sa/api")
    other = SpiffeId.parse("spiffe://a.test/ns/pay/sa/api/more")

    assert (pod.namespace, pod.service_account, pod.path) == ("pay", "api", "/ns/pay/sa/api")
    assert (other.namespace, other.service_account) == (None, None)


def test_a_trust_domain_is_read_with_and_without_scheme() -> None:
    """Bundle maps name a domain by its ID, settings by its name."""
    assert TrustDomain("a.test") == TrustDomain.parse("spiffe://a.test") == TrustDomain.parse("a.test")
    assert str(TrustDomain("a.test")) == "a.test"


@pytest.mark.parametrize(
    ("pattern", "spiffe_id", "matches"),
    [
        ("spiffe://a.test/ns/pay/sa/api", "spiffe://a.test/ns/pay/sa/api", True),
        ("spiffe://a.test/ns/pay/sa/api", "spiffe://a.test/ns/pay/sa/apis", False),
        ("spiffe://a.test/ns/pay/sa/api", "spiffe://b.test/ns/pay/sa/api", False),
        ("spiffe://a.test/ns/pay/sa/api", "spiffe://a.test/ns/pay/sa/API", False),
        ("spiffe://a.test/ns/*/sa/api", "spiffe://a.test/ns/pay/sa/api", True),
        ("spiffe://a.test/ns/*/sa/api", "spiffe://a.test/ns/pay/extra/sa/api", False),
        ("spiffe://a.test/ns/*", "spiffe://a.test/ns/pay/sa/api", False),
        ("spiffe://a.test/ns/pay/**", "spiffe://a.test/ns/pay/sa/api", True),
        ("spiffe://a.test/ns/pay/**", "spiffe://a.test/ns/payroll/sa/api", False),
        ("spiffe://a.test/ns/pay/**", "spiffe://a.test/ns/pay", False),
        ("spiffe://a.test/**", "spiffe://a.test/x", True),
        ("spiffe://a.test/**", "spiffe://a.test.evil/x", False),
    ],
)
def test_patterns_compare_whole_segments(pattern: str, spiffe_id: str, matches: bool) -> None:
    """A pattern never matches by a prefix of text."""
    assert matches is SpiffePattern.parse(pattern).matches(SpiffeId.parse(spiffe_id))


@given(ids, ids)
def test_an_exact_pattern_matches_its_id_only(one: str, other: str) -> None:
    """exactly() and parse() of an ID mean equality."""
    spiffe_id = SpiffeId.parse(one)

    assert SpiffePattern.exactly(spiffe_id) == SpiffePattern.parse(one)
    assert SpiffePattern.parse(one).matches(spiffe_id)
    assert SpiffePattern.parse(one).matches(SpiffeId.parse(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("spiffe://*/x", "trust domain"),
        ("spiffe://a.test", "for every ID"),
        ("spiffe://a.test/**/x", "last segment"),
        ("spiffe://a.test/ns/pay*", "path segment"),
        ("spiffe://a.test/ns/***", "path segment"),
        (f"spiffe://a.test/{'x' * 2048}", "longer than 2048"),
    ],
)
def test_a_malformed_pattern_is_refused_and_the_rule_named(text: str, why: str) -> None:
    """Wildcards stand for whole segments of a named trust domain, nothing else."""
    with pytest.raises(BadSpiffeId, match=why):
        SpiffePattern.parse(text)


def test_a_pattern_made_from_parts_is_checked_as_well() -> None:
    """There is no way round the length limit by construction."""
    with pytest.raises(BadSpiffeId, match="longer than 2048"):
        SpiffePattern(TrustDomain("a.test"), ("x" * 2048,))


def test_a_pattern_is_printed_as_it_was_read() -> None:
    """Settings print what was configured."""
    assert str(SpiffePattern.parse("spiffe://a.test/ns/*/**")) == "spiffe://a.test/ns/*/**"
