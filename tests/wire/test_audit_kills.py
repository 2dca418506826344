"""The sidecar is killed, again and again, with calls under way: the audit has every call that reached the server."""

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import aiohttp
import pytest

from sidecar.core import chain
from tests.relays import free_port, is_open
from webhook.cli.__main__ import main

KILLS = 12
CALLS = 44  # answered before each kill
CLIENTS = 4
PATIENCE_S = 300.0
HERE = Path(__file__).parents[1]
MODERN = "2026-07-28"  # without sessions: a restart costs no handshake


@asynccontextmanager
async def running(*command: str, log: Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program until the block ends."""
    inherited = dict(os.environ)  # noqa: TID251 - a child has what the test has
    with log.open("ab") as errors:
        child = await asyncio.create_subprocess_exec(
            *command, env=inherited | environment, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.terminate()
        await child.communicate()


@asynccontextmanager
async def a_sidecar(directory: Path, upstream_port: int, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """`sidegate run` in front of the server, once it listens."""
    command = (
        sys.executable, "-m", "webhook.cli", "run", "--listen", f"127.0.0.1:{port}", "--user", "optional",
        "--upstream", f"http://127.0.0.1:{upstream_port}/mcp", "--policy", str(directory / "policies"),
        "--audit", str(directory / "audit.jsonl"), "--log-level", "warning",
    )  # fmt: skip
    async with running(*command, log=directory / "sidecar.log") as child:
        while not is_open(port):
            assert child.returncode is None, (directory / "sidecar.log").read_text()[-2000:]
            await asyncio.sleep(0.02)
        yield child


async def call(session: aiohttp.ClientSession, url: str, text: str) -> bool:
    """Call the tool that writes *text* down; say whether it was answered."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {"name": "mark", "arguments": {"text": text}, "_meta": meta}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    headers = {
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": MODERN,
        "mcp-method": "tools/call",
        "mcp-name": "mark",
    }
    try:
        async with session.post(url, json=body, headers=headers) as response:
            answer = await response.text()
    except (aiohttp.ClientError, OSError):
        return False
    assert "marked" in answer, answer
    return True


async def call_until_killed(url: str, numbers: "count[int]", answered: list[str], enough: asyncio.Event) -> None:
    """Call one after the other until nobody answers any more; *enough* were answered when it is time to kill."""
    begin = len(answered)

    async def one_client(session: aiohttp.ClientSession) -> None:
        while await call(session, url, text := f"call {next(numbers)}"):
            answered.append(text)
            if len(answered) - begin >= CALLS:
                enough.set()

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(one_client(session))


async def test_every_call_that_reached_the_server_is_in_the_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at any moment, the sidecar has written a call down before the server had it; each restart goes on."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "all.cedar").write_text("permit (principal, action, resource);")
    ledger, audit = tmp_path / "ledger.jsonl", tmp_path / "audit.jsonl"
    server = str(HERE / "matrix" / "programs" / "server_python2.py")
    numbers, answered, port = count(1), list[str](), free_port()
    async with asyncio.timeout(PATIENCE_S):
        async with running(sys.executable, server, log=tmp_path / "server.log", LEDGER=str(ledger)) as upstream:
            assert upstream.stdout is not None
            upstream_port = int(await upstream.stdout.readline())
            for _ in range(KILLS):
                async with a_sidecar(tmp_path, upstream_port, port) as sidecar, asyncio.TaskGroup() as tasks:
                    enough = asyncio.Event()
                    tasks.create_task(call_until_killed(f"http://127.0.0.1:{port}/mcp", numbers, answered, enough))
                    await enough.wait()
                    await asyncio.sleep(random.uniform(0, 0.02))  # noqa: S311 - any moment
                    sidecar.kill()
            async with a_sidecar(tmp_path, upstream_port, port), aiohttp.ClientSession() as session:
                assert await call(session, f"http://127.0.0.1:{port}/mcp", "the last")

    lines = audit.read_bytes().splitlines()
    records = [document for line in lines if (document := _read(line)) and "phase" in document]
    ran = {json.loads(line)["arguments"]["text"] for line in ledger.read_text().splitlines()}
    begun = {each["arguments"]["content"]["text"] for each in records if each["phase"] == "begin"}
    ended = {each["arguments"]["content"]["text"] for each in records if each["phase"] == "end"}
    assert len(ran) >= KILLS * CALLS >= 500
    assert ran <= begun
    assert set(answered) <= ended

    report = chain.verify(lines, None)
    assert report.is_sound, report.findings
    assert len(report.chains) == KILLS + 1
    assert report.other_lines == len(report.torn)
    assert len(begun - ended) == len(report.begun) > 0  # under way when it was killed

    assert main(["audit", "verify", str(audit)]) == 0
    assert f"{len(report.begun)} calls were begun and have no end" in capsys.readouterr().out


def _read(line: bytes) -> dict[str, object] | None:
    try:
        document = json.loads(line)
    except json.JSONDecodeError:  # cut short by a kill
        return None
    return document if isinstance(document, dict) else None
