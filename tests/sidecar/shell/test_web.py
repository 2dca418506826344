"""sidecar.shell.web: requests to providers are protected and bounded."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from sidecar.shell import web as module
from sidecar.shell.web import WebError, request, require_protected


@asynccontextmanager
async def answering(
    body: bytes, status: int = 200, delay_s: float = 0.0
) -> AsyncIterator[tuple[str, list[web.Request]]]:
    """A server that says *body* to everything; gives its URL and what it heard."""
    heard: list[web.Request] = []

    async def handle(asked: web.Request) -> web.Response:
        await asked.read()
        heard.append(asked)
        await asyncio.sleep(delay_s)
        return web.Response(body=body, status=status, headers={"location": "/elsewhere"})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/x", heard
    finally:
        await runner.cleanup()


async def test_a_form_is_posted() -> None:
    """As tokens are: never in the URL."""
    async with answering(b"{}", 400) as (url, heard), aiohttp.ClientSession(auto_decompress=False) as session:
        assert await request(session, url, form={"token": "t"}, headers={"authorization": "x"}) == (400, b"{}")
    assert (heard[0].method, await heard[0].text()) == ("POST", "token=t")
    assert (heard[0].headers["authorization"], heard[0].headers["accept-encoding"]) == ("x", "identity")


async def test_a_redirect_is_not_followed() -> None:
    """It could lead out of HTTPS, with the secret."""
    async with answering(b"", 307) as (url, heard), aiohttp.ClientSession() as session:
        assert (await request(session, url, form={"a": "b"}))[0] == 307
    assert len(heard) == 1


async def test_an_answer_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    async with answering(b"x" * 101) as (url, _), aiohttp.ClientSession() as session:
        with pytest.raises(WebError, match="more than 100 bytes"):
            await request(session, url)


async def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls wait for it."""
    monkeypatch.setattr(module, "REQUEST_S", 0.05)
    async with answering(b"", delay_s=0.3) as (url, _), aiohttp.ClientSession() as session:
        with pytest.raises(WebError, match="TimeoutError"):
            await request(session, url)


@pytest.mark.parametrize("url", ["https://id.test/x", "http://127.0.0.1:1/x", "http://[::1]/x", "http://localhost/x"])
def test_protected_urls(url: str) -> None:
    """HTTPS, or this host."""
    require_protected(url)


@pytest.mark.parametrize(
    "url", ["http://id.test", "http://10.0.0.1/", "ftp://localhost", "https://", "x", "http://[::1"]
)
def test_unprotected_urls(url: str) -> None:
    """Others could read or change what goes there."""
    with pytest.raises(WebError, match="must be https"):
        require_protected(url)
