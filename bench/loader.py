"""The loader: a Go program of ours (bench/go), built once, told what to send by lines of JSON.

Written in Go and not taken from elsewhere, because it must compare every answer's body and keep its TLS connections
between blocks; wrk does neither.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).parent / "go"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Files in PEM: the loader's certificate and key, and whom it believes. Without *certificate* it shows none."""

    anchors: str
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What came of one job. Times in microseconds, as the client sees them."""

    requests: int
    errors: int
    first_error: str
    seconds: float
    p50_us: float
    p99_us: float
    status: int
    body: str


class Loader:
    """The running program. One job at a time."""

    def __init__(self, process: subprocess.Popen[str], answer: Path) -> None:
        self._process = process
        self._answer = answer

    def block(self, port: int, keys: Keys | None, request: Path, *, connections: int, seconds: float) -> Block:
        """Load *port* for *seconds* and return the counts. Raises BenchError unless every answer was the right one."""
        done = self._run(port, keys, request, connections, seconds)
        if done.errors or not done.requests:
            raise BenchError(f"{done.errors} errors in {done.requests} requests: {done.first_error}")
        return done

    def once(self, port: int, keys: Keys | None, request: Path) -> Block:
        """Send one request and return what came back; `first_error` tells of a connection that failed."""
        return self._run(port, keys, request, 1, 0.0)

    def _run(self, port: int, keys: Keys | None, request: Path, connections: int, seconds: float) -> Block:
        job = {
            "address": f"127.0.0.1:{port}",
            "tls": None if keys is None else asdict(keys),
            "request": str(request),
            "answer": str(self._answer),
            "connections": connections,
            "seconds": seconds,
        }
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101, PT018 - pipes, see below
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("the loader ended")
        return Block(**json.loads(line))

    @classmethod
    @contextlib.contextmanager
    def started(cls, go: Path, directory: Path, answer: bytes) -> Iterator[Self]:
        """Build and start the loader, which expects *answer*; end it afterwards. Raises BenchError."""
        program, expected = directory / "loader", directory / "answer.json"
        expected.write_bytes(answer)
        build: list[str | Path] = [go, "build", "-o", program, "."]
        built = subprocess.run(build, cwd=SOURCE, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            raise BenchError(f"the loader does not build: {built.stderr}")
        process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"GOMAXPROCS": "1"}
        )
        try:
            yield cls(process, expected)
        finally:
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
