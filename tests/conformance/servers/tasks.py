"""The tasks extension of the Python reference server, as a middleware: the SDK has none of its own.

A tool of everything.json's "tasks" answers with a task to whoever declared the extension, and by itself to others,
unless it is only to be had as a task. A task's work is a timer, and the answers it asks for.
Source: SEP-2663, and the suite's "Server Implementation Requirements".
"""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import mcp_types as types
from mcp.server import ServerRequestContext
from mcp.server.context import CallNext
from mcp.shared.exceptions import MCPError

EXTENSION: Final = "io.modelcontextprotocol/tasks"
CAPABILITIES_KEY: Final = "io.modelcontextprotocol/clientCapabilities"
MODERN: Final = "2026-07-28"
TTL_MS: Final = 60_000
POLL_MS: Final = 100


def _now() -> str:
    return datetime.now(UTC).isoformat()


@dataclass(slots=True)
class Task:
    """One task; `outcome` is the member that ends it."""

    tool: Mapping[str, Any]
    answer: Mapping[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    status: str = "working"
    created: str = field(default_factory=_now)
    updated: str = field(default_factory=_now)
    pending: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Ask what the tool asks, or work for *seconds*."""
        self.pending = dict(self.tool.get("asks", {}))
        if self.pending:
            self.status = "input_required"
        else:
            self.timer = asyncio.get_running_loop().call_later(seconds, self.finish)

    def finish(self) -> None:
        """End as the tool says."""
        if "failure" in self.tool:
            self.settle("failed", error=self.tool["failure"])
        else:
            self.settle("completed", result=self.answer)

    def settle(self, status: str, **outcome: Any) -> None:
        """Take a status that lasts, once."""
        if self.timer is not None:
            self.timer.cancel()
        if self.status in {"working", "input_required"}:
            self.status, self.outcome, self.pending, self.updated = status, outcome, {}, _now()

    def shown(self) -> dict[str, Any]:
        """Return the task as it stands on the wire."""
        return {
            "taskId": self.id,
            "status": self.status,
            "createdAt": self.created,
            "lastUpdatedAt": self.updated,
            "ttlMs": TTL_MS,
            "pollIntervalMs": POLL_MS,
        }


class Tasks:
    """Answers tasks/* itself, and makes a task of a finished call of a task's tool."""

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self._tools = {tool["name"]: tool for tool in tools}
        self._tasks: dict[str, Task] = {}

    async def __call__(self, context: ServerRequestContext[Any, Any], call_next: CallNext) -> Any:
        """Answer, or pass on. Raises MCPError."""
        if context.protocol_version != MODERN or context.request_id is None:
            return await call_next(context)
        params = context.params or {}
        capabilities = params.get("_meta", {}).get(CAPABILITIES_KEY, {})
        is_declared = EXTENSION in capabilities.get("extensions", {})
        if context.method in {"tasks/get", "tasks/update", "tasks/cancel"}:
            if not is_declared:
                raise _missing()
            task = self._tasks.get(str(params.get("taskId")))
            if task is None:
                raise MCPError(types.INVALID_PARAMS, "Task not found")
            return self._answer(context.method, task, params)
        tool = self._tools.get(str(params.get("name"))) if context.method == "tools/call" else None
        if tool is not None and tool.get("required") and not is_declared:
            raise _missing()
        answer = await call_next(context)
        if tool is None or not is_declared or not isinstance(answer, Mapping) or answer["resultType"] != "complete":
            return answer
        task = Task(tool, {key: value for key, value in answer.items() if key in {"content", "isError"}})
        self._tasks[task.id] = task
        task.start(float((params.get("arguments") or {}).get("seconds", tool.get("seconds", 0))))
        return {"resultType": "task", **task.shown()}

    def _answer(self, method: str, task: Task, params: Mapping[str, Any]) -> dict[str, Any]:
        if method == "tasks/cancel":
            task.settle("cancelled")
        elif method == "tasks/update":
            for key in params.get("inputResponses", {}):
                task.pending.pop(key, None)
            if task.status == "input_required" and not task.pending:
                task.finish()
        elif task.pending:
            return {"resultType": "complete", **task.shown(), "inputRequests": task.pending}
        else:
            return {"resultType": "complete", **task.shown(), **task.outcome}
        return {"resultType": "complete"}


def _missing() -> MCPError:
    data = {"requiredCapabilities": {"extensions": {EXTENSION: {}}}}
    return MCPError(types.MISSING_REQUIRED_CLIENT_CAPABILITY, "The client did not declare tasks", data=data)
