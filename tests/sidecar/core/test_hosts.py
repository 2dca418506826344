"""Requirements on which hosts a server may connect to: names, wildcards, requests, and what a name resolves to."""

from ipaddress import IPv4Address, IPv6Address, ip_network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import PUBLIC_RANGES
from sidecar.core.hosts import Barred, Head, Why, check_name, host_of, is_by_address, is_public, requested, usable
from sidecar.core.profile import EgressRules, NamedHosts, Network
from sidecar.errors import Reason

RULES = EgressRules(
    hosts=(
        NamedHosts(hosts=("api.example.com", "*.example.org")),
        NamedHosts(hosts=("plain.example.net",), ports=(80, 8080)),
    ),
    networks=(
        Network(cidr="198.51.100.0/24", excluded=("198.51.100.128/25",), ports=(5432,)),
        Network(cidr="10.1.0.0/16"),
        Network(cidr="fd00::/8"),
    ),
    private=("203.0.113.0/25",),
)
LABELS = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\Z")
NAMES = st.builds(lambda labels, top: ".".join([*labels, top]), st.lists(LABELS, min_size=1, max_size=5), st.sampled_from(["com", "x1", "xn--p1ai"]))  # fmt: skip # noqa: E501


def why(refused: pytest.ExceptionInfo[Barred]) -> Why:
    """The named reason; the kind is always the same."""
    assert refused.value.reason is Reason.EGRESS
    assert (refused.value.detail or "").startswith(f"{refused.value.why}: ")
    return refused.value.why


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("api.example.com", "api.example.com"),
        ("API.Example.COM.", "api.example.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("1.2.3.example", "1.2.3.example"),
    ],
)
def test_names_are_compared_as_dns_does(text: str, name: str) -> None:
    """Without regard to case, and to the dot at the end."""
    assert host_of(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "localhost", "a..example", ".example.com", "api.example.com..", "1.2.3.4", "127.1", "0x7f.1", "1.2.3.0x4", "::1",
        "[::1]", "2130706433", "bücher.example", "a_b.example", "a b.example", "-a.example", "a-.example", "a.example\n",
        "a.example\0.example.com", "*.example.org", f"{'a' * 64}.example", ".".join(["a" * 60] * 5) + ".example",
        "\u212aafka.example",
    ],
)  # fmt: skip
def test_what_is_no_host_name_is_refused(text: str) -> None:
    """Addresses in any spelling, single labels, other scripts, empty and overlong labels, what C would cut."""
    with pytest.raises(Barred) as refused:
        host_of(text)

    assert why(refused) is Why.UNNAMED


@pytest.mark.parametrize(
    ("name", "port"),
    [("api.example.com", 443), ("a.example.org", 443), ("plain.example.net", 80), ("plain.example.net", 8080)],
)
def test_a_named_host_may_be_reached_on_its_ports(name: str, port: int) -> None:
    """A wildcard stands for a label."""
    check_name(RULES, name, port)


@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("example.com", 443), ("www.api.example.com", 443), ("example.org", 443), ("a.b.example.org", 443),
        ("api.example.com", 80), ("plain.example.net", 443), ("api.example.com.evil.test", 443), ("xexample.org", 443),
    ],
)  # fmt: skip
def test_any_other_name_and_port_is_refused(name: str, port: int) -> None:
    """A wildcard stands for one label exactly, and each rule's ports are its own."""
    with pytest.raises(Barred) as refused:
        check_name(RULES, name, port)

    assert why(refused) is Why.NOT_ALLOWED


@given(name=NAMES, port=st.integers(1, 65535))
def test_a_name_is_let_out_only_by_a_rule_that_has_it(name: str, port: int) -> None:
    """Whatever name: it is a rule's, or the rest behind its first label is a wildcard's, and the port is there."""
    expected = any(
        port in rule.ports and (pattern == name or (pattern[:2] == "*." and name.split(".", 1)[1] == pattern[2:]))
        for rule in RULES.hosts
        for pattern in rule.hosts
    )
    try:
        check_name(RULES, host_of(name), port)
    except Barred:
        assert not expected
    else:
        assert expected


@given(text=st.text(max_size=40))
def test_a_host_name_is_stable(text: str) -> None:
    """What passes for a name is one that a rule can have, and passes again as itself."""
    try:
        name = host_of(text)
    except Barred:
        return
    assert host_of(name) == name
    msgspec.convert({"hosts": [name]}, type=NamedHosts)


def a_head(*hosts: bytes, url: bytes = b"/", method: bytes = b"GET") -> Head:
    """A request's head."""
    return Head(method=method, url=url, hosts=hosts)


@pytest.mark.parametrize(
    "head",
    [
        a_head(b"API.example.com"),
        a_head(b"api.example.com:8080"),
        a_head(b"api.example.com.", url=b"*", method=b"OPTIONS"),
        a_head(b"api.example.com", url=b"http://api.example.com/x"),
        a_head(b"api.example.com:8080", url=b"HTTP://API.example.com:8080?x=/"),
    ],
)
def test_a_request_asks_for_its_host(head: Head) -> None:
    """By Host, which an absolute target repeats."""
    assert requested(head, 8080) == "api.example.com"


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (a_head(), Why.UNNAMED),
        (a_head(b""), Why.UNNAMED),
        (a_head(b"10.0.0.1"), Why.UNNAMED),
        (a_head(b"[fd00::1]:8080"), Why.UNNAMED),
        (a_head(b"api.example.com:http"), Why.UNNAMED),
        (a_head(b"user@api.example.com"), Why.UNNAMED),
        (a_head(b"api.example.com, b.example.com"), Why.UNNAMED),
        (a_head(b"api.example.com", b"api.example.com"), Why.MISMATCH),
        (a_head(b"api.example.com:80"), Why.MISMATCH),
        (a_head(b"api.example.com", url=b"http://b.example.com/"), Why.MISMATCH),
        (a_head(b"api.example.com", url=b"http://api.example.com:81/"), Why.MISMATCH),
        (a_head(b"api.example.com", url=b"http://api.example.com@b.example.com/"), Why.UNNAMED),
        (a_head(b"api.example.com", url=b"https://api.example.com/"), Why.UNREADABLE),
        (a_head(b"api.example.com", url=b"api.example.com:8080"), Why.UNREADABLE),
        (a_head(b"api.example.com", url=b"api.example.com:443", method=b"CONNECT"), Why.UNREADABLE),
    ],
)
def test_a_request_that_names_no_host_or_two_is_refused(head: Head, reason: Why) -> None:
    """Where Host, target and port say different things, servers differ in which they believe."""
    with pytest.raises(Barred) as refused:
        requested(head, 8080)

    assert why(refused) is reason


@pytest.mark.parametrize(
    ("address", "port", "passes"),
    [
        ("198.51.100.7", 5432, True),
        ("198.51.100.7", 443, False),
        ("198.51.100.200", 5432, False),
        ("10.1.2.3", 1, True),
        ("::ffff:10.1.2.3", 1, True),
        ("203.0.113.1", 1, True),
        ("203.0.113.200", 1, False),
        ("2001:db8::1", 443, False),
    ],
)
def test_declared_addresses_pass_whatever_is_said(address: str, port: int, passes: bool) -> None:
    """On their ports; and the cluster's own, which NetworkPolicies judge."""
    assert is_by_address(RULES, address, port) is passes


def test_only_public_and_declared_addresses_of_a_name_are_tried() -> None:
    """The cluster's own are not, though they look public; the dialled address goes first, then the families in turn."""
    resolved = ["192.0.2.1", "10.0.0.1", "203.0.113.5", "2600::1", "192.0.2.2", "10.1.0.9", "fe80::1", "192.0.2.1"]

    assert usable(RULES, "api.example.com", resolved, 443, dialled="192.0.2.2") == [
        "192.0.2.2", "2600::1", "192.0.2.1", "10.1.0.9",
    ]  # fmt: skip
    assert usable(RULES, "api.example.com", resolved, 443, dialled="2600::2")[:2] == ["2600::1", "192.0.2.1"]
    many = [f"2600::{number}" for number in range(1, 9)]  # of which none may lead anywhere
    assert "192.0.2.1" in usable(RULES, "api.example.com", [*many, "192.0.2.1"], 443, dialled="2600::3")[:2]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.2.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255",  # noqa: S104
        "::1", "::", "fe80::1", "fe80::1%eth0", "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::", "2001:0:1::", "203.0.113.5",
    ],
)  # fmt: skip
def test_a_name_with_an_address_of_ours_leads_nowhere(address: str) -> None:
    """Loopback, link-local, metadata, private, translated and multicast ones: whoever runs a zone could say them."""
    rules = EgressRules(private=RULES.private)
    with pytest.raises(Barred) as refused:
        usable(rules, "api.example.com", [address], 443, dialled="192.0.2.2")

    assert why(refused) is Why.ADDRESS


def test_a_declared_range_opens_no_loopback() -> None:
    """All addresses may be declared; the pod itself is none of them."""
    rules = EgressRules(networks=(Network(cidr="0.0.0.0/0"), Network(cidr="::/0")))

    assert usable(rules, "api.example.com", ["10.0.0.1", "fd00::1"], 443, dialled="192.0.2.2")
    for address in ("127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"):  # noqa: S104
        with pytest.raises(Barred):
            usable(rules, "api.example.com", [address], 443, dialled="192.0.2.2")


def test_a_name_without_addresses_is_said_so() -> None:
    """It differs from one with the wrong ones."""
    with pytest.raises(Barred) as refused:
        usable(RULES, "api.example.com", [], 443, dialled="192.0.2.2")

    assert why(refused) is Why.UNRESOLVED


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_public_addresses_are_global_ones(address: IPv4Address | IPv6Address) -> None:
    """What Python's own table calls loopback, link-local, private for a site, multicast or reserved is never public."""
    documentation = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20")
    if is_public(address):
        assert not any((address.is_loopback, address.is_link_local, address.is_multicast, address.is_unspecified))
        is_local = address.is_private and not any(address in ip_network(each) for each in documentation)
        assert not is_local or address.version == 6  # IETF's own assignments in 2001::/23


def test_ranges_lie_within_what_they_are_taken_from() -> None:
    """NetworkPolicies demand that of exceptions."""
    for whole, excluded in PUBLIC_RANGES.items():
        for each in excluded:
            assert ip_network(each).subnet_of(ip_network(whole))  # type: ignore[arg-type]
