"""Requirements on carrying bytes between two connections: unchanged, half-closed, held back, inspected."""

import asyncio
import socket

import pytest

from sidecar.shell.tunnel import carry
from tests.fakes import PATIENCE_S


async def a_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection."""
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


async def test_each_direction_ends_by_itself() -> None:
    """After the one side's end the other may still speak."""
    loop = asyncio.get_running_loop()
    (near, app), (far, server) = await a_pair(), await a_pair()
    with near, app, far, server:
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(carry(near, await asyncio.open_connection(sock=far.dup()), first=b"first "))
            far.close()
            await loop.sock_sendall(app, b"then")
            app.shutdown(socket.SHUT_WR)
            said = b""
            while piece := await loop.sock_recv(server, 100):
                said += piece
            await loop.sock_sendall(server, b"late")
            server.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := await loop.sock_recv(app, 100):
                answer += piece

    assert (said, answer) == (b"first then", b"late")


async def test_what_an_inspection_refuses_is_not_carried() -> None:
    """Both connections end, and the one who carries hears why."""
    loop = asyncio.get_running_loop()
    (near, app), (far, server) = await a_pair(), await a_pair()

    def inspect(piece: bytes) -> None:
        if b"bad" in piece:
            raise ValueError("no")

    with near, app, far, server:
        await loop.sock_sendall(app, b"bad")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ValueError, match="no"):
                await carry(near, await asyncio.open_connection(sock=far.dup()), inspect=inspect)
            far.close()
            assert await loop.sock_recv(server, 100) == b""


async def test_a_lost_connection_ends_the_other() -> None:
    """Nothing is left half open that nobody can use."""
    (near, app), (far, server) = await a_pair(), await a_pair()
    with near, far, server:
        server.shutdown(socket.SHUT_WR)
        app.close()
        async with asyncio.timeout(PATIENCE_S):
            await carry(near, await asyncio.open_connection(sock=far.dup()), first=b"x")
