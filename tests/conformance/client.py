"""The client of the suite's client scenarios, on the official Python SDK: `client.py [--through] URL`.

With --through it talks to a sidecar that it starts in front of URL. What it does in a scenario is what the scenario
asks for: list, call, answer what it is asked. Environment, set by the suite: MCP_CONFORMANCE_SCENARIO,
MCP_CONFORMANCE_PROTOCOL_VERSION, MCP_CONFORMANCE_CONTEXT (JSON; the calls to make). Source: the suite's README.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import mcp_types as types
from mcp import Client
from mcp.shared.exceptions import MCPError

from tests.conformance.parties import sidecar

ADD: Final[tuple[str, dict[str, Any]]] = ("add_numbers", {"a": 5, "b": 3})
CALLS: Final[dict[str, list[tuple[str, dict[str, Any]]]]] = {
    "tools_call": [ADD],
    "request-metadata": [ADD],
    "http-standard-headers": [ADD],
    "sse-retry": [("test_reconnection", {})],
    "elicitation-sep1034-client-defaults": [("test_client_elicitation_defaults", {})],
    "sep-2322-client-request-state": [
        ("test_mrtr_echo_state", {}),
        ("test_mrtr_unrelated", {}),
        ("test_mrtr_no_state", {}),
        ("test_mrtr_no_result_type", {}),
    ],
}
ENVIRONMENT: Final = os.environ  # noqa: TID251 - how the suite speaks to a client
HANDSHAKE_ONLY: Final = ("json-schema-ref-no-deref",)  # its server speaks no other era, whatever the suite announces
SAMPLES: Final = {"string": "x", "integer": 0, "number": 0, "boolean": False, "object": {}, "array": []}


async def elicited(_context: Any, params: types.ElicitRequestParams) -> types.ElicitResult:
    """Accept with the defaults of what is asked for, and confirm."""
    asked = params.requested_schema if isinstance(params, types.ElicitRequestFormParams) else {}
    properties = asked.get("properties", {})
    content = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    return types.ElicitResult(action="accept", content=content or dict.fromkeys(properties, True))


async def sampled(_context: Any, _params: Any) -> types.CreateMessageResult:
    """Answer as a model would."""
    return types.CreateMessageResult(
        role="assistant", content=types.TextContent(type="text", text="pong"), model="none"
    )


async def roots(_context: Any) -> types.ListRootsResult:
    """Have none."""
    return types.ListRootsResult(roots=[])


def calls(scenario: str, tools: list[types.Tool]) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls of *scenario*, given the *tools* that the SDK let through."""
    if scenario == "http-invalid-tool-headers":
        return [(tool.name, _sample(tool.input_schema)) for tool in tools]
    if scenario == "http-custom-headers":
        asked = json.loads(ENVIRONMENT["MCP_CONFORMANCE_CONTEXT"])["toolCalls"]
        known = {tool.name for tool in tools}
        return [(call["name"], call.get("arguments") or {}) for call in asked if call["name"] in known]
    if scenario == "json-schema-2020-12-preservation":
        kept = next(tool.input_schema for tool in tools if tool.name == "json_schema_2020_12_tool")
        return [("json_schema_echo", {"schema": kept})]
    return CALLS.get(scenario, [])


def _sample(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    return {name: SAMPLES.get(properties.get(name, {}).get("type"), "x") for name in schema.get("required", ())}


async def run(url: str, scenario: str, version: str) -> None:
    """Connect, list, make the scenario's calls, disconnect. A refused call is the suite's business."""
    is_legacy = version < "2026" or scenario in HANDSHAKE_ONLY
    async with Client(
        url,
        mode="legacy" if is_legacy else "auto",
        elicitation_callback=elicited,
        sampling_callback=sampled if scenario == "request-metadata" else None,
        list_roots_callback=roots if scenario == "request-metadata" else None,
    ) as client:
        tools = (await client.list_tools()).tools
        for name, arguments in calls(scenario, tools):
            with contextlib.suppress(MCPError):
                await client.call_tool(name, arguments)


def main(arguments: list[str]) -> None:
    """Run one scenario; any failure is the exit status."""
    url = arguments[-1]
    scenario, version = (ENVIRONMENT[f"MCP_CONFORMANCE_{name}"] for name in ("SCENARIO", "PROTOCOL_VERSION"))
    with contextlib.ExitStack() as stack:
        if "--through" in arguments:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conformance-client-")))
            upstream = urlsplit(url)
            port = stack.enter_context(sidecar(home, f"http://127.0.0.1:{upstream.port}{upstream.path}"))
            url = f"http://localhost:{port}{upstream.path}"
        asyncio.run(run(url, scenario, version))


if __name__ == "__main__":
    main(sys.argv[1:])
