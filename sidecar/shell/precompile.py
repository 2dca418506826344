"""Compiles one policy.wasm for this machine: `python -m sidecar.shell.precompile SOURCE TARGET`, run as a child."""

import sys
from pathlib import Path

from sidecar.core.rego import compile as compile_wasm
from sidecar.errors import BundleError


def main() -> int:
    """Compile; return the exit status."""
    source, target = sys.argv[1:]
    try:
        Path(target).write_bytes(compile_wasm(Path(source).read_bytes()))
    except BundleError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the parent reads it
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
