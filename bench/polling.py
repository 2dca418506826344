"""How fast a policy change reaches 10,000 sidecars that long-poll one control plane: `python -m bench.polling`.

The control plane's Controller, Bundles and BundleEndpoint run as they are in one process on one core, over real mutual
TLS on loopback; the sidecars are connections of a second process on another core, which speak what sidecars speak, and
ask again soon after each bundle that they get: that is their report. The clock starts where the API server's watch hands
the change over, and includes compiling. Connections are opened at a bounded rate before.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import uvloop
from aiohttp import web

from certs.authority import make_key
from certs.embedded import EmbeddedDomain
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain
from certs.svid import X509Snapshot
from certs.tls import MutualClient, MutualServer
from webhook.__main__ import GC_THRESHOLDS
from webhook.core import resources
from webhook.core.effective import Defaults
from webhook.core.signing import SigningKeys
from webhook.shell.bundles import BundleEndpoint, Bundles
from webhook.shell.controllers import Controller
from webhook.shell.kube import Listed, Put
from webhook.shell.metrics import Metrics
from webhook.shell.opa import Opa, Remembering

NAMESPACE: Final = "bench"
DOMAIN: Final = TrustDomain.parse("bench.test")
PLANE: Final = SpiffeId.parse("spiffe://bench.test/ns/sidegate-system/sa/sidegate")
SIDECAR: Final = SpiffeId.parse(f"spiffe://bench.test/ns/{NAMESPACE}/sa/server")
HANDSHAKES: Final = 64  # at a time
SETTLE_S: Final = 3.0
PATIENCE_S: Final = 60.0
RULES: Final = 50


def policy(number: int) -> dict[str, Any]:
    """Return the MCPPolicy, in Cedar, as it is after change *number*."""
    rules = "\n".join(
        f'permit (principal in Role::"role-{n}", action == Action::"tools/call", resource == Tool::"s/tool-{n}-{number}");'
        for n in range(RULES)
    )
    metadata = {"name": "rules", "namespace": NAMESPACE, "resourceVersion": str(1000 + number)}
    return {"metadata": metadata, "spec": {"selector": {}, "cedar": rules}}


def pod(number: int, workloads: int) -> dict[str, Any]:
    """Return an injected pod of one of so many workloads."""
    owner = {"kind": "StatefulSet", "name": f"server-{number % workloads}", "controller": True}
    container = {"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}
    return {
        "metadata": {"name": f"pod-{number}", "namespace": NAMESPACE, "ownerReferences": [owner]},
        "spec": {"serviceAccountName": "server", "containers": [container]},
    }


# --- the control plane ---


async def serve(pods: int, workloads: int, socket_path: str) -> None:
    """Be the control plane; what is written to standard input says what happens, one line each."""
    gc.set_threshold(*GC_THRESHOLDS)
    domain = EmbeddedDomain(DOMAIN)
    server = MutualServer()
    server.follow(_identity(domain, PLANE))
    _write_identity(Path(socket_path), domain)
    bundles, metrics = Bundles(), Metrics()
    bundles.keys = SigningKeys(current=make_key(), term=1)
    controller = Controller(bundles, Remembering(Opa("opa")).files, Defaults(), metrics)
    for kind in resources.KINDS:
        controller.apply(kind, Listed([policy(0)] if kind is resources.POLICY else [], "1000"))
    controller.apply_pods(Listed([pod(number, workloads) for number in range(pods)], "1000"))
    await controller.compile_dirty()
    application = web.Application(client_max_size=0)
    application.router.add_get("/v1/bundles/{pod}", BundleEndpoint(bundles, DOMAIN, metrics).get)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server.context, backlog=1024).start()
    _say(port=runner.addresses[0][1])
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while command := (await reader.readline()).decode().split():
        if command[0] == "change":
            began, began_cpu_s = time.monotonic(), time.process_time()
            controller.apply(resources.POLICY, Put(policy(int(command[1]))))
            await controller.compile_dirty()
            _say(began=began, published=time.monotonic(), cpu_s=time.process_time() - began_cpu_s)
        else:
            _say(cpu_s=time.process_time(), memory=_memory())
    await runner.cleanup()


def _say(**values: float) -> None:
    print(json.dumps(values), flush=True)


def _memory() -> int:
    """Return the resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _identity(domain: EmbeddedDomain, spiffe_id: SpiffeId) -> X509Snapshot:
    issued = domain.issue(spiffe_id)
    return X509Snapshot.parse(
        (issued.spiffe_id, issued.x509_svid, issued.x509_svid_key, issued.bundle), {}, now=datetime.now(UTC)
    )


def _write_identity(path: Path, domain: EmbeddedDomain) -> None:
    """Leave for the sidecars what their agents would give them."""
    issued = domain.issue(SIDECAR)
    parts = (issued.x509_svid, issued.x509_svid_key, issued.bundle)
    path.write_text(json.dumps([part.hex() for part in parts]), encoding="ascii")


# --- the sidecars ---


class Sidecars:
    """All of them. *arrived* holds when each got its last new bundle."""

    def __init__(self, port: int, identity: X509Snapshot) -> None:
        self._port = port
        client = MutualClient()
        client.follow(identity)
        self._context = client.context(SpiffePattern.exactly(PLANE))
        self._opening = asyncio.Semaphore(HANDSHAKES)
        self.waiting = 0
        self.arrived: list[float] = []
        self.bytes = 0

    async def live(self, number: int) -> None:
        """Be one sidecar: ask, wait, and ask again."""
        async with self._opening:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._context, limit=2**20)
        etag = revision = ""
        while True:
            fields = [f"GET /v1/bundles/pod-{number} HTTP/1.1", "Host: sidegate.test"]
            fields += ["Prefer: modes=snapshot;wait=60", "Accept-Encoding: identity"]
            fields += [f"If-None-Match: {etag}", f"Sidegate-Bundle-Revision: {revision}"] if etag else []
            writer.write(("\r\n".join(fields) + "\r\n\r\n").encode())
            self.waiting += 1
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.waiting -= 1
            status, known = head.split(" ", 2)[1], _header(head, "etag")
            body = await reader.readexactly(int(_header(head, "content-length") or 0))
            if status == "200":
                self.arrived.append(time.monotonic())
                self.bytes += len(body)
                etag, revision = known, known.strip('"').partition(".")[0]
                within_s = float(_header(head, "sidegate-report-within"))
                await asyncio.sleep(random.uniform(within_s / 2, within_s))  # noqa: S311 - as the sidecar does
            elif status != "304":
                raise RuntimeError(head)


def _header(head: str, name: str) -> str:
    for line in head.split("\r\n"):
        if line.lower().startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""


class Plane:
    """The control plane's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101 - same
        self._input, self._output = process.stdin, process.stdout

    async def told(self, command: str = "") -> dict[str, Any]:
        """Return what it answers to *command*."""
        if command:
            self._input.write(f"{command}\n".encode())
        answer: dict[str, Any] = json.loads(await self._output.readline())
        return answer


@contextlib.asynccontextmanager
async def a_plane(pods: int, workloads: int, identity: Path, core: int) -> AsyncIterator[Plane]:
    """Run the control plane on *core*."""
    command = (sys.executable, "-m", "bench.polling", "--serve", str(identity), "--sidecars", str(pods))
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--workloads", str(workloads)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        yield Plane(process)
    finally:
        process.terminate()
        await process.wait()


async def measure(pods: int, workloads: int, changes: int, directory: Path) -> None:
    """Print what was measured."""
    cores = sorted(os.sched_getaffinity(0))
    identity = directory / "identity.json"
    async with a_plane(pods, workloads, identity, cores[0]) as plane, asyncio.TaskGroup() as tasks:
        os.sched_setaffinity(0, {cores[-1]})
        port = (await plane.told())["port"]
        empty = await plane.told("stats")
        svid, key, bundle = (bytes.fromhex(part) for part in json.loads(identity.read_text(encoding="ascii")))
        sidecars = Sidecars(port, X509Snapshot.parse((str(SIDECAR), svid, key, bundle), {}, now=datetime.now(UTC)))
        began = time.monotonic()
        running = [tasks.create_task(sidecars.live(number)) for number in range(pods)]
        while len(sidecars.arrived) < pods or sidecars.waiting < pods:  # noqa: ASYNC110 - counts have no event
            await asyncio.sleep(0.1)
        opened_s = time.monotonic() - began
        await asyncio.sleep(SETTLE_S)
        full = await plane.told("stats")
        print(f"{pods} sidecars of {workloads} workloads, {sidecars.bytes / pods / 1024:.1f} KiB a bundle")
        print(
            f"connected in {opened_s:.0f} s; control plane: {(full['cpu_s'] - empty['cpu_s']) / pods * 1e3:.2f} ms of CPU "
            f"a connection, {full['memory'] / 2**20:.0f} MiB ({(full['memory'] - empty['memory']) / pods / 1024:.0f} KiB each)"
        )
        await asyncio.sleep(SETTLE_S)
        idle = await plane.told("stats")
        print(f"idle: {(idle['cpu_s'] - full['cpu_s']) / SETTLE_S * 100:.1f} % of a core")
        for number in range(1, changes + 1):
            await _change(number, pods, plane, sidecars)
        for task in running:
            task.cancel()


async def _change(number: int, pods: int, plane: Plane, sidecars: Sidecars) -> None:
    """Change the policy, and print how long it took."""
    sidecars.arrived.clear()
    before = await plane.told("stats")
    said = await plane.told(f"change {number}")
    async with asyncio.timeout(PATIENCE_S):
        while len(sidecars.arrived) < pods or sidecars.waiting < pods:  # noqa: ASYNC110 - same
            await asyncio.sleep(0.05)
    after = await plane.told("stats")
    took = sorted(each - said["began"] for each in sidecars.arrived)
    print(
        f"change {number}: 50 % after {took[pods // 2]:.2f} s, 99 % after {took[pods * 99 // 100 - 1]:.2f} s, "
        f"all after {took[-1]:.2f} s; published within {said['published'] - said['began']:.2f} s and {said['cpu_s']:.2f} s of "
        f"CPU; with the reports {after['cpu_s'] - before['cpu_s']:.2f} s of CPU; {after['memory'] / 2**20:.0f} MiB"
    )
    await asyncio.sleep(SETTLE_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when figures were printed."""
    parser = argparse.ArgumentParser(prog="bench.polling", description=__doc__)
    parser.add_argument("--sidecars", type=int, default=10_000)
    parser.add_argument("--workloads", type=int, default=100)
    parser.add_argument("--changes", type=int, default=5)
    parser.add_argument("--serve", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted, (soft, hard) = options.sidecars + 200, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    with contextlib.suppress(KeyboardInterrupt):
        if options.serve:
            uvloop.run(serve(options.sidecars, options.workloads, options.serve))
        else:
            with tempfile.TemporaryDirectory(prefix="bench-") as directory:
                uvloop.run(measure(options.sidecars, options.workloads, options.changes, Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
