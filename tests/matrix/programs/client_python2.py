"""The matrix's client on the Python SDK 2.x: goes through every step, and prints a line of JSON for each.

Arguments: the URL, and `legacy` or `modern`.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from mcp import Client
from mcp.shared.exceptions import MCPError

PATIENCE_S = 10.0


async def step(name: str, do: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Do it and print what came of it."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            result = await do()
    except MCPError as error:
        result = {"outcome": "error", "code": error.code, "text": error.message}
    except TimeoutError:
        result = {"outcome": "hang"}
    except Exception as error:  # noqa: BLE001 - whatever the SDK does is a finding
        result = {"outcome": "exception", "text": f"{type(error).__name__}: {error}"}
    print(json.dumps({**result, "step": name}), flush=True)


async def main() -> None:
    """Go through the steps."""
    mode: Any = "legacy" if sys.argv[2] == "legacy" else "auto"
    async with Client(sys.argv[1], mode=mode) as client:
        await steps(client)
        await step("close", nothing)


async def nothing() -> dict[str, Any]:
    """Leave the work to the context manager."""
    return {"outcome": "result"}


async def steps(client: Client) -> None:
    """Do all that needs a client."""

    async def connect() -> dict[str, Any]:
        return {"outcome": "result", "text": client.protocol_version}

    async def listing() -> dict[str, Any]:
        return {"outcome": "result", "names": [tool.name for tool in (await client.list_tools()).tools]}

    def call(name: str, arguments: dict[str, Any], **options: Any) -> Callable[[], Any]:
        async def do() -> dict[str, Any]:
            result = await client.call_tool(name, arguments, **options)
            text = getattr(result.content[0], "text", None)
            return {"outcome": "result", "is_error": bool(result.is_error), "text": text}

        return do

    async def streamed() -> dict[str, Any]:
        progress: list[str | None] = []

        async def heard(_progress: float, _total: float | None, message: str | None) -> None:
            progress.append(message)

        result: dict[str, Any] = await call("count", {"to": 3}, progress_callback=heard)()
        return {**result, "progress": progress}

    async def cancelled() -> dict[str, Any]:
        begun = asyncio.Event()

        async def heard(_progress: float, _total: float | None, _message: str | None) -> None:
            begun.set()

        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(call("wait", {}, progress_callback=heard)())
            await begun.wait()
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
