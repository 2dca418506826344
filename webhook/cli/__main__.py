"""`sidegate VERB`: exit 0 done, 1 refused or failed, 2 misuse. Errors are `sidegate: error: …`, then `hint: …`."""

import argparse
import sys
from collections.abc import Sequence

from certs.errors import CertsError
from sidecar.errors import BundleError, ConfigError
from webhook.cli import demo, run
from webhook.errors import WebhookError

VERBS = (run, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that *arguments* name; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="sidegate",
        description="Govern MCP servers.",
        epilog="example: sidegate run --policy policies/ --upstream http://127.0.0.1:8000/mcp",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_to(verbs)
    options = parser.parse_args(arguments)
    try:
        status: int = options.perform(options)
    except (ConfigError, BundleError, CertsError, WebhookError, OSError) as error:
        print(f"sidegate: error: {error}", file=sys.stderr)
        hint = getattr(error, "hint", None)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
