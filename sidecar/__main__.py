"""The sidecar's entry point: the environment is read here, once."""

import os
import sys

from sidecar.config import Settings
from sidecar.core import otel
from sidecar.errors import ConfigError
from sidecar.shell.app import App


def main() -> int:
    """Run the sidecar; return the exit status."""
    try:
        environment = os.environ  # noqa: TID251 - the one place
        App(Settings.from_env(environment), otel=otel.read(environment)).run()
    except ConfigError as error:
        print(f"sidegate: error: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
