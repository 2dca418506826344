"""Keeps a cluster running for as long as a developer wants it: `python -m tests.cluster [RUN_DIR]`, ended by Ctrl-C.

`SIDEGATE_E2E_CLUSTER=RUN_DIR make e2e` then uses it instead of starting one; `RUN_DIR/enter PROGRAM...` runs a program
in it.
"""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.spire import Spire

run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="sidegate-cluster-"))
try:
    with Cluster(run_dir) as cluster:
        Spire(cluster).start()
        enter = cluster.run_dir / "enter"
        enter.write_text(f'#!/bin/sh\nexec {shlex.join(cluster.command())} "$@"\n')
        enter.chmod(0o755)
        print(f"ready: {enter} kubectl get pods --all-namespaces", flush=True)
        signal.pause()
except KeyboardInterrupt:
    print("ended", file=sys.stderr)
