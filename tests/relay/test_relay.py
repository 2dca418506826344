"""relay/relay.c: a process for each connection, on loopback alone, and none left behind."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import eventually
from tests.relays import free_port, is_alive, is_open, relay, relayed

SHELL = ("/bin/sh", "-c")


async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection."""
    return await asyncio.open_connection("127.0.0.1", port, limit=2**26)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close it."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_each_connection_is_a_process() -> None:
    """With its own input and output."""
    async with asyncio.timeout(30), relayed(*SHELL, "echo $$; cat") as port:
        pids, ends = set(), []
        for number in range(3):
            reader, writer = await dial(port)
            writer.write(b"line %d\n" % number)
            pids.add(int(await reader.readline()))
            assert await reader.readline() == b"line %d\n" % number
            ends.append(writer)
        assert len(pids) == 3
        assert all(is_alive(pid) for pid in pids)
        for writer in ends:
            await hang_up(writer)
        await eventually(lambda: not any(is_alive(pid) for pid in pids), what="the processes' end")


async def test_large_messages_pass_both_ways_at_once() -> None:
    """Neither side reads ahead without bound, and nobody waits for the other for ever."""
    message = os.urandom(2**16) * 128  # 8 MiB
    async with asyncio.timeout(60), relayed("/bin/cat") as port:
        reader, writer = await dial(port)
        writer.write(message)
        echoed, _ = await asyncio.gather(reader.readexactly(len(message)), writer.drain())
        await hang_up(writer)

    assert echoed == message


async def test_the_end_of_the_input_is_an_end_like_on_a_terminal() -> None:
    """A server that ends on it may still finish what it writes."""
    async with asyncio.timeout(30), relayed(*SHELL, "cat >/dev/null; echo finished") as port:
        reader, writer = await dial(port)
        writer.write(b"x\n")
        writer.write_eof()
        assert await reader.read() == b"finished\n"
        await hang_up(writer)


async def test_a_process_that_ends_closes_its_connection() -> None:
    """After its last words, whatever else holds its output open."""
    async with asyncio.timeout(30), relayed(*SHELL, "sleep 1000 & echo $!; exit 3") as port:
        reader, writer = await dial(port)
        writer.write(b"x\n")
        left_behind = int(await reader.readline())
        assert await reader.read() == b""
        await eventually(lambda: not is_alive(left_behind), what="the end of what it left behind")
        await hang_up(writer)


async def test_a_stubborn_process_is_killed_with_its_group() -> None:
    """It ignores the end of its input and SIGTERM."""
    async with asyncio.timeout(30), relayed(*SHELL, "trap '' TERM; sleep 1000 & echo $$ $!; wait; sleep 1000") as port:
        reader, writer = await dial(port)
        writer.write(b"x\n")
        pids = [int(word) for word in (await reader.readline()).split()]
        await hang_up(writer)
        await eventually(lambda: not any(is_alive(pid) for pid in pids), what="the end of the group")


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
async def test_a_process_that_reads_nothing_is_ended_all_the_same(*, is_reset: bool) -> None:
    """Its connection is closed while input waits for it; it must not keep its place for ever."""
    async with relayed("/bin/sh", "-c", "echo $$; exec sleep 600") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x" * 2**17)  # more than a pipe takes, less than the kernel's buffers and the relay's
        pid = int(await reader.readline())
        await eventually(lambda: not writer.transport.get_write_buffer_size(), what="the input to be sent")
        if is_reset:
            writer.transport.abort()
        else:
            writer.close()
        await eventually(lambda: not Path(f"/proc/{pid}").exists(), what="its end")


async def test_sigterm_ends_all_of_them() -> None:
    """The relay is the container's first process: with it goes everything, in time."""
    async with asyncio.timeout(30), relayed(*SHELL, "echo $$; cat") as port:
        pids, ends = [], []
        for _ in range(3):
            reader, writer = await dial(port)
            writer.write(b"x\n")
            pids.append(int(await reader.readline()))
            ends.append(writer)

    assert not any(is_alive(pid) for pid in pids)
    for writer in ends:
        await hang_up(writer)


async def test_looking_whether_the_port_is_open_starts_nothing(tmp_path: Path) -> None:
    """A TCP probe every second would start a server every second."""
    mark = tmp_path / "started"
    async with asyncio.timeout(30), relayed(*SHELL, f"echo x >>{mark}; cat") as port:
        for _ in range(5):
            assert is_open(port)
        reader, writer = await dial(port)
        writer.write(b"x\n")
        assert await reader.readline() == b"x\n"
        await hang_up(writer)

    assert mark.read_text() == "x\n"


async def test_connections_beyond_the_most_are_closed() -> None:
    """Those that are there go on."""

    def is_refused() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            try:
                sock.sendall(b"y\n")
                return sock.recv(1) == b""
            except ConnectionError:
                return True

    async with asyncio.timeout(30), relayed("/bin/cat", most=1) as port:
        reader, writer = await dial(port)
        while not await _answers(reader, writer):  # the probe of `relayed` holds the one place for a moment
            await hang_up(writer)
            reader, writer = await dial(port)
        assert is_refused()
        assert await _answers(reader, writer)
        await hang_up(writer)
        await eventually(lambda: not is_refused(), what="a free place")


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    try:
        writer.write(b"x\n")
        return await reader.readline() == b"x\n"
    except ConnectionError:
        return False


async def test_the_server_hears_signals_and_has_no_strange_descriptors() -> None:
    """Ignored and blocked signals, and sockets, would pass to the program."""
    script = "import os,signal,sys; sys.stdin.readline(); print(signal.getsignal(signal.SIGTERM)==signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK,[])==set(), sorted(os.listdir('/proc/self/fd'))[:-1], os.getpgrp()==os.getpid(), flush=True)"  # fmt: skip # noqa: E501
    async with asyncio.timeout(30), relayed(sys.executable, "-I", "-S", "-c", script) as port:
        reader, writer = await dial(port)
        writer.write(b"x\n")
        assert await reader.readline() == b"True True ['0', '1', '2'] True\n"
        await hang_up(writer)


async def test_nobody_but_loopback_can_connect() -> None:
    """Another address of this machine is refused."""
    async with relayed("/bin/cat") as port:
        listening = [
            line.split()[1]
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            for line in Path(table).read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
        ]

    assert listening == [f"{int.from_bytes(socket.inet_aton('127.0.0.1'), 'little'):08X}:{port:04X}"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "usage"),
        (["1", "2"], 2, "usage"),
        (["0", "2", "cat"], 2, "expected a number from 1 to 65535"),
        (["80x", "2", "cat"], 2, "expected a number"),
        (["8000", "5000", "cat"], 2, "expected a number from 1 to 1024"),
    ],
)
def test_unusable_arguments_are_named(arguments: list[str], status: int, said: str) -> None:
    """On standard error, which is the container's log."""
    done = subprocess.run([relay(), *arguments], capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - ours

    assert (done.returncode, said in done.stderr) == (status, True)


async def test_a_command_that_cannot_run_is_named() -> None:
    """The connection is closed; the next one tries again."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        relay(), str(port), "2", "/no/such/server", stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    await eventually(lambda: is_open(port), what="the relay")
    reader, writer = await dial(port)
    writer.write(b"x\n")
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert b"cannot run /no/such/server: No such file" in await process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
    await hang_up(writer)
