"""Plan the life of the keys by which bundles are signed: what has to happen next, from what is held and what time it is.

A new key is announced by the one before (sidecar/core/keyring.py) and signs at once, as every sidecar can follow the
announcements from any key that it knows. The one before stays believed for the overlap, in which replicas notice; then
the new key announces itself alone, and a copy of the old one is worth nothing to whoever has it. Terms are Unix seconds:
a control plane that was restored from a backup goes on above the terms that sidecars have seen. Refuses a Secret that
cannot be read: replacing it silently would cut off every sidecar.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.errors import BadCertificate
from sidecar.core.bundle import Stamp
from sidecar.core.keyring import MAX_ANNOUNCEMENTS, PrivateKey, PublicKey, announce, pem_of, public_keys
from sidecar.errors import BundleError

KEY: Final = "signing.key"
PREVIOUS: Final = "previous.pub"
STATE: Final = "state.json"
ROTATE: Final = "sidegate.dev/rotate"  # annotation of the Secret: any new text asks for a rotation
STOLEN: Final = "stolen"  # a text that ends so says that the key before must not be believed any longer


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTimes:
    """How long a key signs, and how long it is believed after that, in seconds."""

    age_s: float
    overlap_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKeys:
    """The key that signs *since_s* (Unix time), the one before while it is believed, and who announced whom.

    *asked* is the last request for a rotation that was granted.
    """

    current: PrivateKey
    previous: PublicKey | None = None
    term: int = 0
    since_s: int = 0
    asked: str = ""
    announcements: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: Mapping[str, bytes]) -> Self | None:
        """Return what a Secret's *data* holds, None when it is empty. Raises BadCertificate."""
        if not data:
            return None
        if KEY not in data:
            raise BadCertificate(f"Secret of the signing key: {KEY} is expected, found {', '.join(sorted(data))}")
        current = _private_key(data[KEY])
        try:
            previous = public_keys(data[PREVIOUS].decode())[0] if PREVIOUS in data else None
            state = json.loads(data.get(STATE, b"{}"))
            return cls(
                current=current,
                previous=previous,
                term=int(state.get("term", 0)),
                since_s=int(state.get("since_s", 0)),
                asked=str(state.get("asked", "")),
                announcements=tuple(map(str, state.get("announcements", ()))),
            )
        except (BundleError, ValueError, TypeError, AttributeError) as error:
            raise BadCertificate(f"Secret of the signing key: {error}") from error

    def data(self) -> dict[str, bytes]:
        """Return the data of the Secret that `parse` reads these from."""
        state = {
            "term": self.term,
            "since_s": self.since_s,
            "asked": self.asked,
            "announcements": self.announcements,
        }
        data = {
            KEY: self.current.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            STATE: json.dumps(state).encode(),
        }
        if self.previous:
            data[PREVIOUS] = pem_of([self.previous]).encode()
        return data

    @property
    def believed(self) -> tuple[PublicKey, ...]:
        """Return the keys that sidecars are to believe."""
        return (self.current.public_key(), *((self.previous,) if self.previous else ()))

    def stamp(self, sequence: int) -> Stamp:
        """Return the stamp of a bundle that is made now."""
        return Stamp(term=self.term, sequence=sequence, announcements=self.announcements)

    def _announced(self, by: PrivateKey, now_s: float) -> Self:
        """Return these with a later term, announced by *by*."""
        term = max(self.term + 1, int(now_s))
        told = (*self.announcements, announce(self.believed, term, by))
        return replace(self, term=term, announcements=told[-MAX_ANNOUNCEMENTS:])


def due(
    held: SigningKeys | None, now_s: float, times: KeyTimes, make: Callable[[], PrivateKey], asked: str = ""
) -> SigningKeys:
    """Return what to hold now: *held* itself when nothing is due, else the result of one step, with a key by *make*.

    *asked* is the text of the annotation by which an operator asks for a rotation.
    """
    if held is None:
        return SigningKeys(current=make(), term=int(now_s), since_s=int(now_s), asked=asked)
    if held.term == 0:  # a key from somewhere else: it is in nobody's hands for longer than it can be
        return replace(held, term=int(now_s), since_s=int(now_s), asked=asked)
    if asked != held.asked or now_s >= held.since_s + times.age_s:
        previous = None if asked != held.asked and asked.endswith(STOLEN) else held.current.public_key()
        rotated = replace(held, current=make(), previous=previous, since_s=int(now_s), asked=asked)
        return rotated._announced(held.current, now_s)  # noqa: SLF001 - of this module
    if held.previous and now_s >= held.since_s + times.overlap_s:
        return replace(held, previous=None)._announced(held.current, now_s)  # noqa: SLF001 - same
    return held


def _private_key(pem: bytes) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise BadCertificate(f"Secret of the signing key: {KEY} is no PEM private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadCertificate(f"Secret of the signing key: {KEY} must be a P-256 key")
    return key
