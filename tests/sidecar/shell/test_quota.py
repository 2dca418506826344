"""sidecar.shell.quota: every way to a real store, and what becomes of what was taken there."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from sidecar.core import tally
from sidecar.core.limits import Charge, Ledger, Reservation, admit
from sidecar.core.profile import Limit, Quota
from sidecar.core.store import read_address
from sidecar.shell import quota as module
from sidecar.shell.quota import Login, Store
from tests.builders import a_permit
from tests.fakes import eventually
from tests.stores import RedisServer, a_redis, free_port, tls_options

PATIENT_S = 20.0


def a_limit(**changes: Any) -> Limit:
    """Return a limit that fills so slowly that nothing comes back while a test runs."""
    return Limit(**{"name": "calls", "rate_per_s": 1e-6, "burst": 3, "scope": "global", **changes})


def charges(*limits: Limit) -> tuple[Charge, ...]:
    """Return what a call is charged."""
    reservation = admit(a_permit(), limits, Ledger(), 0.0)
    assert isinstance(reservation, Reservation)
    return reservation.shared


@asynccontextmanager
async def a_store(
    url: str, *, login: Login | None = None, timeout_s: float = PATIENT_S, waits: bool = True
) -> AsyncIterator[Store]:
    """Run a store's client; *waits* until it is up."""
    store = Store(read_address(url), login=login or Login(), replica="r", timeout_s=timeout_s)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(store.run())
        try:
            if waits:
                await eventually(lambda: store.is_up, what="the store")
            yield store
        finally:
            running.cancel()


async def grants(store: Store, *limits: Limit, times: int = 5) -> int:
    """Return how many of *times* calls the store lets pass."""
    granted = 0
    for _ in range(times):
        answer = await store.ask(charges(*limits), "pay")
        assert answer is not None
        granted += all(each.wait_s == 0 for each in answer)
    return granted


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis."""
    with a_redis(tmp_path) as server:
        yield server


async def test_a_bucket_fills_by_the_stores_clock(redis: RedisServer) -> None:
    """Who comes back when told gets in."""
    limit = a_limit(rate_per_s=20.0, burst=2)
    async with a_store(redis.url) as store:
        assert await grants(store, limit, times=2) == 2
        (told,) = await store.ask(charges(limit), "pay") or ()
        await asyncio.sleep(told.wait_s)

        assert 0 <= told.wait_s <= 0.05
        assert await grants(store, limit, times=1) == 1


async def test_a_bucket_that_never_fills_is_kept_like_any_other(redis: RedisServer) -> None:
    """The store takes no life of a key beyond 64 bits; what it refused would count as its absence, for every limit."""
    async with a_store(redis.url) as store:
        assert await grants(store, a_limit(burst=10**12, rate_per_s=1e-6), a_limit(name="other"), times=4) == 3
        assert store.failures == 0


async def test_a_window_forgets_what_is_over(redis: RedisServer) -> None:
    """What was used two minutes ago counts no more; what was used within the last one says when it will not."""
    limit = a_limit(rate_per_s=None, burst=None, quotas=(Quota(amount=5, period="minute"),))
    async with a_store(redis.url) as store:
        await grants(store, limit, times=1)
        with Redis(port=redis.port, decode_responses=True) as admin:
            (key,) = admin.keys("*")
            (slot,) = admin.hkeys(key)
            admin.hset(key, mapping={str(int(slot) - 120): 100, str(int(slot) - 30): 4})
            (told,) = await store.ask(charges(limit), "pay") or ()
            admin.hdel(key, str(int(slot) - 30))
            granted = await grants(store, limit)
            held = admin.hkeys(key)

    assert told.marks == ()
    assert 28 <= told.wait_s <= 31
    assert granted == 4
    assert str(int(slot) - 120) not in held


async def test_a_clock_that_was_ahead_grants_nothing_when_it_is_right_again(redis: RedisServer) -> None:
    """What it wrote from the future counts as now."""
    limit = a_limit(quotas=(Quota(amount=3, period="minute"),))
    async with a_store(redis.url) as store:
        assert await grants(store, limit) == 3
        with Redis(port=redis.port, decode_responses=True) as admin:
            bucket, window = sorted(admin.keys("*"))
            (slot,) = admin.hkeys(window)
            admin.hset(bucket, "at", str(2 * 10**12))
            admin.delete(window)
            admin.hset(window, str(int(slot) + 1000), 3)

        assert await grants(store, limit) == 0


async def test_what_is_given_back_can_be_had_again(redis: RedisServer) -> None:
    """Tokens, units and the place among calls under way."""
    limit = a_limit(burst=1, quotas=(Quota(amount=1, period="month"),), concurrent=1)
    async with a_store(redis.url) as store:
        mine = charges(limit)
        (told,) = await store.ask(mine, "pay") or ()
        mine[0].marks = told.marks
        store.give_back(mine, "pay")
        store.give_back(charges(limit), "pay")  # nothing was taken for these

        assert await grants(store, limit) == 1


async def test_what_is_over_in_shadow_mode_takes_no_part_of_its_limit(redis: RedisServer) -> None:
    """As in a pod's own account: a bucket that is empty must not use up the day, nor hold a place that nobody frees."""
    limit = a_limit(burst=1, quotas=(Quota(amount=9, period="day"),), concurrent=9, mode="shadow")
    async with a_store(redis.url) as store:
        for _ in range(3):
            answer = await store.ask(charges(a_limit(name="enforced", burst=9), limit), "pay")
        assert answer is not None
        left = answer[0].remaining
        with Redis(port=redis.port, decode_responses=True) as admin:
            (day,) = (admin.hvals(key) for key in admin.keys("*:day"))
            (held,) = (admin.zcard(key) for key in admin.keys("*:under-way"))

    assert (left, answer[1].marks, day, held) == (6, (), ["1"], 1)


async def test_a_replica_that_died_holds_no_place_for_long(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease ends by itself; that of a replica which lives is renewed."""
    monkeypatch.setattr(tally, "LEASE_MS", "300")
    monkeypatch.setattr(tally, "RENEW_S", 0.1)
    limit = a_limit(rate_per_s=None, burst=None, concurrent=1)
    async with a_store(redis.url) as other:
        async with a_store(redis.url) as living:
            mine = charges(limit)
            (told,) = await living.ask(mine, "pay") or ()
            mine[0].marks = told.marks
            await asyncio.sleep(0.7)  # longer than a lease
            assert await grants(other, limit) == 0
        async with asyncio.timeout(PATIENT_S):
            while not await grants(other, limit, times=1):  # noqa: ASYNC110 - no event tells that a lease has ended
                await asyncio.sleep(0.02)


async def test_an_end_is_told_once(redis: RedisServer) -> None:
    """The place is free for another, and is not freed again when that one has it."""
    limit = a_limit(rate_per_s=None, burst=None, concurrent=1)
    async with a_store(redis.url) as store:
        mine, others = charges(limit), charges(limit)
        for each in (mine, others):
            (told,) = await store.ask(each, "pay") or ()
            each[0].marks = told.marks
            store.end(mine)
        store.end(mine)

        assert others[0].marks
        assert await grants(store, limit) == 0


async def test_an_answer_that_nobody_waits_for_is_given_back(redis: RedisServer) -> None:
    """The call was judged without it."""
    async with a_store(redis.url) as store:
        redis.freeze()
        late = charges(a_limit())
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(store.ask(late, "pay"))
            await asyncio.sleep(0.05)
            asking.cancel()
        redis.thaw()

        assert await grants(store, a_limit()) == 3


async def test_more_calls_than_may_wait_are_told_at_once(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded; they are judged as if the store were away."""
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    async with a_store(redis.url) as store:
        redis.freeze()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(store.ask(charges(a_limit()), "pay"))
            await asyncio.sleep(0)
            assert await store.ask(charges(a_limit()), "pay") is None
            redis.thaw()
        assert first.result() is not None


async def test_nobody_waits_for_a_store_that_was_never_there() -> None:
    """Until it is found."""
    async with a_store(f"redis://127.0.0.1:{free_port()}", waits=False) as store:
        await asyncio.sleep(0.05)
        assert await store.ask(charges(a_limit()), "pay") is None


async def test_a_store_behind_tls_and_login_is_proven_and_shown_who_we_are(tmp_path: Path) -> None:
    """By the given authority, by user and password; without either it stays away."""
    tls, ca_pem = tls_options(tmp_path)
    tls = ("--port", "0", "--tls-port", str(port := free_port()), *tls)
    rights = "~{sidegate/* +evalsha +script|load +@hash +@sortedset +exists +pexpire +time"  # as the how-to says
    acl = ("--user", "sidegate", "on", ">secret", *rights.split(), "--user", "default", "off")
    url = f"rediss://localhost:{port}"
    known = Login(user="sidegate", password="secret", ca_pem=ca_pem)
    with a_redis(tmp_path, *tls, *acl):
        async with a_store(url, login=known) as store:
            assert await grants(store, a_limit(quotas=(Quota(amount=9, period="day"),), concurrent=9)) == 3
            mine = charges(a_limit(name="other", quotas=(Quota(amount=1, period="day"),), concurrent=1))
            for _ in range(2):
                (told,) = await store.ask(mine, "pay") or ()
                assert told.marks
                mine[0].marks = told.marks
                store.give_back(mine, "pay")
        for wrong in (
            Login(user="sidegate", password="other", ca_pem=ca_pem),
            Login(user="sidegate", password="secret"),
        ):
            async with a_store(url, login=wrong, waits=False) as store:
                await asyncio.sleep(0.3)
                assert not store.is_up


async def test_a_cluster_keeps_a_namespaces_limits_on_one_node(tmp_path: Path) -> None:
    """So that one script sees all of them."""
    bus = str(free_port())
    with a_redis(tmp_path, "--cluster-enabled", "yes", "--cluster-port", bus) as server:
        with Redis(port=server.port) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            await eventually(lambda: admin.cluster("INFO")["cluster_state"] == "ok", what="the cluster")
        async with a_store(f"redis+cluster://127.0.0.1:{server.port}") as store:
            assert await grants(store, a_limit(), a_limit(name="other", quotas=(Quota(amount=2, period="day"),))) == 2


async def test_sentinels_say_where_the_master_is(tmp_path: Path) -> None:
    """By the name in the URL."""
    with a_redis(tmp_path) as master:
        configuration = tmp_path / "sentinel.conf"
        configuration.write_text(f"sentinel monitor limits 127.0.0.1 {master.port} 1\n")
        port = free_port()
        with a_redis(tmp_path, port=port, sentinel=configuration):
            async with a_store(f"redis+sentinel://127.0.0.1:{port}/limits") as store:
                assert await grants(store, a_limit()) == 3
