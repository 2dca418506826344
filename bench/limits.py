"""What a limit costs each call, judged in the pod: CPU of this thread, the median of some blocks. `python -m bench.limits`.

Beside it, the naive way for one rate: a lock, and a list of the moments of every call in the last minute.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from sidecar.core.limits import Ledger, admit, release
from sidecar.core.profile import ArgumentWeight, Limit, Quota, Weight
from tests.builders import a_call, a_permit

BLOCKS: Final = 15
CALLS: Final = 2000
PLENTY: Final = 10**9
RATE: Final = Limit(name="rate", rate_per_s=1e6, burst=PLENTY)
QUOTAS: Final = Limit(name="budget", quotas=(Quota(amount=PLENTY, period="hour"), Quota(amount=PLENTY, period="month")))
WEIGHED: Final = Limit(
    name="weighed",
    rate_per_s=1e6,
    burst=PLENTY,
    weight=Weight(
        tools={"read_schema": 3}, arguments=(ArgumentWeight(tool="read_schema", path="rows", per=10, maximum=50),)
    ),
)
CASES: Final = {
    "no limit": (),
    "a rate": (RATE,),
    "a rate with weights": (WEIGHED,),
    "calls at a time": (Limit(name="at-once", concurrent=10),),
    "two quotas": (QUOTAS,),
    "all of these": (RATE, WEIGHED, QUOTAS, Limit(name="at-once", concurrent=10)),
}


class Naive:
    """The sliding log that many write first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[str, list[float]] = {}

    def admit(self, key: str, now_s: float) -> bool:
        """Say whether the call is within the limit."""
        with self._lock:
            calls = [each for each in self._calls.get(key, []) if each > now_s - 60]
            calls.append(now_s)
            self._calls[key] = calls
            return len(calls) < PLENTY


def cost_us(call: Callable[[float], object], calls: int = CALLS) -> float:
    """Return the CPU time of one *call*, which gets the time of a clock that ticks."""
    blocks, now_s = [], 0.0
    for _ in range(BLOCKS):
        started_s = time.thread_time()
        for _ in range(calls):
            now_s += 0.01
            call(now_s)
        blocks.append((time.thread_time() - started_s) / calls)
    return statistics.median(blocks) * 1e6


def rows() -> Iterator[tuple[str, float]]:
    """Yield what is judged, and microseconds a call."""
    permit = a_permit(a_call("read_schema", {"rows": 95}))
    for name, limits in CASES.items():
        ledger = Ledger()

        def call(now_s: float, limits: tuple[Limit, ...] = limits, ledger: Ledger = ledger) -> None:
            release(admit(permit, limits, ledger, now_s, 300).charges)

        yield name, cost_us(call)
    naive = Naive()
    yield "a rate, naively, at 100 calls a second", cost_us(lambda now_s: naive.admit("alice planner", now_s), 200)


def main() -> None:
    """Print."""
    print("limits, judged in the pod: us of CPU a call (with making and releasing the admission)")
    for name, cost in rows():
        print(f"  {name:40} {cost:8.2f}")


if __name__ == "__main__":
    main()
