"""Who takes part in a conformance run: the two reference servers, and the sidecar in front of one, as processes.

Each is ended at the end of its block. The sidecar is `sidegate run` with a policy that allows everything: what it
then refuses or changes, it refuses or changes for the protocol's sake alone.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.processes import free_port, is_listening, running
from sidecar.core.bundle import PROFILE
from sidecar.core.profile import Identity, Profile, Server, encode
from tests.parts import part

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVERS: Final = Path(__file__).parent / "servers"
OVER_SSE: Final = Profile(
    server=Server(namespace="local", workload="local", name="local", port=1, transport="sse"),
    identity=Identity(mtls="permissive"),
)
ALLOW_ALL: Final = "permit(principal, action, resource);\n"


@contextlib.contextmanager
def typescript(home: Path) -> Iterator[int]:
    """Run the TypeScript reference server; gives its port. Node looks for packages beside the program: *home*."""
    packages = part("mcp-typescript") / "node_modules"
    with contextlib.suppress(FileExistsError):
        (home / "node_modules").symlink_to(packages)
    for name in ("everything.mjs", "everything.json"):
        shutil.copyfile(SERVERS / name, home / name)
    port = free_port()
    with running(
        [part("node"), home / "everything.mjs", str(port)],
        log=home / "typescript.log",
        is_ready=lambda: is_listening(port),
    ):
        yield port


@contextlib.contextmanager
def python(home: Path) -> Iterator[int]:
    """Run the Python reference server; gives its port."""
    port = free_port()
    command = [sys.executable, SERVERS / "everything.py", str(port)]
    with running(command, log=home / "python.log", is_ready=lambda: is_listening(port)):
        yield port


@contextlib.contextmanager
def sidecar(
    home: Path, *upstream: str, transport: str = "http", profile: Profile | None = None, port: int | None = None
) -> Iterator[int]:
    """Run a sidecar in front of an HTTP server, one URL, or of a command's stdio; gives its port.

    Without a *profile*, it asks nobody for a token.
    """
    policies = home / "policies"
    policies.mkdir(exist_ok=True)
    (policies / "all.cedar").write_text(ALLOW_ALL)
    if profile is None and transport == "sse":
        profile = OVER_SSE
    if profile is not None:
        (policies / PROFILE).write_bytes(encode(profile))
    port = port or free_port()
    user = profile.identity.user if profile is not None and profile is not OVER_SSE else "optional"
    listen = ("--listen", f"127.0.0.1:{port}", "--user", user, "--log-level", "warning")
    kept = ("--policy", policies, "--audit", home / "audit.jsonl")
    command = (sys.executable, "-m", "webhook.cli", "run", *listen, *kept)
    behind = ("--", *upstream) if transport == "stdio" else ("--upstream", *upstream)
    with running([*command, *behind], log=home / f"sidecar-{port}.log", is_ready=lambda: is_listening(port)):
        yield port
