"""Reads which host a connection asks for, from the first bytes that its client says: TLS or HTTP/1.

Nothing is decrypted and nothing is answered: OpenSSL reads the ClientHello and is stopped as soon as it knows the name,
without a certificate and before it chooses anything. llhttp reads requests, every one of a connection: each must ask for
the host that the first one did. Refused: more bytes than a head may have, what neither of the two can read, HTTP/2
without TLS, upgrades and tunnels, in which later bytes mean something else. RFC 8446, 4.1.2; RFC 9112.
"""

import ssl
from typing import Final, Protocol

import httptools

from sidecar.core.hosts import Barred, Head, Why, host_of, requested

MAX_HELLO_BYTES: Final = 16 * 1024  # one record; with post-quantum keys it is about 2 kB
MAX_HEAD_BYTES: Final = 64 * 1024  # as elsewhere here
HANDSHAKE: Final = 0x16
_NO: Final = b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"


class Opening(Protocol):
    """The first bytes of a connection."""

    def feed(self, data: bytes) -> str | None:
        """Take *data*; return the host that is asked for once it is known. Raises Barred."""
        ...

    def refusal(self, refusal: Barred) -> bytes:
        """Return how the client is told of *refusal*."""
        ...


class Hello:
    """A TLS connection. What follows the ClientHello is not for us."""

    def __init__(self) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = _reading.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._seen_bytes = 0
        self._host: str | None = None

    def feed(self, data: bytes) -> str | None:
        """Take *data*; return the host that is asked for once it is known. Raises Barred."""
        if self._host is not None:
            return self._host
        self._incoming.write(data[: MAX_HELLO_BYTES - self._seen_bytes])  # early data may come with it
        self._seen_bytes += len(data)
        _reading.names.clear()
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            if self._seen_bytes > MAX_HELLO_BYTES:
                raise Barred(Why.UNREADABLE, f"a ClientHello of more than {MAX_HELLO_BYTES} bytes") from None
            return None
        except ssl.SSLError as error:  # always, as the name was seen or can no more be
            if not _reading.names:
                raise Barred(Why.UNREADABLE, f"no ClientHello: {error.reason}") from error
        name = _reading.names.pop()
        if name is None:
            raise Barred(Why.UNNAMED, "a ClientHello without server_name")
        self._host = host_of(name)
        return self._host

    def refusal(self, refusal: Barred) -> bytes:
        """Return the alert: access_denied, or what OpenSSL thinks of the bytes."""
        del refusal
        return self._outgoing.read()


class _Reading:
    """The one TLS context by which names are read; each ends in the alert that `Hello` may send."""

    def __init__(self) -> None:
        self.names: list[str | None] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.options |= ssl.OP_NO_TICKET
        self.context.sni_callback = self._stop

    def _stop(self, tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> int:
        del tls, context
        self.names.append(name)
        return ssl.AlertDescription.ALERT_DESCRIPTION_ACCESS_DENIED


_reading: Final = _Reading()


class Requests:
    """A connection of HTTP/1. Every later byte must be fed as well, before it is sent on."""

    def __init__(self, port: int) -> None:
        """Read requests that were sent to *port*."""
        self._port = port
        self._parser = httptools.HttpRequestParser(self)
        self._host: str | None = None
        self._reset()

    def feed(self, data: bytes) -> str | None:
        """Take *data*; return the host that is asked for once it is known. Raises Barred."""
        self._unseen_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise Barred(Why.UNREADABLE, "an upgrade to another protocol") from None
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, Barred):
                raise cause from None
            raise Barred(Why.UNREADABLE, f"no HTTP/1: {error}") from error
        if self._unseen_bytes > 2 * MAX_HEAD_BYTES:  # the parser keeps a field to itself until it ends
            raise Barred(Why.UNREADABLE, f"a head of more than {MAX_HEAD_BYTES} bytes")
        return self._host

    def refusal(self, refusal: Barred) -> bytes:
        """Return an answer that says why."""
        body = refusal.public.encode("ascii", "backslashreplace") + b"\n"
        return _NO % (len(body), body)

    # httptools callbacks; what they raise comes out of `feed_data`

    def _reset(self) -> None:
        self._url = b""
        self._hosts: list[bytes] = []
        self._head_bytes = 0
        self._unseen_bytes = 0  # that came since the request began, or since a piece of its body

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._reset()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        self._url += url
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field, or a trailer field, which nobody may take for one."""
        self._grow(len(name) + len(value))
        if name.lower() == b"host":
            self._hosts.append(value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        """Judge whom the request is for."""
        host = requested(Head(method=self._parser.get_method(), url=self._url, hosts=tuple(self._hosts)), self._port)
        if self._host not in (None, host):
            raise Barred(Why.MISMATCH, f"{self._host} and {host} on one connection")
        self._host = host

    def on_body(self, piece: bytes) -> None:
        """Let a piece of the body pass."""
        del piece
        self._unseen_bytes = 0

    def _grow(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise Barred(Why.UNREADABLE, f"a head of more than {MAX_HEAD_BYTES} bytes")


def opening(first: int, port: int) -> Opening:
    """Return what reads a connection to *port* that begins with the byte *first*."""
    return Hello() if first == HANDSHAKE else Requests(port)
