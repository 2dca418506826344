"""Wrong input at a running sidecar: each is refused with a clear message, counted and audited, and the next call is served."""

import asyncio
import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web

from certs.embedded import EmbeddedDomain, EmbeddedWorkloadApi, Identity
from certs.spiffe import SpiffeId, SpiffePattern, TrustDomain
from certs.tls import MutualClient, _load_key, _pem
from certs.workload import X509Source
from webhook.cli.issuer import EmbeddedIssuer

ARTICLE = Path(__file__).parents[2] / "examples" / "article"
SIDECAR = SpiffeId.parse("spiffe://a.test/ns/demo/sa/records")
AGENT = SpiffeId.parse("spiffe://a.test/ns/agents/sa/agent")
FOREIGNER = SpiffeId.parse("spiffe://b.test/ns/agents/sa/agent")
AUDIENCE = "https://records.a.test/mcp"
READ = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "list_tables", "arguments": {}}}


class Bench:
    """A running sidecar with everything around it."""

    def __init__(self, directory: Path) -> None:
        self.audit_file = directory / "audit.jsonl"
        self.issuer = EmbeddedIssuer(audience=AUDIENCE, in_cluster=False)
        self.client = MutualClient()
        self.url = ""
        self.health = ""
        self.reached: list[Any] = []

    def token(self, role: str = "analyst") -> str:
        """Return a good token."""
        return self.issuer.token(f"{role}-1", email=f"{role}@a.test", role=role)

    def context(self) -> ssl.SSLContext:
        """Return the agent's way in."""
        return self.client.context(SpiffePattern.exactly(SIDECAR))

    async def post(self, body: bytes | dict[str, Any], token: str | None = None, **options: Any) -> tuple[int, Any]:
        """Send one message; return status and decoded body."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {token or self.token()}"}
        data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                self.url,
                data=data,
                headers={**headers, **options.pop("headers", {})},
                ssl=options.pop("ssl", None) or self.context(),
            ) as response,
        ):
            text = await response.text()
            return response.status, json.loads(text) if text else None

    def audited(self) -> list[dict[str, Any]]:
        """Return the records so far, one of each message."""
        lines = map(json.loads, self.audit_file.read_text().splitlines())
        return [line for line in lines if line.get("phase") == "end"]

    async def metric(self, sample: str) -> float:
        """Return the sum of all samples whose name and labels begin like *sample*."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.health}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))

    async def still_serves(self) -> None:
        """A good call passes: the wrong one before it lost nothing."""
        status, answer = await self.post(READ)

        assert (status, answer["result"]["content"]) == (200, [])


@contextlib.asynccontextmanager
async def serving(directory: Path, *, with_agent: bool = True) -> AsyncIterator[Bench]:
    """Run a sidecar as `sidegate run` does, before a server that answers everything."""
    bench = Bench(directory)
    domain = EmbeddedDomain(TrustDomain.parse("a.test"))

    async def upstream(request: web.Request) -> web.Response:
        message = await request.json()
        bench.reached.append(message)
        return web.json_response({"jsonrpc": "2.0", "id": message["id"], "result": {"content": []}})

    application = web.Application()
    application.router.add_post("/mcp", upstream)
    runners = [web.AppRunner(application, access_log=None), await bench.issuer.start()]
    await runners[0].setup()
    await web.TCPSite(runners[0], "127.0.0.1", 0).start()
    upstream_port = runners[0].addresses[0][1]
    port, health_port = _free_port(), _free_port()
    bench.url, bench.health = f"https://127.0.0.1:{port}/mcp", f"http://127.0.0.1:{health_port}"
    async with asyncio.TaskGroup() as tasks:
        background = []
        for name, identity in (("sidecar", SIDECAR), ("agent", AGENT)):
            if name == "agent" or with_agent:
                api = EmbeddedWorkloadApi(
                    directory / name, domain, identities=[Identity(spiffe_id=identity)], in_cluster=False
                )
                background.append(tasks.create_task(api.run()))
        source = X509Source(f"unix:{directory / 'agent'}")
        source.subscribe(bench.client.follow)
        background.append(tasks.create_task(source.run()))
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "webhook.cli", "run", "--listen", f"127.0.0.1:{port}", "--health", f"127.0.0.1:{health_port}",
            "--upstream", f"http://127.0.0.1:{upstream_port}/mcp", "--policy", str(ARTICLE / "bundle.tar.gz"),
            "--key", str(ARTICLE / "bundle.pub.pem"), "--issuer", bench.issuer.issuer, "--audience", AUDIENCE,
            "--spiffe-socket", f"unix:{directory / 'sidecar'}", "--caller", str(AGENT), "--audit", str(bench.audit_file),
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                await source.wait_ready()
                while not await _answers(f"{bench.health}/{'readyz' if with_agent else 'livez'}"):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            yield bench
        finally:
            child.terminate()
            await child.wait()
            for task in background:
                task.cancel()
            for runner in runners:
                await runner.cleanup()


async def _answers(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_wrong_input_is_refused_counted_audited_and_nothing_is_lost(tmp_path: Path) -> None:
    """One sidecar, one wrong thing after another; a good call passes after each."""
    async with serving(tmp_path) as bench:
        await bench.still_serves()
        good = len(bench.reached)

        # A body with a duplicate key: servers take the last, so must nobody judge the first.
        status, answer = await bench.post(b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call"}')
        assert (status, answer["error"]["data"]["reason"]) == (400, "malformed")
        assert "twice" in answer["error"]["message"]
        await bench.still_serves()

        # A token that has expired, one of a foreign issuer, one for another audience, one that was cut.
        for token, detail in _wrong_tokens(bench):
            status, answer = await bench.post(READ, token)
            assert (status, answer["error"]["data"]["reason"]) == (401, "unauthenticated")
            assert detail in bench.audited()[-1]["decision"]["detail"]
        await bench.still_serves()

        # A tool that the policy does not allow, and a method that nobody knows.
        status, answer = await bench.post({**READ, "params": {"name": "execute_query", "arguments": {}}})
        assert (status, answer["error"]["code"], answer["id"]) == (200, 403, 7)
        status, answer = await bench.post({"jsonrpc": "2.0", "id": 8, "method": "tools/run"})
        assert (status, answer["error"]["code"], answer["id"]) == (200, -32601, 8)
        await bench.still_serves()

        # A peer from another trust domain, and one without certificate.
        before = await bench.metric("sidegate_handshake_refusals_total")
        with pytest.raises(aiohttp.ClientError):
            await bench.post(READ, ssl=_foreign_context())
        after = await bench.metric("sidegate_handshake_refusals_total")
        assert after == before + 1
        anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
        status, answer = await bench.post(READ, ssl=anonymous)
        assert status == 401
        assert "mutual TLS" in answer["error"]["message"]
        await bench.still_serves()

        assert len(bench.reached) == good + 4, "a wrong call reached the server"
        reasons = {record["decision"]["reason"] for record in bench.audited()}
        assert reasons >= {"malformed", "unauthenticated", "denied", "unknown_method"}
        for reason in ("malformed", "unauthenticated", "denied", "unknown_method"):
            assert await bench.metric(f'sidegate_refusals_total{{reason="{reason}"}}') >= 1


def _wrong_tokens(bench: Bench) -> list[tuple[str, str]]:
    now_s = int(time.time())
    claims = {"iss": bench.issuer.issuer, "aud": AUDIENCE, "sub": "x", "iat": now_s - 900, "exp": now_s + 60}
    headers = {"kid": "development", "typ": "at+jwt"}

    def signed(**changed: Any) -> str:
        return jwt.encode({**claims, **changed}, bench.issuer._key, algorithm="ES256", headers=headers)

    return [
        (signed(exp=now_s - 60), "expired"),
        (signed(iss="https://elsewhere.example"), "unknown issuer"),
        (signed(aud="https://other.example"), "udience"),
        (signed()[:-6] + "AAAAAA", "ignature"),
    ]


def _foreign_context() -> ssl.SSLContext:
    """A client of b.test that would accept any server: what matters is what the sidecar does."""
    foreign = EmbeddedDomain(TrustDomain.parse("b.test"))
    svid = foreign.issue(FOREIGNER)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _load_key(context, [_pem("PRIVATE KEY", svid.x509_svid_key), _pem("CERTIFICATE", svid.x509_svid)])
    return context


async def test_without_an_agent_the_sidecar_says_so_and_passes_nothing(tmp_path: Path) -> None:
    """A missing agent socket: the process lives, readiness names it, callers get no further than the handshake."""
    async with serving(tmp_path, with_agent=False) as bench:
        async with aiohttp.ClientSession() as session, session.get(f"{bench.health}/readyz") as response:
            said = await response.json()

        assert response.status == 503
        assert said["conditions"]["identity"].startswith("no-agent")
        with pytest.raises(aiohttp.ClientError):
            await bench.post(READ)
        assert bench.reached == []
