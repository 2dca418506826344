"""Accepts the application's outbound connections, finds out where they go, and lets those that are not ours pass untouched.

In capture mode redirect, netfilter sends the ports of MCP servers here, and the address is asked of the socket. In mode
remap the application was told of a proxy: this one, which therefore forwards everything else too. Listens on loopback
only. Refuses a proxy's client that names no destination. RFC 9112, 3.2 (absolute and authority form); RFC 9110, 9.3.6.
"""

import asyncio
import ipaddress
import re
import socket
import struct
from typing import Final

from sidecar.core.egress import split_authority, target
from sidecar.errors import Refusal
from sidecar.shell.accepting import Accepting, listening
from sidecar.shell.egress import MAX_HEAD_BYTES, Egress, Outgoing
from sidecar.shell.listener import SO_ORIGINAL_DST
from sidecar.shell.tunnel import carry, dial

QUIET_S: Final = 1.0  # an application that says nothing first speaks another protocol, in which the server begins
HEAD_S: Final = 10.0
CONNECT_S: Final = 10.0
_METHOD: Final = re.compile(rb"[A-Z]{1,16}(?: |\Z)")
_REQUEST_LINE: Final = re.compile(rb"[A-Z]{1,16} [!-~]+ HTTP/1\.[01]")
_DROPPED: Final = (b"connection", b"proxy-connection", b"proxy-authorization", b"keep-alive")
_BAD_GATEWAY: Final = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

Address = tuple[str, int]


class EgressListener:
    """The outbound side of one sidecar. `run` in the root TaskGroup; cancel it to stop accepting."""

    def __init__(self, egress: Egress, *, port: int, is_redirected: bool, max_connections: int) -> None:
        """Bind at once, so that `port` is known."""
        self._egress = egress
        self._is_redirected = is_redirected
        self._loop = asyncio.get_running_loop()
        sockets = bind(port)
        self.port: int = sockets[0].getsockname()[1]
        self._accepting = Accepting(sockets, self._serve, max_connections=max_connections)

    async def run(self) -> None:
        """Accept until cancelled; what is open goes on until it ends."""
        await self._accepting.run()

    async def _serve(self, sock: socket.socket, client: str) -> bool:
        """Serve *sock* until it is closed; say whether somebody else closes it."""
        address = original_address(sock) if self._is_redirected else None
        if self._is_redirected and address is None:  # nothing was redirected: it came straight here
            return False
        head = await self._peek(sock)
        if address is None and head.startswith(b"CONNECT "):
            address = split_authority(head.split(b" ", 2)[1].decode("latin-1"))
            await self._take(sock, head)
            await self._loop.sock_sendall(sock, b"HTTP/1.1 200 Connection established\r\n\r\n")
            head = await self._peek(sock)
        url, host = _first_line(head)
        is_absolute = not url.startswith(b"/")
        if head and is_absolute is (address is None) and self._is_ours(url, host):
            closed = asyncio.Event()
            await self._loop.connect_accepted_socket(lambda: Outgoing(self._egress, client, address, closed), sock)
            await closed.wait()
            return True
        if address is not None:
            await self._splice(sock, address, b"")
        elif head and is_absolute:
            asked = target(url, host)
            await self._take(sock, head)
            try:
                await self._splice(sock, (asked.host, asked.port), _origin_form(head, asked.path, asked.authority))
            except (OSError, TimeoutError):
                await self._loop.sock_sendall(sock, _BAD_GATEWAY)
                raise
        return False

    def _is_ours(self, url: bytes, host: str | None) -> bool:
        try:
            asked = target(url, host)
        except Refusal:
            return False
        try:
            return self._egress.find(asked) is not None
        except Refusal:  # nobody can say yet; it is answered so
            return True

    async def _peek(self, sock: socket.socket) -> bytes:
        """Return the head of an HTTP request without taking it; empty when it is something else, or nothing."""
        try:
            async with asyncio.timeout(QUIET_S):
                await self._readable(sock)
        except TimeoutError:
            return b""
        began_s = self._loop.time()
        while True:
            seen = sock.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
            line, ended, _ = seen.partition(b"\r\n")
            if not (_REQUEST_LINE.fullmatch(line) if ended else _METHOD.match(seen)):
                return b""
            end = seen.find(b"\r\n\r\n")
            if end >= 0:
                return seen[: end + 4]
            patience_s = HEAD_S if ended else QUIET_S
            if len(seen) == MAX_HEAD_BYTES or self._loop.time() - began_s > patience_s:
                return b""
            await asyncio.sleep(0.005)  # readable all the time: what is there was not taken

    async def _readable(self, sock: socket.socket) -> None:
        ready = self._loop.create_future()
        self._loop.add_reader(sock.fileno(), lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._loop.remove_reader(sock.fileno())

    async def _take(self, sock: socket.socket, head: bytes) -> None:
        """Take what was peeked at."""
        left = len(head)
        while left:
            left -= len(await self._loop.sock_recv(sock, left))

    async def _splice(self, sock: socket.socket, address: Address, first: bytes) -> None:
        """Carry bytes both ways until both sides have ended; *first* go before all others."""
        await carry(sock, await dial(*address, timeout_s=CONNECT_S), first=first)


def original_address(sock: socket.socket) -> Address | None:
    """Return where the application dialled before netfilter redirected it; None where it did not."""
    is_6 = sock.family == socket.AF_INET6
    try:
        found = sock.getsockopt(socket.IPPROTO_IPV6 if is_6 else socket.IPPROTO_IP, SO_ORIGINAL_DST, 28)
    except OSError:  # no connection tracking entry
        return None
    port: int = struct.unpack_from("!H", found, 2)[0]  # sin_port and sin6_port both stand at 2
    host = str(ipaddress.ip_address(found[8:24] if is_6 else found[4:8]))
    return None if (host, port) == sock.getsockname()[:2] else (host, port)


def _first_line(head: bytes) -> tuple[bytes, str | None]:
    """Return the target and the Host of *head*."""
    lines = head.split(b"\r\n")
    parts = lines[0].split(b" ")
    hosts = [line[5:].strip() for line in lines[1:] if line[:5].lower() == b"host:"]
    return parts[1] if len(parts) == 3 else b"", hosts[0].decode("latin-1") if len(hosts) == 1 else None


def _origin_form(head: bytes, path: str, authority: str) -> bytes:
    """Return *head* as its server expects it; the connection ends with the answer, since the next may go elsewhere."""
    first, *lines = head[:-4].split(b"\r\n")
    method, _, version = first.split(b" ")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in (*_DROPPED, b"host")]
    start = b"%b %b %b" % (method, path.encode("latin-1"), version)
    return b"\r\n".join([start, b"Host: " + authority.encode("latin-1"), *kept, b"Connection: close", b"", b""])


def bind(port: int) -> list[socket.socket]:
    """Return the listening sockets of both families, on loopback and on the same port."""
    return listening(("127.0.0.1", "::1"), port)
