"""`sidegate VERB`: exit 0 done, 1 refused or failed, 2 misuse. Errors are `sidegate: error: …`, then `hint: …`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from certs.errors import CertsError
from sidecar.errors import BundleError, ConfigError
from webhook.cli import audit, check, demo, inject, keys, policy, run, status
from webhook.errors import WebhookError

VERBS = (run, policy, inject, audit, status, check, keys, demo)
TOLD = (ConfigError, BundleError, CertsError, WebhookError, OSError)  # somebody else's to mend; the rest is a defect


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
    environment = argparse.Namespace(environment=os.environ)  # noqa: TID251 - the one place; `run` reads OTEL_*
    options = parser.parse_args(arguments, environment)
    try:
        status: int = options.perform(options)
    except TOLD as error:
        print(f"sidegate: error: {error}", file=sys.stderr)
        return 1
    except ExceptionGroup as group:  # what happens inside a TaskGroup
        told, defects = group.split(TOLD)
        if told is None or defects is not None:
            raise
        for each in _leaves(told):
            print(f"sidegate: error: {each}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for each in group.exceptions:
        yield from _leaves(each) if isinstance(each, ExceptionGroup) else (each,)


if __name__ == "__main__":
    sys.exit(main())
