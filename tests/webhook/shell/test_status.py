"""What is written into the status of custom resources, and how often."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from tests.webhook.kube_server import KubeServer, connection_to
from tests.webhook.shell.test_controllers import POLICIES as POLICY
from tests.webhook.shell.test_controllers import PROFILES, Cluster, a_pod, a_resource
from webhook.core.reports import PodKey, Report, Reports
from webhook.errors import BadPolicy, KubeError
from webhook.shell import status
from webhook.shell.kube import Kube, Put
from webhook.shell.lease import Leadership
from webhook.shell.status import ECHO_S, SETTLE_S, Statuses

POLICIES = "/apis/sidegate.dev/v1alpha1/mcppolicies"
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PODS: tuple[PodKey, ...] = (("payments", "ledger-0"), ("payments", "ledger-1"))


class FakePeers:
    """Other replicas; *error* is raised instead."""

    def __init__(self) -> None:
        self.answers: list[Mapping[PodKey, Report]] = []
        self.error: KubeError | None = None

    async def ask(self, _session: aiohttp.ClientSession) -> list[Mapping[PodKey, Report]]:
        """Return what they heard."""
        if self.error:
            raise self.error
        return self.answers


class Plane:
    """A controller that knows two pods and one policy, on an API server that has the policy."""

    def __init__(self, server: KubeServer, kube: Kube) -> None:
        self.server = server
        self.cluster = Cluster()
        self.reports = Reports()
        self.peers = FakePeers()
        self.now = NOON
        leadership = Leadership(kube, self.cluster.metrics, namespace="x", name="x", identity="x")
        self.statuses = Statuses(
            kube, self.cluster.controller, leadership, self.reports, self.peers,  # type: ignore[arg-type] # a fake
            self.cluster.compile, self.cluster.metrics, "default",
        )  # fmt: skip

    async def listed(self, *policies: Any, pods: int = 2, profiles: Any = ()) -> None:
        """Let the cluster be so, and compile."""
        self.server.objects.setdefault(POLICIES, {})
        for each in policies:
            self.server.put(POLICIES, each)
        found = [a_pod(name) for _, name in PODS[:pods]]
        for each in found:
            each["metadata"]["labels"] = {"sidegate.dev/injected": "default"}
        self.cluster.listed(*found, policies=policies, profiles=profiles)
        await self.cluster.compiled()

    def say(self, *pods: int, error: str = "") -> None:
        """Let pods report the revision that was made for them."""
        for each in pods:
            published = self.cluster.entry(PODS[each][1]).published
            assert published is not None
            self.reports.note(PODS[each], published.revision, error, self.now.timestamp())

    async def step(self, after_s: float = 0.0) -> int:
        """Write what is due."""
        self.now += timedelta(seconds=after_s)
        async with aiohttp.ClientSession() as session:
            return await self.statuses.step(session, self.now)

    def echo(self) -> None:
        """Let the watch show what was written."""
        for each in list(self.server.objects[POLICIES].values()):
            self.cluster.controller.apply(POLICY, Put(each))

    def status(self, name: str = "article") -> dict[str, Any]:
        """Return what is in the API server: the counts, and statuses by type."""
        found = self.server.objects[POLICIES][f"payments/{name}"]["status"]
        return {
            "distributed": found["distributed"],
            **{each["type"]: (each["status"], each["reason"]) for each in found["conditions"]},
        }


def a_policy(name: str = "article", generation: int = 1, **spec: Any) -> Any:
    """Return a policy of the namespace payments."""
    item = a_resource(name, **({"cedar": "x"} | spec))
    return item | {"metadata": item["metadata"] | {"generation": generation}}


@asynccontextmanager
async def running() -> AsyncIterator[Plane]:
    """Serve an API server, and give what writes to it."""
    server = KubeServer()
    async with server.running() as kube:
        yield Plane(server, kube)


async def test_a_good_policy_is_accepted_compiled_and_distributed() -> None:
    """What kubectl shows, once every sidecar has said that it enforces it, to whichever replica."""
    async with running() as plane:
        await plane.listed(a_policy())
        plane.say(0)
        assert await plane.step() == 1
        assert plane.status() == {
            "distributed": "1/2",
            "Accepted": ("True", "Selects"),
            "Compiled": ("True", "Compiled"),
            "Distributed": ("False", "InProgress"),
        }
        plane.echo()
        published = plane.cluster.entry("ledger-1").published
        assert published is not None
        elsewhere = Report(revision=published.revision, error="", noted_s=NOON.timestamp())
        plane.peers.answers = [{PODS[1]: elsewhere}]
        await plane.step(after_s=1)

        assert plane.status()["distributed"] == "2/2"
        assert plane.status()["Distributed"] == ("True", "AllPods")
        path, change = plane.server.patches[-1]
        assert path.endswith("mcppolicies/payments/article")
        assert set(change) == {"status"}


async def test_nothing_is_written_without_a_change() -> None:
    """Neither when the watch has shown the write, nor while it has not; nor does a write compile anything."""
    async with running() as plane:
        await plane.listed(a_policy())
        plane.say(0, 1)
        assert await plane.step() == 1
        assert await plane.step(after_s=1) == 0
        plane.echo()
        plane.say(0, 1)
        assert await plane.step(after_s=ECHO_S + 1) == 0
        assert await plane.cluster.compiled() == 0


async def test_a_lost_write_is_made_again() -> None:
    """What is never seen was perhaps never kept."""
    async with running() as plane:
        await plane.listed(a_policy())
        assert await plane.step() == 1
        assert await plane.step(after_s=ECHO_S + 1) == 1


async def test_mere_counts_wait() -> None:
    """A roll-out of ten thousand pods is not ten thousand writes."""
    async with running() as plane:
        await plane.listed(a_policy())
        await plane.step()
        plane.echo()
        plane.say(0)
        assert await plane.step(after_s=SETTLE_S - 1) == 0
        assert await plane.step(after_s=2) == 1
        assert plane.status()["distributed"] == "1/2"


async def test_writes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that concerns every policy does not flood the API server."""
    monkeypatch.setattr(status, "MAX_WRITES", 2)
    async with running() as plane:
        await plane.listed(*(a_policy(f"p{number}") for number in range(5)))

        assert [await plane.step(after_s=1) for _ in range(4)] == [2, 2, 1, 0]


async def test_what_is_refused_for_ever_leaves_the_others_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred resources whose status some webhook forbids must not hold up a good one, nor be written all the time."""
    monkeypatch.setattr(status, "MAX_WRITES", 2)
    async with running() as plane:
        names = [f"p{number}" for number in range(9)]
        await plane.listed(*(a_policy(name) for name in names))
        for name in names[:8]:  # all but the last are gone from the API server, and stay in what was listed
            plane.server.delete(POLICIES, f"payments/{name}")
        writes = [await plane.step(after_s=1) for _ in range(120)]
        refused, after = sum(writes[:60]), sum(writes[60:])

        assert plane.status("p8")["Accepted"] == ("True", "Selects")
        # After 0, 10, 30 and 70 s; the good one, as its echo never comes.
        assert (refused, after) == (8 * 3 + 12, 8 + 12)
        plane.cluster.controller.apply(POLICY, Put(plane.server.put(POLICIES, a_policy("p0", generation=2))))
        await plane.cluster.compiled()
        await plane.step(after_s=1)
        assert plane.status("p0")["Accepted"] == ("True", "Selects")  # mended: not the time to be patient


async def test_who_was_written_longest_ago_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that change all the time during a roll-out do not take the turn of what has had none yet."""
    monkeypatch.setattr(status, "MAX_WRITES", 1)
    async with running() as plane:
        await plane.listed(a_policy("p0"), a_policy("p1"))
        assert await plane.step() == 1
        plane.echo()
        plane.say(0)
        assert await plane.step(after_s=SETTLE_S + 1) == 1  # p0 is due again

        assert plane.status("p1")["distributed"] == "1/2"


async def test_a_broken_policy_says_line_and_column_and_the_last_good_one_stays() -> None:
    """It came in while the validating webhook was away."""
    async with running() as plane:
        await plane.listed(a_policy())
        plane.say(0, 1)
        await plane.step()
        plane.echo()
        good = plane.cluster.entry().published
        plane.cluster.compile.error = BadPolicy("article.rego", "unexpected eof token", line=2, column=20)
        plane.cluster.controller.apply(POLICY, Put(plane.server.put(POLICIES, a_policy(generation=2, rego="no"))))
        await plane.cluster.compiled()
        await plane.step(after_s=1)

        assert plane.status()["Compiled"] == ("False", "DoesNotCompile")
        assert plane.status()["distributed"] == "0/2"
        (compiled,) = [
            each
            for each in plane.server.objects[POLICIES]["payments/article"]["status"]["conditions"]
            if each["type"] == "Compiled"
        ]
        assert compiled["message"] == "article.rego:2:20: unexpected eof token"
        assert compiled["observedGeneration"] == 2
        assert plane.cluster.entry().published == good


async def test_a_policy_without_pods_is_compiled_once() -> None:
    """By itself; and a new leader believes what the status says."""
    async with running() as plane:
        await plane.listed(a_policy(), pods=0)
        await plane.step()
        assert plane.status() == {
            "distributed": "0/0",
            "Accepted": ("True", "SelectsNoPod"),
            "Compiled": ("True", "Compiled"),
            "Distributed": ("Unknown", "SelectsNoPod"),
        }
        plane.echo()
        await plane.step(after_s=60)
        assert len(plane.cluster.compile.asked) == 1

        plane.statuses._trials.clear()  # as in a process that has just begun
        await plane.step(after_s=60)
        assert len(plane.cluster.compile.asked) == 1


async def test_a_policy_that_took_too_long_is_tried_again() -> None:
    """A busy compiler says nothing about the policy."""
    async with running() as plane:
        await plane.listed(a_policy(), pods=0)
        plane.cluster.compile.error = OSError("no such program")
        assert await plane.step() == 0
        plane.cluster.compile.error = BadPolicy("article.cedar", "unexpected token", line=1, column=1)
        assert await plane.step(after_s=1) == 1
        assert plane.status()["Compiled"] == ("False", "DoesNotCompile")


async def test_a_refused_write_does_not_stop_the_others() -> None:
    """Nor is it repeated every second."""
    async with running() as plane:
        await plane.listed(a_policy("p0"), a_policy("p1"))
        plane.server.fail_next = [422]
        await plane.step()
        assert [path.rpartition("/")[2] for path, _ in plane.server.patches] == ["p1"]
        assert await plane.step(after_s=1) == 0
        assert await plane.step(after_s=ECHO_S + 1) >= 1


async def test_a_deleted_resource_is_forgotten() -> None:
    """Also when it goes between the look and the write."""
    async with running() as plane:
        await plane.listed(a_policy())
        plane.server.objects[POLICIES].clear()
        assert await plane.step() == 1
        await plane.listed()
        assert await plane.step(after_s=1) == 0
        assert plane.statuses._written == {}


async def test_an_api_server_that_is_away_is_an_error() -> None:
    """The next step begins anew."""
    async with running() as plane:
        await plane.listed(a_policy())
        away = connection_to(1)  # nothing listens there
        plane.statuses._kube = away
        with pytest.raises(KubeError):
            await plane.step()
        await away.aclose()


async def test_an_unreadable_resource_says_why() -> None:
    """A CRD may be older than the program."""
    async with running() as plane:
        await plane.listed(a_policy(cedar="", rego=""))
        await plane.step()

        assert plane.status()["Accepted"] == ("False", "Invalid")
        assert PROFILES.name == "MCPServerProfile"


async def test_only_who_leads_writes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And goes on after an error."""
    monkeypatch.setattr(status, "PERIOD_S", 0.01)
    monkeypatch.setattr(status, "PODS_PER_S", 1e9)
    async with running() as plane:
        leadership = plane.statuses._leadership
        await plane.listed(a_policy())
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(plane.statuses.run())
            for _ in range(20):  # rounds of a follower
                await asyncio.sleep(0)
            assert plane.server.requests == []
            plane.peers.error = KubeError(403, "endpointslices is forbidden")
            leadership._until_s = time.monotonic() + 60
            while "status not written" not in caplog.text:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            plane.peers.error = None
            while not plane.server.patches:  # noqa: ASYNC110 - same
                await asyncio.sleep(0.01)
            writing.cancel()

    assert plane.status()["distributed"] == "0/2"
