"""Decides which hosts the MCP server beside us may connect to, by the name that its first bytes ask for. Pure.

The name is all that counts: it is resolved here and now, and the connection goes to what it resolves to, never to where
the server dialled; an allowed name with somebody else's address leads nowhere. Refused: what names nobody, IP addresses
for names, names that no rule has, and names that resolve to no address that is public or declared. A wildcard stands for
one label, the first (RFC 9525, 6.3). Names are compared as DNS does, in ASCII; internationalised ones as `xn--` labels.
RFC 1123, 2.1 (host names); RFC 6066, 3 (server_name); RFC 9112, 3.2 (Host and target); RFC 6890 (special addresses).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import zip_longest
from typing import Final

from sidecar.config import PUBLIC_RANGES
from sidecar.core.egress import split_authority
from sidecar.core.profile import HOST_NAME, EgressRules
from sidecar.errors import Reason, Refusal

MAX_HOST_CHARS: Final = 253
_NAME: Final = re.compile(HOST_NAME)


class Why(StrEnum):
    """What a connection was refused for."""

    UNNAMED = "unnamed"  # silence, another protocol, TLS without server_name, HTTP without Host
    UNREADABLE = "unreadable"  # neither a ClientHello nor a request of HTTP/1 that stays one
    MISMATCH = "mismatch"  # one request, or one connection, names two hosts
    NOT_ALLOWED = "not_allowed"  # no rule has the name with this port
    ADDRESS = "address"  # the name resolves to addresses that are neither public nor declared
    UNRESOLVED = "unresolved"  # the name has no address, or nobody says
    UNREACHABLE = "unreachable"  # nobody answers there


class Barred(Refusal):
    """A connection goes nowhere."""

    def __init__(self, why: Why, detail: str) -> None:
        super().__init__(Reason.EGRESS, f"this server may not connect there: {detail}", detail=f"{why}: {detail}")
        self.why = why


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the head of an HTTP/1 request says of its destination."""

    method: bytes
    url: bytes
    hosts: tuple[bytes, ...]  # values of Host, each


def host_of(text: str) -> str:
    """Return the host name *text* as rules have it. Raises Barred for what is none, an IP address among them."""
    name = text.lower().removesuffix(".")
    if not text.isascii() or len(name) > MAX_HOST_CHARS or not _NAME.fullmatch(name):  # U+212A is a k in lower case
        raise Barred(Why.UNNAMED, f"{text[:64]!r} is no host name")
    return name


def requested(head: Head, port: int) -> str:
    """Return which host a request asks for that was sent to *port*. Raises Barred.

    Host and an absolute target must agree, with each other and with the port.
    """
    if head.method == b"CONNECT":
        raise Barred(Why.UNREADABLE, "a tunnel would lead where nobody sees")
    if len(head.hosts) != 1:
        raise Barred(Why.UNNAMED if not head.hosts else Why.MISMATCH, f"{len(head.hosts)} Host fields")
    authorities = [head.hosts[0].decode("latin-1")]
    url = head.url.decode("latin-1")
    if url[:7].lower() == "http://":
        authorities.append(re.split("[/?#]", url[7:], maxsplit=1)[0])
    elif not url.startswith("/") and url != "*":
        raise Barred(Why.UNREADABLE, "the request target is neither a path nor an http URL")
    found = {_split(each, port) for each in authorities}
    if len(found) > 1 or found.copy().pop()[1] != port:
        raise Barred(Why.MISMATCH, f"{' and '.join(each[:64] for each in authorities)} on port {port}")
    return found.pop()[0]


def _split(authority: str, port: int) -> tuple[str, int]:
    try:
        host, named = split_authority(authority, port)
    except Refusal as error:
        raise Barred(Why.UNNAMED, f"{authority[:64]!r} is no host name") from error
    return host_of(host), named


def check_name(rules: EgressRules, name: str, port: int) -> None:
    """Raise Barred unless *rules* have *name*, as `host_of` returns it, with *port*."""
    wildcard = f"*.{name.partition('.')[2]}"
    if not any(port in each.ports and (name in each.hosts or wildcard in each.hosts) for each in rules.hosts):
        raise Barred(Why.NOT_ALLOWED, f"{name} on port {port}")


def is_by_address(rules: EgressRules, address: str, port: int) -> bool:
    """Say whether connections to *address* and *port* go there whatever they name.

    It is declared by address, or it is the cluster's own, which NetworkPolicies judge as ever.
    """
    found = _address(address)
    return _is_declared(rules, found, port) or _is_within(found, rules.private)


def usable(rules: EgressRules, name: str, addresses: Iterable[str], port: int, *, dialled: str) -> Sequence[str]:
    """Return the *addresses* of *name* to try, each once; the *dialled* one first, then its family and the other in turn.

    One of the families may lead nowhere, and nobody but us finds out (RFC 8305, 4).

    Raises Barred when none may be used. A declared range opens no loopback: that is the pod itself.
    """
    wanted = _address(dialled)
    found = {each: _address(each) for each in addresses}
    if not found:
        raise Barred(Why.UNRESOLVED, name)
    kept = [
        text
        for text, each in found.items()
        if not (each.is_loopback or each.is_unspecified or each.is_multicast)
        and ((is_public(each) and not _is_within(each, rules.private)) or _is_declared(rules, each, port))
    ]
    if not kept:
        raise Barred(Why.ADDRESS, f"{name} is {', '.join(found)[:256]}")
    kept.sort(key=lambda text: found[text] != wanted)
    families = ([text for text in kept if (found[text].version == wanted.version) is same] for same in (True, False))
    return [text for pair in zip_longest(*families) for text in pair if text is not None]


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Say whether *address* is one that host names are for."""
    for whole, excluded in PUBLIC_RANGES.items():
        if address in _network(whole):
            return not _is_within(address, excluded)
    return False


def _address(text: str) -> IPv4Address | IPv6Address:
    """Return the address in *text*; of an IPv4 address in IPv6's clothes (RFC 4291, 2.5.5.2), the IPv4 address."""
    found = ip_address(text)
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _is_declared(rules: EgressRules, address: IPv4Address | IPv6Address, port: int) -> bool:
    return any(
        (not each.ports or port in each.ports)
        and address in _network(each.cidr)
        and not _is_within(address, each.excluded)
        for each in rules.networks
    )


def _is_within(address: IPv4Address | IPv6Address, ranges: Iterable[str]) -> bool:
    return any(address in _network(each) for each in ranges)


@lru_cache(maxsize=1024)  # parsing costs ten times as much as looking
def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text)
