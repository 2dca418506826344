"""Builds the snapshot in force from a bundle and the providers' keys, and swaps it whole.

A bundle whose engines do not load changes nothing: the last good one stays. New keys mean a new, empty cache of
verified tokens.
"""

import asyncio
import logging
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Final

from sidecar.core.bundle import WASM, Bundle
from sidecar.core.dpop import Proofs
from sidecar.core.engines import Engines, engines
from sidecar.core.identity import Keys, trust
from sidecar.core.workload import WorkloadTokens
from sidecar.errors import BundleError
from sidecar.pipeline import Snapshot
from sidecar.shell.serving import Serving

log = logging.getLogger(__name__)

COMPILE_S: Final = 30.0  # of policy.wasm in a child; half a second on an idle core


class Snapshots:
    """Owned by sidecar/shell/app.py; the only one that sets `Serving.snapshot`."""

    def __init__(self, serving: Serving, *, hosts: frozenset[str], work_dir: str | None) -> None:
        self._serving = serving
        self._hosts = hosts
        self._work_dir = work_dir
        self._bundle: Bundle | None = None
        self._engines = Engines()
        self._keys: Keys = {}
        self._tokens: WorkloadTokens | None = None
        self._proofs = Proofs(nonce_key=secrets.token_bytes(32))

    async def activate(self, bundle: Bundle) -> None:
        """Put *bundle* in force; raises BundleError, and then the one before stays in force."""
        self._engines = await load(bundle, self._work_dir)
        self._bundle = bundle
        self._publish()
        log.info("bundle activated", extra={"revision": bundle.revision})

    def use_keys(self, keys: Keys) -> None:
        """Believe tokens that *keys* prove, and no others."""
        self._keys = keys
        self._publish()

    def use_tokens(self, tokens: WorkloadTokens | None) -> None:
        """Believe JWT-SVIDs that *tokens* prove, and no others."""
        self._tokens = tokens
        self._publish()

    def _publish(self) -> None:
        if self._bundle is None:
            return
        profile = self._bundle.profile
        self._serving.snapshot = Snapshot(
            profile=profile,
            revision=self._bundle.revision,
            engines=self._engines.enforced,
            shadows=self._engines.shadows,
            trust=trust(profile.identity, self._keys, self._tokens, self._proofs),
            hosts=self._hosts.union(profile.server.hosts),  # each says under which names we are known
        )


async def load(bundle: Bundle, work_dir: str | None) -> Engines:
    """Return the bundle's engines; its WebAssembly is compiled in children, whose 20 MB end with them."""
    sources = {each.path: bundle.files[each.path + WASM] for each in bundle.profile.policies if each.rego}
    with tempfile.TemporaryDirectory(prefix="sidegate-", dir=work_dir) as directory:
        compiled = {}
        for number, (path, wasm) in enumerate(sources.items()):
            compiled[path] = str(await _compile(wasm, Path(directory, str(number))))
        return engines(bundle, compiled=compiled)


async def _compile(wasm: bytes, directory: Path) -> Path:
    """Return the file, in the new *directory*, that holds *wasm* as machine code; raises BundleError."""
    directory.mkdir()
    source, compiled = directory / WASM, directory / "policy.cwasm"
    source.write_bytes(wasm)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar.shell.precompile", str(source), str(compiled), stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(COMPILE_S):
            _, errors = await child.communicate()
    except TimeoutError as error:
        child.kill()
        await child.wait()
        raise BundleError(f"{WASM}: compiling took longer than {COMPILE_S:g} s") from error
    if child.returncode != 0:
        raise BundleError(f"{WASM}: {errors.decode(errors='replace').strip()[-500:]}")
    return compiled
