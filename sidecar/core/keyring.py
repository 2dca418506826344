"""Says whose signatures on bundles are believed: the keys that a pod began with, or those that these announced since.

An announcement is a JWT in which one key names the keys that count from a term on, itself among them or not. The control
plane hands out the last of them with every bundle, so that a sidecar that was away follows from any of its keys to
today's; a key that is not named any more is not believed again. Refuses nothing by itself: an announcement that no
believed key has signed, or of a term that is over, is left out. Source: RFC 7515 (JWS), RFC 8725 section 3.11 (explicit
typing).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Self

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from jwt.utils import der_to_raw_signature

from sidecar.errors import BundleError

ALGORITHM: Final = "ES256"
TYPE: Final = "sidegate-keys+jwt"
MAX_ANNOUNCEMENTS: Final = 16  # that are handed out; each rotation makes two
MAX_TERM: Final = 2**53
_PEM: Final = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)

PublicKey = ec.EllipticCurvePublicKey
PrivateKey = ec.EllipticCurvePrivateKey


def public_keys(pem: str) -> tuple[PublicKey, ...]:
    """Return the keys in *pem*, one block after the other; raises BundleError, also when there is none."""
    keys: list[PublicKey] = []
    for block in _PEM.findall(pem):
        try:
            key = serialization.load_pem_public_key(block.encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BundleError(f"bundle key: not a public key in PEM: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise BundleError("bundle key: only P-256 keys (ES256) are accepted")
        keys.append(key)
    if not keys:
        raise BundleError("bundle key: no PEM block 'PUBLIC KEY' found")
    return tuple(keys)


def key_id(key: PublicKey) -> str:
    """Return the name of *key*: 16 hexadecimal digits of a hash over its SubjectPublicKeyInfo."""
    return sha256(_encoded(key, serialization.Encoding.DER)).hexdigest()[:16]


def pem_of(keys: Iterable[PublicKey]) -> str:
    """Return *keys* as `public_keys` reads them."""
    return "".join(_encoded(key, serialization.Encoding.PEM).decode() for key in keys)


def _encoded(key: PublicKey, encoding: serialization.Encoding) -> bytes:
    return key.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


class _Deterministic(ECAlgorithm):
    """ES256 with the nonce of RFC 6979: no randomness to get wrong, and one signature for one content."""

    def sign(self, msg: bytes, key: Any) -> bytes:
        der = key.sign(msg, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        return der_to_raw_signature(der, key.curve)


_SIGNER: Final = jwt.PyJWS(algorithms=[])
_SIGNER.register_algorithm(ALGORITHM, _Deterministic(ECAlgorithm.SHA256))
_VERIFIER: Final = jwt.PyJWS(algorithms=[ALGORITHM])


def sign(payload: bytes, key: PrivateKey, *, typ: str = "JWT") -> str:
    """Return *payload* signed with *key*, whose name is in the header; the same each time."""
    return _SIGNER.encode(payload, key, ALGORITHM, headers={"kid": key_id(key.public_key()), "typ": typ})


def announce(keys: Sequence[PublicKey], term: int, key: PrivateKey) -> str:
    """Return the announcement, signed with *key*, that *keys* and no others count from *term* on."""
    return sign(json.dumps({"keys": pem_of(keys), "term": term}, sort_keys=True).encode(), key, typ=TYPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """The *keys* that count, since *term*; 0 for those that a pod began with."""

    keys: tuple[PublicKey, ...]
    term: int = 0

    @classmethod
    def parse(cls, pem: str) -> Self:
        """Return the keys in *pem*; raises BundleError."""
        return cls(keys=public_keys(pem))

    def follow(self, announcements: Iterable[str]) -> "Keyring":
        """Return the keys to which *announcements*, the oldest first, lead from these."""
        held = self
        for token in announcements:
            held = held._after(token) or held
        return held

    def verify(self, token: str) -> tuple[bytes, str] | None:
        """Return payload and type of *token* when one of the keys signed it."""
        for key in self.keys:
            try:
                found = _VERIFIER.decode_complete(token, key, algorithms=[ALGORITHM])
            except jwt.PyJWTError:
                continue  # another key may fit: keys overlap while they are rotated
            return found["payload"], str(found["header"].get("typ"))
        return None

    def _after(self, token: str) -> "Keyring | None":
        found = self.verify(token)
        if found is None or found[1] != TYPE:
            return None
        try:
            said = json.loads(found[0])
            term, keys = said["term"], public_keys(said["keys"])
        except (ValueError, LookupError, TypeError, BundleError):
            return None
        is_later = isinstance(term, int) and self.term < term <= MAX_TERM
        return Keyring(keys=keys, term=term) if is_later else None

    def __str__(self) -> str:
        """Return the keys' names."""
        return ", ".join(map(key_id, self.keys)) or "none"
