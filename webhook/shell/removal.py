"""Deletes what refuses pods before an uninstall: `python -m webhook.shell.removal KIND/NAME...`, a Helm hook.

Without it the API server would go on asking a control plane that is gone, or miss its work in pods of governed
namespaces, until helm came to those objects. Ends well whatever happens, and says so: a hook that fails would hold up
the uninstall that it serves.
"""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import Final

from webhook.errors import KubeError
from webhook.shell.kube import Kube

PATH: Final = "/apis/admissionregistration.k8s.io/v1"
KINDS: Final = ("validatingadmissionpolicybindings", "mutatingwebhookconfigurations")


async def remove(kube: Kube, thing: str) -> str:
    """Delete *thing*, plural and name; return one line saying what came of it."""
    try:
        await kube.delete(f"{PATH}/{thing}")
    except KubeError as error:
        if error.status == 404:
            return f"{thing}: already gone"
        return f"{thing}: not deleted: {error}; hint: kubectl delete {thing}"
    return f"{thing}: deleted"


async def _perform(things: Sequence[str]) -> list[str]:
    try:
        kube = await Kube.open()
    except KubeError as error:
        return [f"{thing}: not deleted: {error}" for thing in things]
    async with contextlib.aclosing(kube):
        return [await remove(kube, thing) for thing in things]


def main(arguments: Sequence[str]) -> int:
    """Delete what is named; return 0, or 2 for anything but names of these kinds."""
    if not arguments or not all(each.partition("/")[0] in KINDS for each in arguments):
        print(f"usage: python -m webhook.shell.removal KIND/NAME...; kinds are {', '.join(KINDS)}", file=sys.stderr)  # noqa: T201
        return 2
    for line in asyncio.run(_perform(arguments)):
        print(line)  # noqa: T201 - a hook speaks through its log
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
