"""Decides whether a permitted message is within its limits; all that apply must admit it, or none is charged.

Only this module makes an Admission (tests/architecture), and it needs a Permit: what was refused by policy never
drains a limit. Limits of scope `pod` are judged here and at once. Those of scope `global` are judged by the store that
all replicas share (sidecar/core/tally.py): until it has spoken there is a Reservation, which cannot be sent. The
arithmetic is sidecar/core/quota.py. Its laws hold for every caller, however many there are: accounts at rest are
forgotten, and when the room for accounts is full of busy ones, newcomers share one account.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from sidecar.core.authorise import Permit, Question
from sidecar.core.message import Message, Tool
from sidecar.core.profile import Limit, Part, Quota
from sidecar.core.quota import PERIODS_S, SLOTS, Account, Bucket, Window
from sidecar.core.weight import weighing
from sidecar.errors import Reason, Refusal

MAX_ACCOUNTS: Final = 10_000  # of all limits together, about 5 MB; each limit has its share of the room
LOOKS: Final = 8  # accounts that a newcomer looks at for one at rest
RETRY_S: Final = 1  # where nobody can know when: calls under way, a store that is away


class Charge:
    """What one message costs under one limit. Mutated by this module only, but for the lease."""

    # Most messages leave most of these as they are: defaults of the class cost nothing to set.
    wait_s: float = 0.0  # until it can be had; 0: now
    why: str = "is reached"
    remaining: float | None = None  # units that were left after it in the scarcest of the limit's parts
    warned: int = 0  # per cent of a quota, as its author named them, that this message crossed; 0: none
    slots: tuple[int, ...] = ()  # of its units in the windows
    is_taken: bool = False  # it was counted, and not given back
    is_held: bool = False  # the account counts it as under way
    is_fallback: bool = False  # judged without the store that should have
    marks: tuple[int, ...] = ()  # where the store counted it; empty: it did not
    lease: str = ""  # by which the store counts it as under way

    def __init__(self, rule: "Rule", key: Hashable, cost: int, account: Account | None) -> None:
        """*account* None: in the store alone."""
        self.rule = rule
        self.key = key
        self.cost = cost
        self.account = account

    @property
    def name(self) -> str:
        """Return the limit's name."""
        return self.rule.limit.name

    @property
    def is_over(self) -> bool:
        """Say whether it is more than the limit has; in shadow mode nothing follows from that."""
        return self.wait_s > 0


class Admission(
    msgspec.Struct, frozen=True, kw_only=True
):  # made for every call, four times as fast as a frozen dataclass
    """Proof that a message was authorised and is within its limits; what `Upstream.send` demands."""

    permit: Permit
    charges: tuple[Charge, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Within the limits of this pod; the store has still to say whether it is within those of all."""

    permit: Permit
    charges: tuple[Charge, ...]  # taken
    shared: tuple[Charge, ...]  # to be judged by the store


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the store says of one charge; *marks* are what it needs to take it back."""

    wait_s: float
    remaining: float | None
    marks: tuple[int, ...]
    warned: int = 0


@dataclass(slots=True)
class Counts:
    """What came of the messages that a limit applied to; for metrics."""

    admitted: int = 0
    refused: int = 0
    units: int = 0
    over: int = 0  # would have been refused, in shadow mode
    fallback: int = 0  # judged without the store
    warnings: dict[int, int] = field(default_factory=dict)


class Rule:
    """One limit, ready to be judged: its accounts, and what makes a message's key and cost."""

    def __init__(self, limit: Limit, room: int, before: "Rule | None" = None) -> None:
        """*before* is the same limit as it was until now: what was used stays used."""
        share = limit.replicas or 1
        self.limit = limit
        is_counted = limit.burst is not None or limit.quotas or limit.concurrent is not None
        self.is_global = limit.scope == "global" and bool(is_counted)  # bytes of a message need no store
        self.rate_per_s = (limit.rate_per_s or 1.0) / share
        self.burst = math.inf if limit.burst is None else limit.burst // share
        self.has_bucket = limit.burst is not None
        self.quotas = tuple(
            enumerate([(each.amount // share, PERIODS_S[each.period] / SLOTS, each) for each in limit.quotas])
        )
        self.concurrent = None if limit.concurrent is None else limit.concurrent // share
        self.max_bytes = limit.max_bytes
        self.tools = frozenset(limit.tools)
        self.key = _key_of(limit.per)
        self.weigh = weighing(limit.weight)
        self.room = room
        self.accounts: dict[Hashable, Account] = {}
        self.newcomers = self.opened()  # of whoever finds no room
        self.counts = Counts()
        if before is not None:
            self.counts = before.counts
            if _shape(before.limit) == _shape(limit):
                self.accounts, self.newcomers = before.accounts, before.newcomers

    def opened(self) -> Account:
        """Return an account of which nothing was used."""
        return Account(Bucket(self.burst, -math.inf), tuple([Window() for _ in self.quotas]))

    def charge(self, permit: Permit, now_s: float) -> Charge:
        """Return what *permit* costs, judged by this pod's own account; nothing is taken."""
        question = permit.question
        cost = 1 if self.weigh is None else self.weigh(question.message)
        key = self.key(question)
        account = self.account(key, now_s)
        charge = Charge(self, key, cost, account)
        self.judge(charge, account, now_s)
        return charge

    def judge(self, charge: Charge, account: Account, now_s: float) -> None:
        """Fill in how long the charge must wait, and what would be left after it."""
        cost, wait_s, remaining = charge.cost, 0.0, math.inf
        if self.has_bucket:
            bucket = account.bucket
            wait_s = bucket.wait_s(cost, self.rate_per_s, self.burst, now_s)
            remaining = bucket.tokens - cost
        for index, (amount, slot_s, _) in self.quotas:
            window = account.windows[index]
            window_s = window.wait_s(cost, amount, slot_s, now_s)
            if window_s > wait_s:  # noqa: PLR1730 - max costs three times as much, on the path of every call
                wait_s = window_s
            left = amount - window.used - cost
            if left < remaining:  # noqa: PLR1730 - same
                remaining = left
        if self.concurrent is not None and account.under_way >= self.concurrent:
            charge.why = "is reached: too many calls are under way"
            wait_s = max(wait_s, RETRY_S)
        if wait_s > 0:
            charge.wait_s = wait_s
        if remaining is not math.inf:
            charge.remaining = remaining

    def take(self, charge: Charge, account: Account) -> None:
        """Count the charge, which `judge` has just let through."""
        if self.has_bucket:
            account.bucket.tokens -= charge.cost
        if self.quotas:
            slots = []
            for index, (amount, _, quota) in self.quotas:
                window = account.windows[index]
                slots.append(window.take(charge.cost))
                if quota.warn_at_percent:
                    charge.warned = max(charge.warned, crossed(quota, amount, window.used, charge.cost))
            charge.slots = tuple(slots)
        if self.concurrent is not None:
            account.under_way += 1
            charge.is_held = True

    def give_back(self, charge: Charge) -> None:
        """Return what was taken for the charge: its message is not sent."""
        account = charge.account
        if account is not None:
            account.bucket.tokens = min(self.burst, account.bucket.tokens + charge.cost)
            for window, slot in zip(account.windows, charge.slots, strict=False):
                window.give_back(charge.cost, slot)
        self.counts.admitted -= 1
        self.counts.units -= charge.cost

    def account(self, key: Hashable, now_s: float) -> Account:
        """Return the account of *key*, which may be the one that newcomers share."""
        found = self.accounts.get(key)
        return self._open(key, now_s) if found is None else found

    def _open(self, key: Hashable, now_s: float) -> Account:
        if len(self.accounts) >= self.room:
            for _ in range(LOOKS):
                oldest = next(iter(self.accounts))
                account = self.accounts.pop(oldest)
                if self._is_at_rest(account, now_s):
                    break
                self.accounts[oldest] = account  # looked at again when all others were
            else:
                return self.newcomers
        account = self.accounts[key] = self.opened()
        return account

    def _is_at_rest(self, account: Account, now_s: float) -> bool:
        """Say whether the account is as good as new."""
        return (
            account.under_way == 0
            and account.bucket.wait_s(0, self.rate_per_s, self.burst, now_s) == 0
            and account.bucket.tokens >= self.burst
            and all(
                not window.numbers or now_s // slot_s - SLOTS > window.numbers[-1]
                for window, (_, (_, slot_s, _)) in zip(account.windows, self.quotas, strict=True)
            )
        )


@dataclass(slots=True)
class Ledger:
    """The accounts of one sidecar. Mutated by the functions of this module only."""

    limits: tuple[Limit, ...] = ()
    rules: dict[str, Rule] = field(default_factory=dict)  # by the limit's name
    by_method: dict[str, tuple[Rule, ...]] = field(default_factory=dict)

    def use(self, limits: tuple[Limit, ...]) -> None:
        """Judge by *limits* from now on; limits that stay keep their accounts."""
        room = MAX_ACCOUNTS // max(1, len(limits))
        self.rules = {each.name: Rule(each, room, self.rules.get(each.name)) for each in limits}
        methods = {method for each in limits for method in each.methods}
        self.by_method = {
            method: tuple([rule for rule in self.rules.values() if method in rule.limit.methods]) for method in methods
        }
        self.limits = limits


def admit(
    permit: Permit, limits: tuple[Limit, ...], ledger: Ledger, now_s: float, size_bytes: int = 0
) -> Admission | Reservation:
    """Charge every limit that applies to *permit*, or none at all.

    *now_s* is monotonic seconds, *size_bytes* the length of the body. Raises Refusal(THROTTLED) of the limit that takes
    longest, with retry_after_s rounded up, because a client that returns early is refused twice.
    """
    if limits is not ledger.limits:
        ledger.use(limits)
    message = permit.question.message
    rules = ledger.by_method.get(message.method)
    if rules is None:
        return Admission(permit=permit)
    name = message.target.name if isinstance(message.target, Tool) else None
    is_over = False
    own: list[Charge] = []
    shared: list[Charge] = []
    for rule in rules:
        if rule.tools and name not in rule.tools:
            continue
        if rule.max_bytes is not None and size_bytes > rule.max_bytes:
            _refuse_size(rule, size_bytes)
        if rule.is_global:
            shared.append(_unjudged(rule, permit))
        else:
            charge = rule.charge(permit, now_s)
            is_over = is_over or charge.wait_s > 0
            own.append(charge)
    if is_over:
        _require_room(own)
    _take(own)
    if shared:
        return Reservation(permit=permit, charges=tuple(own), shared=tuple(shared))
    return Admission(permit=permit, charges=tuple(own))


def settle(reservation: Reservation, judgements: Sequence[Judgement] | None, now_s: float) -> Admission:
    """Return the admission that *reservation* becomes by what the store says; None: it is away.

    The store has already taken what it says fits. Raises Refusal(THROTTLED), as `admit` does; it is then the caller's to
    give back what the reservation holds.
    """
    shared = reservation.shared
    if judgements is None:
        _fall_back(shared, now_s)
    else:
        for charge, judgement in zip(shared, judgements, strict=True):
            charge.wait_s, charge.remaining = judgement.wait_s, judgement.remaining
            charge.marks, charge.warned = judgement.marks, judgement.warned
        _require_room(shared)
        _take(shared)
        for charge in shared:
            _use_share(charge, now_s)
    return Admission(permit=reservation.permit, charges=(*reservation.charges, *shared))


def give_back(charges: Iterable[Charge]) -> None:
    """Return what was taken for *charges*, once: their message is not sent. What the store took is for it to return."""
    for charge in charges:
        if charge.is_taken:
            charge.is_taken = False
            charge.rule.give_back(charge)
    release(charges)


def release(charges: Iterable[Charge]) -> None:
    """Know that the message of *charges* is no longer under way; a second time changes nothing."""
    for charge in charges:
        if charge.is_held:
            charge.is_held = False
            if charge.account is not None:
                charge.account.under_way -= 1


def crossed(quota: Quota, amount: float, used: float, cost: int) -> int:
    """Return the highest step of *quota* that *used*, the last *cost* of it included, has just passed; 0: none."""
    steps = [step for step in quota.warn_at_percent if used - cost < amount * step / 100 <= used]
    return max(steps, default=0)


def _unjudged(rule: Rule, permit: Permit) -> Charge:
    question = permit.question
    cost = 1 if rule.weigh is None else rule.weigh(question.message)
    return Charge(rule, rule.key(question), cost, None)


def _refuse_size(rule: Rule, size_bytes: int) -> None:
    if rule.limit.mode == "shadow":
        rule.counts.over += 1
        return
    rule.counts.refused += 1
    name = rule.limit.name
    # Coming again does not help: there is no retry_after_s.
    raise Refusal(Reason.THROTTLED, f"limit {name}: {size_bytes} bytes are more than its {rule.max_bytes}", detail=name)


def _require_room(charges: Iterable[Charge]) -> None:
    """Raise Refusal(THROTTLED) of the limit that takes longest, where one has no room."""
    slowest: Charge | None = None
    for charge in charges:
        if charge.wait_s > 0 and charge.rule.limit.mode == "enforce":
            charge.rule.counts.refused += 1
            if slowest is None or charge.wait_s > slowest.wait_s:
                slowest = charge
    if slowest is not None:
        raise Refusal(
            Reason.THROTTLED,
            f"limit {slowest.name} {slowest.why}",
            detail=slowest.name,
            retry_after_s=max(1, math.ceil(slowest.wait_s)),
        )


def _take(charges: Iterable[Charge]) -> None:
    """Count what fits; in shadow mode there may be nothing left to take."""
    for charge in charges:
        rule, account, counts = charge.rule, charge.account, charge.rule.counts
        if charge.wait_s > 0:
            counts.over += 1
            continue
        if account is not None:
            rule.take(charge, account)
        charge.is_taken = True
        counts.admitted += 1
        counts.units += charge.cost
        if charge.warned:
            counts.warnings[charge.warned] = counts.warnings.get(charge.warned, 0) + 1


def _use_share(charge: Charge, now_s: float) -> None:
    """Charge this pod's share, too, with what the store granted: when the store goes away, that much is used already."""
    rule = charge.rule
    if charge.wait_s > 0 or rule.limit.when_unavailable != "local":
        return
    account = charge.account = rule.account(charge.key, now_s)
    share = Charge(rule, charge.key, charge.cost, account)
    rule.judge(share, account, now_s)
    rule.take(share, account)
    account.bucket.tokens = max(0.0, account.bucket.tokens)
    charge.slots, charge.is_held = share.slots, share.is_held


def _fall_back(charges: Sequence[Charge], now_s: float) -> None:
    """Judge without the store, each limit as it says; raises Refusal."""
    for charge in charges:
        limit = charge.rule.limit
        charge.is_fallback = True
        charge.rule.counts.fallback += 1
        if limit.when_unavailable == "closed":
            charge.wait_s, charge.why = RETRY_S, "cannot be judged now"
        elif limit.when_unavailable == "local":
            charge.account = charge.rule.account(charge.key, now_s)
            charge.rule.judge(charge, charge.account, now_s)
    _require_room(charges)
    _take(charges)


def _shape(limit: Limit) -> tuple[object, ...]:
    """Return what must be the same for accounts to keep their meaning."""
    return (limit.per, limit.burst is None, tuple([each.period for each in limit.quotas]))


def _key_of(per: Sequence[Part]) -> Callable[[Question], Hashable]:
    parts = tuple([_PARTS[each] for each in dict.fromkeys(per)])
    match parts:
        case (one,):
            return one
        case (one, two):
            return lambda question: (one(question), two(question))
        case _:
            return lambda question: tuple([part(question) for part in parts])


def _user(question: Question) -> Hashable:
    user = question.principal.user
    return None if user is None else (user.issuer, user.id)


def _workload(question: Question) -> Hashable:
    workload = question.principal.workload
    # Not the SpiffeId itself: to hash one costs more than all the rest.
    return None if workload is None else (workload.trust_domain.name, workload.segments)


def _tool(message: Message) -> str | None:
    return message.target.name if isinstance(message.target, Tool) else None


_PARTS: Final[dict[Part, Callable[[Question], Hashable]]] = {
    "user": _user,
    "workload": _workload,
    "session": lambda question: question.session_id,
    "agent_session": lambda question: question.agent.session,
    "tool": lambda question: _tool(question.message),
    "server": lambda question: (question.server.namespace, question.server.workload),
}
