"""Makes and removes the cgroup that holds all of one cluster; its name is all that two clusters must not share.

Handles cgroup v1 with its separate hierarchies, which is what the suite has run on. The pure cgroup v2 branch follows
the kernel's documentation (admin-guide/cgroup-v2, "No Internal Process Constraint") and has not been run yet.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_V2_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids")


def is_v2() -> bool:
    """Whether the machine has the unified hierarchy alone."""
    return (ROOT / "cgroup.controllers").exists()


def _hierarchies() -> list[Path]:
    return [ROOT] if is_v2() else [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def create(name: str) -> None:
    """Make the cgroup in every hierarchy, ready for kubelet's children."""
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)
    if is_v2():
        (ROOT / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in _V2_CONTROLLERS))
        return
    for file in ("cpuset.cpus", "cpuset.mems"):  # v1 leaves them empty in a new cgroup, and then no process may join
        (ROOT / "cpuset" / name / file).write_text((ROOT / "cpuset" / file).read_text())


def remove(name: str, *, timeout_s: float = 10) -> None:
    """Remove the cgroup, deepest first; the kernel may hold a dead process' one for a moment. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while left := [path for hierarchy in _hierarchies() if (path := hierarchy / name).exists()]:
        for top in left:
            directories = [path for path in top.rglob("*") if path.is_dir()]
            for directory in sorted([top, *directories], key=lambda path: len(path.parts), reverse=True):
                with contextlib.suppress(OSError):
                    directory.rmdir()
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"cgroups still in use: {left}")
        time.sleep(0.1)
