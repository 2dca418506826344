"""The demo, as `make demo ONCE=1` runs it."""

import subprocess
import sys


def test_the_demo_ends_as_it_should() -> None:
    """A real public server is governed on this machine: calls are allowed, denied, limited, audited and traced."""
    command = (sys.executable, "-m", "webhook.cli", "demo", "--once")
    done = subprocess.run(  # noqa: S603 - our own program
        command, capture_output=True, text=True, timeout=180, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    for event in ("allowed", "denied", "limited", "refused", "audited", "traced"):
        assert event in done.stdout
