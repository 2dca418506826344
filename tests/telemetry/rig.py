"""A sidecar between a server and a client that both have an OpenTelemetry of their own."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from sidecar.config import Settings
from sidecar.core.bundle import Bundle
from sidecar.core.otel import read
from sidecar.core.profile import Identity, Limit, PolicySet, Profile, Quota, Server, Telemetry
from sidecar.shell.app import App

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0  # on a machine that builds something at the same time
POLICY = b"""
@id("everything") permit(principal, action, resource);
@id("no-drops") forbid(principal, action == Action::"tools/call", resource) when { resource.name == "drop" };
"""
TRIAL = b'permit(principal, action, resource) unless { resource.name == "add" };'


def environment(service: str, base: str) -> dict[str, str]:
    """Return what a party with an SDK is told: who it is, and where its spans go."""
    return {
        **os.environ,  # noqa: TID251 - handed on
        "OTEL_SERVICE_NAME": service,
        "OTEL_EXPORTER_OTLP_ENDPOINT": base,
        "PYTHONWARNINGS": "ignore",
    }


@asynccontextmanager
async def a_server(base: str) -> AsyncIterator[int]:
    """Run the server, whose spans go to *base*; give its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.telemetry.party", "server"),
        cwd=ROOT,
        env=environment("records", base),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


async def a_client(base: str, port: int, *, calls: int = 2) -> str:
    """Run the client against *port* to its end; return the id of its trace."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.telemetry.party", "client", f"http://127.0.0.1:{port}/mcp", str(calls)),
        cwd=ROOT,
        env=environment("agent", base),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode().strip()


@asynccontextmanager
async def a_sidecar(
    variables: Mapping[str, str],
    server: int,
    folder: Path,
    *,
    telemetry: Telemetry | None = None,
    spiffe_socket: str = "",
) -> AsyncIterator[tuple[int, int]]:
    """The whole process but its main(), in front of *server*; give its port and that of its health."""
    profile = Profile(
        server=Server(namespace="pay", workload="billing", name="billing", port=server),
        identity=Identity(mtls="permissive", user="optional"),
        limits=(Limit(name="hourly", quotas=(Quota(amount=6, period="hour", warn_at_percent=(50,)),), per=("tool",)),),
        policies=(
            PolicySet(name="pay/tools", cedar=True),
            PolicySet(name="pay/trial", path="sets/namespace/trial/", mode="shadow", cedar=True),
        ),
        telemetry=telemetry or Telemetry(),
    )
    files = {"cedar/all.cedar": POLICY, "sets/namespace/trial/cedar/all.cedar": TRIAL}
    bundle = Bundle(revision="r1", files=files, profile=profile)
    settings = Settings(
        listen_host="127.0.0.1", listen_port=0, health_host="127.0.0.1", health_port=0, drain_s=1.0, pod="billing-7f",
        audit_sink=str(folder / "audit.jsonl"), spiffe_socket=spiffe_socket,
    )  # fmt: skip
    listening: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(App(settings, bundle=bundle, otel=read(variables)).serve(listening))
        ports = await listening
        try:
            yield ports
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ours alone: the app has a handler for it
            await serving
