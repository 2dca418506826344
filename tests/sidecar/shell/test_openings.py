"""Requirements on reading the host from a connection's first bytes: real ClientHellos of OpenSSL, and HTTP/1 requests."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.hosts import Barred, Why
from sidecar.shell import openings
from sidecar.shell.openings import Hello, Opening, Requests, opening


def a_hello(name: str | None, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """What a client says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = newest
    context.set_alpn_protocols(["h2", "http/1.1"])
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def a_request(*lines: str, body: bytes = b"") -> bytes:
    """One HTTP request."""
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def refused(reader: Opening, data: bytes) -> Why:
    """Why *data* is refused."""
    with pytest.raises(Barred) as error:
        reader.feed(data)
    return error.value.why


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_name_is_read_from_a_client_hello(newest: ssl.TLSVersion) -> None:
    """In the spelling of rules; later bytes are not looked at."""
    reader = Hello()

    assert reader.feed(a_hello("API.example.com", newest=newest)) == "api.example.com"
    assert reader.feed(b"anything") == "api.example.com"


@given(cuts=st.lists(st.integers(1, 200), max_size=8))
def test_a_client_hello_may_come_in_pieces(cuts: list[int]) -> None:
    """However TCP cuts it, the name is known with its last byte and not before."""
    data, reader = a_hello("api.example.com"), Hello()
    for cut in cuts:
        piece, data = data[:cut], data[cut:]
        if not data:
            assert reader.feed(piece) == "api.example.com"
            return
        assert reader.feed(piece) is None
    assert reader.feed(data) == "api.example.com"


def test_early_data_may_come_with_a_client_hello() -> None:
    """As much as a first flight holds (RFC 8446, 4.2.10): only what the name is read from is bounded."""
    assert Hello().feed(a_hello("api.example.com") + b"\x17" * openings.MAX_HELLO_BYTES) == "api.example.com"


def test_a_client_hello_in_several_records_is_read() -> None:
    """A record may hold a part of it (RFC 8446, 5.1)."""
    hello = a_hello("api.example.com")
    body = hello[5:]
    records = [b"\x16\x03\x01" + len(part).to_bytes(2) + part for part in (body[:40], body[40:90], body[90:])]

    assert Hello().feed(b"".join(records)) == "api.example.com"


def test_tls_without_a_name_is_refused() -> None:
    """Clients that dial an address say none; whatever the address, there is nothing to judge."""
    assert refused(Hello(), a_hello(None)) is Why.UNNAMED
    assert refused(Hello(), a_hello("192.0.2.1")) is Why.UNNAMED


def test_an_address_for_a_name_is_refused() -> None:
    """Some clients write one into server_name, where none belongs (RFC 6066, 3)."""
    hello = a_hello("abc.de.fg.hi").replace(b"abc.de.fg.hi", b"192.168.10.1")

    assert refused(Hello(), hello) is Why.UNNAMED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ssl tells what it cannot decode
@pytest.mark.parametrize("byte", [b"\xff", b"\x00"])
def test_a_name_that_is_no_text_is_refused(byte: bytes) -> None:
    """Nothing behind it, nor in front of it, counts as a name."""
    hello = a_hello("api.example.com").replace(b"api.example.com", b"api.example" + byte + b"com")

    assert refused(Hello(), hello) is Why.UNREADABLE


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x00\x05hello", b"\x16\x03\x01" + b"\xff" * 40])
def test_bytes_that_are_no_client_hello_are_refused(data: bytes) -> None:
    """Before any of them goes on."""
    assert refused(Hello(), data) is Why.UNREADABLE


def test_a_client_hello_without_end_is_refused() -> None:
    """No more is kept than a ClientHello may have."""
    reader = Hello()
    record = b"\x16\x03\x01\x40\x00" + b"\x01\x01\x00\x00" + b"\x00" * (0x4000 - 4)
    assert reader.feed(record[:5000]) is None

    assert refused(reader, b"\x00" * openings.MAX_HELLO_BYTES) is Why.UNREADABLE


def test_one_hello_says_nothing_of_another() -> None:
    """They share one TLS context."""
    one, other = Hello(), Hello()
    first, second = a_hello("one.example.com"), a_hello("other.example.com")

    assert one.feed(first[:50]) is None
    assert other.feed(second) == "other.example.com"
    assert one.feed(first[50:]) == "one.example.com"


def test_a_refused_client_is_told_by_an_alert() -> None:
    """Fatal, access_denied (RFC 8446, 6.2): no client takes that for a network's fault."""
    reader = Hello()
    reader.feed(a_hello("api.example.com"))

    assert reader.refusal(Barred(Why.NOT_ALLOWED, "x"))[-2:] == b"\x02\x31"


def test_the_host_is_read_from_a_request() -> None:
    """And with the head's last byte, not before."""
    reader = Requests(80)

    assert reader.feed(b"GET / HTTP/1.1\r\nHost: API.exam") is None
    assert reader.feed(b"ple.com\r\n") is None
    assert reader.feed(b"\r\n") == "api.example.com"


def test_later_requests_may_ask_for_the_same_host() -> None:
    """Bodies, chunked ones too, are not read for requests."""
    reader = Requests(80)
    host = "Host: api.example.com"
    assert reader.feed(a_request("POST / HTTP/1.1", host, "Content-Length: 40", body=b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\nabcde"))  # fmt: skip # noqa: E501

    assert reader.feed(a_request("POST / HTTP/1.1", host, "Transfer-Encoding: chunked"))
    assert reader.feed(b"5\r\nHost:\r\n0\r\nHost: b.example\r\n\r\n")
    assert reader.feed(a_request("GET /x HTTP/1.1", host)) == "api.example.com"


def test_another_host_on_the_same_connection_is_refused() -> None:
    """In the same piece or later; the server at its end may serve many."""
    first, second = (a_request("GET / HTTP/1.1", f"Host: {name}.example.com") for name in ("a", "b"))
    reader = Requests(80)
    assert reader.feed(first) == "a.example.com"

    assert refused(reader, second) is Why.MISMATCH
    assert refused(Requests(80), first + second) is Why.MISMATCH


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Why.UNREADABLE),
        (b"SSH-2.0-OpenSSH\r\n", Why.UNREADABLE),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Why.UNREADABLE),
        (a_request("GET / HTTP/1.1"), Why.UNNAMED),
        (a_request("GET / HTTP/1.0"), Why.UNNAMED),
        (a_request("GET / HTTP/1.1", "Host: a.example", "Host: a.example"), Why.MISMATCH),
        (a_request("GET / HTTP/1.1", "Host : a.example"), Why.UNREADABLE),
        (a_request("GET / HTTP/1.1", "Host: a.example", " b.example"), Why.UNREADABLE),
        (a_request("GET / HTTP/1.1", "Host: a.example", "Content-Length: 1", "Transfer-Encoding: chunked"), Why.UNREADABLE),
        (a_request("GET http://b.example/ HTTP/1.1", "Host: a.example"), Why.MISMATCH),
        (a_request("CONNECT a.example:443 HTTP/1.1", "Host: a.example"), Why.UNREADABLE),
        (a_request("GET / HTTP/1.1", "Host: a.example", "Connection: Upgrade", "Upgrade: h2c"), Why.UNREADABLE),
        (a_request("GET / HTTP/1.1", "Host: a.example", "Connection: Upgrade", "Upgrade: websocket"), Why.UNREADABLE),
        (a_request("GET / HTTP/1.1", "Host: a.example", "X: " + "x" * openings.MAX_HEAD_BYTES), Why.UNREADABLE),
    ],
)  # fmt: skip
def test_what_is_no_plain_request_is_refused(data: bytes, reason: Why) -> None:
    """Other protocols, HTTP/2 and what becomes one, tunnels, no Host or two, and heads without end."""
    assert refused(Requests(80), data) is reason


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"", b"\r\n"),
        (b"GET /", b"x"),
        (b"GET / HTTP/1.1\r\nX", b"x"),
        (b"GET / HTTP/1.1\r\nX: ", b"x"),
        (a_request("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked", body=b"0\r\nX: "), b"x"),
        (a_request("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked", body=b"1;"), b"x"),
    ],
)
def test_a_head_that_never_ends_is_refused(first: bytes, more: bytes) -> None:
    """However it comes: the parser would keep it all, and copy it anew with every piece."""
    reader = Requests(80)
    reader.feed(first)
    piece = more * (1024 // len(more))
    for _ in range(openings.MAX_HEAD_BYTES // 1024 - 1):
        reader.feed(piece)

    assert refused(reader, piece * 80) is Why.UNREADABLE


def test_a_large_body_passes() -> None:
    """Its bytes are not the head's, of whatever framing."""
    reader, piece = Requests(80), b"x" * 65536
    reader.feed(a_request("POST / HTTP/1.1", "Host: a.example", f"Content-Length: {8 * len(piece)}"))
    for _ in range(8):
        reader.feed(piece)
    reader.feed(a_request("POST / HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked"))
    for _ in range(8):
        assert reader.feed(b"10000\r\n" + piece + b"\r\n") == "a.example"


def test_a_refused_client_of_http_is_answered() -> None:
    """By a whole response, which says what was refused."""
    said = Requests(80).refusal(Barred(Why.NOT_ALLOWED, "é.example on port 80"))
    head, _, body = said.partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert rb"\xe9.example on port 80" in body


def test_the_first_byte_says_which_of_the_two_it_is() -> None:
    """As the inbound side has it."""
    assert isinstance(opening(0x16, 443), Hello)
    assert isinstance(opening(ord("G"), 443), Requests)
