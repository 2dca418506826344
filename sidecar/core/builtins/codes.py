"""Encodings, hashes and identifiers. Sources: OPA, "Encoding", "Crypto", "UUID"; Go's net/url; RFC 4648, RFC 9562."""

import base64
import binascii
import hashlib
import hmac
import re
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import quote_plus, unquote_to_bytes

from sidecar.core.builtins.values import Set, Undefined, Unknown, strings, text

_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_UUID_EPOCH_100NS: Final = 0x01B21DD213814000  # from 1582-10-15 to 1970-01-01
_BARE_UUID_CHARS: Final = 32
_BRACED_UUID_CHARS: Final = 38


def _text_of(data: bytes) -> str:
    """Return *data* as text; raises Unknown: Rego's strings hold any bytes, ours do not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Unknown("a string that is not UTF-8") from None


def base64url_encode_no_pad(plain: Any) -> str:
    """Return *plain* in base64url without padding."""
    return base64.urlsafe_b64encode(text(plain).encode()).decode().rstrip("=")


def hex_encode(plain: Any) -> str:
    """Return the bytes of *plain* as hexadecimal digits."""
    return text(plain).encode().hex()


def hex_decode(digits: Any) -> str:
    """Return the text that *digits* encode."""
    try:
        return _text_of(binascii.unhexlify(text(digits)))
    except ValueError:
        raise Undefined from None


def query_encode(plain: Any) -> str:
    """Return *plain* as part of a URL's query."""
    return quote_plus(text(plain), safe="~")


def query_decode(encoded: Any) -> str:
    """Return what *encoded*, part of a URL's query, stands for."""
    if _BAD_ESCAPE.search(text(encoded)):
        raise Undefined
    return _text_of(unquote_to_bytes(text(encoded).replace("+", " ")))


def query_encode_object(members: Any) -> str:
    """Return the query of an object whose values are strings, or arrays or sets of strings."""
    if not isinstance(members, dict):
        raise Undefined
    pairs = [
        (name, each)
        for name in sorted(members, key=str.encode)
        for each in (sorted(strings(members[name])) if isinstance(members[name], Set) else _values(members[name]))
    ]
    return "&".join(f"{query_encode(name)}={query_encode(value)}" for name, value in pairs)


def _values(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else strings(value)


def query_decode_object(query: Any) -> dict[str, list[str]]:
    """Return the values of each name in *query*."""
    found: dict[str, list[str]] = {}
    for part in filter(None, text(query).split("&")):
        if ";" in part:
            raise Undefined
        name, _, value = part.partition("=")
        found.setdefault(query_decode(name), []).append(query_decode(value))
    return found


def _digest(algorithm: str, plain: Any) -> str:
    return hashlib.new(algorithm, text(plain).encode(), usedforsecurity=False).hexdigest()


def _hmac(algorithm: str, message: Any, key: Any) -> str:
    return hmac.new(text(key).encode(), text(message).encode(), algorithm).hexdigest()


def hmac_equal(one: Any, other: Any) -> bool:
    """Return whether two codes are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(text(one).encode(), text(other).encode())


def parse_uuid(written: Any) -> dict[str, Any]:
    """Return version and variant of a UUID; of versions 1 and 2 also when and where it was made."""
    digits = text(written)
    if digits[:9].lower() == "urn:uuid:":
        digits = digits[9:]
    elif len(digits) == _BRACED_UUID_CHARS:  # whatever the braces are, as in Go's reader
        digits = digits[1:-1]
    if not _UUID.fullmatch(digits) and not (
        len(digits) == _BARE_UUID_CHARS
        and digits.isascii()
        and all(each in "0123456789abcdefABCDEF" for each in digits)
    ):
        raise Undefined
    value = uuid.UUID(digits)
    version = value.int >> 76 & 0xF
    found: dict[str, Any] = {"version": version, "variant": _variant(value.bytes[8])}
    if version in (1, 2):
        node = value.bytes[10:]
        found["time"] = (value.time - _UUID_EPOCH_100NS) * 100
        found["nodeid"] = node.hex("-")
        found["macvariables"] = f"{'local' if node[0] & 2 else 'global'}:{'multicast' if node[0] & 1 else 'unicast'}"
        found["clocksequence"] = value.clock_seq
    if version == 2:
        found["id"] = value.time_low
        domain = value.bytes[9]
        found["domain"] = ("Person", "Group", "Org")[domain] if domain < 3 else f"Domain{domain}"
    return found


def _variant(octet: int) -> str:
    if octet & 0xC0 == 0x80:
        return "RFC4122"
    if octet & 0xE0 == 0xC0:
        return "Microsoft"
    return "Future" if octet & 0xE0 == 0xE0 else "Reserved"


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "base64url.encode_no_pad": base64url_encode_no_pad,
    "crypto.hmac.equal": hmac_equal,
    **{f"crypto.hmac.{each}": partial(_hmac, each) for each in ("md5", "sha1", "sha256", "sha512")},
    **{f"crypto.{each}": partial(_digest, each) for each in ("md5", "sha1", "sha256")},
    "hex.decode": hex_decode,
    "hex.encode": hex_encode,
    "urlquery.decode": query_decode,
    "urlquery.decode_object": query_decode_object,
    "urlquery.encode": query_encode,
    "urlquery.encode_object": query_encode_object,
    "uuid.parse": parse_uuid,
}
