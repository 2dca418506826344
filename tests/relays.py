"""The relay, compiled from the source that the sidecar image compiles it from, and run as a container would run it."""

import asyncio
import contextlib
import functools
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes import eventually
from tests.parts import cache_dir

SOURCE = Path(__file__).parents[1] / "relay" / "relay.c"
FLAGS = ("-std=c11", "-O2", "-s", "-static", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


@functools.cache
def relay() -> Path:
    """The relay's program; the test is skipped where there is no C compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc: the relay is C, and the image's build has its own compiler")
    key = hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:12]
    program = cache_dir() / "parts" / f"relay-{key}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
            made = Path(scratch, "relay")
            subprocess.run([compiler, *FLAGS, "-o", made, SOURCE], check=True)  # noqa: S603 - a fixed command
            made.rename(program)
    return program


def free_port() -> int:
    """A port that nobody listens on; the relay is told its port, as it is in a pod."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def relayed(*command: str | Path, most: int = 32, port: int | None = None) -> AsyncIterator[int]:
    """Run *command* behind the relay; gives the port. The relay must end well, and soon, when it is told to."""
    port = port or free_port()
    process = await asyncio.create_subprocess_exec(relay(), str(port), str(most), *command)
    try:
        await eventually(lambda: is_open(port), what="the relay")
        yield port
    finally:
        process.terminate()
        async with asyncio.timeout(20):
            assert await process.wait() == 0


def is_open(port: int) -> bool:
    """Whether somebody listens on *port* of loopback."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
