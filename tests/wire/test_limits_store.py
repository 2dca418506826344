"""Limits of all replicas together: four sidecars, a real Redis, which is killed, frozen and started again."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path as FilePath
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from sidecar.core.profile import Limit, Quota
from sidecar.core.store import read_address
from sidecar.shell.quota import Login, Store
from tests.builders import a_call, a_snapshot
from tests.fakes import FakeServer, Heard, Path, a_path, a_server, allowing, echo_script, eventually, post, response
from tests.stores import RedisServer, a_redis

SIDECARS = 4
BOUND_S = 0.05
CALL = a_call("read_schema")


def a_limit(**changes: Any) -> Limit:
    """Return a limit that fills so slowly that nothing comes back while a test runs."""
    return Limit(**{"name": "calls", "rate_per_s": 1e-6, "burst": 20, "scope": "global", **changes})


def a_store(url: str, number: int = 0, *, timeout_s: float = BOUND_S, login: Login | None = None) -> Store:
    """Return a replica's store."""
    return Store(read_address(url), login=login or Login(), replica=f"replica-{number}", timeout_s=timeout_s)


@asynccontextmanager
async def sidecars(
    url: str, *limits: Limit, count: int = SIDECARS, timeout_s: float = BOUND_S, script: Any = None
) -> AsyncIterator[tuple[list[Path], list[Store], FakeServer]]:
    """Run sidecars in front of one server, each with its own connection to the store."""
    async with AsyncExitStack() as stack:
        fake, port = await stack.enter_async_context(a_server(script or echo_script()))
        stores = [a_store(url, number, timeout_s=timeout_s) for number in range(count)]
        paths = [
            await stack.enter_async_context(a_path(a_snapshot(allowing(), port=port, limits=limits), store=store))
            for store in stores
        ]
        await eventually(lambda: all(store.is_up for store in stores), what="the store, for every sidecar")
        yield paths, stores, fake


def keys(redis: RedisServer) -> list[bytes]:
    """Return what the store holds."""
    with SyncRedis(port=redis.port) as admin:
        found: list[bytes] = admin.keys("*")
    return found


async def call(path: Path, times: int, body: bytes = CALL) -> list[dict[str, Any]]:
    """Return the answers to *times* calls on one connection."""
    client = await path.dial()
    answers = []
    for _ in range(times):
        await client.say(post(body))
        heard = await client.hear()
        assert heard is not None
        answers.append(json.loads(heard.body))
    await client.close()
    return answers


async def burst(paths: Sequence[Path], connections: int, times: int) -> list[dict[str, Any]]:
    """Return the answers to *times* calls on each of the *connections* of each sidecar, all at once."""
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(call(path, times)) for path in paths for _ in range(connections)]
    return [answer for each in calls for answer in each.result()]


def granted(answers: Sequence[dict[str, Any]]) -> int:
    """Return how many of *answers* are the server's; all others must be refusals by a limit."""
    refused = [answer for answer in answers if "result" not in answer]
    assert all(answer["error"]["code"] == 429 for answer in refused), refused
    return len(answers) - len(refused)


@pytest.fixture
def redis(tmp_path: FilePath) -> Any:
    """A Redis."""
    with a_redis(tmp_path) as server:
        yield server


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rate_per_s": None, "burst": None, "quotas": (Quota(amount=20, period="hour"),)},
        {"quotas": (Quota(amount=30, period="minute"), Quota(amount=25, period="month"))},
    ],
    ids=["a bucket", "a quota", "the tightest of three"],
)
async def test_four_sidecars_admit_exactly_the_limit(redis: RedisServer, changes: dict[str, Any]) -> None:
    """Ten times as many calls come at once; the twenty that pass are all that the server sees."""
    async with sidecars(redis.url, a_limit(**changes), timeout_s=5.0) as (paths, stores, fake):
        answers = await burst(paths, connections=5, times=10)

    assert (len(answers), granted(answers), len(fake.heard)) == (200, 20, 20)
    assert [store.unanswered for store in stores] == [0] * SIDECARS
    assert all(answer["error"]["data"]["retryAfterSeconds"] > 0 for answer in answers if "error" in answer)


async def test_a_batch_is_judged_whole(redis: RedisServer) -> None:
    """Three messages do not pass a limit of two, and leave it as it was."""
    batch = b"[" + b",".join(a_call("read_schema", request_id=number) for number in range(3)) + b"]"
    two = b"[" + b",".join(a_call("read_schema", request_id=number) for number in range(2)) + b"]"
    async with sidecars(redis.url, a_limit(burst=2), count=1, timeout_s=5.0) as (paths, _, fake):
        client = await paths[0].dial()
        heard = []
        for body in (batch, two, two):
            await client.say(post(body, "MCP-Protocol-Version: 2025-03-26"))
            heard.append(await client.hear())
        await client.close()
        records = paths[0].exchanges
    codes = [[each["error"]["code"] for each in json.loads(answer.body)] for answer in (heard[0], heard[2]) if answer]

    assert (codes, len(fake.heard)) == ([[429] * 3, [429] * 2], 1)
    assert [each.was_sent for each in records] == [False] * 3 + [True] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("changes", "passing"),
    [
        ({"when_unavailable": "closed"}, 0),
        ({"when_unavailable": "open"}, 40),
        ({"when_unavailable": "local", "replicas": SIDECARS}, 20),
    ],
    ids=["closed", "open", "local"],
)
async def test_without_the_store_the_limit_says_what_holds(
    redis: RedisServer, changes: dict[str, Any], passing: int
) -> None:
    """It was killed: nothing, everything, or each replica's part; no call goes unjudged, and none hangs."""
    async with sidecars(redis.url, a_limit(**changes)) as (paths, stores, fake):
        redis.kill()
        answers = await burst(paths, connections=2, times=5)
        charges = [each.admission.charges[0] for path in paths for each in path.exchanges if each.admission]

    assert (len(answers), granted(answers), len(fake.heard)) == (40, passing, passing)
    assert all(charge.is_fallback for charge in charges)
    assert not any(store.is_up for store in stores)


async def test_a_store_that_does_not_answer_delays_nobody_for_long(redis: RedisServer) -> None:
    """Who asked first waits for the bound; while it is known to be away, nobody waits."""
    loop = asyncio.get_running_loop()
    async with sidecars(redis.url, a_limit(when_unavailable="open"), count=1, timeout_s=0.2) as (paths, (store,), fake):
        redis.freeze()
        waits_s = []
        for _ in range(30):
            began_s = loop.time()
            assert granted(await call(paths[0], 1)) == 1
            waits_s.append(loop.time() - began_s)
        redis.thaw()
        await eventually(lambda: store.is_up, what="the store again")
        while paths[0].exchanges[-1].admission.charges[0].is_fallback:  # type: ignore[union-attr]
            assert granted(await call(paths[0], 1)) == 1

    assert len(fake.heard) == len(paths[0].exchanges) >= 31
    assert store.unanswered <= 2 + len(fake.heard) - 31  # a second call can come before the first one's wait is over
    assert waits_s[0] >= 0.19
    assert max(waits_s) < 0.2 + 1.0  # the bound, and what a busy machine adds


async def test_a_store_that_was_restarted_is_asked_again(redis: RedisServer) -> None:
    """It has forgotten the scripts and what was used; calls that come while it is back are judged by it."""
    limit = a_limit(when_unavailable="closed")
    async with sidecars(redis.url, limit, count=2, timeout_s=5.0) as (paths, stores, fake):
        before = granted(await burst(paths, connections=2, times=10))
        redis.kill()
        redis.start()
        await eventually(lambda: all(store.is_up for store in stores), what="the store again")
        after = granted(await burst(paths, connections=2, times=10))

    assert (before, after, len(fake.heard)) == (20, 20, 40)


async def test_a_script_that_was_forgotten_is_loaded_again(redis: RedisServer) -> None:
    """SCRIPT FLUSH, or another node of a failover: the call itself notices nothing."""
    async with sidecars(redis.url, a_limit(burst=2), count=1, timeout_s=5.0) as (paths, (store,), _):
        first = granted(await call(paths[0], 1))
        async with Redis(port=redis.port) as admin:
            await admin.script_flush()
        second = granted(await call(paths[0], 2))

    assert (first, second, store.failures) == (1, 1, 0)


async def test_calls_at_a_time_are_counted_over_all_sidecars(redis: RedisServer) -> None:
    """Exactly three of twelve are under way; each that ends makes room for one."""
    may_answer = asyncio.Event()

    async def slow(_: Heard, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        writer.write(response(b'{"jsonrpc":"2.0","id":7,"result":{}}'))

    limit = a_limit(rate_per_s=None, burst=None, concurrent=3, per=("server",))
    async with sidecars(redis.url, limit, timeout_s=5.0, script=slow) as (paths, _, fake):
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(call(path, 1)) for path in paths for _ in range(3)]
            try:
                await eventually(lambda: sum(each.done() for each in calls) == 9, what="nine refusals")
                await eventually(lambda: len(fake.heard) == 3, what="three calls")
            finally:
                may_answer.set()
        answers = [answer for each in calls for answer in each.result()]
        await eventually(lambda: not keys(redis), what="the end of what was under way")
        again = granted(await burst(paths[:3], connections=1, times=1))

    assert (granted(answers), again) == (3, 3)


async def test_a_client_that_leaves_while_the_store_is_asked_costs_nothing(redis: RedisServer) -> None:
    """What the store granted it is given back."""
    async with sidecars(redis.url, a_limit(burst=1, concurrent=1), count=1, timeout_s=20.0) as (paths, (store,), fake):
        redis.freeze()
        client = await paths[0].dial()
        await client.say(post(CALL))
        await eventually(lambda: paths[0].serving.in_flight == 1, what="the call")
        await client.close()
        await eventually(lambda: paths[0].serving.in_flight == 0, what="its end")
        redis.thaw()
        answers: list[dict[str, Any]] = []
        async with asyncio.timeout(30):
            while not answers or "error" in answers[-1]:  # until it is given back
                answers += await call(paths[0], 1)

    assert len(fake.heard) == 1
    assert store.unanswered == 0
