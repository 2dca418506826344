"""Tries the installed webhook on pods that are never made: `python -m webhook.shell.trial NAMESPACE`, a Helm test.

Each trial is a dry run in a namespace that is labelled as users label theirs, so that it takes every step of admission
and leaves nothing behind. Says what came of each, and fails when one came out wrong.
"""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from webhook.core.container import SIDECAR
from webhook.core.injection import SERVER_LABEL
from webhook.core.pod import JSON
from webhook.errors import KubeError
from webhook.shell.kube import Kube


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A pod, and what must come of it: `injected`, `untouched`, or a part of the text that refuses it."""

    name: str
    pod: JSON
    expected: str


def _pod(name: str, labels: dict[str, str] | None = None, **spec: object) -> JSON:
    security: JSON = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    limits = {"cpu": "100m", "memory": "64Mi"}
    process = {
        "name": "server",
        "image": "example.invalid/server",
        "ports": [{"name": "mcp", "containerPort": 8000}],
        "resources": {"requests": limits, "limits": limits},
        "securityContext": security,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"sidegate-trial-{name}", "labels": labels or {}},
        "spec": {"containers": [process], **spec},
    }


_SERVER: Final = {SERVER_LABEL: "true"}
TRIALS: Final = (
    Trial(name="server", pod=_pod("server", _SERVER), expected="injected"),
    Trial(name="other", pod=_pod("other"), expected="untouched"),
    Trial(name="host-network", pod=_pod("host-network", _SERVER, hostNetwork=True), expected="hostNetwork"),
    Trial(
        name="decoy",
        pod=_pod("decoy", initContainers=[{"name": SIDECAR, "image": "example.invalid/decoy"}]),
        expected=SIDECAR,
    ),
)


async def attempt(kube: Kube, namespace: str, trial: Trial) -> str:
    """Return what came of *trial*: `injected`, `untouched`, or why the API server refused it. Raises KubeError."""
    try:
        made = await kube.create(f"/api/v1/namespaces/{namespace}/pods", trial.pod, dry_run=True)
    except KubeError as error:
        if 400 <= error.status < 500:
            return str(error)
        raise
    names = [each.get("name") for each in made["spec"].get("initContainers") or ()]
    return "injected" if SIDECAR in names else "untouched"


async def run(kube: Kube, namespace: str) -> bool:
    """Make all trials and print what came of each; return whether all came out right."""
    right = True
    for trial in TRIALS:
        try:
            found = await attempt(kube, namespace, trial)
        except KubeError as error:
            found = f"no answer: {error}"
        matches = trial.expected == found or (found not in ("injected", "untouched") and trial.expected in found)
        right = right and matches
        print(f"{'ok  ' if matches else 'FAIL'} {trial.name}: {found}")  # noqa: T201 - a hook speaks through its log
        if not matches:
            print(f"     expected: {trial.expected}")  # noqa: T201 - same
    return right


async def _perform(namespace: str) -> bool:
    try:
        kube = await Kube.open()
    except KubeError as error:
        print(f"FAIL {error}")  # noqa: T201 - same
        return False
    async with contextlib.aclosing(kube):
        return await run(kube, namespace)


def main(arguments: Sequence[str]) -> int:
    """Make the trials in the namespace that is named; return 0, 1 when one came out wrong, or 2 without one name."""
    if len(arguments) != 1:
        print("usage: python -m webhook.shell.trial NAMESPACE", file=sys.stderr)  # noqa: T201
        return 2
    return 0 if asyncio.run(_perform(arguments[0])) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
