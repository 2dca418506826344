"""Carries bytes between two connections, unchanged and both ways, until both sides have ended.

The end of one direction is passed on and leaves the other open. Whoever reads slowly holds the other back; nothing more
than a piece is kept.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

PIECE_BYTES: Final = 64 * 1024
LINGER_S: Final = 10.0  # for what the other side has yet to read when both have said all
KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))  # s, s, times

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def dial(host: str, port: int, *, timeout_s: float) -> Streams:
    """Return a connection that finds out when the other end is gone. Raises OSError, TimeoutError.

    Whoever asked for keep-alive asks it of us now, who are always there; and routers forget what is silent.
    """
    async with asyncio.timeout(timeout_s):
        streams = await asyncio.open_connection(host, port)
    sock = streams[1].get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return streams


async def carry(
    sock: socket.socket, streams: Streams, *, first: bytes = b"", inspect: Callable[[bytes], object] | None = None
) -> None:
    """Carry between *sock* and *streams*, which is closed in the end; *first* goes out before all else.

    *inspect* sees each piece before it goes out; what it raises ends both connections, and comes out of here.
    """
    reader, writer = streams
    try:
        writer.write(first)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_carry_out(sock, writer, inspect))
            tasks.create_task(_carry_back(reader, sock))
        writer.close()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(LINGER_S):
                await writer.wait_closed()  # what waits in the transport goes out yet
    except ExceptionGroup as group:
        raise group.exceptions[0] from None  # the first one ended the other
    finally:
        writer.transport.abort()


async def _carry_out(
    sock: socket.socket, writer: asyncio.StreamWriter, inspect: Callable[[bytes], object] | None
) -> None:
    loop = asyncio.get_running_loop()
    try:
        while piece := await loop.sock_recv(sock, PIECE_BYTES):
            if inspect is not None:
                inspect(piece)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()  # the other half ends with it


async def _carry_back(reader: asyncio.StreamReader, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while piece := await reader.read(PIECE_BYTES):
            await loop.sock_sendall(sock, piece)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
