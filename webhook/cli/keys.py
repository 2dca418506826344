"""`sidegate rotate-keys`: ask the control plane for a new key to sign bundles by.

Reads no key and makes none: it annotates the Secret, and the replicas do the rest within seconds (webhook/core/signing.py).
Exit 0: asked for; 1: the Secret is not there, or may not be changed.
"""

import argparse
import asyncio
import contextlib
from datetime import UTC, datetime
from typing import Any, Final

from webhook.cli import kubeconfig
from webhook.core.signing import ROTATE, STOLEN
from webhook.errors import KubeError

EXAMPLE: Final = "example: sidegate rotate-keys --stolen"


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser(
        "rotate-keys", help="have bundles signed by a new key", description=__doc__, epilog=EXAMPLE
    )
    parser.add_argument("-n", "--namespace", default="sidegate-system", help="of the control plane (default: %(default)s)")  # fmt: skip
    parser.add_argument("--secret", default="sidegate-bundle-signing", metavar="NAME", help="that holds the key (default: %(default)s)")  # fmt: skip # noqa: E501
    parser.add_argument("--stolen", action="store_true", help="do not let the key of now be believed for the overlap")
    kubeconfig.add_to(parser)
    parser.set_defaults(perform=_perform)


def _perform(options: argparse.Namespace) -> int:
    asyncio.run(_ask(options))
    how = "the one before counts no longer" if options.stolen else "the one before counts for the overlap"
    print(f"Secret {options.namespace}/{options.secret}: a new key was asked for; {how}")
    print("watch: sidegate_signing_key_timestamp_seconds of the control plane, and `sidegate status`")
    return 0


async def _ask(options: argparse.Namespace) -> None:
    """Annotate the Secret. Raises KubeError."""
    path = f"/api/v1/namespaces/{options.namespace}/secrets/{options.secret}"
    text = datetime.now(UTC).isoformat(timespec="seconds") + (f" {STOLEN}" if options.stolen else "")
    async with contextlib.aclosing(await kubeconfig.connect(options)) as kube:
        try:
            await kube.merge_object(path, {"metadata": {"annotations": {ROTATE: text}}})
        except KubeError as error:
            hint = (
                "hint: --namespace and --secret say where the control plane keeps its key"
                if error.status == 404
                else ""
            )
            raise KubeError(error.status, f"{error}\n{hint}".strip()) from error
