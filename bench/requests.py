"""The requests that are sent, and the answer that must come back: MCP tool calls as an SDK's client writes them.

Four bodies: small, one long string (what most tools take), many small objects (the worst case for a JSON reader), and
large. Source of the head: the streamable HTTP clients of the Python and TypeScript SDKs; MCP 2025-11-25, transports.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

SESSION: Final = "6f1c2f0e-5a0c-4b38-9d0f-2f6b6a3f4c11"
TRACE: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"  # sampled: every call ends as a span
ROW: Final = {"id": 7, "name": "abc", "ok": True, "price": 1.5, "tags": ["a", "b"]}
SQL: Final = "select name, sum(price) from orders where region = 'north' group by name order by 2 desc; "
ANSWER: Final = json.dumps(
    {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {"content": [{"type": "text", "text": "x" * 440}], "isError": False},
    },
    separators=(",", ":"),
).encode()


def bodies() -> Mapping[str, bytes]:
    """Return the calls that are timed, by the name that the tables use."""
    return {
        "300 B": _padded({"sql": SQL}, 300),
        "4 KB text": _padded({"sql": ""}, 4096),
        "4 KB dense": _padded({"sql": "", "rows": [ROW] * 60}, 4096),
        "100 KB text": _padded({"sql": ""}, 100_000),
    }


def destructive() -> bytes:
    """Return a call that the policy forbids."""
    return _call({"sql": "drop table orders", "destructive": True})


def initialize() -> bytes:
    """Return the message that opens a session."""
    params = {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "1"},
    }
    return _encoded({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params})


def post(body: bytes, *, token: str | None, session: str | None = SESSION) -> bytes:
    """Return the whole request, as it goes over the wire."""
    fields = {
        "Host": "mcp.bench.test",
        "User-Agent": "python-httpx/0.28.1",
        "Accept": "application/json, text/event-stream",
        "Accept-Encoding": "gzip, deflate",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "MCP-Protocol-Version": "2025-11-25",
        "traceparent": TRACE,
    }
    if session is not None:
        fields["Mcp-Session-Id"] = session
    if token is not None:
        fields["Authorization"] = f"Bearer {token}"
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /mcp HTTP/1.1\r\n{head}\r\n".encode() + body


def _padded(arguments: dict[str, Any], size_bytes: int) -> bytes:
    """Return the call with its SQL text filled up, so that the body has exactly *size_bytes*."""
    missing = size_bytes - len(_call(arguments))
    filler = (SQL * (missing // len(SQL) + 1))[:missing]
    return _call({**arguments, "sql": arguments["sql"] + filler})


def _call(arguments: Mapping[str, Any]) -> bytes:
    params = {"name": "execute_query", "arguments": arguments}
    return _encoded({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})


def _encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
