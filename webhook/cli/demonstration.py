"""What `sidegate demo` does: starts everything, makes the calls, checks the records and the spans.

Everything real but the two authorities, which are embedded and for development only: a SPIFFE Workload API and an
OpenID issuer. Exits 0 only if every call ended as the rules say and the records and spans tell it.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2
from aiohttp import web
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain
from certs.tls import MutualClient
from certs.workload import X509Source
from sidecar.errors import ConfigError
from sidecar.record import SCHEMA
from webhook.cli.issuer import EmbeddedIssuer

TABLE: Final = "CREATE TABLE customers AS SELECT 1 AS id, 'Ada' AS name UNION ALL SELECT 2, 'Grace'"
SIDECAR: Final = SpiffeId.parse("spiffe://demo.sidegate/ns/demo/sa/database")
AGENT: Final = SpiffeId.parse("spiffe://demo.sidegate/ns/agents/sa/assistant")
AUDIENCE: Final = "https://database.demo.sidegate/mcp"
START_S: Final = 60.0  # the server imports DuckDB; a cold machine takes 10 s
BURST: Final = 6
EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "article"  # not in the wheel
BUNDLE: Final = EXAMPLE / "bundle.tar.gz"
KEY: Final = EXAMPLE / "bundle.pub.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of the demo and how it must end."""

    who: str
    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    expected: str


QUERY: Final = {"sql": "SELECT count(*) AS customers FROM customers"}
STEPS: Final = (
    Step(who="analyst", tool="list_tables", expected="allowed"),
    Step(who="analyst", tool="execute_query", arguments=QUERY, expected="denied"),
    Step(who="engineer", tool="execute_query", arguments=QUERY, expected="allowed"),
    Step(
        who="engineer",
        tool="execute_query",
        arguments={"sql": "DROP TABLE customers", "destructive": True},
        expected="denied",
    ),
)


async def demonstrate(server_program: str, *, once: bool) -> int:
    """Return 0 if every call ended as it should."""
    in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ  # noqa: TID251 - the demo is a process entry point
    with tempfile.TemporaryDirectory(prefix="sidegate-demo-") as name:
        directory = Path(name)
        domain = EmbeddedDomain(TrustDomain.parse("demo.sidegate"))
        sockets = {each: directory / f"{each}.sock" for each in ("sidecar", "agent")}
        ids = {"sidecar": SIDECAR, "agent": AGENT}
        issuer = EmbeddedIssuer(audience=AUDIENCE, in_cluster=in_cluster)
        spans: list[Mapping[str, Any]] = []
        async with asyncio.TaskGroup() as tasks, _running(await issuer.start()), _receiver(spans) as receiver:
            apis = [
                EmbeddedWorkloadApi(
                    sockets[each], domain, identities=[Identity(spiffe_id=ids[each])], in_cluster=in_cluster
                )
                for each in sockets
            ]
            background = [tasks.create_task(api.run()) for api in apis]
            source = X509Source(f"unix:{sockets['agent']}")
            background.append(tasks.create_task(source.run()))
            mutual = MutualClient()
            source.subscribe(mutual.follow)
            upstream_port, port, health_port = _free_port(), _free_port(), _free_port()
            audit = directory / "audit.jsonl"
            server = [server_program, "--transport", "http", "--host", "127.0.0.1", "--port", str(upstream_port),
                      "--db-path", ":memory:", "--read-write", "--init-sql", TABLE]  # fmt: skip
            sidecar = [sys.executable, "-m", "webhook.cli", "run", "--listen", f"127.0.0.1:{port}",
                       "--health", f"127.0.0.1:{health_port}", "--upstream", f"http://127.0.0.1:{upstream_port}/mcp",
                       "--policy", str(BUNDLE), "--key", str(KEY), "--issuer", issuer.issuer, "--audience", AUDIENCE,
                       "--spiffe-socket", f"unix:{sockets['sidecar']}", "--caller", f"{AGENT}",
                       "--limit", f"0.01/{BURST}", "--audit", str(audit), "--otlp", receiver, "--log-level", "warning"]  # fmt: skip
            _say(
                "starting",
                f"{server_program} on port {upstream_port}, unmodified; the sidecar in front of it on port {port}",
            )
            async with _process(server, directory / "server.log"), _process(sidecar, directory / "sidecar.log"):
                await _until_ready(f"http://127.0.0.1:{health_port}/readyz", directory / "sidecar.log")
                await _until_open(upstream_port, directory / "server.log")
                demo = _Calls(f"https://127.0.0.1:{port}/mcp", mutual, issuer, audit, spans)
                problems = await demo.run()
                if not once and not problems:
                    _say("running", f"https://127.0.0.1:{port}/mcp; audit records in {audit}; end with Ctrl-C")
                    await asyncio.Event().wait()
            for task in background:
                task.cancel()
    for problem in problems:
        print(f"sidegate: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


class _Calls:
    """What the two people do, and what must be found in the records afterwards."""

    def __init__(
        self, url: str, mutual: MutualClient, issuer: EmbeddedIssuer, audit: Path, spans: Sequence[Mapping[str, Any]]
    ) -> None:
        self._url = url
        self._mutual = mutual
        self._issuer = issuer
        self._audit = audit
        self._spans = spans
        self._problems: list[str] = []

    async def run(self) -> list[str]:
        """Make the calls; return what was not as it should be."""
        for who, shown in (("analyst", {"list_tables"}), ("engineer", {"list_tables", "execute_query"})):
            async with self._session(who) as session:
                listed = {tool.name for tool in (await session.list_tools()).tools}
                _say("sees", f"{who}: {', '.join(sorted(listed))}")
                self._expect(listed == shown, f"{who} sees {sorted(listed)}, expected {sorted(shown)}")
                for step in STEPS:
                    if step.who == who:
                        outcome, said = await _outcome(session, step)
                        _say(outcome, f"{who}: {step.tool} {json.dumps(dict(step.arguments))} {said}")
                        self._expect(outcome == step.expected, f"{who}: {step.tool} was {outcome}, not {step.expected}")
        async with self._session("engineer") as session:
            outcomes = [
                await _outcome(session, Step(who="engineer", tool="list_tables", expected="")) for _ in range(BURST + 2)
            ]
            limited = [said for outcome, said in outcomes if outcome == "limited"]
            _say("limited", f"engineer: {len(limited)} of {BURST + 2} more calls {limited[0] if limited else ''}")
            self._expect(bool(limited) and outcomes[0][0] == "allowed", "the limit did not hold, or held at once")
        await self._check_stranger()
        await self._check_records()
        return self._problems

    @contextlib.asynccontextmanager
    async def _session(self, who: str) -> AsyncIterator[ClientSession]:
        token = self._issuer.token(f"{who}-1", email=f"{who}@demo.example", role=who)
        headers = {"authorization": f"Bearer {token}", "sidegate-agent-session": "demo-7f3a"}
        context = self._mutual.context(SpiffePattern.exactly(SIDECAR))
        async with (
            httpx2.AsyncClient(verify=context, headers=headers, timeout=30) as client,
            streamable_http_client(self._url, http_client=client) as streams,
            ClientSession(streams[0], streams[1]) as session,
        ):
            await session.initialize()
            yield session

    async def _check_stranger(self) -> None:
        """A caller with the right SVID and no token, and one without SVID, must get nowhere."""
        context = self._mutual.context(SpiffePattern.exactly(SIDECAR))
        ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        async with httpx2.AsyncClient(verify=context) as client:
            status = (await client.post(self._url, json=ping)).status_code
        _say("refused", f"an agent without a user's token: HTTP {status}")
        self._expect(status == 401, f"a call without token got HTTP {status}, expected 401")

    async def _check_records(self) -> None:
        lines = [json.loads(line) for line in self._audit.read_text().splitlines()]
        records = [each for each in lines if each["schema"] == SCHEMA and each["phase"] == "end"]
        calls = [record for record in records if (record["message"] or {}).get("method") == "tools/call"]
        denied = [record for record in calls if record["decision"]["outcome"] == "refused"]
        _say("audited", f"{len(records)} records, {len(calls)} of them tool calls, {len(denied)} refused; one of them:")
        for record in denied[:1]:
            print(json.dumps(record, indent=2))
        known = all(
            (record["who"]["user"] or {}).get("email") and record["who"]["workload"] == str(AGENT) for record in calls
        )
        self._expect(bool(calls) and known, "an audit record lacks the user or the workload")
        async with asyncio.timeout(15):
            while len(self._spans) < len(calls):  # noqa: ASYNC110 - another coroutine appends
                await asyncio.sleep(0.1)
        names = sorted({span["name"] for span in self._spans})
        _say("traced", f"{len(self._spans)} spans: {', '.join(names)}")
        self._expect("tools/call execute_query" in names, "no span of execute_query was received")

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self._problems.append(problem)


async def _outcome(session: ClientSession, step: Step) -> tuple[str, str]:
    """Make the call; return how it ended and what the caller was told."""
    try:
        result = await session.call_tool(step.tool, dict(step.arguments))
    except MCPError as error:
        return ("limited" if error.error.code == 429 else "denied"), f"({error.error.message})"
    return ("failed", str(result.content)) if result.is_error else ("allowed", "")


@contextlib.asynccontextmanager
async def _receiver(spans: list[Mapping[str, Any]]) -> AsyncIterator[str]:
    """Receive OTLP/HTTP spans into *spans*; give the endpoint."""

    async def receive(request: web.Request) -> web.Response:
        for resource in (await request.json())["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                spans.extend(scope["spans"])
        return web.json_response({})

    application = web.Application()
    application.router.add_post("/v1/traces", receive)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with _running(runner):
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"


@contextlib.asynccontextmanager
async def _running(runner: web.AppRunner) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _process(command: Sequence[str], log: Path) -> AsyncIterator[None]:
    """Run *command* for as long as the block; its output goes to *log*."""
    with log.open("wb") as output:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdout=output,
            stderr=output,
            env={**os.environ, "PATH": search_path()},  # noqa: TID251 - handed on
        )
    try:
        yield
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(10):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def _until_ready(url: str, log: Path) -> None:
    """Wait until the sidecar is ready; say why it is not when it takes too long."""
    said = "no answer"
    try:
        async with asyncio.timeout(START_S), httpx2.AsyncClient() as client:
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    response = await client.get(url)
                    said = response.text
                    if response.status_code == 200:
                        return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ConfigError(f"the sidecar is not ready: {said}\n{log.read_text()[-2000:]}") from None


async def _until_open(port: int, log: Path) -> None:
    try:
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ConfigError(f"the server does not listen:\n{log.read_text()[-2000:]}") from None


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def search_path() -> str:
    """Return the search path, this interpreter's own programs first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # noqa: TID251 - handed on


def _say(event: str, what: str) -> None:
    print(f"{event:>9}  {what}", flush=True)
