"""Processes that are measured: started, asked for their CPU time and memory, ended by their own id.

CPU time is the scheduler's (`/proc/<pid>/task/*/schedstat`, nanoseconds), summed over threads and children: a proxy
that moves its work to another thread or process does not look cheaper.
Source: Linux, Documentation/scheduler/sched-stats.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

START_S = 20.0  # a sidecar compiles its policies first
STOP_S = 5.0


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Say whether something accepts connections on *port* of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    *,
    log: Path,
    is_ready: Callable[[], bool],
    env: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Run *command*, give its process id once *is_ready*, end it afterwards. Raises BenchError, with *log*'s end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env)
    try:
        deadline_s = time.monotonic() + START_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise BenchError(f"{Path(command[0]).name} did not start: {_tail(log)}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:]) or "no output"


def cpu_ns(pid: int) -> int:
    """Return the CPU time that *pid*, its threads and its children have had, in nanoseconds."""
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for each in _tree(pid)
        for task in Path(f"/proc/{each}/task").iterdir()
    )


def rss_bytes(pid: int) -> int:
    """Return the resident memory of *pid* and its children."""
    return sum(_rss_bytes(each) for each in _tree(pid))


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _tree(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(each for child in children for each in _tree(child))]
