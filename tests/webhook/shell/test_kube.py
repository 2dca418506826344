"""Our calls to the Kubernetes API, against a small server on a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.webhook.kube_server import PODS, KubeServer, connection_to
from webhook.core.pod import JSON
from webhook.errors import KubeError
from webhook.shell import kube as kube_module
from webhook.shell.kube import Bookmark, Change, Gone, Kube, Listed, Put, version_of

PATIENCE_S = 20.0


def a_pod(name: str, **metadata: object) -> dict[str, object]:
    """Return a pod as an API object."""
    return {"metadata": {"name": name, "namespace": "n", **metadata}}


async def next_change(changes: "asyncio.Queue[Change]") -> Change:
    """Return the next change, within reason."""
    async with asyncio.timeout(PATIENCE_S):
        return await changes.get()


@contextlib.asynccontextmanager
async def followed(
    kube: Kube, path: str, keep: Callable[[JSON], JSON] | None = None
) -> AsyncIterator[asyncio.Queue[Change]]:
    """Give a queue of what `follow` yields."""
    changes: asyncio.Queue[Change] = asyncio.Queue()

    async def follow() -> None:
        async for change in kube.follow(path, keep=keep):
            changes.put_nowait(change)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(follow())
        yield changes
        task.cancel()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once."""
    monkeypatch.setattr(kube_module, "RETRY_MAX_S", 0.01)
    monkeypatch.setattr(kube_module, "REWATCH_S", 0.0)


async def test_missing_object_is_none_and_a_refusal_is_an_error_with_the_apis_words() -> None:
    """404 is an answer; everything else above 399 is a KubeError."""
    server = KubeServer()
    async with server.running() as kube:
        assert await kube.get("/api/v1/namespaces/n/secrets/x") is None
        server.fail_next = [403]
        with pytest.raises(KubeError, match="made up") as refused:
            await kube.get("/api/v1/namespaces/n/secrets/x")

    assert refused.value.status == 403


async def test_what_is_followed_is_cut_as_it_comes() -> None:
    """In a list and in events; where a list or a watch goes on is read before."""
    server, path = KubeServer(), "/api/v1/pods"
    server.put(path, a_pod("a"))
    async with (
        server.running() as kube,
        followed(kube, path, lambda item: {"metadata": {"name": item["metadata"]["name"]}}) as changes,
    ):
        listed = await next_change(changes)
        server.put(path, a_pod("b"))
        put = await next_change(changes)

    assert isinstance(listed, Listed)
    assert listed.items == [{"metadata": {"name": "a"}}]
    assert put == Put({"metadata": {"name": "b"}})


async def test_conflicts_are_told_by_status() -> None:
    """Creating twice and replacing what has changed are both 409."""
    server = KubeServer()
    path = "/api/v1/namespaces/n/secrets"
    async with server.running() as kube:
        held = await kube.create(path, {"metadata": {"name": "x"}})
        with pytest.raises(KubeError) as twice:
            await kube.create(path, {"metadata": {"name": "x"}})
        server.put(path, {"metadata": {"name": "x"}})
        with pytest.raises(KubeError) as stale:
            await kube.replace(f"{path}/x", held)

    assert (twice.value.status, stale.value.status) == (409, 409)


async def test_no_answer_is_an_error_without_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is silent, or not there, is told from one that refuses."""
    monkeypatch.setattr(kube_module, "CALL_TIMEOUT_S", 0.01)
    writers: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with contextlib.aclosing(connection_to(port)) as kube:
        async with silent:
            with pytest.raises(KubeError, match=r"no answer within 0\.01 s") as mute:
                await kube.get("/x")
            for writer in writers:  # before the server: since Python 3.12 it waits for them
                writer.close()
                await writer.wait_closed()
        monkeypatch.undo()
        with pytest.raises(KubeError, match="Connect") as gone:
            await kube.get("/x")

    assert (mute.value.status, gone.value.status) == (0, 0)


async def test_all_pages_are_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large collection comes in pages."""
    monkeypatch.setattr(kube_module, "PAGE", 2)
    server = KubeServer()
    for name in "abcde":
        server.put(PODS, a_pod(name))
    async with server.running() as kube, followed(kube, PODS) as changes:
        listed = await next_change(changes)

    assert isinstance(listed, Listed)
    assert [item["metadata"]["name"] for item in listed.items] == list("abcde")


async def test_changes_come_one_by_one() -> None:
    """Appearing, changing and going, across a watch that the server ends."""
    server = KubeServer()
    server.put(PODS, a_pod("a"))
    async with server.running() as kube, followed(kube, PODS) as changes:
        assert isinstance(await next_change(changes), Listed)
        server.put(PODS, a_pod("b"))
        put = await next_change(changes)
        server.cut()
        bookmark = await next_change(changes)
        server.delete(PODS, "n/a")
        gone = await next_change(changes)

    assert isinstance(put, Put)
    assert put.item["metadata"]["name"] == "b"
    assert bookmark == Bookmark("102")
    assert isinstance(gone, Gone)
    assert [version_of(each) for each in (put, bookmark, gone)] == ["102", "102", "103"]
    assert server.requests.count(f"GET {PODS}") >= 3  # one list, two watches


async def test_version_that_is_gone_leads_to_a_new_list() -> None:
    """After 410 only a new list helps; it replaces everything."""
    server = KubeServer()
    server.put(PODS, a_pod("a"))
    async with server.running() as kube, followed(kube, PODS) as changes:
        await next_change(changes)
        server.delete(PODS, "n/a")
        assert isinstance(await next_change(changes), Gone)
        server.put(PODS, a_pod("b"))
        await next_change(changes)
        server.error(PODS, 410)
        again = await next_change(changes)

    assert isinstance(again, Listed)
    assert [item["metadata"]["name"] for item in again.items] == ["b"]


async def test_refusals_are_survived() -> None:
    """An API server that is restarting, or forbids us for a while, costs time only."""
    server = KubeServer()
    server.put(PODS, a_pod("a"))
    server.fail_next = [500, 403, 429]
    async with server.running() as kube, followed(kube, PODS) as changes:
        assert isinstance(await next_change(changes), Listed)


async def test_no_credentials_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Outside a cluster and without kubeconfig nothing can be done."""
    with pytest.raises(KubeError, match="no access to the Kubernetes API"):
        await Kube.open(str(tmp_path / "none"))
