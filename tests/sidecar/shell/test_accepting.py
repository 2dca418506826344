"""Connections are accepted a bounded number at a time, and none of them can end the others."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sidecar.errors import Reason, Refusal
from sidecar.shell.accepting import Accepting, listening


@contextlib.asynccontextmanager
async def accepting(
    serve: Callable[[socket.socket, str], Awaitable[bool]], *, max_connections: int = 8
) -> AsyncIterator[int]:
    """Accept on a free port; gives the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    port = listening.getsockname()[1]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(Accepting([listening], serve, max_connections=max_connections).run())
        yield port
        running.cancel()
    assert listening.fileno() == -1


def test_a_port_that_another_has_in_one_family_is_not_left_to_it() -> None:
    """Callers of that family would reach whoever has it."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"::1 port {port}: Address already in use"):
            listening(("127.0.0.1", "::1"), port)


def test_a_family_of_which_the_pod_has_no_address_is_left_out() -> None:
    """But not the only one."""
    (sock,) = listening(("127.0.0.1", "2001:db8::1"), 0)
    assert sock.getsockname()[0] == "127.0.0.1"
    sock.close()
    with pytest.raises(OSError, match="2001:db8::1 port 0: "):
        listening(("2001:db8::1",), 0)


async def answer_of(port: int) -> bytes:
    """Return what a new connection is told, to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("error", [OSError("gone"), TimeoutError(), Refusal(Reason.MALFORMED, "no"), ValueError("x")])
async def test_one_that_fails_is_closed_and_the_next_is_served(error: Exception) -> None:
    """Whatever was wrong with it; its place is free again."""
    errors = [error]

    async def serve(sock: socket.socket, _: str) -> bool:
        if errors:
            raise errors.pop()
        await asyncio.get_running_loop().sock_sendall(sock, b"served")
        return False

    async with accepting(serve, max_connections=1) as port:
        assert await answer_of(port) == b""
        assert await answer_of(port) == b"served"


async def test_more_than_there_are_places_for_wait() -> None:
    """The kernel keeps them until one is over."""
    served: list[str] = []
    first_is_over = asyncio.Event()

    async def serve(_: socket.socket, client: str) -> bool:
        served.append(client)
        await first_is_over.wait()
        return False

    async with accepting(serve, max_connections=1) as port, asyncio.timeout(5), asyncio.TaskGroup() as clients:
        for _ in range(2):
            clients.create_task(answer_of(port))
        while not served:  # noqa: ASYNC110 - what is waited for is a list
            await asyncio.sleep(0.01)
        assert len(served) == 1
        first_is_over.set()
    assert len(served) == 2
