"""A server and a client on the official SDK with an OpenTelemetry of their own, as programs: `python -m tests.telemetry.party`.

`server` prints its port and serves; `client URL` makes some calls in one trace. Both export as their OTEL_* variables
say. The server's HTTP framework reads the `traceparent` header, as OpenTelemetry's instrumentation for ASGI does; the
SDK itself reads `params._meta`.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from mcp import Client
from mcp.server import MCPServer
from mcp.shared.exceptions import MCPError
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def instrumented(application: Asgi) -> Asgi:
    """Return *application* with a span for each HTTP request, under the one that the request names."""
    tracer = trace.get_tracer("asgi")

    async def traced(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        with tracer.start_as_current_span(scope["method"], context=extract(headers), kind=SpanKind.SERVER):
            await application(scope, receive, send)

    return traced


async def serve() -> None:
    """Serve two tools until the end of standard input."""
    server = MCPServer("records")

    @server.tool()
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    @server.tool()
    def drop(table: str) -> str:
        """Drop a table."""
        return table

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        config = uvicorn.Config(instrumented(server.streamable_http_app()), log_config=None, lifespan="on", ws="none")
        program = uvicorn.Server(config)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(program.serve(sockets=[sock]))
            print(sock.getsockname()[1], flush=True)  # noqa: T201 - a program
            await asyncio.to_thread(sys.stdin.read)
            program.should_exit = True
            await running


async def call(url: str, times: int) -> None:
    """Call, be denied, and go on; all of it in one trace, whose id is printed."""
    with trace.get_tracer("agent").start_as_current_span("turn") as turn:
        print(f"{turn.get_span_context().trace_id:032x}", flush=True)  # noqa: T201 - a program
        async with Client(url) as client:
            await client.list_tools()
            for first in ("no number", *range(times)):  # an error of the tool's, then sums
                with contextlib.suppress(MCPError):  # a limit
                    await client.call_tool("add", {"a": first, "b": 2})
            with contextlib.suppress(MCPError):
                await client.call_tool("drop", {"table": "t"})


def main() -> None:
    """Run one of the two."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    match sys.argv[1:]:
        case ["server"]:
            asyncio.run(serve())
        case ["client", url, times]:
            asyncio.run(call(url, int(times)))
        case _:
            sys.exit("expected: server, or client URL TIMES")
    provider.shutdown()


if __name__ == "__main__":
    main()
