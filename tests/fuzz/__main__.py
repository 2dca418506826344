"""`make fuzz SECONDS=300`: every reader of foreign bytes, for its share of the time; 1 when something was found.

A finding is written to tests/fuzz/found/, where the tests run it from then on.
"""

import hashlib
import random
import resource
import sys
import time
from pathlib import Path
from typing import Final

from tests.fuzz.engine import Finding, Session
from tests.fuzz.targets import TARGETS

FOUND: Final = Path(__file__).parent / "found"
MAX_MEMORY_BYTES: Final = 4 * 2**30  # of addresses, so that a leak ends the run and not the machine
SLICES: Final = 4  # of each target's time: what one finds is not lost when the run is stopped


def main(seconds: float, names: list[str]) -> int:
    """Fuzz the targets that *names* begins (all, without any) for *seconds* in sum; return the exit status."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    seed = int(time.time())
    print(f"fuzz: {seconds:.0f} s, seed {seed}")
    targets = [target for target in TARGETS if not names or any(target.name.startswith(name) for name in names)]
    sessions = [Session(target=target, source=random.Random(seed)) for target in targets]  # noqa: S311 - no secret
    for session in sessions:
        session.begin()
    share_s = seconds / len(sessions) / SLICES
    for _ in range(SLICES):
        for session in sessions:
            session.work(time.monotonic() + share_s)
    findings = [finding for session in sessions for finding in session.findings.values()]
    for session in sessions:
        print(
            f"{session.target.name:12} {session.inputs:9} inputs  {len(session.outcomes):5} outcomes"
            f"  {len(session.findings)} findings"
        )
    for finding in findings:
        print(f"\nfinding: {finding.target}, {len(finding.data)} bytes in {_keep(finding)}\n{finding.why}")
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"fuzz: {sum(session.inputs for session in sessions)} inputs, {len(findings)} findings, {peak_bytes >> 20} MiB"
    )
    return 1 if findings else 0


def _keep(finding: Finding) -> Path:
    """Write the input where the tests find it; return where."""
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{finding.target}-{hashlib.sha256(finding.data).hexdigest()[:12]}"
    path.write_bytes(finding.data)
    return path


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
