"""How the operator's verbs reach the Kubernetes API: by the same kubeconfig as kubectl."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from webhook.errors import KubeError

if TYPE_CHECKING:
    from webhook.shell.kube import Kube


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--kubeconfig", metavar="FILE", help="(default: $KUBECONFIG, or ~/.kube/config)")
    parser.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: its current one)")


async def connect(options: argparse.Namespace) -> Kube:
    """Return a connection to the API. Raises KubeError."""
    try:
        from webhook.shell.kube import Kube  # noqa: PLC0415 - needs what only the extra `webhook` installs, and takes a second
    except ImportError as error:
        raise KubeError(0, f"{error}\nhint: pip install 'sidegate[webhook]'") from error
    try:
        return await Kube.open_as_user(options.kubeconfig, options.context)
    except KubeError as error:
        raise KubeError(0, f"{error}\nhint: name a kubeconfig by --kubeconfig FILE or KUBECONFIG") from error
