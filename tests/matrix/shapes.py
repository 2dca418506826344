"""Why a refusal is HTTP 200 with a JSON-RPC error: what every client makes of the other ways to say no.

A small proxy without policies stands where the sidecar would, and answers one call in each shape that a gateway might
choose; everything else passes. Nothing of the sidecar runs here: it is the clients that are measured.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

from tests.matrix.rig import CLIENTS, SERVERS, Place, Program, serving, walk

_HOP: Final = frozenset({"connection", "content-length", "host", "transfer-encoding"})


def _error(request_id: Any, code: int = 403) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": "no"}})


def _json(status: int, **headers: str) -> Callable[[Any], web.Response]:
    return lambda id_: web.Response(status=status, text=_error(id_), content_type="application/json", headers=headers)


def _text(status: int, **headers: str) -> Callable[[Any], web.Response]:
    return lambda _: web.Response(status=status, text="no", headers=headers)


def _tool_error(request_id: Any) -> web.Response:
    result = {"content": [{"type": "text", "text": "no"}], "isError": True, "resultType": "complete"}
    return web.json_response({"jsonrpc": "2.0", "id": request_id, "result": result})


SHAPES: Final[dict[str, Callable[[Any], web.Response]]] = {
    "200, error": _json(200),
    "200, isError": _tool_error,
    "200, id null": lambda _: web.Response(text=_error(None), content_type="application/json"),
    "400, error": _json(400),
    "403, error": _json(403),
    "403, text": _text(403),
    "404, error": _json(404),
    "429, error": _json(429, **{"Retry-After": "60"}),
    "429, text": _text(429, **{"Retry-After": "60"}),
    "202": lambda _: web.Response(status=202),
    "500, text": _text(500),
}


@asynccontextmanager
async def refusing(server: Place, shape: Callable[[Any], web.Response]) -> AsyncIterator[str]:
    """Run the proxy, which answers a call of `drop` in *shape*; gives its URL."""

    async def pass_on(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        message = json.loads(body) if body else {}
        if message.get("method") == "tools/call" and message["params"]["name"] == "drop":
            return shape(message["id"])
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        async with session.request(request.method, server.url, data=body or None, headers=headers) as upstream:
            kept = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP}
            response = web.StreamResponse(status=upstream.status, headers=kept)
            await response.prepare(request)
            with suppress(ConnectionError):  # a client that has gone
                async for piece in upstream.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            return response

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        application = web.Application(client_max_size=2**22)
        application.router.add_route("*", "/mcp", pass_on)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
        finally:
            await runner.cleanup()


def told(steps: dict[str, dict[str, Any]]) -> str:
    """Say what the client made of the refusal, and whether it lived on."""
    step, after = steps.get("denied"), steps.get("call after denial")
    if step is None:
        said = "ends"
    elif step["outcome"] == "error":
        said = f"error {step['code']}"
    elif step["outcome"] == "result":
        said = "tool error" if step["is_error"] else "result"
    else:
        said = {"exception": "HTTP error", "hang": "hangs"}.get(step["outcome"], step["outcome"])
    return said if after is not None and after.get("text") == "3" else f"{said}, dead"


async def measure(scratch: Path, at_once: int) -> dict[str, dict[str, str]]:
    """Return, by client and shape, what came of it."""
    dual = next(server for server in SERVERS if server.name == "Python 2.3")
    gate = asyncio.Semaphore(at_once)

    async def one(client: Program, era: str, name: str, directory: Path) -> str:
        async with gate:
            directory.mkdir()
            async with serving(dual, directory) as server, refusing(server, SHAPES[name]) as url:
                return told(await walk(client, era, url, directory))

    async with asyncio.TaskGroup() as tasks:
        running = {
            (client.name, era, name): tasks.create_task(
                one(client, era, name, scratch / f"{client.name}-{era}-{number}")
            )
            for client in CLIENTS
            for era in client.eras
            for number, name in enumerate(SHAPES)
        }
    found: dict[str, dict[str, str]] = {}
    for (client_name, era, name), task in running.items():
        found.setdefault(f"{client_name} ({era})", {})[name] = task.result()
    return found
