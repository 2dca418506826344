"""sidecar.shell.probes: the kubelet's probes, performed as the kubelet would, against real listeners."""

import asyncio
import json
from typing import Any

import pytest
from grpclib.health.check import ServiceStatus
from grpclib.health.service import Health
from grpclib.server import Server

from sidecar.errors import ConfigError
from sidecar.shell.probes import Unwell, decode, perform
from tests.fakes import Heard, a_server, answers, response


async def told(probe: Any, user_agent: str = "kube-probe/1.36") -> int:
    """Return the status for *probe*, as it would stand in the record."""
    return await perform(
        decode(json.dumps({"app": {"liveness": probe}}))["app"]["liveness"], "127.0.0.1", user_agent=user_agent
    )


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
    """With the recorded path, query and headers; a redirect to elsewhere is a success, as for the kubelet."""
    body = b"" if upstream.startswith("204") else b"x"
    raw = response(body, status=upstream, kind="text/plain", headers=["location: http://192.0.2.1/"])
    headers = [{"name": "X-Probe", "value": "1"}, {"name": "Host", "value": "ledger"}]
    async with a_server(answers(raw)) as (server, port):
        assert await told({"port": port, "httpGet": {"path": "/hz?a=b", "httpHeaders": headers}}) == status

    (heard,) = server.heard
    assert (heard.line, heard.values(b"x-probe"), heard.values(b"host")) == (
        b"GET /hz?a=b HTTP/1.1",
        [b"1"],
        [b"ledger"],
    )
    assert heard.values(b"user-agent") == [b"kube-probe/1.36"]


async def test_a_recorded_user_agent_is_kept() -> None:
    """The author's word goes before the kubelet's."""
    headers = [{"name": "user-agent", "value": "mine"}]
    async with a_server(answers(response(b"x", kind="text/plain"))) as (server, port):
        await told({"port": port, "httpGet": {"httpHeaders": headers}})

    assert server.heard[0].values(b"user-agent") == [b"mine"]


async def test_a_redirect_on_the_same_host_is_followed() -> None:
    """What it leads to is the answer."""
    first = response(b"", status="301 Moved Permanently", kind="text/plain", headers=["location: /ready"])
    second = response(b"", status="503 Service Unavailable", kind="text/plain")
    answered = iter([first, second])

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(next(answered))

    async with a_server(script) as (server, port):
        assert await told({"port": port, "httpGet": {"path": "hz"}}) == 503

    assert [heard.line for heard in server.heard] == [b"GET /hz HTTP/1.1", b"GET /ready HTTP/1.1"]


@pytest.mark.parametrize("location", ["/", "http://[", None])
async def test_a_redirect_that_leads_nowhere(location: str | None) -> None:
    """A loop and an unreadable address are failures; one without address is left at that."""
    headers = [] if location is None else [f"location: {location}"]
    raw = response(b"", status="302 Found", kind="text/plain", headers=headers)
    async with a_server(answers(raw)) as (_, port):
        probe = {"port": port, "httpGet": {}}
        if location is None:
            assert await told(probe) == 200
        else:
            with pytest.raises(Unwell, match=r"redirects|ValueError|InvalidURL"):
                await told(probe)


@pytest.mark.parametrize(
    ("service", "expected"),
    [("well", 200), ("ledger", "NOT_SERVING"), ("nobody", "NOT_FOUND")],
)
async def test_a_grpc_probe_is_a_health_check(service: str, expected: int | str) -> None:
    """By grpc.health.v1, of the service that was named."""
    ledger = ServiceStatus()
    ledger.set(False)
    well = ServiceStatus()
    well.set(True)
    server = Server([Health({_named("ledger"): [ledger], _named("well"): [well]})])
    await server.start("127.0.0.1", 0)
    port = server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    try:
        if isinstance(expected, int):
            assert await told({"port": port, "grpc": {"port": port, "service": service}}) == expected
        else:
            with pytest.raises(Unwell, match=expected):
                await told({"port": port, "grpc": {"port": port, "service": service}})
    finally:
        server.close()
        await server.wait_closed()


def _named(name: str) -> Any:
    """Return what grpclib takes for a service of *name*."""

    class Named:
        def __mapping__(self) -> dict[str, None]:
            return {f"/{name}/Do": None}

    return Named()


async def test_a_grpc_probe_of_what_is_no_grpc_has_failed() -> None:
    """An HTTP/1.1 server, say."""
    async with a_server(answers(response(b"x", kind="text/plain"))) as (_, port):
        with pytest.raises(Unwell):
            await told({"port": port, "timeout_s": 0.5, "grpc": {"port": port}})


async def test_a_tcp_probe_is_a_connection() -> None:
    """That it can be made is the answer."""
    async with a_server(answers()) as (_, port):
        assert await told({"port": port, "tcpSocket": {"port": port}}) == 200
    with pytest.raises(Unwell, match="ConnectionRefusedError"):
        await told({"port": port, "tcpSocket": {"port": port}})


async def test_a_probe_that_takes_too_long_has_failed() -> None:
    """The kubelet's time-out is the probe's."""

    async def hang(_: Heard, __: asyncio.StreamWriter) -> None:
        """Say nothing."""

    async with a_server(hang) as (_, port):
        with pytest.raises(Unwell, match=r"no answer within 0\.05 s"):
            await told({"port": port, "timeout_s": 0.05, "httpGet": {}})


async def test_an_answer_that_is_no_http_has_failed() -> None:
    """It is the application's trouble, not ours."""
    async with a_server(answers(b"SSH-2.0\r\n\r\n")) as (_, port):
        with pytest.raises(Unwell, match="Bad status line"):
            await told({"port": port, "httpGet": {}})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"app":[]}', '{"app":{"liveness":{}}}', '{"app":{"liveness":{"port":"http"}}}']
)
def test_unreadable_probes_are_refused(text: str) -> None:
    """At the start, by the name of the setting."""
    with pytest.raises(ConfigError, match="SIDEGATE_PROBES"):
        decode(text)
