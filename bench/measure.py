"""Takes the figures: rounds in random order, CPU time around each block, latency of one connection apart.

Every round measures every target once with every body, in an order of its own: what else the machine does falls on all
alike. A wrong answer anywhere ends the bench without figures.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bench.errors import BenchError
from bench.processes import cpu_ns, rss_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.loader import Loader
    from bench.targets import Target

CONNECTIONS: Final = 8
WARM_S: Final = 0.05  # before each block: connections made, caches filled
SINGLE_BODIES: Final = ("300 B", "4 KB text")
RECORD: Final = b'"schema":"sidegate.audit/v1","phase":"end"'  # a line of the audit trail, one for each call
LIMIT_S: Final = 240.0  # the whole bench


@dataclass(slots=True)
class Rounds:
    """One figure for each round."""

    cpu_us: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything a bench found; figures by target's name and body's name."""

    machine: Mapping[str, Any]
    targets: Sequence[Target]
    bodies: Sequence[str]
    single_bodies: Sequence[str]
    load: Mapping[tuple[str, str], Rounds]
    single: Mapping[tuple[str, str], Rounds]
    idle_rss_bytes: Mapping[str, int]
    loaded_rss_bytes: Mapping[str, int]
    skipped: Mapping[str, str]


def measure(
    loader: Loader,
    targets: Sequence[Target],
    requests: Mapping[str, Path],
    *,
    rounds: int,
    seconds: float,
    skipped: Mapping[str, str],
) -> Measured:
    """Return the figures of *targets* under *requests* (files by the body's name). Raises BenchError."""
    deadline_s = time.monotonic() + LIMIT_S
    load_before = os.getloadavg()[0]
    recorded = {each.name: _lines(each) for each in targets}
    sent = dict.fromkeys(recorded, 0)
    idle_rss_bytes = {each.name: rss_bytes(each.pid) for each in targets}
    plan = [(each, body, CONNECTIONS) for each, body in itertools.product(targets, requests)]
    plan += [(each, body, 1) for each, body in itertools.product(targets, SINGLE_BODIES)]
    figures = {(connections, each.name, body): Rounds() for each, body, connections in plan}
    for _ in range(rounds):
        for each, body, connections in random.sample(plan, len(plan)):
            if time.monotonic() > deadline_s:
                raise BenchError(f"not done after {LIMIT_S:.0f} s: take fewer rounds")
            block = _Block(loader, each, requests[body], connections)
            sent[each.name] += block.run(WARM_S)
            sent[each.name] += block.run(seconds, figures[connections, each.name, body])
    for each in targets:
        if each.audit is not None and _lines(each) - recorded[each.name] != sent[each.name]:
            found = _lines(each) - recorded[each.name]
            raise BenchError(f"{each.name}: {found} audit records for {sent[each.name]} calls")
    return Measured(
        machine={
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_before": round(load_before, 1),
            "load_after": round(os.getloadavg()[0], 1),
            "rounds": rounds,
            "seconds": seconds,
        },
        targets=targets,
        bodies=list(requests),
        single_bodies=SINGLE_BODIES,
        load={key[1:]: value for key, value in figures.items() if key[0] == CONNECTIONS},
        single={key[1:]: value for key, value in figures.items() if key[0] == 1},
        idle_rss_bytes=idle_rss_bytes,
        loaded_rss_bytes={each.name: rss_bytes(each.pid) for each in targets},
        skipped=skipped,
    )


def _lines(target: Target) -> int:
    """Return how many audit records *target* has written."""
    if target.audit is None:
        return 0
    with target.audit.open("rb") as file:
        return sum(1 for line in file if RECORD in line)


@dataclass(frozen=True, slots=True)
class _Block:
    """One target under one request, for some time."""

    loader: Loader
    target: Target
    request: Path
    connections: int

    def run(self, seconds: float, rounds: Rounds | None = None) -> int:
        """Load the target, put what came of it into *rounds*, and return the number of requests."""
        before_ns = cpu_ns(self.target.pid)
        try:
            done = self.loader.block(
                self.target.port, self.target.keys, self.request, connections=self.connections, seconds=seconds
            )
        except BenchError as error:
            raise BenchError(f"{self.target.name}: {error}") from error
        used_ns = cpu_ns(self.target.pid) - before_ns
        if rounds is not None:
            rounds.cpu_us.append(used_ns / 1e3 / done.requests)
            rounds.requests_per_s.append(done.requests / done.seconds)
            rounds.p50_us.append(done.p50_us)
            rounds.p99_us.append(done.p99_us)
        return done.requests
