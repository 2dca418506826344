"""Accepts connections on listening sockets, a bounded number at a time; what is done with one is its caller's.

A defect in serving one connection ends neither the others nor the process.
"""

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from sidecar.errors import Refusal

log = logging.getLogger(__name__)

BACKLOG: Final = 512  # connections that wait in the kernel while all places are taken
_NO_SUCH_FAMILY: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # a kernel without IPv6, or where it is switched off


def listening(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Return sockets that listen on *hosts*, all on the same port; what the pod has no addresses of is left out.

    Raises OSError, naming host and port, where that leaves none, and where somebody else has the port.
    """
    sockets: list[socket.socket] = []
    for host in hosts:
        try:
            sock = _bound(host, port)
        except OSError as error:
            if sockets and error.errno in _NO_SUCH_FAMILY:
                continue
            for each in sockets:
                each.close()
            raise OSError(error.errno, f"{host} port {port}: {error.strerror}") from error
        port = sock.getsockname()[1]
        sock.listen(BACKLOG)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


class Accepting:
    """`run` in the root TaskGroup; cancel it to stop accepting. More connections wait in the kernel's queue."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        serve: Callable[[socket.socket, str], Awaitable[bool]],
        *,
        max_connections: int,
    ) -> None:
        """Take over *sockets*, which listen; *serve* ends with its connection and says whether somebody else closes it."""
        self._sockets = sockets
        self._serve = serve
        self._places = asyncio.Semaphore(max_connections)
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Accept until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for sock in self._sockets:
                    tasks.create_task(self._accept(sock, tasks))
        finally:
            for sock in self._sockets:
                sock.close()

    async def _accept(self, listening: socket.socket, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._places.acquire()
            try:
                sock, address = await self._loop.sock_accept(listening)
            except OSError as error:  # the client is gone again, or no descriptor is free
                self._places.release()
                log.warning("accept failed", extra={"error": str(error)})
                await asyncio.sleep(0.01)
                continue
            tasks.create_task(self._open(sock, f"{address[0]}:{address[1]}"))

    async def _open(self, sock: socket.socket, client: str) -> None:
        """Serve *sock* until it is closed, then give its place back."""
        is_taken = False
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            is_taken = await self._serve(sock, client)
        except (OSError, TimeoutError, Refusal) as error:
            # ssl.SSLError is an OSError; certs/tls.py has counted it with its reason.
            log.debug("connection refused", extra={"client": client, "error": str(error)})
        except Exception:
            # The last resort of one connection: its defect must not end the others, or the process.
            log.exception("connection failed", extra={"client": client})
        finally:
            if not is_taken:
                sock.close()
            self._places.release()
