"""The sidecar itself, as it runs in a pod, with everything switched on: what the figures are about.

Its surroundings are real too: an OpenID provider, a SPIFFE Workload API, a receiver of spans that counts them. Before
anything is timed, the refusals are tried; afterwards, audit records and spans are counted against the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bench.errors import UnavailableError
from bench.material import CLIENT_ID, SERVER_ID, Material
from bench.processes import free_port, running
from bench.targets import Target
from certs.authority import make_key
from certs.embedded import EmbeddedWorkloadApi, Identity
from sidecar.config import LogLevel, Settings
from sidecar.core import profile as profiles
from sidecar.core.bundle import encode
from sidecar.shell.bundles import LAST_GOOD
from tests.parts import PartError, part
from webhook.cli.issuer import EmbeddedIssuer
from webhook.core.compile import Policies
from webhook.shell.opa import Opa, files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.loader import Keys

ARTICLE: Final = Path(__file__).parent.parent / "examples" / "article"
AUDIENCE: Final = "http://mcp.bench.test/mcp"
START_S: Final = 10.0
UNREACHED: Final = 1_000_000  # calls a second: the limit is counted, and never refuses


@dataclass(slots=True)
class Surroundings:
    """What a sidecar talks to besides the server, on a thread of its own. `spans` grows."""

    directory: Path
    material: Material
    spans: int = 0
    token: str = ""
    issuer: str = ""
    otlp: str = ""
    spiffe_socket: str = ""
    _ready: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run them until the end of the block."""
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        thread = threading.Thread(target=self._run, args=(loop, stop), name="surroundings")
        thread.start()
        try:
            self._ready.wait(START_S)
            if self._failure is not None:
                raise self._failure
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # closed: it failed by itself
                loop.call_soon_threadsafe(stop.set)
            thread.join()

    def _run(self, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._serve(stop))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._failure = error
            self._ready.set()

    async def _serve(self, stop: asyncio.Event) -> None:
        issuer = EmbeddedIssuer(audience=AUDIENCE, in_cluster=False)
        providers = await issuer.start()
        receiver = web.Application(client_max_size=64 * 2**20)
        receiver.router.add_post("/v1/traces", self._take_spans)
        sink = web.AppRunner(receiver, access_log=None)
        await sink.setup()
        port = free_port()
        await web.TCPSite(sink, "127.0.0.1", port).start()
        identities = [Identity(spiffe_id=SERVER_ID)]
        api = EmbeddedWorkloadApi(
            self.directory / "spiffe.sock", self.material.domain, identities=identities, in_cluster=False
        )
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(api.run())
            await api.started.wait()
            self.issuer, self.otlp, self.spiffe_socket = issuer.issuer, f"http://127.0.0.1:{port}", api.address
            self.token = issuer.token("ada", email="ada@bench.test", role="engineer", groups=("data", "on-call"))
            self._ready.set()
            await stop.wait()
            serving.cancel()
        await sink.cleanup()
        await providers.cleanup()

    async def _take_spans(self, request: web.Request) -> web.Response:
        self.spans += (await request.read()).count(b'"kind":2')  # one for each message; toward the server is another
        return web.json_response({})


def profile(around: Surroundings, upstream_port: int, *, mtls: bool) -> profiles.Profile:
    """Return what the bundle says: every check on, and a limit that nobody reaches."""
    return profiles.Profile(
        server=profiles.Server(namespace="bench", workload="server", name="server", port=upstream_port),
        identity=profiles.Identity(
            mtls="strict" if mtls else "permissive",
            callers=(str(CLIENT_ID),),
            providers=(profiles.Provider(name="bench", issuer=around.issuer, audiences=(AUDIENCE,)),),
        ),
        limits=(profiles.Limit(name="calls", rate_per_s=UNREACHED, burst=UNREACHED),),
        telemetry=profiles.Telemetry(otlp_endpoint=around.otlp),
    )


@contextlib.contextmanager
def sidecar(
    around: Surroundings, upstream_port: int, keys: Keys | None = None, *, policies: Path = ARTICLE
) -> Iterator[Target]:
    """Run the sidecar; with *keys*, under mutual TLS, and then nobody gets in without."""
    name = "sidecar" if keys is None else "sidecar mTLS"
    home = around.directory / name.replace(" ", "-")
    home.mkdir()
    audit = home / "audit.jsonl"
    key = make_key()
    wanted = profile(around, upstream_port, mtls=keys is not None)
    content = asyncio.run(files([_policies(policies)], wanted, Opa(path=_opa())))
    (home / LAST_GOOD).write_bytes(encode(content, key))
    port, health_port = free_port(), free_port()
    settings = Settings(
        namespace=wanted.server.namespace,
        workload=wanted.server.workload,
        pod="server-0",
        listen_host="127.0.0.1",
        listen_port=port,
        health_host="127.0.0.1",
        health_port=health_port,
        spiffe_socket=around.spiffe_socket,
        control_plane="https://127.0.0.1:9",  # nobody there: the sidecar lives on the last good bundle
        control_plane_id=str(SERVER_ID),
        bundle_keys=key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        bundle_dir=str(home),
        audit_sink=str(audit),
        log_level=LogLevel.WARNING,
    )
    command = [sys.executable, "-m", "sidecar"]
    with running(command, log=home / "log", is_ready=lambda: _is_ready(health_port), env=settings.to_env()) as pid:
        yield Target(
            name=name,
            pid=pid,
            port=port,
            version=f"Python {platform.python_version()}",
            enforces=True,
            keys=keys,
            audit=audit,
        )


def _policies(directory: Path) -> Policies:
    if not directory.is_dir():
        raise UnavailableError(f"{directory} is missing")
    written = [path for path in sorted(directory.rglob("*")) if not path.stem.endswith("_test")]
    return Policies(
        cedar={path.name: path.read_text() for path in written if path.suffix == ".cedar"},
        rego={path.name: path.read_text() for path in written if path.suffix == ".rego"},
    )


def _opa() -> Path:
    try:
        return part("opa")
    except PartError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error


def _is_ready(health_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health_port}/readyz", timeout=1.0) as response:
            return bool(response.status == 200)
    except OSError:
        return False
