"""The matrix's client on the Python SDK 1.x: goes through every step, and prints a line of JSON for each.

Arguments: the URL, and `legacy`. Only what the first release with Streamable HTTP had is used; a call is cancelled by
hand, because these releases do not say to the server that a call was given up.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from mcp import ClientSession, McpError, types
from mcp.client.streamable_http import streamablehttp_client

PATIENCE_S = 10.0
progress: list[str | None] = []
begun = asyncio.Event()


async def heard(message: Any) -> None:
    """Take the server's notifications."""
    inner = getattr(message, "root", None)
    if isinstance(inner, types.ProgressNotification):
        if inner.params.progressToken == "wait":
            begun.set()
        else:
            # The first releases know no message of a step.
            progress.append(getattr(inner.params, "message", None) or f"step {inner.params.progress:.0f}")


async def step(name: str, do: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Do it and print what came of it."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            result = await do()
    except McpError as error:
        result = {"outcome": "error", "code": error.error.code, "text": error.error.message}
    except TimeoutError:
        result = {"outcome": "hang"}
    except Exception as error:  # noqa: BLE001 - whatever the SDK does is a finding
        result = {"outcome": "exception", "text": f"{type(error).__name__}: {error}"}
    print(json.dumps({**result, "step": name}), flush=True)


async def main() -> None:
    """Go through the steps."""
    async with (
        streamablehttp_client(sys.argv[1], timeout=timedelta(seconds=PATIENCE_S)) as (read, write, _),
        ClientSession(read, write, message_handler=heard) as session,
    ):
        await steps(session)
        await step("close", nothing)


async def nothing() -> dict[str, Any]:
    """Leave the work to the context managers."""
    return {"outcome": "result"}


async def steps(session: ClientSession) -> None:
    """Do all that needs a session."""

    async def connect() -> dict[str, Any]:
        return {"outcome": "result", "text": str((await session.initialize()).protocolVersion)}

    async def listing() -> dict[str, Any]:
        return {"outcome": "result", "names": [tool.name for tool in (await session.list_tools()).tools]}

    def call(name: str, arguments: dict[str, Any], token: str | None = None) -> Callable[[], Any]:
        async def do() -> dict[str, Any]:
            given: dict[str, Any] = {"name": name, "arguments": arguments}
            if token is not None:
                given["_meta"] = {"progressToken": token}
            params = types.CallToolRequestParams.model_validate(given)
            request = types.ClientRequest(types.CallToolRequest(method="tools/call", params=params))
            result = await session.send_request(request, types.CallToolResult)
            content = result.content[0]
            text = content.text if isinstance(content, types.TextContent) else None
            return {"outcome": "result", "is_error": result.isError, "text": text}

        return do

    async def streamed() -> dict[str, Any]:
        result: dict[str, Any] = await call("count", {"to": 3}, "count")()
        return {**result, "progress": progress}

    async def cancelled() -> dict[str, Any]:
        request_id = session._request_id
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(call("wait", {}, "wait")())
            await begun.wait()
            params = types.CancelledNotificationParams(requestId=request_id, reason="enough")
            notification = types.CancelledNotification(method="notifications/cancelled", params=params)
            await session.send_notification(types.ClientNotification(notification))
            waiting.cancel()
        return {"outcome": "cancelled"}

    add = call("add", {"a": 1, "b": 2})
    for name, do in (
        ("connect", connect), ("list", listing), ("call", add), ("stream", streamed),
        ("cancel", cancelled), ("call after cancel", add),
        ("denied", call("drop", {"table": "t"})), ("call after denial", add),
        ("within limit", call("paced", {})), ("limited", call("paced", {})), ("call after limit", add),
        ("list again", listing),
    ):  # fmt: skip
        await step(name, do)


asyncio.run(main())
