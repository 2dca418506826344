"""sidecar.core.dpop: a bound token without its proof is worthless."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode

from certs.verify import Peer
from sidecar.core import dpop as module
from sidecar.core.connection import Connection
from sidecar.core.dpop import NonceWanted, Proofs, check_certificate, check_proof, confirmation, nonce
from sidecar.core.jwk import thumbprint
from sidecar.errors import Reason, Refusal
from tests.builders import AGENT, NOW_S, a_connection

RESOURCE = "https://mcp.test/mcp"
TOKEN_SHA256 = hashlib.sha256(b"the token").digest()
ABSENT = object()


@cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    """A key of that name."""
    del name
    return ec.generate_private_key(ec.SECP256R1())


def jwk_of(name: str = "mine") -> dict[str, Any]:
    """Its public half."""
    return ECAlgorithm.to_jwk(key(name).public_key(), as_dict=True)


def a_proof(
    claims: Mapping[str, Any] | None = None, header: Mapping[str, Any] | None = None, *, by: str = "mine"
) -> str:
    """A good proof but for what is given; ABSENT takes a claim away."""
    made = {
        "htm": "POST",
        "htu": RESOURCE,
        "iat": int(NOW_S),
        "jti": "one",
        "ath": base64url_encode(TOKEN_SHA256).decode(),
        **(claims or {}),
    }
    head = {"alg": "ES256", "typ": "dpop+jwt", "jwk": jwk_of(by), **(header or {})}
    parts = [
        base64url_encode(json.dumps({name: value for name, value in part.items() if value is not ABSENT}).encode())
        for part in (head, made)
    ]
    signed = b".".join(parts)
    signature = jwt.get_algorithm_by_name("ES256").sign(signed, key(by))
    return (signed + b"." + base64url_encode(signature)).decode()


def shown(proof: str | None, *, method: str = "POST", path: str = "/mcp") -> Connection:
    """A request with *proof*."""
    headers = [] if proof is None else [(b"dpop", proof.encode())]
    return a_connection(method=method, path=path, headers=headers)


def check(connection: Connection, proofs: Proofs | None = None, *, now_s: float = NOW_S, nonces: bool = False) -> None:
    """Check the proof of *connection* against my key."""
    held = proofs if proofs is not None else Proofs(nonce_key=b"k" * 32)
    check_proof(connection, TOKEN_SHA256, thumbprint(jwk_of()), RESOURCE, held, now_s, nonces=nonces)


@pytest.mark.parametrize(
    ("claims", "path"),
    [
        ({}, "/mcp"),
        ({"htu": "https://mcp.test:443/mcp?x=1#y"}, "/mcp"),
        ({"htu": "HTTPS://MCP.test/mcp"}, "/mcp"),
        ({"htu": "https://mcp.test/messages"}, "/messages"),
        ({"iat": NOW_S - 59}, "/mcp"),
        ({"iat": NOW_S + 29}, "/mcp"),
    ],
    ids=["plain", "port, query and fragment", "capitals", "another endpoint of ours", "a minute old", "a fast clock"],
)
def test_a_good_proof_passes(claims: dict[str, Any], path: str) -> None:
    """As the libraries in the field write it."""
    check(shown(a_proof(claims), path=path))


def rsa_jwk(bits: int) -> dict[str, Any]:
    """A short key."""
    short = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    return RSAAlgorithm.to_jwk(short.public_key(), as_dict=True)


@pytest.mark.parametrize(
    ("proof", "detail"),
    [
        pytest.param(lambda: None, "there is no DPoP proof", id="none"),
        pytest.param(lambda: "x", "does not verify", id="no JWT"),
        pytest.param(lambda: "x" * (module.MAX_PROOF_CHARS + 1), "no DPoP proof", id="too long"),
        pytest.param(lambda: a_proof({"htm": "GET"}), "another method", id="htm"),
        pytest.param(lambda: a_proof({"htm": "post"}), "another method", id="htm in small letters"),
        pytest.param(lambda: a_proof({"htm": ABSENT}), "another method", id="no htm"),
        pytest.param(lambda: a_proof({"htu": "https://other.test/mcp"}), "another URL", id="htu host"),
        pytest.param(lambda: a_proof({"htu": "http://mcp.test/mcp"}), "another URL", id="htu scheme"),
        pytest.param(lambda: a_proof({"htu": "https://mcp.test:8443/mcp"}), "another URL", id="htu port"),
        pytest.param(lambda: a_proof({"htu": "https://mcp.test/other"}), "another URL", id="htu path"),
        pytest.param(lambda: a_proof({"htu": "https://mcp.test/MCP"}), "another URL", id="htu path in capitals"),
        pytest.param(lambda: a_proof({"htu": "https://[bad/mcp"}), "another URL", id="htu is no URL"),
        pytest.param(lambda: a_proof({"htu": "https://mcp.test:x/mcp"}), "another URL", id="htu has no port"),
        pytest.param(lambda: a_proof({"htu": ""}), "another URL", id="htu empty"),
        pytest.param(lambda: a_proof({"htu": ABSENT}), "another URL", id="no htu"),
        pytest.param(lambda: a_proof({"ath": "x"}), "another token", id="ath"),
        pytest.param(lambda: a_proof({"ath": ABSENT}), "another token", id="no ath"),
        pytest.param(lambda: a_proof({"iat": ABSENT}), "lacks iat", id="no iat"),
        pytest.param(lambda: a_proof({"iat": "1"}), "lacks iat", id="iat is text"),
        pytest.param(lambda: a_proof({"iat": True}), "lacks iat", id="iat is true"),
        pytest.param(lambda: a_proof({"iat": float("nan")}), "too old", id="iat is NaN"),
        pytest.param(lambda: a_proof({"iat": NOW_S - 61}), "too old", id="old"),
        pytest.param(lambda: a_proof({"iat": NOW_S + 31}), "too old", id="from the future"),
        pytest.param(lambda: a_proof({"jti": ABSENT}), "lacks iat or jti", id="no jti"),
        pytest.param(lambda: a_proof({"jti": ""}), "lacks iat or jti", id="empty jti"),
        pytest.param(lambda: a_proof({"jti": 7}), "lacks iat or jti", id="jti is a number"),
        pytest.param(lambda: a_proof(by="yours"), "another key", id="another key"),
        pytest.param(
            lambda: a_proof(header={"jwk": jwk_of("mine")}, by="yours"), "does not verify", id="my key, your signature"
        ),
        pytest.param(lambda: a_proof(header={"typ": "JWT"}), "is no proof", id="typ"),
        pytest.param(lambda: a_proof(header={"typ": ABSENT}), "is no proof", id="no typ"),
        pytest.param(lambda: a_proof(header={"jwk": ABSENT}), "is no proof", id="no key"),
        pytest.param(lambda: a_proof(header={"jwk": "x"}), "is no proof", id="key is text"),
        pytest.param(lambda: a_proof(header={"alg": "none"}), "is no proof", id="alg none"),
        pytest.param(lambda: a_proof(header={"alg": "HS256"}), "is no proof", id="alg HS256"),
        pytest.param(lambda: a_proof(header={"alg": ["ES256"]}), "", id="alg is a list"),
        pytest.param(lambda: a_proof(header={"jwk": {"kty": "oct", "k": "eA"}}), "another key", id="symmetric key"),
        pytest.param(lambda: a_proof(header={"jwk": {**jwk_of(), "d": "eA"}}), "another key", id="private key"),
        pytest.param(lambda: a_proof(header={"alg": "RS256", "jwk": rsa_jwk(1024)}), "another key", id="short RSA"),
        pytest.param(lambda: a_proof(header={"jwk": {"kty": "EC"}}), "another key", id="half a key"),
    ],
)
def test_a_bad_proof_is_refused(proof: Any, detail: str) -> None:
    """Each for its own reason, which only the operator learns."""
    with pytest.raises(Refusal) as caught:
        check(shown(proof()))

    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert detail in caught.value.detail


def test_two_proofs_are_refused() -> None:
    """Which of them counts would be a guess."""
    header = (b"dpop", a_proof().encode())
    with pytest.raises(Refusal) as caught:
        check(a_connection(headers=[header, header]))

    assert caught.value.reason is Reason.MALFORMED


def test_a_proof_serves_once() -> None:
    """Whoever saw it cannot send it again, as long as it would be young enough."""
    proofs = Proofs()
    check(shown(a_proof({"iat": NOW_S + 29})), proofs)
    with pytest.raises(Refusal, match="used before"):
        check(shown(a_proof({"iat": NOW_S + 29})), proofs, now_s=NOW_S + 29 + 59)


def test_proofs_are_forgotten_when_they_are_too_old_anyway() -> None:
    """Memory holds two minutes of them."""
    proofs = Proofs()
    for jti in ("a", "b", "c"):
        check(shown(a_proof({"jti": jti})), proofs)
    check(shown(a_proof({"jti": "d", "iat": NOW_S + 91})), proofs, now_s=NOW_S + 91)

    assert len(proofs.seen) == 1


def test_more_proofs_than_can_be_remembered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting one would let it be used again."""
    monkeypatch.setattr(module, "MAX_PROOFS", 1)
    proofs = Proofs()
    check(shown(a_proof({"jti": "a"})), proofs)
    with pytest.raises(Refusal, match="too many"):
        check(shown(a_proof({"jti": "b"})), proofs)


def test_a_refused_proof_is_not_remembered() -> None:
    """Or anybody could spend the proofs of others."""
    proofs = Proofs()
    with pytest.raises(Refusal):
        check(shown(a_proof({"htm": "GET"})), proofs)
    check(shown(a_proof()), proofs)


def test_a_nonce_is_demanded_and_lasts_for_a_while() -> None:
    """The one in force and the one before; nothing is kept of them."""
    proofs = Proofs(nonce_key=b"k" * 32)
    for shift in (0, module.NONCE_S):
        check(
            shown(a_proof({"nonce": nonce(b"k" * 32, NOW_S), "jti": str(shift), "iat": NOW_S + shift})),
            proofs,
            now_s=NOW_S + shift,
            nonces=True,
        )
    for bad in (ABSENT, "x", nonce(b"k" * 32, NOW_S - 2 * module.NONCE_S), nonce(b"other", NOW_S)):
        with pytest.raises(NonceWanted):
            check(shown(a_proof({"nonce": bad, "jti": "n"})), proofs, nonces=True)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_bytes_are_refused(head: bytes, payload: bytes) -> None:
    """And nothing else happens."""
    proof = b".".join(base64url_encode(part) for part in (head, payload, b"x")).decode()
    with pytest.raises(Refusal):
        check(shown(proof))


# certificates


def with_certificate(der: bytes | None) -> Connection:
    """A connection over mutual TLS with the certificate *der*; None: without."""
    if der is None:
        return a_connection()
    at = datetime.fromtimestamp(NOW_S, UTC)
    return a_connection(peer=Peer(spiffe_id=AGENT, serial=1, not_before=at, not_after=at, chain_der=(der, b"issuer")))


BOUND = base64url_encode(hashlib.sha256(b"leaf").digest()).decode()


def test_a_certificate_proves_the_token_bound_to_it() -> None:
    """RFC 8705: by the leaf's SHA-256."""
    check_certificate(with_certificate(b"leaf"), BOUND)


@pytest.mark.parametrize("der", [None, b"another", b"issuer"])
def test_another_workload_cannot_use_a_stolen_token(der: bytes | None) -> None:
    """Its own certificate is good, and not the one."""
    with pytest.raises(Refusal, match="bound to"):
        check_certificate(with_certificate(der), BOUND)


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({}, (None, None)),
        ({"cnf": {"jkt": "a"}}, ("a", None)),
        ({"cnf": {"x5t#S256": "b"}}, (None, "b")),
        ({"cnf": {"jkt": "a", "x5t#S256": "b"}}, ("a", "b")),
    ],
)
def test_bindings_are_read(claims: dict[str, Any], expected: tuple[str | None, str | None]) -> None:
    """Both kinds, and both at once."""
    assert expected == confirmation(claims)


@pytest.mark.parametrize("bound", [{}, {"kid": "x"}, {"jwk": {}}, "x", [], 7, {"jkt": 7}, {"jkt": ["a"]}, {"jkt": ""}])
def test_a_binding_that_cannot_be_checked_is_refused(bound: Any) -> None:
    """Whoever bound the token meant it."""
    with pytest.raises(Refusal, match="not known here"):
        confirmation({"cnf": bound})
