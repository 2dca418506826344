"""The reference server of the conformance runs, on the official Python SDK: what it offers stands in everything.json.

Both eras on /mcp of 127.0.0.1: sessions with resumable streams up to 2025-11-25, stateless from 2026-07-28.
Argument: the port. Sources: the suite's "Server Implementation Requirements", the SDK's own text.
"""

import asyncio
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Final

import mcp_types as types
import uvicorn
from mcp.server import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, PromptsListChanged, ToolsListChanged
from mcp.shared.exceptions import MCPDeprecationWarning, MCPError
from mcp.shared.message import ServerMessageMetadata
from tasks import EXTENSION, Tasks

OFFER: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("everything.json").read_text(encoding="utf-8"))
TOOLS: Final = OFFER["tools"] + OFFER["tasks"]
CAPABILITIES: Final = {"elicitation/create": "elicitation", "sampling/createMessage": "sampling", "roots/list": "roots"}
ASKS: Final[dict[str, tuple[Any, Any]]] = {
    "elicitation/create": (types.ElicitRequest, types.ElicitResult),
    "sampling/createMessage": (types.CreateMessageRequest, types.CreateMessageResult),
}
STEP_S: Final = 0.05  # between notifications, so that a buffered stream would be seen
RETRY_MS: Final = 200  # after which a client comes back for a stream that was ended

bus = InMemorySubscriptionBus()


def text(words: str) -> types.CallToolResult:
    """Return a tool's result that is one text."""
    return types.CallToolResult(content=[types.TextContent(type="text", text=words)])


def filled(value: Any, arguments: dict[str, Any] | None) -> Any:
    """Return a copy of *value* with every `{argument}` in its strings replaced."""
    if isinstance(value, dict):
        return {key: filled(each, arguments) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, arguments) for each in value]
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda found: str((arguments or {}).get(found[1], found[0])), value)
    return value


def missing(item: dict[str, Any], context: ServerRequestContext, params: Any) -> dict[str, Any] | None:
    """Return what is still to be asked in the round the client is at, or None when every round is answered.

    Raises MCPError when the client did not declare what would be asked.
    """
    capabilities = context.session.client_capabilities
    declared = capabilities.model_dump(exclude_none=True) if capabilities else {}
    responses = params.input_responses or {}
    state = json.loads(params.request_state) if params.request_state else None
    index = state["round"] if state else 0
    asked = item["rounds"][index]
    undeclared = {CAPABILITIES[request["method"]] for request in asked.values()} - declared.keys()
    if undeclared and item.get("undeclared") != "omitted":
        data = {"requiredCapabilities": {name: {} for name in sorted(undeclared)}}
        raise MCPError(types.MISSING_REQUIRED_CLIENT_CAPABILITY, "The client lacks what this needs", data=data)
    asked = {key: request for key, request in asked.items() if CAPABILITIES[request["method"]] in declared}
    if all(is_answer(responses.get(key)) for key in asked) and (state or not item.get("state")):
        index += 1
        if index == len(item["rounds"]):
            return None
        asked = item["rounds"][index]
    question = {"resultType": "input_required", "inputRequests": asked}
    return question | {"requestState": json.dumps({"round": index})} if item.get("state") else question


def is_answer(response: Any) -> bool:
    """Say whether *response* answers: a user may have declined, or nobody answered at all."""
    return response is not None and (not isinstance(response, types.ElicitResult) or response.content is not None)


async def call(context: ServerRequestContext, params: types.CallToolRequestParams) -> Any:
    """Do what the tool's entry says."""
    tool = next((tool for tool in TOOLS if tool["name"] == params.name), None)
    if tool is None:
        raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {params.name}")
    for line in tool.get("log", ()):
        await context.session.send_log_message("info", line, related_request_id=context.request_id)
        await asyncio.sleep(STEP_S)
    for progress in tool.get("progress", ()):
        await context.session.report_progress(progress, 100)
        await asyncio.sleep(STEP_S)
    if "ask" in tool:
        request_type, result_type = ASKS[tool["ask"]["method"]]
        request = request_type.model_validate(filled(tool["ask"], params.arguments))
        related = ServerMessageMetadata(related_request_id=context.request_id)
        return text((await context.session.send_request(request, result_type, metadata=related)).model_dump_json())
    if "rounds" in tool:
        return missing(tool, context, params) or text(f"state-ok {params.input_responses}")
    if "publish" in tool:
        await bus.publish(ToolsListChanged() if tool["publish"] == "tools" else PromptsListChanged())
        return text("announced")
    if tool.get("reconnect") and context.close_sse_stream is not None:
        await context.close_sse_stream()
        await asyncio.sleep(2 * STEP_S)
    return types.CallToolResult.model_validate(filled(tool["answer"], params.arguments))


async def list_tools(_context: ServerRequestContext, _params: Any) -> Any:
    """Return every tool as it may be seen."""
    tools = [{key: tool[key] for key in ("name", "description", "inputSchema")} for tool in TOOLS]
    return types.ListToolsResult.model_validate({"tools": tools})


async def list_resources(_context: ServerRequestContext, _params: Any) -> Any:
    """Return every resource without its contents."""
    resources = [without(resource, "text", "blob") for resource in OFFER["resources"]]
    return types.ListResourcesResult.model_validate({"resources": resources})


async def list_templates(_context: ServerRequestContext, _params: Any) -> Any:
    """Return every template without its contents."""
    templates = [without(template, "text") for template in OFFER["templates"]]
    return types.ListResourceTemplatesResult.model_validate({"resourceTemplates": templates})


async def read(_context: ServerRequestContext, params: types.ReadResourceRequestParams) -> Any:
    """Return the contents of a resource, or of what a template makes."""
    uri = str(params.uri)
    for resource in OFFER["resources"]:
        if resource["uri"] == uri:
            return contents(resource)
    for template in OFFER["templates"]:
        before, name, after = re.split(r"[{}]", template["uriTemplate"])
        if uri.startswith(before) and uri.endswith(after):
            made = filled(template, {name: uri.removeprefix(before).removesuffix(after)})
            return contents(made | {"uri": uri})
    raise MCPError(types.INVALID_PARAMS, "Resource not found", data={"uri": uri})


def contents(resource: dict[str, Any]) -> types.ReadResourceResult:
    """Return what reading *resource* gives."""
    return types.ReadResourceResult.model_validate(
        {"contents": [without(resource, "name", "description", "uriTemplate")]}
    )


async def list_prompts(_context: ServerRequestContext, _params: Any) -> Any:
    """Return every prompt without its messages."""
    prompts = [without(prompt, "messages", "rounds") for prompt in OFFER["prompts"]]
    return types.ListPromptsResult.model_validate({"prompts": prompts})


async def get_prompt(context: ServerRequestContext, params: types.GetPromptRequestParams) -> Any:
    """Return a prompt's messages, or what is needed for them."""
    prompt = next((prompt for prompt in OFFER["prompts"] if prompt["name"] == params.name), None)
    if prompt is None:
        raise MCPError(types.INVALID_PARAMS, f"Unknown prompt: {params.name}")
    question = missing(prompt, context, params) if "rounds" in prompt else None
    messages = filled(prompt["messages"], params.arguments)
    return question or types.GetPromptResult.model_validate({"messages": messages})


async def complete(_context: ServerRequestContext, _params: Any) -> Any:
    """Return no suggestion."""
    return types.CompleteResult(completion=types.Completion(values=[], total=0, has_more=False))


async def accept(_context: ServerRequestContext, _params: Any) -> Any:
    """Return what says no more than that it is done."""
    return types.EmptyResult()


def without(item: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return *item* without *keys*."""
    return {key: value for key, value in item.items() if key not in keys}


class Events(EventStore):
    """Events by stream, so that a client that comes back gets what it missed."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any]] = []

    async def store_event(self, stream_id: str, message: Any) -> str:
        """Return the id of the event that carries *message*; the first of a stream carries none."""
        self.kept.append((stream_id, message))
        return str(len(self.kept))

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Send again what came after that event on its stream; return the stream."""
        stream, _ = self.kept[int(last_event_id) - 1]
        for index, (other, message) in enumerate(self.kept[int(last_event_id) :], int(last_event_id) + 1):
            if other == stream and message is not None:
                await send_callback(EventMessage(message, str(index)))
        return stream


def make_server() -> Server[Any]:
    """Return the server; logging and sampling are deprecated and all the same asked for by the suite."""
    made: Server[Any] = Server(
        "everything-python",
        version="1.0.0",
        on_list_tools=list_tools,
        on_call_tool=call,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read,
        on_subscribe_resource=accept,
        on_unsubscribe_resource=accept,
        on_subscriptions_listen=ListenHandler(bus),
        on_list_prompts=list_prompts,
        on_get_prompt=get_prompt,
        on_completion=complete,
        on_set_logging_level=accept,
    )
    made.middleware += [
        Tasks(OFFER["tasks"]),
        RequestStateBoundary(RequestStateSecurity.ephemeral(), default_audience=made.name),
    ]
    made.extensions[EXTENSION] = {}
    return made


def main() -> None:
    """Serve until ended."""
    warnings.simplefilter("ignore", MCPDeprecationWarning)
    app = make_server().streamable_http_app(event_store=Events(), retry_interval=RETRY_MS)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", ws="none")


if __name__ == "__main__":
    main()
