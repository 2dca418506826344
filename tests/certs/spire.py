"""A real SPIRE server and agent on loopback, with one registered workload: the user who runs the tests."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from certs.spiffe import SpiffeId
from tests.certs.pki import A_TEST, API
from tests.parts import part

NODE = "spiffe://a.test/node"
SVID_TTL_S = 15  # SPIRE then rotates every 2 to 4 s
START_S = 60.0

SERVER_CONF = """
server {{
  bind_address = "127.0.0.1"
  bind_port = "{port}"
  socket_path = "{folder}/server.sock"
  trust_domain = "{domain}"
  data_dir = "{folder}/server"
  log_level = "WARN"
  ca_key_type = "ec-p256"
  ca_ttl = "10m"
  default_x509_svid_ttl = "60s"
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{
      database_type = "sqlite3"
      connection_string = "{folder}/server/data.sqlite3"
    }}
  }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{folder}/server/keys.json" }} }}
}}
"""
AGENT_CONF = """
agent {{
  data_dir = "{folder}/agent"
  log_level = "WARN"
  server_address = "127.0.0.1"
  server_port = "{port}"
  socket_path = "{folder}/agent.sock"
  trust_bundle_path = "{folder}/bundle.pem"
  trust_domain = "{domain}"
  experimental {{ sync_interval = "2s" }}
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{folder}/agent" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


class SpireAgent:
    """SPIRE as the contract tests see an agent."""

    def __init__(self) -> None:
        self._programs = part("spire")
        self._folder = Path(tempfile.mkdtemp(prefix="sg"))
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._entry = ""
        self.address = f"unix:{self._folder}/agent.sock"

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Run server and agent while the block lasts, the workload registered."""
        for name in ("server", "agent"):
            (self._folder / name).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, text in (("server", SERVER_CONF), ("agent", AGENT_CONF)):
            (self._folder / f"{name}.conf").write_text(text.format(folder=self._folder, port=port, domain=A_TEST))
        try:
            await self._spawn("server")
            await self._answers("healthcheck")
            (self._folder / "bundle.pem").write_text(await self._server("bundle", "show"))
            token = (await self._server("token", "generate", "-spiffeID", NODE)).split()[-1]
            await self._spawn("agent", "-joinToken", token)
            await self.restore()
            yield
        finally:
            for process in self._running.values():
                await _end(process)
            shutil.rmtree(self._folder)

    async def restore(self, spiffe_id: SpiffeId = API) -> None:
        """Register the workload."""
        told = await self._server(
            *("entry", "create", "-parentID", NODE, "-spiffeID", str(spiffe_id)),
            *("-selector", f"unix:uid:{os.getuid()}", "-x509SVIDTTL", str(SVID_TTL_S)),
        )
        self._entry = next(line.split()[-1] for line in told.splitlines() if line.startswith("Entry ID"))

    async def drop(self) -> None:
        """Delete the workload's entry."""
        await self._server("entry", "delete", "-entryID", self._entry)

    async def stop(self) -> None:
        """Kill the agent, as the kernel would for want of memory."""
        await _end(self._running.pop("agent"))

    async def start(self) -> None:
        """Start the agent again; it knows its key from disk."""
        await self._spawn("agent")

    async def _spawn(self, name: str, *arguments: str) -> None:
        self._running[name] = await asyncio.create_subprocess_exec(
            *(self._programs / f"spire-{name}", "run", "-config", self._folder / f"{name}.conf", *arguments),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )

    async def _server(self, *arguments: str) -> str:
        code, told = await self._ask(*arguments)
        assert code == 0, told
        return told

    async def _answers(self, *arguments: str) -> None:
        async with asyncio.timeout(START_S):
            while (await self._ask(*arguments))[0] != 0:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.2)

    async def _ask(self, *arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(self._programs / "spire-server", *arguments, "-socketPath", self._folder / "server.sock"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told, _ = await process.communicate()
        return process.returncode or 0, told.decode()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
