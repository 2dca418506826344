"""Accepts inbound connections, tells TLS from plaintext by its first byte, and learns where redirected ones were going.

Refuses, in capture mode redirect, connections to any port but the MCP server's. One listening socket for each address
family, because the original destination is asked of the socket by family. RFC 8446, 5.1 (record type 22 is a
handshake); Linux netfilter, SO_ORIGINAL_DST.
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final

from sidecar.config import Capture
from sidecar.shell.accepting import Accepting, listening
from sidecar.shell.inbound import Inbound
from sidecar.shell.serving import Serving

FIRST_BYTE_S: Final = 10.0  # a client that connects and says nothing gives its place back
HANDSHAKE_S: Final = 10.0
TLS_HANDSHAKE: Final = b"\x16"
SO_ORIGINAL_DST: Final = 80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number


class Listener:
    """The inbound side of one sidecar. `run` in the root TaskGroup; cancel it to stop accepting."""

    def __init__(
        self,
        serving: Serving,
        *,
        host: str,
        port: int,
        capture: Capture,
        tls: ssl.SSLContext | None,
        max_connections: int,
        refused_port: Callable[[str, int], None],
    ) -> None:
        """Bind at once, so that `port` is known; *refused_port* is told client and port of misdirected connections."""
        self._serving = serving
        self._capture = capture
        self._tls = tls
        self._refused_port = refused_port
        self._loop = asyncio.get_running_loop()
        # `::` means both families.
        sockets = listening(("0.0.0.0", "::") if host == "::" else (host,), port)  # noqa: S104 - the pod's network is what we guard
        self.port: int = sockets[0].getsockname()[1]
        self._accepting = Accepting(sockets, self._serve, max_connections=max_connections)

    async def run(self) -> None:
        """Accept until cancelled."""
        await self._accepting.run()

    async def _serve(self, sock: socket.socket, client: str) -> bool:
        """Give *sock* to a protocol of its own until it is closed; say whether it was taken."""
        if not self._is_ours(sock, client):
            return False
        first = await self._first_byte(sock)
        is_tls = first == TLS_HANDSHAKE
        if not first or (is_tls and self._tls is None):
            return False
        closed = asyncio.Event()
        await self._loop.connect_accepted_socket(
            lambda: _Placed(self._serving, client, closed),
            sock,
            ssl=self._tls if is_tls else None,
            ssl_handshake_timeout=HANDSHAKE_S if is_tls else None,
        )
        await closed.wait()
        return True

    def _is_ours(self, sock: socket.socket, client: str) -> bool:
        snapshot = self._serving.snapshot
        if self._capture is not Capture.REDIRECT:
            return True
        port = original_port(sock)
        if port == self.port or (snapshot is not None and port == snapshot.profile.server.port):
            return True
        self._refused_port(client, port)
        return False

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """Return the first byte without taking it; empty when the client closes or stays silent."""
        ready = self._loop.create_future()
        self._loop.add_reader(sock.fileno(), lambda: None if ready.done() else ready.set_result(None))
        try:
            async with asyncio.timeout(FIRST_BYTE_S):
                await ready
        finally:
            self._loop.remove_reader(sock.fileno())
        return sock.recv(1, socket.MSG_PEEK)


class _Placed(Inbound):
    """An inbound connection that says when it is over."""

    def __init__(self, serving: Serving, client: str, closed: asyncio.Event) -> None:
        super().__init__(serving, client)
        self._closed = closed

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._closed.set()


def original_port(sock: socket.socket) -> int:
    """Return the port that the client dialled before netfilter redirected it; the own port where it did not."""
    level = socket.IPPROTO_IPV6 if sock.family == socket.AF_INET6 else socket.IPPROTO_IP
    try:
        address = sock.getsockopt(level, SO_ORIGINAL_DST, 28)  # a sockaddr_in6 has 28 bytes, a sockaddr_in 16
    except OSError:  # no connection tracking entry: it came straight to this port
        return int(sock.getsockname()[1])
    port: int = struct.unpack_from("!H", address, 2)[0]  # sin_port and sin6_port both stand at 2
    return port
