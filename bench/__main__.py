"""`python -m bench`: start every target, check that it does what it says, measure, print, write build/bench.json."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench import product, report, requests, targets
from bench.errors import BenchError, UnavailableError
from bench.loader import Loader
from bench.material import Material
from bench.measure import measure
from bench.probes import Probes
from tests.parts import PartError, part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from bench.measure import Measured
    from bench.targets import Target

RESULT = Path("build/bench.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when figures were printed, 1 when there are none."""
    options = _options(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory, contextlib.ExitStack() as stack:
            measured = _measured(Path(directory), stack, options)
            print(report.tables(measured))
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(report.record(measured) + "\n")
    except (BenchError, PartError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="CPU, latency and memory of the sidecar beside nginx and Envoy, on loopback."
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all targets and bodies (default 7)")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of a block (default 0.4)")
    parser.add_argument("--only", action="append", help="measure this target only, with direct; may be repeated")
    return parser.parse_args(arguments)


def _measured(directory: Path, stack: contextlib.ExitStack, options: argparse.Namespace) -> Measured:
    """Start everything, check it, and return the figures; *stack* ends what was started."""
    material = Material.made(directory)
    around = product.Surroundings(directory=directory, material=material)
    stack.enter_context(around.running())
    loader = stack.enter_context(Loader.started(part("go") / "bin" / "go", directory, requests.ANSWER))
    server = stack.enter_context(targets.direct(directory))
    shown, port = (material.server, material.client), server.port
    starts: dict[str, Callable[[], AbstractContextManager[Target]]] = {
        "nginx": lambda: targets.nginx(directory, port),
        "Envoy": lambda: targets.envoy(directory, port),
        "sidecar": lambda: product.sidecar(around, port),
        "nginx mTLS": lambda: targets.nginx(directory, port, *shown),
        "Envoy mTLS": lambda: targets.envoy(directory, port, *shown),
        "sidecar mTLS": lambda: product.sidecar(around, port, material.client),
    }
    started, skipped = [server], {}
    for name, start in starts.items():
        if options.only and name not in options.only:
            continue
        try:
            started.append(stack.enter_context(start()))
        except UnavailableError as error:
            skipped[name] = str(error)
    probes = Probes(loader, directory, around.token)
    for each in started:
        probes.check(each, material.nobody)
    written = {
        name: probes.written(name, requests.post(body, token=around.token)) for name, body in requests.bodies().items()
    }
    return measure(loader, started, written, rounds=options.rounds, seconds=options.seconds, skipped=skipped)


if __name__ == "__main__":
    sys.exit(main())
