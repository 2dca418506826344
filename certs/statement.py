"""A statement signed with an X.509-SVID: who made it can be proven later, by the trust domain's bundle of that time.

A JWS with the chain in `x5c` (RFC 7515, 4.1.6). Refuses a signer whose chain does not lead to the bundle of its own trust
domain at the time that the statement names; X509-SVID section 5.
"""

import base64
import binascii
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs.errors import UntrustedChain
from certs.spiffe import SpiffeId
from certs.svid import Svid
from certs.verify import UNREADABLE, TrustBundles, Usage, verify_peer

__all__ = ["BadStatement", "sign", "verify"]

TYPE = "sidegate-statement+jwt"
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


class BadStatement(ValueError):  # noqa: N818 - names what is wrong
    """A statement is not believed; the message says why."""


def sign(claims: Mapping[str, Any], svid: Svid, *, now: datetime) -> str:
    """Return the JWS of *claims* and `iat`, by the key of *svid*."""
    key = serialization.load_der_private_key(svid.key_der, password=None)
    x5c = [base64.b64encode(each).decode() for each in svid.chain_der]
    headers = {"typ": TYPE, "x5c": x5c}
    stated = {**claims, "iat": int(now.timestamp())}
    return jwt.encode(stated, key, algorithm=_algorithm(key.public_key()), headers=headers)  # type: ignore[arg-type] # checked by _algorithm


def verify(statement: str, bundles: TrustBundles) -> tuple[SpiffeId, dict[str, Any]]:
    """Return who signed *statement*, and its claims. Raises BadStatement."""
    try:
        header = jwt.get_unverified_header(statement)
        chain = [base64.b64decode(each, validate=True) for each in header.get("x5c", ())]
        key = x509.load_der_x509_certificate(chain[0]).public_key()
        claims = jwt.decode(
            statement,
            key,  # type: ignore[arg-type] # a key of another kind is refused by _algorithm
            algorithms=[_algorithm(key)],
            options={
                "require": ["iat"],
                "verify_iat": False,
                "verify_exp": False,
                "verify_nbf": False,
                "verify_aud": False,
            },
        )
        at = datetime.fromtimestamp(claims["iat"], UTC)
        if header.get("typ") != TYPE:
            raise BadStatement(f"type {header.get('typ')!r} is not {TYPE}")
        peer = verify_peer(chain, bundles, now=at, usage=Usage.CLIENT, strict_eku=False)
    except (
        jwt.PyJWTError,
        binascii.Error,
        LookupError,
        TypeError,
        OverflowError,
        UntrustedChain,
        *UNREADABLE,
    ) as error:
        raise BadStatement(str(error) or type(error).__name__) from error
    return peer.spiffe_id, claims


def _algorithm(key: object) -> str:
    """Return the JWS algorithm of a public *key*: the key decides it, never the header. Raises BadStatement."""
    if isinstance(key, rsa.RSAPublicKey):
        return "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    raise BadStatement("a key of this kind cannot sign")
