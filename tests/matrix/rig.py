"""The programs of the matrix, one per SDK generation, and the sidecar between them, as processes of their own.

A server prints its port and leaves a line in its ledger for every tool that runs; a client goes through the same steps
whatever SDK it is written on, and prints a line for each.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from tests.parts import part

PROGRAMS: Final = Path(__file__).parent / "programs"
PATIENCE_S: Final = 60.0  # for a process to start, on a machine that is busy with others
WALK_S: Final = 150.0  # every step of a client has ten seconds
LEGACY, MODERN = "legacy", "modern"

# Everything but the tool `drop`, and `mark ` with a space, which is not the tool `mark`.
POLICY: Final = """
permit (principal, action, resource);
forbid (principal, action == Action::"tools/call", resource)
when { ["drop", "mark "].contains(resource.name) };
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A client or a server on one SDK."""

    name: str
    part: str  # of tests/parts.py; empty: what the tests themselves are installed with
    command: tuple[str, ...]  # `{part}` and `{node}` stand for the paths of parts
    eras: tuple[str, ...] = (LEGACY,)

    def start(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """Return the command and its environment. Raises PartError when a part cannot be had."""
        parts = {"part": str(part(self.part)) if self.part else "", "node": str(part("node")) if self._on_node else ""}
        command = [word.format(python=sys.executable, programs=PROGRAMS, **parts) for word in self.command]
        environment = dict(os.environ)  # noqa: TID251 - a child has what the test has
        environment |= {"PACKAGES": parts["part"]} if self._on_node else {}
        environment |= {"PYTHONPATH": parts["part"]} if self.part and "{python}" in self.command else {}
        return [*command, *arguments], environment

    @property
    def _on_node(self) -> bool:
        return "{node}" in self.command


def _python(what: str, generation: int) -> tuple[str, ...]:
    # Without site packages, those of the tests: only the part's.
    options = ("-S",) if generation == 1 else ()
    return ("{python}", *options, f"{{programs}}/{what}_python{generation}.py")


BOTH: Final = (LEGACY, MODERN)
CLIENTS: Final = (
    Program(name="Python 1.8.1", part="mcp-python-1.8", command=_python("client", 1)),
    Program(name="Python 1.30", part="mcp-python-1.30", command=_python("client", 1)),
    Program(name="Python 2.3", part="", command=_python("client", 2), eras=BOTH),
    Program(
        name="TypeScript 1.32", part="mcp-typescript-1.32", command=("{node}", "{programs}/client_typescript1.mjs")
    ),
    Program(
        name="TypeScript 2.4",
        part="mcp-typescript-2.4",
        command=("{node}", "{programs}/client_typescript2.mjs"),
        eras=BOTH,
    ),
    Program(name="Go 1.6", part="mcp-go-1.6", command=("{part}",)),
    Program(name="Go 1.8", part="mcp-go", command=("{part}/client",), eras=BOTH),
)
SERVERS: Final = (
    Program(name="Python 1.30", part="mcp-python-1.30", command=_python("server", 1)),
    Program(name="Python 2.3", part="", command=_python("server", 2), eras=BOTH),
    Program(
        name="TypeScript 1.32", part="mcp-typescript-1.32", command=("{node}", "{programs}/server_typescript1.mjs")
    ),
    Program(
        name="TypeScript 2.4",
        part="mcp-typescript-2.4",
        command=("{node}", "{programs}/server_typescript2.mjs"),
        eras=BOTH,
    ),
    Program(name="Go 1.8", part="mcp-go", command=("{part}/server",)),
    Program(name="Go 1.8 stateless", part="mcp-go", command=("{part}/server", "stateless"), eras=BOTH),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Something that listens, and what it writes down."""

    port: int
    written: Path = field(repr=False)  # the ledger of a server, the audit of a sidecar

    @property
    def url(self) -> str:
        """The MCP endpoint."""
        return f"http://127.0.0.1:{self.port}/mcp"

    def size_bytes(self) -> int:
        """How much is written so far."""
        return self.written.stat().st_size if self.written.exists() else 0

    def lines(self, start_bytes: int = 0) -> list[dict[str, Any]]:
        """What is written so far, from *start_bytes* on; an unfinished line is not, nor a call that is only begun."""
        if not self.written.exists():
            return []
        with self.written.open("rb") as file:
            file.seek(start_bytes)
            lines = [json.loads(line) for line in file if line.endswith(b"\n")]
        return [line for line in lines if line.get("phase") != "begin"]


@asynccontextmanager
async def running(
    command: list[str], environment: Mapping[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program until the block ends; what it says goes to *log*."""
    with log.open("wb") as errors:
        child = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.terminate()
        try:
            async with asyncio.timeout(10):
                await child.communicate()
        except TimeoutError:
            child.kill()
            await child.communicate()


@asynccontextmanager
async def serving(server: Program, directory: Path) -> AsyncIterator[Place]:
    """Run a server of the matrix on a free port."""
    ledger = directory / "ledger.jsonl"
    command, environment = server.start()
    async with running(command, {**environment, "LEDGER": str(ledger)}, directory / "server.log") as child:
        assert child.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await child.stdout.readline()
        if not line.strip().isdigit():
            raise AssertionError(f"{server.name} did not start: {(directory / 'server.log').read_text()[-1000:]}")
        yield Place(port=int(line), written=ledger)


@asynccontextmanager
async def governed(server: Place, directory: Path, *, denied: str = "error") -> AsyncIterator[Place]:
    """Run `sidegate run` in front of *server*: one tool is denied, one is limited to one call; gives where it listens."""
    policies = directory / "policies"
    policies.mkdir()
    (policies / "matrix.cedar").write_text(POLICY)
    profile = {
        "format": 1,
        "server": {
            "namespace": "matrix",
            "workload": "matrix",
            "name": "matrix",
            "port": server.port,
            "paths": ["/mcp"],
        },
        "identity": {"mtls": "permissive", "user": "optional"},
        "limits": [{"name": "paced", "rate_per_s": 0.001, "burst": 1, "tools": ["paced"]}],
        "audit": {"redact": [], "max_bytes": 2**20},
        "denied": denied,
    }
    (policies / "sidegate.json").write_text(json.dumps(profile))
    port, health = free_port(), free_port()
    audit = directory / "audit.jsonl"
    command = [
        sys.executable, "-m", "webhook.cli", "run", "--listen", f"127.0.0.1:{port}", "--health", f"127.0.0.1:{health}",
        "--upstream", server.url, "--policy", str(policies), "--user", "optional", "--audit", str(audit),
    ]  # fmt: skip
    environment = dict(os.environ)  # noqa: TID251 - a child has what the test has
    async with running(command, environment, directory / "sidecar.log") as child:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await _ready(health):
                    if child.returncode is not None:
                        break
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        if child.returncode is not None or not await _ready(health):
            raise AssertionError(f"sidecar did not start: {(directory / 'sidecar.log').read_text()[-1000:]}")
        yield Place(port=port, written=audit)


async def _ready(health: int) -> bool:
    url = f"http://127.0.0.1:{health}/readyz"
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def walk(client: Program, era: str, url: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Return what came of each step of *client*, by the step's name, in order."""
    command, environment = client.start(url, era)
    async with running(command, environment, directory / "client.log") as child:
        assert child.stdout is not None
        steps: dict[str, dict[str, Any]] = {}
        async with asyncio.timeout(WALK_S):
            while line := await child.stdout.readline():
                step = json.loads(line)
                steps[step.pop("step")] = step
            await child.wait()  # or the end of the block would signal a process that is gone
    return steps
