"""What the store of global limits is asked, and how its answer is read: keys, two scripts, plain arguments.

One script call judges many messages, each of them all or nothing, and at once takes what fits. Its clock is the server's,
so replicas with other clocks agree. All keys of a namespace carry one hash tag, `{sidegate/<namespace>}`: in a cluster
they live on one node, where a script can see them all. A key names the limit, and its callers by a hash only. Laws and
slots are those of sidecar/core/quota.py. Calls under way hold a lease: it ends with the call, or with the replica that
stopped renewing it. Source: Redis and Valkey, EVALSHA, cluster specification (hash tags).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha1
from typing import Final

from sidecar.core.limits import Charge, Judgement, crossed
from sidecar.core.quota import PERIODS_S, SLOTS

LEASE_S: Final = 30.0  # for which a call counts as under way when its replica died
RENEW_S: Final = LEASE_S / 3
FOREVER_S: Final = 2**40  # within what the store takes for a key's life, and longer than any

# Arguments of each message: how many entries, then six for each: kind, capacity, rate or slot, cost, lease, and 0 or,
# in shadow mode, a number that all entries of one limit share: where one has no room, none of them takes anything.
# Kinds: b, a bucket; w, a window; c, calls under way. Answers three numbers an entry: wait in ms, what is left, slot.
CLAIM: Final = (
    (
        """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local answers, k, a = {}, 0, 1

local function bucket(e)
  local held = redis.call('HMGET', e.key, 'tokens', 'at')
  local at = tonumber(held[2]) or now
  local tokens = math.min(e.capacity, (tonumber(held[1]) or e.capacity) + math.max(0, now - at) / 1000 * e.rate)
  tokens = tokens - e.before
  if e.cost - tokens > 1e-9 then e.wait = math.max(1, math.ceil((e.cost - tokens) / e.rate * 1000)) end
  e.left = tokens - e.cost
  e.take = function()
    redis.call('HSET', e.key, 'tokens', string.format('%.17g', e.left), 'at', string.format('%.0f', math.max(at, now)))
    redis.call('PEXPIRE', e.key, string.format('%.0f', math.min(e.capacity / e.rate, FOREVER) * 1000 + 60000))
  end
end

local function window(e)
  local all = redis.call('HGETALL', e.key)
  local slot, used, held, old = math.floor(now / e.rate), 0, {}, {}
  for i = 1, #all, 2 do slot = math.max(slot, tonumber(all[i])) end
  for i = 1, #all, 2 do
    local number, units = tonumber(all[i]), tonumber(all[i + 1])
    if number < slot - SLOTS then
      old[#old + 1] = all[i]
    else
      used = used + units
      held[#held + 1] = {number, units}
    end
  end
  used = used + e.before
  local lacking = used + e.cost - e.capacity
  if lacking > 0 then
    e.wait = (SLOTS + 1) * e.rate
    table.sort(held, function(one, other) return one[1] < other[1] end)
    for _, each in ipairs(held) do
      lacking = lacking - each[2]
      if lacking <= 0 then
        e.wait = math.max(1, (each[1] + SLOTS + 1) * e.rate - now)
        break
      end
    end
  end
  e.left, e.mark = e.capacity - used - e.cost, slot
  e.take = function()
    if #old > 0 then redis.call('HDEL', e.key, unpack(old)) end
    redis.call('HINCRBY', e.key, string.format('%.0f', slot), string.format('%.0f', e.cost))
    redis.call('PEXPIRE', e.key, string.format('%.0f', (SLOTS + 2) * e.rate))
  end
end

local function under_way(e)
  redis.call('ZREMRANGEBYSCORE', e.key, '-inf', string.format('%.0f', now))
  e.left = e.capacity - redis.call('ZCARD', e.key) - e.before - 1
  if e.left < 0 then e.wait = 1000 end
  e.take = function()
    redis.call('ZADD', e.key, string.format('%.0f', now + e.rate), e.lease)
    redis.call('PEXPIRE', e.key, string.format('%.0f', e.rate))
  end
end

local judge = {b = bucket, w = window, c = under_way}
while a <= #ARGV do
  local entries, before, over = {}, {}, {}
  local count = tonumber(ARGV[a])
  a = a + 1
  for i = 1, count do
    k = k + 1
    local e = {key = KEYS[k], wait = 0, left = 0, mark = 0, capacity = tonumber(ARGV[a + 1]),
      rate = tonumber(ARGV[a + 2]), cost = tonumber(ARGV[a + 3]), lease = ARGV[a + 4], shadow = ARGV[a + 5]}
    e.before = before[e.key] or 0  -- of other messages of the same body
    before[e.key] = e.before + e.cost
    judge[ARGV[a]](e)
    a = a + 6
    if e.wait > 0 then over[e.shadow] = true end
    entries[i] = e
  end
  local fits = not over['0']
  for _, e in ipairs(entries) do
    if fits and not over[e.shadow] then e.take() end
    answers[#answers + 1] = e.wait
    answers[#answers + 1] = math.floor(e.left)
    answers[#answers + 1] = fits and e.mark or 0
  end
end
return answers
"""
    )
    .replace("SLOTS", str(SLOTS))
    .replace("FOREVER", str(FOREVER_S))
)

# Four arguments for each key: kind, units or lease's length, slot, lease. Kinds: b and w give back, c ends a lease, r renews.
SETTLE: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
for k = 1, #KEYS do
  local kind, number, slot, lease = unpack(ARGV, k * 4 - 3, k * 4)
  if kind == 'b' then
    if redis.call('EXISTS', KEYS[k]) == 1 then redis.call('HINCRBYFLOAT', KEYS[k], 'tokens', number) end
  elseif kind == 'w' then
    if redis.call('HEXISTS', KEYS[k], slot) == 1 then redis.call('HINCRBY', KEYS[k], slot, '-' .. number) end
  elseif kind == 'c' then
    redis.call('ZREM', KEYS[k], lease)
  else
    redis.call('ZADD', KEYS[k], string.format('%.0f', now + number), lease)
    redis.call('PEXPIRE', KEYS[k], number)
  end
end
return #KEYS
"""
CLAIM_SHA: Final = sha1(CLAIM.encode(), usedforsecurity=False).hexdigest()
SETTLE_SHA: Final = sha1(SETTLE.encode(), usedforsecurity=False).hexdigest()
LEASE_MS: Final = str(int(LEASE_S * 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the store is asked for one body: all of its charges, or none."""

    charges: tuple[Charge, ...]
    namespace: str
    keys: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One key's part in giving back, ending or renewing."""

    key: str
    arguments: tuple[str, str, str, str]


def claim(charges: Sequence[Charge], namespace: str, leases: Iterator[str]) -> Claim:
    """Return the claim for *charges*; those that count calls under way get the next of *leases*."""
    keys: list[str] = []
    arguments: list[str] = []
    for number, charge in enumerate(charges, 1):
        limit = charge.rule.limit
        shadow = str(number) if limit.mode == "shadow" else "0"
        cost = str(charge.cost)
        for kind, key in _entries(charge, namespace):
            keys.append(key)
            match kind:
                case "b":
                    arguments += ("b", str(limit.burst), repr(limit.rate_per_s), cost, "", shadow)
                case "c":
                    charge.lease = next(leases)
                    arguments += ("c", str(limit.concurrent), LEASE_MS, "1", charge.lease, shadow)
                case _:
                    quota = limit.quotas[int(kind[1:])]
                    slot_ms = PERIODS_S[quota.period] * 1000 // SLOTS
                    arguments += ("w", str(quota.amount), str(slot_ms), cost, "", shadow)
    return Claim(charges=tuple(charges), namespace=namespace, keys=tuple(keys), arguments=(str(len(keys)), *arguments))


def read_answer(asked: Claim, numbers: Sequence[int]) -> tuple[Judgement, ...]:
    """Return what *numbers*, the store's three for each key, say of the claim's charges."""
    found: list[Judgement] = []
    at = 0
    refused = any(numbers[3 * index] > 0 and asked.arguments[6 * index + 6] == "0" for index in range(len(asked.keys)))
    for charge in asked.charges:
        limit = charge.rule.limit
        mine = [numbers[3 * index : 3 * index + 3] for index in range(at, at + _size(charge))]
        at += len(mine)
        left = [each[1] for each in mine[: len(mine) - (limit.concurrent is not None)]]
        wait_s = max(each[0] for each in mine) / 1000
        windows = mine[1 if limit.burst is not None else 0 :]
        warned = max(
            (
                crossed(quota, quota.amount, quota.amount - each[1], charge.cost)
                for quota, each in zip(limit.quotas, windows, strict=False)
            ),
            default=0,
        )
        found.append(
            Judgement(
                wait_s=wait_s,
                remaining=min(left, default=None),
                marks=() if refused or wait_s else tuple([each[2] for each in mine]),
                warned=0 if refused or wait_s else warned,
            )
        )
    return tuple(found)


def returned(charge: Charge, marks: Sequence[int], namespace: str) -> Iterator[Change]:
    """Yield what gives back what the store took for *charge*, at *marks*; nothing where it took nothing."""
    if marks:
        for (kind, key), mark in zip(_entries(charge, namespace), marks, strict=True):
            yield Change(key=key, arguments=(kind[0], str(charge.cost), str(mark), charge.lease))


def ended(charges: Iterable[Charge], namespace: str) -> Iterator[Change]:
    """Yield what ends the leases of *charges*."""
    return _leases(charges, namespace, "c")


def renewed(charges: Iterable[Charge], namespace: str) -> Iterator[Change]:
    """Yield what renews them."""
    return _leases(charges, namespace, "r")


def _leases(charges: Iterable[Charge], namespace: str, verb: str) -> Iterator[Change]:
    for charge in charges:
        if charge.lease and charge.marks:
            key = next(key for kind, key in _entries(charge, namespace) if kind == "c")
            yield Change(key=key, arguments=(verb, LEASE_MS, "0", charge.lease))


def _size(charge: Charge) -> int:
    limit = charge.rule.limit
    return (limit.burst is not None) + len(limit.quotas) + (limit.concurrent is not None)


def _entries(charge: Charge, namespace: str) -> Iterator[tuple[str, str]]:
    """Yield kind and key of each part of the charge's limit: the bucket, the windows by number, the calls under way."""
    limit = charge.rule.limit
    who = blake2b(repr(charge.key).encode(errors="backslashreplace"), digest_size=16).hexdigest()
    stem = f"{{sidegate/{namespace}}}:{limit.name}:{who}"
    if limit.burst is not None:
        yield "b", f"{stem}:bucket"
    for number, quota in enumerate(limit.quotas):
        yield f"w{number}", f"{stem}:{quota.period}"
    if limit.concurrent is not None:
        yield "c", f"{stem}:under-way"
