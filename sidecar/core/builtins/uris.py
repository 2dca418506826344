"""URIs as Go's net/url reads them, whose reading OPA's is. Sources: OPA, "URI"; RFC 3986, RFC 6874 (zones); Go's net/url."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sidecar.core.builtins.values import Undefined, Unknown, text

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):", re.ASCII)
_PORT: Final = re.compile(r"(:[0-9]*)?")
_USERINFO: Final = re.compile(r"[A-Za-z0-9._:~!$&'()*+,;=%@-]*")
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ASCII_ESCAPE: Final = re.compile(rb"%(?!25)[0-7][0-9A-Fa-f]")
_BAD_HOST: Final = re.compile(rb"""[^A-Za-z0-9._~!$&'()*+,;=:\[\]<>"%\x80-\xff-]""")
_PLAIN_IN_PATH: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~$&+,/:;=@")


def parse(uri: Any) -> dict[str, str]:
    """Return the parts of *uri* that are not empty."""
    return {name: _text_of(part) for name, part in _parts(text(uri)).items() if part}


def is_valid(uri: Any) -> bool:
    """Return whether *uri* can be parsed; the empty one counts as none."""
    try:
        return bool(text(uri)) and _parts(uri) is not None
    except Undefined:
        return False


def _parts(uri: str) -> dict[str, bytes]:
    """Return the parts of *uri*; raises Undefined for what is none."""
    rest, _, fragment = uri.partition("#")
    if _CONTROL.search(rest):
        raise Undefined
    parts = {"fragment": _unescaped(fragment)}
    if rest == "*":
        return {**parts, "path": b"*", "raw_path": b"*"}
    named = _SCHEME.match(rest)
    if named is None and rest.startswith(":"):
        raise Undefined
    scheme = "" if named is None else named[1].lower()
    rest = rest if named is None else rest[named.end() :]
    rest, _, query = rest.partition("?")
    parts |= {"scheme": scheme.encode(), "raw_query": query.encode()}
    if not rest.startswith("/"):
        if scheme:
            return parts  # opaque, such as mailto:
        if ":" in rest.partition("/")[0]:
            raise Undefined
    if rest.startswith("//") and (scheme or not rest.startswith("///")):
        authority, slash, rest = rest[2:].partition("/")
        rest = slash + rest
        parts |= _authority(scheme, authority)
    path = _unescaped(rest)
    return {**parts, "path": path, "raw_path": path if _escaped(path) == rest.encode() else rest.encode()}


def _authority(scheme: str, authority: str) -> dict[str, bytes]:
    userinfo, _, host = authority.rpartition("@")
    if not _USERINFO.fullmatch(userinfo):
        raise Undefined
    _unescaped(userinfo)
    if "[" in host:
        name, port = _literal(host)
        return {"hostname": name, "port": port}
    at = host.find(":")
    if at >= 0 and scheme not in ("http", "https"):
        at = host.rfind(":")
    if at >= 0 and not _PORT.fullmatch(host[at:]):
        raise Undefined
    name, _, port = _host(host).rpartition(b":") if at >= 0 else (_host(host), b"", b"")
    return {"hostname": name, "port": port}


def _literal(host: str) -> tuple[bytes, bytes]:
    """Return the address in brackets, and the port behind it."""
    address, bracket, port = host[1:].rpartition("]")
    if host.rfind("[") > 0 or not bracket or not _PORT.fullmatch(port):
        raise Undefined
    plain, mark, zone = address.partition("%25")
    if mark and (_BAD_ESCAPE.search(zone.encode()) or "%" in zone or _BAD_HOST.search(zone.encode())):
        raise Unknown("an escape in the zone of an address")
    name = _host(plain) + (b"%" + zone.encode() if mark else b"")
    try:
        if not isinstance(ipaddress.ip_address(name.decode()), ipaddress.IPv6Address):
            raise Undefined
    except ValueError:
        raise Undefined from None
    return name, port[1:].encode()


def _host(host: str) -> bytes:
    """Return *host* without its escapes, which are for what is not ASCII."""
    data = host.encode()
    if _BAD_ESCAPE.search(data) or _ASCII_ESCAPE.search(data) or _BAD_HOST.search(data):
        raise Undefined
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), data)


def _unescaped(part: str) -> bytes:
    data = part.encode()
    if _BAD_ESCAPE.search(data):
        raise Undefined
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), data)


def _escaped(path: bytes) -> bytes:
    return b"".join([bytes([each]) if each in _PLAIN_IN_PATH else b"%%%02X" % each for each in path])


def _text_of(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Unknown("a string that is not UTF-8") from None


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {"uri.parse": parse, "uri.is_valid": is_valid}
