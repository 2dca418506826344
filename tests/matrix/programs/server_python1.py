"""The matrix's server on the Python SDK 1.x. Prints its port; every tool that runs leaves a line in the ledger."""

import asyncio
import json
import os
import socket
from typing import Any

import uvicorn
from mcp.server.fastmcp import Context, FastMCP

LEDGER = os.environ["LEDGER"]  # noqa: TID251 - a program of its own
server = FastMCP("matrix")


def enter(tool: str, **arguments: Any) -> None:
    """Write down that *tool* ran, with what it was given."""
    with open(LEDGER, "a", encoding="utf-8") as file:  # noqa: PTH123 - as short as a server of this kind would be
        file.write(json.dumps({"tool": tool, "arguments": arguments}) + "\n")


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    enter("add", a=a, b=b)
    return str(a + b)


@server.tool()
def drop(table: str) -> str:
    """Drop a table: the policy denies it."""
    enter("drop", table=table)
    return f"dropped {table}"


@server.tool()
def paced() -> str:
    """Do nothing, seldom: a limit is on it."""
    enter("paced")
    return "once"


@server.tool()
def mark(text: str) -> str:
    """Leave *text* in the ledger."""
    enter("mark", text=text)
    return "marked"


@server.tool(name="mark ")
def mark_with_space(text: str) -> str:
    """Be another tool than `mark`: the policy denies it."""
    enter("mark ", text=text)
    return "marked"


@server.tool()
async def count(to: int, context: Context) -> str:  # type: ignore[type-arg]
    """Count aloud."""
    enter("count", to=to)
    for step in range(to):
        await context.report_progress(step, to, f"step {step}")
    return "done"


@server.tool()
async def wait(context: Context) -> str:  # type: ignore[type-arg]
    """Wait to be cancelled."""
    enter("wait")
    await context.report_progress(0, 1, "waiting")
    try:
        await asyncio.sleep(20)
    except asyncio.CancelledError:
        enter("cancelled")
        raise
    return "waited"


with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(server.streamable_http_app(), log_level="critical")
    uvicorn.Server(config).run(sockets=[listener])
