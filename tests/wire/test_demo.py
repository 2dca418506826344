"""The demo, as `make demo ONCE=1` runs it."""

import subprocess
import sys
from pathlib import Path


def test_the_demo_ends_as_it_should(tmp_path: Path) -> None:
    """A real public server is governed on this machine, from any directory: allowed, denied, limited, audited, traced."""
    command = (sys.executable, "-m", "webhook.cli", "demo", "--once")
    done = subprocess.run(  # noqa: S603 - our own program
        command, capture_output=True, text=True, timeout=180, check=False, cwd=tmp_path
    )

    assert done.returncode == 0, done.stdout + done.stderr
    for event in ("allowed", "denied", "limited", "refused", "audited", "traced"):
        assert event in done.stdout
