"""Real SPIRE on loopback: a server and an agent for each trust domain, and one registered workload: the user who runs the tests."""

import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.spiffe import SpiffeId, TrustDomain
from tests.certs.pki import A_TEST, API
from tests.parts import part

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
  default_jwt_svid_ttl = "60s"
  federation {{
    bundle_endpoint {{
      address = "127.0.0.1"
      port = {bundle_port}
      refresh_hint = "10s"
      profile "https_spiffe" {{}}
    }}
    {federates_with}
  }}
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
FEDERATES_WITH = """
    federates_with "{domain}" {{
      bundle_endpoint_url = "https://127.0.0.1:{bundle_port}"
      bundle_endpoint_profile "https_spiffe" {{ endpoint_spiffe_id = "spiffe://{domain}/spire/server" }}
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
    """SPIRE of one trust domain, as the contract tests see an agent. *others* are federated with, when all are up."""

    def __init__(self, domain: TrustDomain = A_TEST, workload: SpiffeId = API) -> None:
        self.domain = domain
        self.workload = workload
        self._programs = part("spire")
        self._folder = Path(tempfile.mkdtemp(prefix="sg"))
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._entry = ""
        self._others: tuple[SpireAgent, ...] = ()
        self._port, self.bundle_port = _free_port(), _free_port()
        self.address = f"unix:{self._folder}/agent.sock"

    @asynccontextmanager
    async def up(self, *others: "SpireAgent") -> AsyncIterator[None]:
        """Run server and agent while the block lasts; the workload is registered, unless there are *others* to wait for."""
        self._others = others
        for name in ("server", "agent"):
            (self._folder / name).mkdir()
        values = {
            "folder": self._folder,
            "port": self._port,
            "domain": self.domain,
            "bundle_port": self.bundle_port,
            "federates_with": "".join(
                FEDERATES_WITH.format(domain=each.domain, bundle_port=each.bundle_port) for each in others
            ),
        }
        for name, text in (("server", SERVER_CONF), ("agent", AGENT_CONF)):
            (self._folder / f"{name}.conf").write_text(text.format(**values))
        try:
            await self.start("server")
            (self._folder / "bundle.pem").write_text(await self._server("bundle", "show"))
            token = (await self._server("token", "generate", "-spiffeID", self._node)).split()[-1]
            await self._spawn("agent", "-joinToken", token)
            if not others:
                await self.restore()
            yield
        finally:
            for process in self._running.values():
                await _end(process)
            shutil.rmtree(self._folder)

    @property
    def _node(self) -> str:
        return f"spiffe://{self.domain}/node"

    async def federate(self) -> None:
        """Tell the server the others' bundles, and register the workload with them."""
        for other in self._others:
            path = self._folder / f"{other.domain}.json"
            path.write_text(await other._server("bundle", "show", "-format", "spiffe"))
            await self._server(
                "bundle", "set", "-format", "spiffe", "-id", f"spiffe://{other.domain}", "-path", str(path)
            )
        await self.restore()

    async def unfederate(self, other: "SpireAgent") -> None:
        """Take the other domain's bundle away from everybody."""
        await self._server("bundle", "delete", "-id", f"spiffe://{other.domain}", "-mode", "dissociate")

    async def restore(self, spiffe_id: SpiffeId | None = None) -> None:
        """Register the workload."""
        told = await self._server(
            *("entry", "create", "-parentID", self._node, "-spiffeID", str(spiffe_id or self.workload)),
            *("-selector", f"unix:uid:{os.getuid()}", "-x509SVIDTTL", str(SVID_TTL_S), "-jwtSVIDTTL", str(SVID_TTL_S)),
            *(part for other in self._others for part in ("-federatesWith", f"spiffe://{other.domain}")),
        )
        self._entry = next(line.split()[-1] for line in told.splitlines() if line.startswith("Entry ID"))

    async def drop(self) -> None:
        """Delete the workload's entry."""
        await self._server("entry", "delete", "-entryID", self._entry)

    async def prepare_authority(self) -> None:
        """Announce a new CA: everybody trusts it before it signs."""
        await self._server("localauthority", "x509", "prepare")

    async def activate_authority(self) -> None:
        """Sign with the CA that was announced."""
        shown = json.loads(await self._server("localauthority", "x509", "show", "-output", "json"))
        await self._server("localauthority", "x509", "activate", "-authorityID", shown["prepared"]["authority_id"])

    async def authority(self) -> Authority:
        """The CA itself, key and all: what a dishonest server could do."""
        bundle = x509.load_pem_x509_certificates((await self._server("bundle", "show")).encode())
        kept = json.loads((self._folder / "server" / "keys.json").read_text())["keys"]
        for blob in kept.values():
            key = serialization.load_der_private_key(base64.b64decode(blob), password=None)
            for certificate in bundle:
                if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
                    return Authority(certificate=certificate, key=key)
        raise LookupError("no key of an authority in the bundle")

    async def stop(self, name: str = "agent") -> None:
        """Kill it, as the kernel would for want of memory."""
        await _end(self._running.pop(name))

    async def start(self, name: str = "agent") -> None:
        """Start it, or start it again: it knows its keys from disk."""
        await self._spawn(name)
        if name == "server":
            await self._answers("healthcheck")

    def freeze(self) -> None:
        """Stop the agent without ending it."""
        self._running["agent"].send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._running["agent"].send_signal(signal.SIGCONT)

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


@asynccontextmanager
async def federated(one: SpireAgent, other: SpireAgent) -> AsyncIterator[None]:
    """Run both, each trusting the other for the other's own members."""
    async with one.up(other), other.up(one):
        await one.federate()
        await other.federate()
        yield


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
