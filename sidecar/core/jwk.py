"""Decides which published keys may have signed something: by use, by algorithm, by kind and by size.

Refuses private keys that anybody can read, keys of another curve or kind than the algorithm's, short RSA keys, and all
symmetric ones. RFC 7517; RFC 7518, sections 3.3 and 3.4; RFC 7638 (thumbprint).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jwt
from jwt.utils import base64url_encode

MIN_RSA_BITS: Final = 2048  # RFC 7518, section 3.3
_CURVES: Final = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}  # RFC 7518, section 3.4
_THUMBPRINT: Final = {"EC": ("crv", "x", "y"), "OKP": ("crv", "x"), "RSA": ("e", "n")}  # beside kty (RFC 7638, 3.2)


def verifying_key(described: Mapping[str, Any], algorithms: Sequence[str]) -> jwt.PyJWK | None:
    """Return the key that *described* (a JWK) is, or None for one that cannot have signed by any of *algorithms*."""
    operations = described.get("key_ops", ["verify"])
    if described.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    if "d" in described or described.get("kty") == "oct":  # a private key that everybody can read proves nothing
        return None
    named = described.get("alg")
    for algorithm in algorithms if named is None else (named,):
        if algorithm not in algorithms:
            return None
        if described.get("crv") != _CURVES.get(algorithm, described.get("crv")):
            continue  # the library would take a P-384 key for ES256
        try:
            key = jwt.PyJWK(dict(described), algorithm)
        except (jwt.PyJWTError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
            continue  # of another kind than the algorithm's, or nonsense: the library checks little of it
        return None if key.key_type == "RSA" and key.key.key_size < MIN_RSA_BITS else key
    return None


def thumbprint(described: Mapping[str, Any]) -> str:
    """Return the key's name by its content (RFC 7638, SHA-256); raises KeyError or TypeError for what is no public key."""
    kind = str(described["kty"])
    members = {name: str(described[name]) for name in _THUMBPRINT[kind]} | {"kty": kind}
    canonical = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    return base64url_encode(hashlib.sha256(canonical).digest()).decode()
