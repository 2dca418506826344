"""sidecar.core.jwk: a published key is used only for what it is."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from sidecar.core.jwk import thumbprint, verifying_key

JWK: dict[str, Any] = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)


def test_a_key_verifies_by_the_algorithm_of_its_curve() -> None:
    """The first of those that are allowed."""
    key = verifying_key(JWK, ("RS256", "ES256"))

    assert key is not None
    assert key.algorithm_name == "ES256"


@pytest.mark.parametrize(
    ("changes", "algorithms"),
    [
        ({"use": "enc"}, ("ES256",)),
        ({"key_ops": ["sign"]}, ("ES256",)),
        ({"key_ops": "verify"}, ("ES256",)),
        ({"d": "eA"}, ("ES256",)),
        ({"alg": "RS256"}, ("ES256", "RS256")),
        ({"alg": "ES256"}, ("RS256",)),
        ({"crv": "P-384"}, ("ES256",)),
        ({"x": "eA"}, ("ES256",)),
        ({"kty": "oct", "k": "eA"}, ("HS256", "ES256")),
        ({}, ("ES384",)),
    ],
    ids=str,
)
def test_another_use_kind_or_curve_is_no_key(changes: dict[str, Any], algorithms: tuple[str, ...]) -> None:
    """And a private key that everybody can read proves nothing."""
    assert verifying_key({**JWK, **changes}, algorithms) is None


def test_the_thumbprint_is_that_of_the_rfc() -> None:
    """RFC 7638, 3.1: its own example; other members do not count."""
    jwk = {
        "kty": "RSA",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",  # noqa: E501 - as printed there
        "e": "AQAB",
        "alg": "RS256",
        "kid": "2011-04-29",
    }

    assert thumbprint(jwk) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


@pytest.mark.parametrize("described", [{}, {"kty": "oct", "k": "eA"}, {"kty": "EC"}])
def test_what_is_no_public_key_has_no_thumbprint(described: dict[str, Any]) -> None:
    """The caller refuses it."""
    with pytest.raises(LookupError):
        thumbprint(described)
