"""A real Redis on loopback, to be killed, frozen and started again; ended by its process id."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.parts import part

START_S = 30.0  # on a machine that is busy


def free_port() -> int:
    """Return a port that was free a moment ago: redis-server cannot be asked to choose one."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


@dataclass
class RedisServer:
    """redis-server without persistence: a restart forgets everything, scripts too."""

    directory: Path
    port: int = field(default_factory=free_port)
    options: Sequence[str] = ()
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """The value of SIDEGATE_LIMITS_STORE."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return when it listens."""
        command = [
            str(part("redis-server")),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            *self.options,
        ]
        self.process = subprocess.Popen(command, cwd=self.directory, stdout=subprocess.DEVNULL)  # noqa: S603 - the part
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.listening), 1):
                return
            time.sleep(0.01)
        raise AssertionError("redis-server never listened")

    @property
    def listening(self) -> int:
        """The port that accepts connections: that of TLS, where there is one."""
        options = list(self.options)
        return int(options[options.index("--tls-port") + 1]) if "--tls-port" in options else self.port

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Let it answer nothing, while the kernel keeps its connections."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def a_redis(directory: Path, *options: str, port: int | None = None) -> Iterator[RedisServer]:
    """Run a Redis."""
    server = RedisServer(directory=directory, options=options, port=free_port() if port is None else port)
    server.start()
    try:
        yield server
    finally:
        server.kill()
