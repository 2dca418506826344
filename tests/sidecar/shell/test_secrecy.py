"""sidecar.shell.secrecy: what is in memory stays there."""

import subprocess
import sys

PROGRAM = """
import ctypes, resource
from sidecar.shell.secrecy import forbid_dumps
forbid_dumps()
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def test_the_process_leaves_no_dump() -> None:
    """PR_GET_DUMPABLE says 0, and a core may have no size; in a process of its own, because there is no way back."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - our own program

    assert done.stdout.strip() == "(0, 0) 0"
