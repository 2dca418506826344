"""Deletes the webhook configuration before an uninstall: `python -m webhook.shell.removal NAME`, a Helm hook.

Without it the API server would go on asking a control plane that is gone, and refuse pods of governed namespaces.
Ends well whatever happens, and says so: a hook that fails would hold up the uninstall that it serves.
"""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import Final

from webhook.errors import KubeError
from webhook.shell.kube import Kube

PATH: Final = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"


async def remove(kube: Kube, name: str) -> str:
    """Delete the configuration; return one line saying what came of it."""
    try:
        await kube.delete(f"{PATH}/{name}")
    except KubeError as error:
        if error.status == 404:
            return f"webhook configuration {name}: already gone"
        return f"webhook configuration {name}: not deleted: {error}; hint: kubectl delete mutatingwebhookconfiguration {name}"
    return f"webhook configuration {name}: deleted"


async def _perform(name: str) -> str:
    try:
        kube = await Kube.open()
    except KubeError as error:
        return f"webhook configuration {name}: not deleted: {error}"
    async with contextlib.aclosing(kube):
        return await remove(kube, name)


def main(arguments: Sequence[str]) -> int:
    """Delete the configuration that is named; return 0, or 2 without one name."""
    if len(arguments) != 1:
        print("usage: python -m webhook.shell.removal NAME", file=sys.stderr)  # noqa: T201
        return 2
    print(asyncio.run(_perform(arguments[0])))  # noqa: T201 - a hook speaks through its log
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
