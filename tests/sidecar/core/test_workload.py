"""Callers without mutual TLS: their tokens, where they are allowed, and what is refused."""

from datetime import UTC, datetime, timedelta

import pytest

from certs.embedded import EmbeddedDomain
from certs.jwt_verify import JwtBundles
from certs.spiffe import SpiffeId, TrustDomain
from sidecar.core import workload
from sidecar.core.identity import authenticate, trust
from sidecar.core.profile import Identity
from sidecar.core.workload import HEADER, WorkloadTokens
from sidecar.errors import Reason, Refusal
from tests.builders import AGENT, NOW_S, a_connection, a_peer


def _at(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


OWN = "spiffe://a.test/ns/pay/sa/billing"
BOT = SpiffeId.parse("spiffe://b.test/ns/x/sa/bot")
LIFE_S = 300
A = EmbeddedDomain(TrustDomain("a.test"), svid_lifetime=timedelta(seconds=LIFE_S), now=lambda: _at(NOW_S))
B = EmbeddedDomain(TrustDomain("b.test"), svid_lifetime=timedelta(seconds=LIFE_S), now=lambda: _at(NOW_S))
BUNDLES = JwtBundles.parse({"a.test": A.token_bundle, "b.test": B.token_bundle})
ALLOWED = Identity(
    mtls="strict", user="optional", callers=("spiffe://a.test/ns/agents/**", "spiffe://b.test/**"), jwt_svid="allowed"
)
LEEWAY_S = 30


def tokens() -> WorkloadTokens:
    """The keys of both domains, and our name."""
    return WorkloadTokens(bundles=BUNDLES, audience=OWN)


def test_a_token_stands_in_for_a_certificate_where_that_is_allowed() -> None:
    """Also under `strict`: the caller is a verified workload; it ends with its token."""
    connection = a_connection(headers=[(HEADER, A.issue_token(AGENT, [OWN]).encode())])
    principal = authenticate(connection, trust(ALLOWED, {}, tokens()), NOW_S)

    assert principal.workload == AGENT
    assert principal.expires_at_s == NOW_S + LIFE_S + LEEWAY_S


@pytest.mark.parametrize(
    ("domain", "spiffe_id", "pattern", "allowed"),
    [
        (B, BOT, "spiffe://b.test/**", True),
        (B, BOT, "spiffe://b.test/ns/*/sa/bot", True),
        (B, BOT, "spiffe://b.test/ns/xx/**", False),
        (B, BOT, "spiffe://a.test/**", False),
        (A, AGENT, "spiffe://b.test/**", False),
    ],
)
def test_a_federated_domains_caller_is_judged_by_its_own_pattern(
    domain: EmbeddedDomain, spiffe_id: SpiffeId, pattern: str, *, allowed: bool
) -> None:
    """Patterns name the trust domain; each domain's keys vouch for its own members."""
    identity = Identity(user="optional", callers=(pattern,), jwt_svid="allowed")
    connection = a_connection(headers=[(HEADER, domain.issue_token(spiffe_id, [OWN]).encode())])
    if allowed:
        assert authenticate(connection, trust(identity, {}, tokens()), NOW_S).workload == spiffe_id
    else:
        with pytest.raises(Refusal) as refused:
            authenticate(connection, trust(identity, {}, tokens()), NOW_S)
        assert refused.value.reason is Reason.FORBIDDEN_CALLER


@pytest.mark.parametrize(
    ("identity", "keys", "token", "detail"),
    [
        (Identity(mtls="permissive", user="optional"), tokens(), A.issue_token(AGENT, [OWN]), "profile does not allow"),
        (ALLOWED, None, A.issue_token(AGENT, [OWN]), "no keys"),
        (ALLOWED, tokens(), A.issue_token(AGENT, [OWN + "x"]), "Audience"),
        (ALLOWED, tokens(), B.issue_token(AGENT, [OWN]), "unknown key"),
        (ALLOWED, tokens(), "", "not a JWT"),
    ],
)
def test_a_token_that_may_not_count_is_refused(
    identity: Identity, keys: WorkloadTokens | None, token: str, detail: str
) -> None:
    """Never passed over: whoever shows a token wants to be somebody."""
    connection = a_connection(headers=[(HEADER, token.encode())])

    with pytest.raises(Refusal) as refused:
        authenticate(connection, trust(identity, {}, keys), NOW_S)
    assert refused.value.reason is Reason.UNAUTHENTICATED
    assert detail in refused.value.detail
    assert not token or token not in refused.value.detail


def test_a_token_beside_a_certificate_is_refused() -> None:
    """Two identities on one call: nobody could say which of them asked."""
    connection = a_connection(headers=[(HEADER, A.issue_token(AGENT, [OWN]).encode())], peer=a_peer())

    with pytest.raises(Refusal) as refused:
        authenticate(connection, trust(ALLOWED, {}, tokens()), NOW_S)
    assert "beside a certificate" in refused.value.detail


def test_without_token_and_certificate_strict_refuses_and_permissive_does_not() -> None:
    """As without JWT-SVIDs."""
    with pytest.raises(Refusal) as refused:
        authenticate(a_connection(), trust(ALLOWED, {}, tokens()), NOW_S)
    assert refused.value.detail == "no SVID"

    lenient = Identity(mtls="permissive", user="optional", jwt_svid="allowed")
    assert authenticate(a_connection(), trust(lenient, {}, tokens()), NOW_S).workload is None


def test_a_verified_token_is_remembered_but_not_beyond_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked once a minute; refused when its time is over, remembered or not; the memory is bounded."""
    monkeypatch.setattr(workload, "MAX_CACHED", 2)
    trusted = trust(ALLOWED, {}, tokens())
    connection = a_connection(headers=[(HEADER, A.issue_token(AGENT, [OWN]).encode())])
    checked = []
    original = workload.verify_token
    monkeypatch.setattr(workload, "verify_token", lambda *a, **k: checked.append(1) or original(*a, **k))
    for after_s, expected in ((0, 1), (59, 1), (61, 2)):
        authenticate(connection, trusted, NOW_S + after_s)
        assert len(checked) == expected
    with pytest.raises(Refusal):
        authenticate(connection, trusted, NOW_S + LIFE_S + LEEWAY_S)
    for _ in range(3):
        other = a_connection(headers=[(HEADER, A.issue_token(AGENT, [OWN, str(len(checked))]).encode())])
        authenticate(other, trusted, NOW_S)
    assert trusted.tokens
    assert len(trusted.tokens.verified) == 2
