"""sidecar.shell.health: what is not well is said; the application's probes are those recorded, and no others."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.errors import ConfigError
from sidecar.shell.health import Health, decode_probes
from tests.fakes import Heard, a_server, answers, response

Get = Callable[[str], Any]


@asynccontextmanager
async def a_health(probes: object = None, conditions: dict[str, str] | None = None) -> AsyncIterator[Get]:
    """Serve health on a free port; gives a function from a path to status and text."""
    health = Health(
        upstream_host="127.0.0.1",
        probes=decode_probes(json.dumps(probes or {})),
        conditions=lambda: conditions or {},
        render_metrics=lambda: "# HELP x y\nx 1\n",
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


@pytest.mark.parametrize(
    ("upstream", "status"),
    [
        ("200 OK", 200),
        ("204 No Content", 204),
        ("302 Found", 200),
        ("404 Not Found", 404),
        ("503 Service Unavailable", 503),
    ],
)
async def test_an_http_probe_is_told_as_the_application_answered(upstream: str, status: int) -> None:
    """With the recorded path and headers; a redirect is a success, as for the kubelet."""
    body = b"" if upstream.startswith("204") else b"x"
    raw = response(body, status=upstream, kind="text/plain", headers=["location: http://192.0.2.1/"])
    async with a_server(answers(raw)) as (server, port):
        probe = {"port": port, "httpGet": {"path": "/hz?a=b", "httpHeaders": [{"name": "X-Probe", "value": "1"}]}}
        async with a_health({"app": {"liveness": probe}}) as get:
            told, _ = await get("/app-health/app/liveness")

    assert told == status
    (heard,) = server.heard
    assert (heard.line, heard.values(b"x-probe")) == (b"GET /hz?a=b HTTP/1.1", [b"1"])


async def test_a_tcp_probe_is_a_connection() -> None:
    """That it can be made is the answer."""
    async with a_server(answers()) as (_, port), a_health({"app": {"readiness": {"port": port}}}) as get:
        open_status = (await get("/app-health/app/readiness"))[0]
    async with a_health({"app": {"readiness": {"port": port}}}) as get:
        closed_status = (await get("/app-health/app/readiness"))[0]

    assert (open_status, closed_status) == (200, 503)


async def test_a_probe_that_takes_too_long_has_failed() -> None:
    """The kubelet's time-out is the probe's."""

    async def hang(_: Heard, __: asyncio.StreamWriter) -> None:
        """Say nothing."""

    async with a_server(hang) as (_, port):
        probe = {"port": port, "timeout_s": 0.05, "httpGet": {}}
        async with a_health({"app": {"liveness": probe}}) as get:
            assert (await get("/app-health/app/liveness"))[0] == 503


async def test_an_answer_that_is_no_http_has_failed() -> None:
    """It is the application's trouble, not ours."""
    async with (
        a_server(answers(b"SSH-2.0\r\n\r\n")) as (_, port),
        a_health({"app": {"liveness": {"port": port, "httpGet": {}}}}) as get,
    ):
        assert (await get("/app-health/app/liveness"))[0] == 503


@pytest.mark.parametrize(
    "text", ["", "[]", '{"app":[]}', '{"app":{"liveness":{}}}', '{"app":{"liveness":{"port":"http"}}}']
)
def test_unreadable_probes_are_refused(text: str) -> None:
    """At the start, by the name of the setting."""
    with pytest.raises(ConfigError, match="SIDEGATE_PROBES"):
        decode_probes(text)
