"""Limits of all replicas together: four sidecars, a real Redis, which is killed, frozen and started again."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path as FilePath
from typing import Any

import pytest

from sidecar.core.profile import Limit, Quota
from sidecar.core.store import read_address
from sidecar.shell.quota import Login, Store
from tests.builders import a_call, a_snapshot
from tests.fakes import FakeServer, Path, a_path, a_server, allowing, echo_script, eventually, post
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
