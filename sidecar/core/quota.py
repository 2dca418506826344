"""The arithmetic of limits, for one account: a token bucket, sliding windows, and how much is under way.

Laws, whatever the clock does. In any t seconds a bucket grants at most burst + rate * t. In any stretch of its period's
length a window grants at most its amount: it counts whole slots of a sixtieth of the period, and one slot more than the
period has, so units come free at the latest a sixtieth after they had to. A clock that steps back grants nothing. Who is
alone at an account and comes back when told is admitted. Periods are lengths, not calendar pages: a month is 30 days.
"""

from dataclasses import dataclass, field
from typing import Final

from sidecar.core.profile import Period

SLOTS: Final = 60
PERIODS_S: Final[dict[Period, int]] = {
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 7 * 86_400,
    "month": 30 * 86_400,
}
LONG_AGO: Final = -(2**62)
GRAIN: Final = 1e-9  # of a token: what rounding may lack; it is owed, not forgiven


@dataclass(slots=True)
class Bucket:
    """Tokens left at a moment of the clock."""

    tokens: float
    at_s: float

    def wait_s(self, cost: int, rate_per_s: float, burst: float, now_s: float) -> float:
        """Fill up to *now_s*; return the seconds until *cost* tokens are there, 0 when they are."""
        if now_s > self.at_s:
            self.tokens += (now_s - self.at_s) * rate_per_s
            self.at_s = now_s
        if self.tokens > burst:  # noqa: PLR1730 - min costs three times as much, on the path of every call
            self.tokens = burst
        lacking = cost - self.tokens
        return 0.0 if lacking <= GRAIN else lacking / rate_per_s


@dataclass(slots=True)
class Window:
    """Units taken in the last slots, oldest first; *numbers* count slots since the clock's zero."""

    used: int = 0
    slot: int = LONG_AGO  # the newest that was looked at
    numbers: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)

    def wait_s(self, cost: int, amount: float, slot_s: float, now_s: float) -> float:
        """Forget what is over; return the seconds until *cost* units are free, 0 when they are."""
        numbers = self.numbers
        slot = int(now_s // slot_s)
        if slot < self.slot:  # noqa: PLR1730 - same; the clock stepped back, perhaps after a call that was refused
            slot = self.slot
        self.slot = slot
        while numbers and numbers[0] < slot - SLOTS:
            self.used -= self.units.pop(0)
            del numbers[0]
        lacking = self.used + cost - amount
        if lacking <= 0:
            return 0.0
        for number, units in zip(numbers, self.units, strict=True):
            lacking -= units
            if lacking <= 0:
                return (number + SLOTS + 1) * slot_s - now_s
        return (SLOTS + 1) * slot_s  # more than it ever holds

    def take(self, cost: int) -> int:
        """Count *cost* units where `wait_s` has just looked; return the slot."""
        slot = self.slot
        self.used += cost
        if self.numbers and self.numbers[-1] == slot:
            self.units[-1] += cost
        else:
            self.numbers.append(slot)
            self.units.append(cost)
        return slot

    def give_back(self, cost: int, slot: int) -> None:
        """Return *cost* units that were taken in *slot*, if they still count."""
        if slot in self.numbers:
            self.units[self.numbers.index(slot)] -= cost
            self.used -= cost


@dataclass(slots=True)
class Account:
    """What one combination of callers has used of one limit."""

    bucket: Bucket
    windows: tuple[Window, ...]
    under_way: int = 0
