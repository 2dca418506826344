"""A real Redis on loopback, to be killed, frozen and started again; ended by its process id."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import make_key
from tests.certs.pki import LIFETIME, NOW, an_authority
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
    sentinel: Path | None = None  # its configuration
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """The value of SIDEGATE_LIMITS_STORE."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return when it listens."""
        ports = () if "--tls-port" in self.options else ("--port", str(self.port))
        kind = ("--save", "") if self.sentinel is None else ("--sentinel",)
        configuration = () if self.sentinel is None else (str(self.sentinel),)
        command = [str(part("redis-server")), *configuration, *ports, "--bind", "127.0.0.1", *kind, *self.options]
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


def tls_options(directory: Path) -> tuple[tuple[str, ...], str]:
    """Return the options of a Redis that speaks TLS as localhost, and the authority that proves it (PEM)."""
    authority, key = an_authority(), make_key()
    leaf = authority.sign_serving(
        ["localhost"], key.public_key(), now=NOW, lifetime=LIFETIME, serial=x509.random_serial_number()
    )
    certificate, private = directory / "tls.crt", directory / "tls.key"
    certificate.write_bytes(leaf.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    names = ("--tls-cert-file", str(certificate), "--tls-key-file", str(private), "--tls-auth-clients", "no")
    return names, authority.certificate_pem.decode()


@contextmanager
def a_redis(
    directory: Path, *options: str, port: int | None = None, sentinel: Path | None = None
) -> Iterator[RedisServer]:
    """Run a Redis; with *sentinel*, its configuration, it is a Sentinel."""
    server = RedisServer(
        directory=directory, options=options, port=free_port() if port is None else port, sentinel=sentinel
    )
    server.start()
    try:
        yield server
    finally:
        server.kill()
