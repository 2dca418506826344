"""sidecar.shell.health: what is not well is said; the application's probes are those recorded, and no others."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from sidecar.shell.health import Health
from sidecar.shell.metrics import OPENMETRICS, TEXT
from sidecar.shell.probes import decode
from tests.fakes import a_server, answers, response

Get = Callable[[str], Any]


@asynccontextmanager
async def a_health(probes: object = None, conditions: dict[str, str] | None = None) -> AsyncIterator[Get]:
    """Serve health on a free port; gives a function from a path to status and text."""
    health = Health(
        upstream_host="127.0.0.1",
        probes=decode(json.dumps(probes or {})),
        conditions=lambda: conditions or {},
        render_metrics=lambda *, openmetrics: "# EOF\n" if openmetrics else "# HELP x y\nx 1\n",
    )
    runner = web.AppRunner(health.application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:

        async def get(path: str, method: str = "GET") -> tuple[int, str]:
            async with session.request(method, f"http://127.0.0.1:{port}{path}") as answer:
                return answer.status, await answer.text()

        yield get
    await runner.cleanup()


async def test_ready_means_that_nothing_is_wrong() -> None:
    """And what is wrong has a name."""
    conditions: dict[str, str] = {"bundle": "none yet"}
    async with a_health(conditions=conditions) as get:
        unready = await get("/readyz")
        conditions.clear()
        ready = await get("/readyz")

    assert (unready[0], json.loads(unready[1])) == (503, {"ready": False, "conditions": {"bundle": "none yet"}})
    assert (ready[0], json.loads(ready[1])) == (200, {"ready": True, "conditions": {}})


async def test_once_started_always_started() -> None:
    """A startup probe that fails later would kill the container."""
    conditions = {"identity": "no agent"}
    async with a_health(conditions=conditions) as get:
        before = (await get("/startupz"))[0]
        conditions.clear()
        started = (await get("/startupz"))[0]
        conditions["bundle"] = "stale"
        after = (await get("/startupz"))[0]

    assert (before, started, after) == (503, 200, 200)


async def test_alive_means_that_the_loop_answers() -> None:
    """Whatever else is wrong: a restart heals none of it."""
    async with a_health(conditions={"bundle": "stale"}) as get:
        assert (await get("/livez"))[0] == 200


async def test_metrics_are_text() -> None:
    """As Prometheus reads it."""
    async with a_health() as get:
        assert await get("/metrics") == (200, "# HELP x y\nx 1\n")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/mcp", "POST", 404),
        ("/app-health/app/liveness", "GET", 404),
        ("/app-health/app/..%2f..%2fx", "GET", 404),
        ("/readyz", "POST", 405),
    ],
)
async def test_nothing_else_is_answered(path: str, method: str, status: int) -> None:
    """The port is open to the whole pod network."""
    async with a_health() as get:
        assert (await get(path, method))[0] == status


HTTP = {"httpGet": {"path": "/hz"}}
TOKEN = "0123456789abcdef" * 2


async def test_a_recorded_probe_is_performed() -> None:
    """For anyone who asks: it tells no more than whether the application is well."""
    async with (
        a_server(answers(response(b"x", kind="text/plain"))) as (server, port),
        a_health({"app": {"liveness": HTTP | {"port": port}}}) as get,
    ):
        assert (await get("/app-health/app/liveness"))[0] == 200
    assert [heard.line for heard in server.heard] == [b"GET /hz HTTP/1.1"]


async def test_a_failed_probe_says_why() -> None:
    """`kubectl describe pod` shows it."""
    async with a_server(answers()) as (_, port):
        pass
    async with a_health({"app": {"readiness": {"port": port}}}) as get:
        status, text = await get("/app-health/app/readiness")

    assert status == 503
    assert "ConnectionRefusedError" in text


async def test_a_hook_is_performed_for_its_token() -> None:
    """The kubelet has it from the pod's specification."""
    failing = response(b"x", kind="text/plain", status="500 Internal Server Error")  # success, as for the kubelet
    async with (
        a_server(answers(failing)) as (server, port),
        a_health({"app": {"pre-stop": HTTP | {"port": port, "token": TOKEN}}}) as get,
    ):
        assert (await get(f"/app-hook/app/pre-stop/{TOKEN}"))[0] == 200
    assert [heard.line for heard in server.heard] == [b"GET /hz HTTP/1.1"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/app-hook/app/pre-stop/guess", 403),
        (f"/app-hook/app/pre-stop/{TOKEN[:-1]}\u00fc", 403),
        ("/app-hook/app/pre-stop", 404),
        ("/app-health/app/pre-stop", 404),
        (f"/app-hook/app/post-start/{TOKEN}", 404),
        (f"/app-hook/app/liveness/{TOKEN}", 404),
    ],
)
async def test_a_hook_is_not_performed_without_its_token(path: str, status: int) -> None:
    """It could stop the application, and the whole pod network comes here."""
    async with a_server(answers()) as (server, port):
        recorded = {"pre-stop": HTTP | {"port": port, "token": TOKEN}, "liveness": HTTP | {"port": port}}
        async with a_health({"app": recorded}) as get:
            assert (await get(path))[0] == status
    assert server.heard == []


async def test_a_failed_hook_gets_no_answer() -> None:
    """The kubelet takes any answer for success; a failed postStart has to stop the container."""
    async with a_server(answers()) as (_, port):
        pass
    async with a_health({"app": {"post-start": HTTP | {"port": port, "token": TOKEN}}}) as get:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await get(f"/app-hook/app/post-start/{TOKEN}")


async def test_prometheus_gets_openmetrics_when_it_asks() -> None:
    """With exemplars; everybody else gets the older format."""
    health = Health(
        upstream_host="127.0.0.1",
        probes=decode("{}"),
        conditions=dict,
        render_metrics=lambda *, openmetrics: "# EOF\n" if openmetrics else "x 1\n",
    )
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    async with TestClient(TestServer(health.application())) as client:
        new = await client.get("/metrics", headers={"accept": accept})
        old = await client.get("/metrics")

        assert (await new.text(), new.headers["content-type"]) == ("# EOF\n", OPENMETRICS)
        assert (await old.text(), old.headers["content-type"]) == ("x 1\n", TEXT)
