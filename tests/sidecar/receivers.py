"""An OTLP/HTTP receiver for tests, and one that keeps what it is handed without any HTTP."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class Kept:
    """A `Receiver` that keeps the items it is handed."""

    def __init__(self, *, is_on: bool = True) -> None:
        self.is_on = is_on
        self.items: list[Any] = []

    def put(self, items: bytes, count: int = 1) -> None:
        """Keep *items*, which must be as many as is said."""
        found = json.loads(b"[%b]" % items)

        assert len(found) == count
        self.items += found


class HttpReceiver:
    """Keeps what it gets, and answers what the test says (200 when nothing is left)."""

    def __init__(self, *statuses: int, answer: str = "{}") -> None:
        self.statuses = list(statuses)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.hold: asyncio.Event | None = None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Listen on a free port of loopback; give the base URL."""
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/{path:.*}", self._take)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        body = await request.read()  # aiohttp inflates it
        self.raw.append(gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body)
        if request.content_type == "application/json":  # others speak protobuf
            self.bodies.append(json.loads(self.raw[-1]))
        if self.hold is not None:
            await self.hold.wait()
        return web.Response(status=self.statuses.pop(0) if self.statuses else 200, text=self.answer)

    def items(self, *names: str) -> list[Any]:
        """Return all items that came, by the names of the envelope, such as resourceSpans, scopeSpans, spans."""
        outer, scope, inner = names
        return [
            item for body in self.bodies for each in body.get(outer, ()) for part in each[scope] for item in part[inner]
        ]


def values(described: dict[str, Any]) -> dict[str, Any]:
    """Return OTLP's attributes as a mapping."""
    return {each["key"]: next(iter(each["value"].values())) for each in described["attributes"]}
