"""`python -m bench.admission`: what the creation of a pod waits for, and what a control plane with many pods holds.

The control plane is the process that runs in a cluster, on one core of its own, with real TLS and a real Workload API;
the Kubernetes API that it watches is the tests' small one. Reviews arrive as an API server sends them: kept HTTPS
connections, at fixed times whether or not the last one was answered (open loop), so that a stall counts for all that
wait behind it. Their pods are the public templates of tests/admission. Every answer is checked: a pod without sidecar
ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import ssl
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop
import yaml

from bench.errors import BenchError
from bench.processes import free_port, rss_bytes
from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffeId, TrustDomain
from tests.webhook.core.golden_cases import TEMPLATE
from tests.webhook.kube_server import PODS, KubeServer, kubeconfig
from webhook.core import resources
from webhook.core.injection import Inject, NamespacePolicy, decide
from webhook.shell.controllers import path_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
CONTROL_PLANE = SpiffeId.parse("spiffe://bench.test/ns/sidegate-system/sa/sidegate")
HOST = "sidegate.sidegate-system.svc"
TEMPLATES = Path(__file__).parents[1] / "tests/admission/templates"
ROOT = Path(__file__).parents[1]
PATH = "/mutate/enforced"
CONNECTIONS = 8
REPLICAS = 50  # pods of one workload
START_S = 300.0  # ten thousand pods are listed, and a bundle is made for each workload
SETTLE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What came of one run of reviews."""

    rate: float
    latencies_s: list[float]
    cpu_s: float
    wall_s: float

    @property
    def cpu_each_us(self) -> float:
        """CPU time of the control plane for one review."""
        return self.cpu_s / len(self.latencies_s) * 1e6

    def percentile_ms(self, percent: int) -> float:
        """Return the latency that *percent* of the reviews stayed within."""
        return quantiles(self.latencies_s, n=100, method="inclusive")[percent - 1] * 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when figures were printed, 1 when there are none."""
    parser = argparse.ArgumentParser(prog="bench.admission", description="Latency, CPU and memory of admission.")
    parser.add_argument("--rate", type=float, default=100, help="pods a second (default 100)")
    parser.add_argument("--seconds", type=float, default=30, help="length of the run (default 30)")
    parser.add_argument("--pods", type=int, default=10_000, help="injected pods in the cluster (default 10000)")
    options = parser.parse_args(arguments)
    if options.rate <= 0 or options.seconds <= 0 or options.pods < 0:
        parser.error("--rate and --seconds must be above zero, --pods not below")
    status = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(measure(options.rate, options.seconds, options.pods))
    except* (BenchError, TimeoutError) as group:
        print(f"bench: error: {group.exceptions[0]}", file=sys.stderr)
        status = 1
    return status


async def measure(rate: float, seconds: float, pods: int) -> None:
    """Measure and print."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    load_before = os.getloadavg()[0]
    print(
        f"{len(cores)} cores, Python {sys.version.split()[0]}, load average {load_before:.1f} before; one core for the server"
    )
    async with control_plane(0, cores[-1]) as (pid, _, _):
        empty = rss_bytes(pid)
        print(f"idle, no pod watched: {empty / 2**20:.0f} MiB, {idle_percent(await idle(pid)):.1f} % of the core")
    async with control_plane(pods, cores[-1]) as (pid, url, context):
        full = rss_bytes(pid)
        print(
            f"idle, {pods} pods watched: {full / 2**20:.0f} MiB ({(full - empty) / max(pods, 1) / 1024:.1f} KiB a pod), "
            f"{idle_percent(await idle(pid)):.1f} % of the core"
        )
        bodies = reviews()
        size = sum(map(len, bodies)) / len(bodies) / 1024
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=context)) as session:
            await open_loop(session, url, bodies, rate, min(2.0, seconds), pid)  # connections, caches
            show(await open_loop(session, url, bodies, rate, seconds, pid), size)
            show(await closed_loop(session, url, bodies, min(seconds, 10.0), pid), size)
        print(f"resident afterwards: {rss_bytes(pid) / 2**20:.0f} MiB")


def show(load: Load, size_kib: float) -> None:
    """Print one run."""
    what = f"{load.rate:g} pods/s, open loop" if load.rate else f"{CONNECTIONS} connections, back to back"
    print(
        f"{what}: {len(load.latencies_s) / load.wall_s:.0f} pods/s done, reviews of {size_kib:.0f} KiB; "
        f"p50 {load.percentile_ms(50):.2f} ms, p99 {load.percentile_ms(99):.2f} ms, "
        f"slowest {max(load.latencies_s) * 1e3:.1f} ms; CPU {load.cpu_each_us:.0f} µs a pod, "
        f"{load.cpu_s / load.wall_s * 100:.0f} % of the core"
    )


async def idle(pid: int) -> float:
    """Return the CPU time of *pid* over SETTLE_S in which nothing is asked of it."""
    before = cpu_s(pid)
    await asyncio.sleep(SETTLE_S)
    return cpu_s(pid) - before


def idle_percent(used_s: float) -> float:
    """Return it as a share of one core."""
    return used_s / SETTLE_S * 100


def cpu_s(pid: int) -> float:
    """Return the CPU time of *pid* with all of its threads, those that have ended too (proc(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reviews() -> list[bytes]:
    """Return one review of each public template that a namespace with injection enforced takes."""
    return [json.dumps(review(pod)).encode() for pod in map(_pod, sorted(TEMPLATES.glob("*.yaml"))) if _judged(pod)]


def _pod(path: Path) -> Any:
    """Return the pod of a template, as a ReplicaSet asks for it: with an owner, and a port where it has several."""
    workload = yaml.safe_load(path.read_text())
    template = workload["spec"]["template"]
    ports = [port["containerPort"] for each in template["spec"]["containers"] for port in each.get("ports") or ()]
    annotations = (template["metadata"].get("annotations") or {}) | {"sidegate.dev/port": str((ports or [8000])[0])}
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x-5d4f8c7b9", "uid": str(uuid.uuid4())}
    metadata = template["metadata"] | {"generateName": "x-5d4f8c7b9-", "annotations": annotations}
    metadata["ownerReferences"] = [owner | {"controller": True}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _judged(pod: Any) -> bool:
    decision = decide(
        pod, namespace="shop", policy=NamespacePolicy.ENFORCED, profiles={}, template=TEMPLATE, nonce="bench"
    )
    return isinstance(decision, Inject)


def review(pod: Any) -> Any:
    """Return what an API server sends of the creation of *pod*."""
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    resource = {"group": "", "version": "v1", "resource": "pods"}
    request = {
        "uid": str(uuid.uuid4()),
        "kind": kind,
        "resource": resource,
        "requestKind": kind,
        "requestResource": resource,
        "namespace": "shop",
        "operation": "CREATE",
        "userInfo": {
            "username": "system:serviceaccount:kube-system:replicaset-controller",
            "groups": ["system:authenticated"],
        },
        "object": pod,
        "oldObject": None,
        "dryRun": False,
        "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    }
    return {"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": request}


async def open_loop(
    session: aiohttp.ClientSession, url: str, bodies: list[bytes], rate: float, seconds: float, pid: int
) -> Load:
    """Send at fixed times; a latency counts from the time at which its review was due."""
    latencies: list[float] = []
    count, begun, before = max(2, int(rate * seconds)), time.perf_counter(), cpu_s(pid)
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            due = begun + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(_ask(session, url, bodies[number % len(bodies)], due, latencies))
    wall_s = time.perf_counter() - begun
    return Load(rate=rate, latencies_s=latencies, cpu_s=cpu_s(pid) - before, wall_s=wall_s)


async def closed_loop(session: aiohttp.ClientSession, url: str, bodies: list[bytes], seconds: float, pid: int) -> Load:
    """Send the next review on each connection as soon as the last one is answered: the most that one core takes."""
    latencies: list[float] = []
    begun, before, source = time.perf_counter(), cpu_s(pid), itertools.cycle(bodies)

    async def work() -> None:
        while (now := time.perf_counter()) - begun < seconds:
            await _ask(session, url, next(source), now, latencies)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONNECTIONS):
            tasks.create_task(work())
    wall_s = time.perf_counter() - begun
    return Load(rate=0, latencies_s=latencies, cpu_s=cpu_s(pid) - before, wall_s=wall_s)


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, due: float, latencies: list[float]) -> None:
    async with asyncio.timeout(30):
        async with session.post(
            url, data=body, headers={"Content-Type": "application/json"}, server_hostname=HOST
        ) as response:
            answer = await response.read()
    latencies.append(time.perf_counter() - due)
    if b'"patchType":"JSONPatch"' not in answer:
        raise BenchError(f"no patch came back: {answer[:300]!r}")


@contextlib.asynccontextmanager
async def control_plane(pods: int, core: int) -> AsyncIterator[tuple[int, str, ssl.SSLContext]]:
    """Run the control plane on *core* with *pods* in its cluster; gives process, address of admission and its trust."""
    server = cluster(pods)
    admission, bundles, metrics = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        domain = EmbeddedDomain(TrustDomain.parse("bench.test"))
        identity = Identity(spiffe_id=CONTROL_PLANE)
        api = EmbeddedWorkloadApi(directory / "plane", domain, identities=[identity], in_cluster=False)
        async with server.running(), asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(api.run())
            await api.started.wait()
            (directory / "kubeconfig").write_text(kubeconfig(server.port))
            settings = {
                "KUBECONFIG": str(directory / "kubeconfig"),
                "LISTEN_HOST": "127.0.0.1",
                "ADMISSION_PORT": str(admission),
                "BUNDLES_PORT": str(bundles),
                "METRICS_PORT": str(metrics),
                "SPIFFE_SOCKET": api.address,
                "CONTROL_PLANE_ID": str(CONTROL_PLANE),
                "LINGER_S": "0",
                "OPA": "/nowhere/opa",  # these policies are Cedar only
                "LOG_LEVEL": "warning",
            }
            environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
            environment |= {f"SIDEGATE_{key}": value for key, value in settings.items()}
            with (directory / "log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "webhook", stdout=log, stderr=log, env=environment
                )
            os.sched_setaffinity(process.pid, {core})
            try:
                begun = time.monotonic()
                await _ready(process, metrics, directory / "log", pods)
                if pods:
                    print(f"{pods} pods listed and their bundles made in {time.monotonic() - begun:.1f} s")
                await asyncio.sleep(SETTLE_S)
                (webhook,) = server.objects[CONFIGURATIONS]["sidegate"]["webhooks"]
                trusted = base64.b64decode(webhook["clientConfig"]["caBundle"]).decode()
                context = ssl.create_default_context(cadata=trusted)
                yield process.pid, f"https://127.0.0.1:{admission}{PATH}", context
            finally:
                if process.returncode is None:
                    process.terminate()
                await process.wait()
                serving.cancel()


async def _ready(process: asyncio.subprocess.Process, port: int, log: Path, pods: int) -> None:
    """Return when the control plane is ready and has made a bundle for every pod."""
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while True:
            if process.returncode is not None:
                raise BenchError(f"the control plane ended: {log.read_text()[-500:]}")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/readyz") as ready:
                    status = ready.status
                async with session.get(f"http://127.0.0.1:{port}/metrics") as metrics:
                    text = await metrics.text()
                held = [line for line in text.splitlines() if line.startswith("sidegate_bundle_pods ")]
                if status == 200 and (not pods or (held and float(held[0].split()[1]) == pods)):
                    return
            await asyncio.sleep(0.2)


def cluster(pods: int) -> KubeServer:
    """Return an API with *pods* injected pods, REPLICAS to a workload and ten workloads to a namespace."""
    server = KubeServer()
    service = {"name": "sidegate", "namespace": "sidegate-system", "path": PATH}
    webhook = {"name": "enforced.inject.sidegate.dev", "clientConfig": {"service": service}}
    server.put(CONFIGURATIONS, {"metadata": {"name": "sidegate"}, "webhooks": [webhook]})
    server.objects[PODS] = {}
    for kind in resources.KINDS:
        server.objects[path_of(kind)] = {}
    made: dict[int, Any] = {}
    for number in range(pods):
        workload = number // REPLICAS
        namespace = f"team-{workload // 10}"
        if number % (10 * REPLICAS) == 0:
            policy = {"selector": {}, "cedar": "permit(principal, action, resource);"}
            server.put(path_of(resources.POLICY), {"metadata": {"name": "all", "namespace": namespace}, "spec": policy})
        if workload not in made:
            made = {workload: _injected(workload)}
        metadata = {"name": f"server-{number}", "namespace": namespace, "uid": str(uuid.UUID(int=number))}
        pod = made[workload] | {"metadata": made[workload]["metadata"] | metadata}
        server.version += 1
        pod["metadata"]["resourceVersion"] = str(server.version)
        server.objects[PODS][f"{namespace}/server-{number}"] = pod
    server.events.clear()
    return server


def _injected(workload: int) -> Any:
    """Return a pod of *workload* as the API server keeps it."""
    pod = _pod(TEMPLATES / "mcp-kubernetes-mcp-server.yaml")
    pod["metadata"]["ownerReferences"][0]["name"] = f"server-{workload}-5d4f8c7b9"
    pod["metadata"]["labels"] |= {"pod-template-hash": "5d4f8c7b9"}
    decision = decide(
        pod, namespace="shop", policy=NamespacePolicy.ENFORCED, profiles={}, template=TEMPLATE, nonce="bench"
    )
    if not isinstance(decision, Inject):
        raise BenchError(f"the template of the watched pods is not injected: {decision}")
    return decision.pod


if __name__ == "__main__":
    sys.exit(main())
