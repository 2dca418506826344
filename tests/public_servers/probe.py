"""Asks a public MCP server everything servers.yaml says, directly or through the sidecar, and returns its answers as text.

The official SDK's transports carry the messages; what is asked and compared is JSON as it passes, no field of it
dropped. A server-to-client request is answered, the same each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import mcp_types as types
import msgspec
from mcp.client.sse import sse_client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import ClientMessageMetadata, SessionMessage

from bench.processes import free_port, is_listening, running
from tests.conformance.parties import sidecar
from tests.parts import ENVIRONMENT, part

TABLE: Final = Path(__file__).with_name("servers.yaml")
VERSION: Final = "2025-11-25"
MODERN: Final = "2026-07-28"
ANSWER_S: Final = 30.0
LISTS: Final = (  # capability, method
    ("tools", "tools/list"),
    ("resources", "resources/list"),
    ("resources", "resources/templates/list"),
    ("prompts", "prompts/list"),
)
BROKEN: Final = "broken off"
CLIENT: Final = {"name": "probe", "version": "1"}
CAPABILITIES: Final = {"sampling": {}, "elicitation": {}, "roots": {}}
ENVELOPE: Final = {  # no capabilities: what a server would ask instead of answering, it may seal anew each time
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientInfo": CLIENT,
    "io.modelcontextprotocol/clientCapabilities": {},
}
OURS: Final = ("cacheScope", "ttlMs")  # what one caller may see is not to be kept for another
REPLIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "ping": {},
    "roots/list": {"roots": []},
    "elicitation/create": {"action": "decline"},
    "sampling/createMessage": {"role": "assistant", "content": {"type": "text", "text": "four"}, "model": "none"},
}


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the table, described there."""

    name: str
    transport: Literal["http", "sse", "stdio"]
    command: tuple[str, ...]
    requests: tuple[tuple[str, dict[str, Any]], ...]
    part: str | None = None
    path: str = "/mcp"
    environment: dict[str, str] = {}
    files: dict[str, str] = {}
    before: tuple[tuple[str, ...], ...] = ()
    volatile: tuple[str, ...] = ()


def table() -> list[Server]:
    """Return every entry. Raises msgspec.ValidationError naming the field."""
    return msgspec.yaml.decode(TABLE.read_bytes(), type=list[Server])


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How to start one server now: the table's placeholders are filled."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    port: int

    @classmethod
    def of(cls, server: Server, home: Path, port: int) -> Start:
        """Return it for an empty *home*. Raises PartError."""
        at = part(server.part) if server.part else Path(sys.prefix)
        known = {"node": part("node"), "python": sys.executable, "part": at, "port": port, "home": home}
        environment = {"PATH": ENVIRONMENT["PATH"], "HOME": str(home), "PYTHONWARNINGS": "ignore"}
        if server.part and server.command[0] == "{python}":
            environment["PYTHONPATH"] = str(at)
        environment |= {name: value.format(**known) for name, value in server.environment.items()}
        return cls(command=tuple(word.format(**known) for word in server.command), environment=environment, port=port)


def prepare(server: Server, home: Path) -> None:
    """Make *home* afresh: the second run must not see what the first left."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name, content in server.files.items():
        (home / name).write_text(content)
    for command in server.before:
        subprocess.run(command, cwd=home, check=True, env={"PATH": ENVIRONMENT["PATH"], "HOME": str(home)})


@contextlib.contextmanager
def serving(start: Start, log: Path) -> Iterator[None]:
    """Run a server that listens by itself."""
    with running(start.command, log=log, is_ready=lambda: is_listening(start.port), env=start.environment):
        yield


def transport(kind: str, url: str, start: Start, log: Path) -> AbstractAsyncContextManager[Any]:
    """Return the SDK's transport to *url*, or to the process that *start* describes."""
    if kind == "stdio":
        command, *arguments = start.command
        parameters = StdioServerParameters(command=command, args=arguments, env=dict(start.environment))
        return _logged(parameters, log)
    return sse_client(url) if kind == "sse" else streamable_http_client(url)


@contextlib.asynccontextmanager
async def _logged(parameters: StdioServerParameters, log: Path) -> AsyncIterator[Any]:
    with log.open("w") as errors:
        async with stdio_client(parameters, errlog=errors) as streams:
            yield streams


def answers(server: Server, connect: Callable[[], AbstractAsyncContextManager[Any]], home: Path) -> dict[str, str]:
    """Return, by what was asked, what came back: JSON text without what the table calls volatile.

    First in the older era, then in the later one, which a server may not speak: then its refusal is the answer.
    A conversation that broke off has BROKEN among its keys.
    """
    given: dict[str, str] = {}
    try:
        asyncio.run(_converse(server, connect(), home, given, VERSION))
        if server.transport != "sse":
            asyncio.run(_converse(server, connect(), home, given, MODERN))
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises, the conversation ends here
        given[BROKEN] = "; ".join(_causes(error))
    return given


def _causes(error: BaseException) -> Iterator[str]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _causes(each)
    else:
        yield f"{type(error).__name__}: {error}"


async def _converse(
    server: Server, streams: AbstractAsyncContextManager[Any], home: Path, given: dict[str, str], version: str
) -> None:
    async with streams as (incoming, outgoing):
        asker = Asker(incoming, outgoing, given, server.volatile)
        capabilities = await (_discover(asker) if version == MODERN else _initialize(asker, version))
        if capabilities is None:
            return
        for method in (method for capability, method in LISTS if capability in capabilities):
            page: dict[str, Any] = {}
            for number in itertools.count(1):
                result = await asker.note(f"{version} {method} page {number}", method, page)
                if "nextCursor" not in result:
                    break
                page = {"cursor": result["nextCursor"]}
        for number, (method, params) in enumerate(server.requests, 1):
            filled = json.loads(json.dumps(params).replace("{home}", str(home)))
            what = params.get("name") or params.get("uri") or ""
            await asker.note(f"{version} {number} {method} {what}".strip(), method, filled)
    if version != MODERN:  # where a server asks nothing by itself, and is told so through the sidecar
        given[f"{version} what the server asked"] = json.dumps(sorted(asker.answered))  # on whichever stream, whenever


async def _initialize(asker: Asker, version: str) -> dict[str, Any]:
    hello = {"protocolVersion": version, "capabilities": CAPABILITIES, "clientInfo": CLIENT}
    opened = await asker.note(f"{version} initialize", "initialize", hello)
    asker.version = opened.get("protocolVersion", version)
    await asker.tell("notifications/initialized")
    await asker.note(f"{version} ping", "ping", {})
    capabilities: dict[str, Any] = opened.get("capabilities", {})
    return capabilities


async def _discover(asker: Asker) -> dict[str, Any] | None:
    asker.version = MODERN
    opened = await asker.note(f"{MODERN} server/discover", "server/discover", {})
    return opened["capabilities"] if MODERN in opened.get("supportedVersions", ()) else None


class Asker:
    """One client's side of a conversation."""

    def __init__(self, incoming: Any, outgoing: Any, given: dict[str, str], volatile: tuple[str, ...]) -> None:
        self.version: str | None = None
        self.answered: list[str] = []
        self._given = given
        self._volatile = volatile
        self._incoming = incoming
        self._outgoing = outgoing
        self._ids = itertools.count(1)

    async def note(self, label: str, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Ask, and keep the answer as text under *label*; return the result, empty when there was an error."""
        answer, heard = await self.ask(method, params)
        for name in OURS:
            answer.get("result", {}).pop(name, None)
        text = json.dumps({"answer": answer, "heard": heard}, sort_keys=True, ensure_ascii=False)
        for pattern in self._volatile:
            text = re.sub(pattern, "…", text)
        self._given[label] = text
        result: dict[str, Any] = answer.get("result", {})
        return result

    async def ask(self, method: str, params: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Return the response's result or error, and the progress heard before it. Raises TimeoutError."""
        headers = {}
        if self.version == MODERN:
            params = {**params, "_meta": {**params.get("_meta", {}), **ENVELOPE}}
            name = params.get("uri") or params.get("name") or ""
            headers = {"Mcp-Method": method, **({"Mcp-Name": name} if name else {})}
        request = types.JSONRPCRequest(jsonrpc="2.0", id=next(self._ids), method=method, params=params)
        await self._send(request, headers)
        heard: list[Any] = []
        async with asyncio.timeout(ANSWER_S):
            async for item in self._incoming:
                if isinstance(item, Exception):
                    raise item
                message = item.message
                if isinstance(message, types.JSONRPCRequest):
                    await self._reply(message)
                elif isinstance(message, types.JSONRPCNotification):
                    if message.method == "notifications/progress":
                        heard.append(message.params)
                elif message.id == request.id:
                    return message.model_dump(include={"result", "error"}, exclude_none=True), heard
        raise ConnectionError(f"{method}: the stream ended before the response")

    async def tell(self, method: str) -> None:
        """Send a notification."""
        await self._send(types.JSONRPCNotification(jsonrpc="2.0", method=method), {})

    async def _reply(self, request: types.JSONRPCRequest) -> None:
        self.answered.append(f"{request.method} {json.dumps(request.params, sort_keys=True)}")
        result = dict(REPLIES[request.method])
        await self._send(types.JSONRPCResponse(jsonrpc="2.0", id=request.id, result=result), {})

    async def _send(self, message: types.JSONRPCMessage, headers: dict[str, str]) -> None:
        if self.version:
            headers = {"MCP-Protocol-Version": self.version, **headers}
        await self._outgoing.send(SessionMessage(message, metadata=ClientMessageMetadata(headers=headers)))


def direct(server: Server, home: Path, logs: Path) -> dict[str, str]:
    """Return the answers without the sidecar."""
    prepare(server, home)
    start = Start.of(server, home, free_port())
    with contextlib.ExitStack() as stack:
        if server.transport != "stdio":
            stack.enter_context(serving(start, logs / "server.log"))
        url = f"http://127.0.0.1:{start.port}{server.path}"
        return answers(server, lambda: transport(server.transport, url, start, logs / "stdio.log"), home)


def through(server: Server, home: Path, logs: Path) -> dict[str, str]:
    """Return the answers through a sidecar with a policy that allows everything."""
    prepare(server, home)
    start = Start.of(server, home, free_port())
    with contextlib.ExitStack() as stack:
        if server.transport == "stdio":
            # By env(1): the sidecar is not to inherit what is meant for the server.
            setting = (f"{name}={value}" for name, value in start.environment.items())
            behind: tuple[str, ...] = ("env", *setting, *start.command)
        else:
            stack.enter_context(serving(start, logs / "server.log"))
            behind = (f"http://127.0.0.1:{start.port}{server.path}",)
        front = stack.enter_context(sidecar(logs, *behind, transport=server.transport))
        url = f"http://127.0.0.1:{front}{server.path}"
        outside = "sse" if server.transport == "sse" else "http"
        return answers(server, lambda: transport(outside, url, start, logs), home)
