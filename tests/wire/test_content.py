"""Content rules over real sockets: the official SDK on both sides, JSON and event streams, and a raw stream's bytes."""

import asyncio
import json

import msgspec
import pytest
from mcp import Client as McpClient
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError

from sidecar.core.profile import ContentRule
from sidecar.pipeline import Snapshot
from sidecar.record import line
from tests.builders import a_call, a_snapshot
from tests.fakes import Heard, a_path, a_server, allowing, eventually, post
from tests.sidecar.core.contents import KEY, a_rule
from tests.wire.test_http import running

CARD = "4111 1111 1111 1111"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def screening(port: int, *rules: ContentRule, denied: str = "error") -> Snapshot:
    """A snapshot that allows everything but what *rules* find."""
    made = a_snapshot(allowing("customer", "remember", "read_schema"), port=port)
    profile = msgspec.structs.replace(made.profile, content=rules, denied=denied)  # type: ignore[arg-type] # a literal
    return Snapshot(**{name: getattr(made, name) for name in Snapshot.__slots__ if name != "profile"}, profile=profile)


def a_leaky_server(remembered: list[str]) -> MCPServer:
    """A server whose tools and resources tell what they should not."""
    server = MCPServer("leaky")

    @server.tool()
    async def customer(name: str, ctx: Context) -> dict[str, str]:
        """Look a customer up."""
        await ctx.report_progress(1, 2, f"found {name}, card {CARD}")
        return {"name": name, "card": CARD, "ssn": "x", "note": "calls at 9:00"}

    @server.tool()
    def remember(text: str) -> str:
        """Keep a text."""
        remembered.append(text)
        return f"kept {len(text)} characters"

    @server.resource("file://notes")
    def notes() -> str:
        """Return the notes."""
        return f"key: {KEY.decode()}\nend"

    @server.prompt()
    def greet() -> str:
        """Return a prompt."""
        return f"Say hello to nora@example.org, {KEY.decode()}"

    return server


@pytest.mark.parametrize("json_response", [True, False])
async def test_secrets_stay_where_they_are(json_response: bool) -> None:
    """Results, progress, resources and prompts are masked; a structured result and its text say the same."""
    remembered: list[str] = []
    told: list[str | None] = []
    rules = (
        a_rule("personal", patterns=("credit-card", "email")),
        a_rule("numbers", fields=("ssn",), where="results"),
        a_rule("keys", patterns=("aws-key",)),
    )

    async def progress(done: float, total: float | None, message: str | None) -> None:
        del done, total
        told.append(message)

    async with (
        asyncio.timeout(60),
        running(a_leaky_server(remembered), json_response=json_response) as port,
        a_path(screening(port, *rules)) as path,
        McpClient(f"http://127.0.0.1:{path.port}/mcp") as client,
    ):
        found = await client.call_tool("customer", {"name": "Nora"}, progress_callback=progress)
        kept = await client.call_tool("remember", {"text": f"my key is {KEY.decode()}!"})
        notes = await client.read_resource("file://notes")
        prompt = await client.get_prompt("greet", {})
        await eventually(lambda: len(path.exchanges) >= 4, what="the records")
        records = b"".join(line(each) for each in path.exchanges)

    masked = {"name": "Nora", "card": "[masked]", "ssn": "[masked]", "note": "calls at 9:00"}
    assert found.structured_content == masked
    assert json.loads(found.content[0].text) == masked  # type: ignore[union-attr]
    assert set(told) <= {"found Nora, card [masked]"}
    assert kept.content[0].text == f"kept {len('my key is [masked]!')} characters"  # type: ignore[union-attr]
    assert remembered == ["my key is [masked]!"]
    assert notes.contents[0].text == "key: [masked]\nend"  # type: ignore[union-attr]
    assert prompt.messages[0].content.text == "Say hello to [masked], [masked]"  # type: ignore[union-attr]
    assert KEY not in records
    assert CARD.encode() not in records


@pytest.mark.parametrize("json_response", [True, False])
async def test_what_is_denied_goes_no_further(json_response: bool) -> None:
    """Neither to the server nor back; the session goes on."""
    remembered: list[str] = []
    rules = (
        a_rule("keys", patterns=("aws-key",), action="deny", where="arguments"),
        a_rule("cards", patterns=("credit-card",), action="deny", where="results"),
    )
    async with (
        asyncio.timeout(60),
        running(a_leaky_server(remembered), json_response=json_response) as port,
        a_path(screening(port, *rules)) as path,
        McpClient(f"http://127.0.0.1:{path.port}/mcp") as client,
    ):
        with pytest.raises(MCPError) as asked:
            await client.call_tool("remember", {"text": KEY.decode()})
        with pytest.raises(MCPError) as answered:
            await client.call_tool("customer", {"name": "Nora"})
        kept = await client.call_tool("remember", {"text": "hello"})

    assert {asked.value.message, answered.value.message} == {"what this message holds is not allowed"}
    assert kept.content[0].text == "kept 5 characters"  # type: ignore[union-attr]
    assert remembered == ["hello"]


async def test_a_denied_result_can_be_told_to_the_model() -> None:
    """As a failure of the tool."""
    rule = a_rule("cards", patterns=("credit-card",), action="deny", where="results")
    async with (
        asyncio.timeout(60),
        running(a_leaky_server([]), json_response=True) as port,
        a_path(screening(port, rule, denied="tool_error")) as path,
        McpClient(f"http://127.0.0.1:{path.port}/mcp") as client,
    ):
        found = await client.call_tool("customer", {"name": "Nora"})

    assert found.is_error
    assert found.content[0].text == "what this message holds is not allowed"  # type: ignore[union-attr]


def chunk(data: bytes) -> bytes:
    """*data* as a chunk of HTTP."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_each_event_passes_when_it_is_whole_and_keeps_its_other_bytes() -> None:
    """The stream is not held until its end: the first event is read while the server still waits."""
    go_on = asyncio.Event()
    first = b'id: 1\r\ndata: {"jsonrpc":"2.0",  "method":"notifications/message","params":{"data":"\\u00e9 nothing"}}\r\n\r\n'
    last = b'data: {"jsonrpc":"2.0", "id":7,"result":{"content":[{"text":"a\\/b ' + KEY + b' \\u00e9"}]}}\n\n'

    async def script(_: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(first) + chunk(last[:40]))
        await go_on.wait()
        writer.write(chunk(last[40:]) + b"0\r\n\r\n")

    async with (
        a_server(script) as (_, port),
        a_path(screening(port, a_rule(patterns=("aws-key",)))) as path,
    ):
        client = await path.dial()
        await client.say(post(a_call()))
        await client.until(b"\r\n\r\n")
        assert (await client.until(chunk(first))).endswith(chunk(first))
        go_on.set()
        said = await client.until(b"0\r\n\r\n")
        await client.close()

    assert chunk(last.replace(KEY, b"[masked]")) in said
