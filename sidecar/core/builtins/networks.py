"""Networks in CIDR notation, as Go's net.ParseCIDR reads them. Source: OPA, "Net"; RFC 4632, RFC 4291."""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from sidecar.core.builtins.values import Pairs, Set, Undefined, Unknown, pairs_of, text

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_ADDRESSES: Final = 65_536  # of one expansion
MAX_PAIRS: Final = 10_000  # that are compared
_BITS: Final = re.compile(r"[0-9]{1,7}", re.ASCII)


def _parsed(written: Any) -> tuple[Address, Network]:
    """Return address and network of *written*; raises Undefined."""
    host, slash, bits = text(written).partition("/")
    if not slash or not _BITS.fullmatch(bits) or "%" in host:
        raise Undefined
    try:
        address = ipaddress.ip_address(host)
        return address, ipaddress.ip_network((address, int(bits)), strict=False)
    except ValueError:
        raise Undefined from None


def is_valid(written: Any) -> bool:
    """Return whether *written* is a network."""
    try:
        _parsed(written)
    except Undefined:
        return False
    return True


def _contains(network: Any, inner: Any) -> bool:
    """Return whether *inner*, a network or an address, is within *network*."""
    _, outer = _parsed(network)
    try:
        within: Network = ipaddress.ip_network(ipaddress.ip_address(text(inner)))
    except ValueError:
        _, within = _parsed(inner)
    if _mapped(outer) or _mapped(within):
        raise Unknown("an IPv4 address written as IPv6")  # Go holds the two for the same
    return outer.version == within.version and within.subnet_of(outer)  # type: ignore[arg-type] # same version


def _mapped(network: Network) -> bool:
    return isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None


def contains_matches(networks: Any, inner: Any) -> Set:
    """Return a pair of indexes for each of *networks* that contains one of *inner*."""
    ones, others = list(_indexed(networks)), list(_indexed(inner))
    if len(ones) * len(others) > MAX_PAIRS:
        raise Unknown("that many networks")
    found = [
        [one_index, other_index] for one_index, one in ones for other_index, other in others if _contains(one, other)
    ]
    return Set(found)


def _indexed(value: Any) -> Iterator[tuple[Any, Any]]:
    match value:
        case str():
            yield value, value
        case list():
            yield from ((index, _network_of(each)) for index, each in enumerate(value))
        case Set():
            yield from ((each, _network_of(each)) for each in value)
        case dict() | Pairs():
            yield from ((key, _network_of(each)) for key, each in pairs_of(value) or ())


def _network_of(value: Any) -> str:
    if isinstance(value, list) and value:
        return text(value[0])
    return text(value)


def expand(network: Any) -> Set:
    """Return every address in *network*."""
    _, wide = _parsed(network)
    if wide.num_addresses > MAX_ADDRESSES:
        raise Unknown("a network that large")
    return Set(map(str, wide))


def merge(networks: Any) -> Set:
    """Return the fewest networks that hold the same addresses."""
    if not isinstance(networks, list | Set):
        raise Undefined
    found = [_network_or_address(each) for each in networks]
    if any(_mapped(each) for each in found):
        raise Unknown("an IPv4 address written as IPv6")
    merged: list[Network] = []
    for version in (4, 6):
        same = [each for each in found if each.version == version]
        merged.extend(ipaddress.collapse_addresses(same))  # type: ignore[type-var] # one version at a time
    return Set(map(str, merged))


def _network_or_address(written: Any) -> Network:
    try:
        address = ipaddress.ip_address(text(written))
    except ValueError:
        return _parsed(written)[1]
    if address.version == 6:
        raise Undefined  # needs a prefix length, says OPA
    first = int(address) >> 24  # a bare IPv4 address stands for its class: Go's IP.DefaultMask
    bits = 8 if first < 128 else 16 if first < 192 else 24
    try:
        return ipaddress.ip_network((address, bits))
    except ValueError:  # OPA writes it with its own last bits, unless it merges
        raise Unknown("an address that is no network") from None


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "net.cidr_contains_matches": contains_matches,
    "net.cidr_expand": expand,
    "net.cidr_is_valid": is_valid,
    "net.cidr_merge": merge,
}
