"""An agent in a pod of its own: calls an MCP server with its SVID over mutual TLS and a user's token, with the official SDK.

Takes one JSON object on standard input: {"url", "expected", "token", "session", "calls": [[tool, arguments], …], "seconds"}; prints one:
{"tools": […], "results": [{"ok": true, "text": …} | {"ok": false, "code": …, "message": …}], "svids": […]} or {"error": …}.
With "plain" it uses no SVID: it is for a sidecar to add one.
With "seconds" it repeats the calls for so long, on a new session every ten seconds, and prints how many there were and what failed.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from certs.spiffe import SpiffePattern
from certs.tls import MutualClient
from certs.workload import X509Source

SESSION_S = 10.0
SOCKET = "unix:/spiffe-workload-api/spire-agent.sock"


async def call(session: ClientSession, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what became of one call."""
    try:
        result = await session.call_tool(tool, arguments)
    except MCPError as error:
        return {"ok": False, "code": error.error.code, "message": error.error.message, "data": error.error.data}
    return {"ok": not result.is_error, "text": "".join(getattr(part, "text", "") for part in result.content)}


@contextlib.asynccontextmanager
async def opened(task: dict[str, Any], verify: Any) -> AsyncIterator[tuple[ClientSession, list[str]]]:
    """Open a session; give it, and the names of the tools that it shows."""
    headers = {} if task.get("plain") else {"sidegate-agent-session": task.get("session", "e2e-1")}
    if task.get("token"):
        headers["authorization"] = f"Bearer {task['token']}"
    async with (
        httpx2.AsyncClient(verify=verify, headers=headers, timeout=30) as client,
        streamable_http_client(task["url"], http_client=client) as streams,
        ClientSession(streams[0], streams[1]) as session,
    ):
        await session.initialize()
        yield session, sorted(tool.name for tool in (await session.list_tools()).tools)


async def converse(task: dict[str, Any], verify: Callable[[], Any]) -> dict[str, Any]:
    """Make the calls on one session; for "seconds", again and again, each SESSION_S on a new session with the SVID of then."""
    if "seconds" not in task:
        async with opened(task, verify()) as (session, tools):
            return {"tools": tools, "results": [await call(session, *each) for each in task["calls"]]}
    failures: list[dict[str, Any]] = []
    made, sessions, until_s = 0, 0, time.monotonic() + task["seconds"]
    while time.monotonic() < until_s:
        sessions += 1
        session_until_s = time.monotonic() + SESSION_S
        async with opened(task, verify()) as (session, _):
            while time.monotonic() < session_until_s:
                for each in task["calls"]:
                    made += 1
                    result = await call(session, *each)
                    if not result["ok"]:
                        failures.append(result)
                await asyncio.sleep(0.05)
    return {"made": made, "sessions": sessions, "failures": failures}


async def main() -> None:
    """Read the task, get an SVID, do it, print the outcome."""
    task = json.load(sys.stdin)
    if task.get("plain"):
        print(json.dumps(await tried(task, lambda: False)))
        return
    source, client = X509Source(SOCKET), MutualClient()
    source.subscribe(client.follow)
    running = asyncio.get_running_loop().create_task(source.run())
    async with asyncio.timeout(60):
        await source.wait_ready()
    outcome = await tried(task, lambda: client.context(SpiffePattern.parse(task["expected"])))
    running.cancel()
    print(json.dumps(outcome))


async def tried(task: dict[str, Any], verify: Callable[[], Any]) -> dict[str, Any]:
    """Return the outcome, or the error as the SDK's user would see it."""
    try:
        return await converse(task, verify)
    except Exception as error:  # noqa: BLE001 - the SDK wraps transport errors in groups of groups
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return {"error": f"{type(error).__name__}: {error}"}


asyncio.run(main())
