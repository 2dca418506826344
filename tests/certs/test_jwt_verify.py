"""Callers' JWT-SVIDs: which prove an identity, and why each of the others does not."""

import base64
import hashlib
import hmac
import json
from datetime import timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from certs import jwt_verify
from certs.errors import BadToken
from certs.jwt_verify import JwtBundles, verify_token
from certs.spiffe import SpiffeId
from tests.certs.pki import A_TEST, API, B_TEST, NOW

AUDIENCE = "spiffe://a.test/ns/records/sa/default"
NOW_S = int(NOW.timestamp())
EC, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
EC384, RSA, WEAK = (
    ec.generate_private_key(ec.SECP384R1()),
    rsa.generate_private_key(65537, 2048),
    rsa.generate_private_key(65537, 1024),  # noqa: S505 - it is the one that is refused
)
ED = ed25519.Ed25519PrivateKey.generate()


def a_jwk(key: Any, kid: str, **changes: Any) -> dict[str, Any]:
    """A key as a trust domain publishes it."""
    kinds: dict[type, Any] = {ec.EllipticCurvePrivateKey: ECAlgorithm, rsa.RSAPrivateKey: RSAAlgorithm}
    algorithm: Any = next((made for kind, made in kinds.items() if isinstance(key, kind)), OKPAlgorithm)
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "jwt-svid", **changes}


def a_document(*keys: dict[str, Any]) -> bytes:
    """A JWK set."""
    return json.dumps({"keys": keys}).encode()


A_KEYS = a_document(
    a_jwk(EC, "ec"), a_jwk(EC384, "ec384"), a_jwk(RSA, "rsa"), a_jwk(WEAK, "weak"), a_jwk(ED, "ed"),
    {**a_jwk(RSA, "unused"), "use": "sig"}, a_jwk(OTHER, "x509", use="x509-svid"), {**a_jwk(OTHER, "private"), "d": "AQ"},
)  # fmt: skip
BUNDLES = JwtBundles.parse({"spiffe://a.test": A_KEYS, "spiffe://b.test": a_document(a_jwk(OTHER, "b"))})


def a_token(
    key: Any = EC, alg: str = "ES256", kid: str | None = "ec", head: dict[str, Any] | None = None, **claims: Any
) -> str:
    """A JWT-SVID of API for us; a claim or header of None is left out."""
    full = {"sub": str(API), "aud": [AUDIENCE], "exp": NOW_S + 300, "iat": NOW_S, **claims}
    header = {"typ": "JWT", "kid": kid, **(head or {})}
    return jwt.encode(
        {name: value for name, value in full.items() if value is not None},
        key,
        algorithm=alg,
        headers={name: value for name, value in header.items() if value is not None},
    )


def raw_token(header: dict[str, Any], claims: dict[str, Any], secret: bytes = b"") -> str:
    """A token that no library would make: unsigned, or signed with a public key as if it were a secret."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    signature = hmac.digest(secret, b".".join(parts), hashlib.sha256) if secret else b""
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


GOOD_CLAIMS = {"sub": str(API), "aud": [AUDIENCE], "exp": NOW_S + 300}
PUBLIC = A_KEYS  # any bytes that everybody knows


@pytest.mark.parametrize(
    "token",
    [
        a_token(),
        a_token(aud=AUDIENCE),
        a_token(aud=["https://other.test", AUDIENCE]),
        a_token(head={"typ": None}),
        a_token(head={"typ": "JOSE"}),
        a_token(iat=None),
        a_token(exp=NOW_S - 20),  # within the leeway
        a_token(nbf=NOW_S + 20),
        a_token(iss="https://spire.test"),
        a_token(EC384, "ES384", "ec384"),
        *(a_token(RSA, alg, "rsa") for alg in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    ],
)
def test_a_good_token_proves_its_identity(token: str) -> None:
    """Every algorithm and both forms of audience that the standard allows."""
    proof = verify_token(token, BUNDLES, AUDIENCE, now=NOW)

    assert proof.spiffe_id == API
    assert proof.expires_at <= NOW + timedelta(seconds=330)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("", "not a JWT"),
        ("a.b.c", "not a JWT"),
        ("x" * 9000, "longer than"),
        (raw_token({"alg": "none", "kid": "ec"}, GOOD_CLAIMS), "algorithm"),
        (raw_token({"alg": "HS256", "kid": "ec", "typ": "JWT"}, GOOD_CLAIMS, PUBLIC), "algorithm"),
        (a_token(ED, "EdDSA", "ed"), "unknown key"),
        (a_token(RSA, "RS256", "ec"), "algorithm is not that of the key"),
        (a_token(EC384, "ES384", "ec"), "algorithm is not that of the key"),
        (a_token(kid=None), "unknown key"),
        (a_token(kid="new"), "unknown key"),
        (a_token(kid="weak"), "unknown key"),
        (a_token(OTHER, kid="x509"), "unknown key"),
        (a_token(OTHER, kid="private"), "unknown key"),
        (a_token(RSA, "RS256", "unused"), "unknown key"),
        (a_token(OTHER), "Signature verification failed"),
        (a_token()[:-4] + "AAAA", "Signature verification failed"),
        (a_token(head={"typ": "at+jwt"}), "typ"),
        (a_token(head={"crit": ["x"], "x": 1}), "crit|not a JWT"),
        (a_token(OTHER, kid="b"), "unknown key"),  # b.test's key for an ID of a.test
        (a_token(sub="spiffe://c.test/x"), "no keys for c.test"),
        (a_token(sub="spiffe://a.test"), "sub"),
        (a_token(sub="SPIFFE://a.test/x"), "sub"),
        (a_token(sub="alice"), "sub"),
        (a_token(sub=None), "sub"),
        (a_token(aud=None), "aud"),
        (a_token(aud=[]), "aud"),
        (a_token(aud="https://other.test"), "[Aa]udience"),
        (a_token(aud=[AUDIENCE + "/x"]), "[Aa]udience"),
        (a_token(aud=[1]), "claim format"),
        (a_token(exp=None), "exp"),
        (raw_token({"alg": "ES256", "kid": "ec"}, {**GOOD_CLAIMS, "exp": "soon"}), "Signature"),
        (a_token(exp=NOW_S - 30), "expired"),
        (a_token(exp=NOW_S + 25 * 3600), "longer than a day"),
        (a_token(nbf=NOW_S + 60), "not valid yet"),
    ],
)
def test_a_bad_token_proves_nothing(token: str, why: str) -> None:
    """Each with its reason, and none is quoted."""
    with pytest.raises(BadToken, match=why) as refused:
        verify_token(token, BUNDLES, AUDIENCE, now=NOW)

    assert not token or token not in str(refused.value)


@pytest.mark.parametrize("value", ["300", True, -1, 2**60])
def test_a_signed_end_that_is_no_time_is_refused(value: Any) -> None:
    """The library would take a string, and a clock cannot be compared with all numbers."""
    claims = {**GOOD_CLAIMS, "exp": value}
    token = jwt.api_jws.encode(json.dumps(claims).encode(), EC, "ES256", headers={"kid": "ec"})

    with pytest.raises(BadToken, match="exp is not a time"):
        verify_token(token, BUNDLES, AUDIENCE, now=NOW)


def test_without_an_audience_of_ours_no_token_is_good() -> None:
    """An empty name must not match an empty claim."""
    with pytest.raises(BadToken, match="no audience"):
        verify_token(a_token(aud=""), BUNDLES, "", now=NOW)


def test_a_token_that_ends_between_two_calls_is_refused_at_the_second() -> None:
    """The clock that counts is the one handed in."""
    proof = verify_token(a_token(), BUNDLES, AUDIENCE, now=NOW)

    with pytest.raises(BadToken, match="expired"):
        verify_token(a_token(), BUNDLES, AUDIENCE, now=proof.expires_at)


def test_a_foreign_key_id_of_the_same_name_is_another_key() -> None:
    """b.test publishes a key under a.test's key id: it vouches for b.test only."""
    bundles = JwtBundles.parse({"a.test": A_KEYS, "b.test": a_document(a_jwk(OTHER, "ec"))})

    assert verify_token(a_token(), bundles, AUDIENCE, now=NOW).spiffe_id.trust_domain == A_TEST
    bot = SpiffeId.parse("spiffe://b.test/bot")
    assert verify_token(a_token(OTHER, sub=str(bot)), bundles, AUDIENCE, now=NOW).spiffe_id == bot
    with pytest.raises(BadToken, match="Signature"):
        verify_token(a_token(OTHER), bundles, AUDIENCE, now=NOW)


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"{}", b'{"keys": []}', b'{"keys": [{"kty": "EC"}]}', b'{"keys": [1]}', a_document(a_jwk(EC, "")),
     a_document(a_jwk(EC, "k", crv="P-521")), a_document(a_jwk(EC, "k", kty="oct", k="AAAA")), b"[" * 100_000],
)  # fmt: skip
def test_an_unreadable_bundle_costs_its_own_domain_only(document: bytes) -> None:
    """The others go on."""
    bundles = JwtBundles.parse({"spiffe://a.test": A_KEYS, "spiffe://b.test": document})

    assert bundles.domains == {A_TEST}
    assert bundles.rejected_domains == {"spiffe://b.test"}


def test_keys_without_a_use_are_for_tokens() -> None:
    """SPIRE's agent gives them so; it never sends certificates' keys here."""
    plain = {name: value for name, value in a_jwk(EC, "ec").items() if name != "use"}
    bundles = JwtBundles.parse({"spiffe://a.test": a_document(plain)})

    assert verify_token(a_token(), bundles, AUDIENCE, now=NOW).spiffe_id == API


def test_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain cannot fill our memory."""
    monkeypatch.setattr(jwt_verify, "MAX_KEYS", 1)
    bundles = JwtBundles.parse({"a.test": a_document(a_jwk(EC, "1"), a_jwk(OTHER, "2"))})

    assert bundles.find(A_TEST, "1")
    assert bundles.find(A_TEST, "2") is None
    assert bundles.find(B_TEST, "1") is None


@given(st.text(max_size=200))
def test_any_text_is_a_proof_or_a_refusal(text: str) -> None:
    """Nothing else comes out."""
    with pytest.raises(BadToken):
        verify_token(text, BUNDLES, AUDIENCE, now=NOW)
