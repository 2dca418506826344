"""Accepts connections on listening sockets, a bounded number at a time; what is done with one is its caller's.

A defect in serving one connection ends neither the others nor the process.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

from sidecar.errors import Refusal

log = logging.getLogger(__name__)


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
