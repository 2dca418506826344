"""What a server asks of a client, over real sockets: on the stream of a POST or a GET, in a result, in an error."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from mcp import Client as McpClient
from mcp.client.context import ClientRequestContext
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError
from mcp_types import CreateMessageRequestParams, CreateMessageResult, SamplingMessage, TextContent

from sidecar.core.authorise import Engine, Question, Verdict
from sidecar.core.message import Ask
from sidecar.errors import Reason
from sidecar.record import line
from tests.builders import a_snapshot
from tests.fakes import Client, FakeServer, Heard, Path, a_path, a_server, eventually, post
from tests.wire.test_http import running

SESSION = "Mcp-Session-Id: s1"
VERSION = "MCP-Protocol-Version: 2025-11-25"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nmcp-session-id: s1\r\ntransfer-encoding: chunked\r\n\r\n"
ACCEPTED = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"


class Allowing:
    """Allows methods, and URLs of elicitations, by name."""

    name = "allowing"

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        target = question.message.target
        key = target.url if isinstance(target, Ask) and target.url else question.message.method
        return Verdict(allowed=key in self.allowed)


def asked(path: Path) -> list[tuple[str, Reason | None, str]]:
    """What was asked of clients, as it was recorded."""
    return [
        (
            each.message.method,
            None if each.refusal is None else each.refusal.reason,
            json.loads(line(each))["decision"]["outcome"],
        )
        for each in path.exchanges
        if each.message and isinstance(each.message.target, Ask)
    ]


# the official SDK on both sides


def a_sampling_server() -> MCPServer:
    """A server whose tool needs the client's model."""
    server = MCPServer("sampling")

    @server.tool()
    async def summarise(text: str, ctx: Context) -> str:
        """Summarise."""
        message = SamplingMessage(role="user", content=TextContent(type="text", text=text))
        result = await ctx.session.create_message(messages=[message], max_tokens=10)
        assert isinstance(result.content, TextContent)
        return result.content.text

    @server.tool()
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    return server


async def sample(context: ClientRequestContext, params: CreateMessageRequestParams) -> CreateMessageResult:
    """Stand for the client's model."""
    del context
    content = TextContent(type="text", text=f"{len(params.messages)} in short")
    return CreateMessageResult(role="assistant", content=content, model="m")


@pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")  # sampling is older than 2026-07-28
@pytest.mark.parametrize("may_sample", [True, False])
async def test_sampling_is_for_the_policy_to_allow(may_sample: bool) -> None:
    """Allowed, the answer finds its way; denied, the tool fails and both sides go on."""
    engine = Allowing("tools/call", *(["sampling/createMessage"] if may_sample else []))
    async with (
        asyncio.timeout(60),
        running(a_sampling_server(), json_response=False) as port,
        a_path(a_snapshot(engine, port=port)) as path,
        McpClient(f"http://127.0.0.1:{path.port}/mcp", mode="legacy", sampling_callback=sample) as client,
    ):
        try:
            summary = (await client.call_tool("summarise", {"text": "long"})).structured_content
        except MCPError as error:  # the tool handed it on
            summary = error.message
        total = await client.call_tool("add", {"a": 1, "b": 2})
        seen = asked(path)

    if may_sample:
        assert summary == {"result": "1 in short"}
        assert seen == [("sampling/createMessage", None, "allowed")]
    else:
        assert summary == "policy does not allow sampling/createMessage on the client"
        assert seen == [("sampling/createMessage", Reason.DENIED, "refused")]
    assert total.structured_content == {"result": 3}


# a server that says what the test wants


def chunk(message: str, *, event_id: str = "") -> bytes:
    """An event as a chunk."""
    event = (f"id: {event_id}\n" if event_id else "") + f"data: {message}\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event.encode())


class Scripted:
    """Opens a session; answers a call with *answer*; says *news* on a GET."""

    def __init__(self, *answer: bytes, news: Sequence[bytes] = ()) -> None:
        self.answer = answer
        self.news = news

    async def __call__(self, heard: Heard, writer: asyncio.StreamWriter) -> None:
        """Answer."""
        if heard.line.startswith(b"GET"):
            writer.write(HEAD + b"".join(self.news))
        elif b'"initialize"' in heard.body:
            writer.write(HEAD + chunk('{"jsonrpc":"2.0","id":1,"result":{}}') + b"0\r\n\r\n")
        elif b'"method"' in heard.body:
            writer.write(b"".join(self.answer))
        else:
            writer.write(ACCEPTED)


@asynccontextmanager
async def a_session(server: Scripted, engine: Engine) -> AsyncIterator[tuple[Path, Client, FakeServer]]:
    """A client with a session."""
    async with a_server(server) as (fake, port), a_path(a_snapshot(engine, port=port)) as path:
        client = await path.dial()
        initialize = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
        await client.say(post(a_message("initialize", initialize, request_id=1)))
        assert await client.hear()
        yield path, client, fake
        await client.close()


def a_message(method: str, params: dict[str, Any] | None = None, *, request_id: int = 7) -> bytes:
    """A request."""
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}}).encode()


SAMPLING = '{"jsonrpc":"2.0","id":"a1","method":"sampling/createMessage","params":{"messages":[]}}'
PING = '{"jsonrpc":"2.0","id":"a2","method":"ping"}'
RESULT = '{"jsonrpc":"2.0","id":7,"result":{"content":[]}}'
CALL = a_message("tools/call", {"name": "a"})


async def test_a_refused_ask_is_answered_in_its_session() -> None:
    """By a POST of our own, with nothing of the client's but its session and revision."""
    server = Scripted(HEAD, chunk(SAMPLING), chunk(PING), chunk(RESULT), b"0\r\n\r\n")
    async with a_session(server, Allowing("tools/call")) as (path, client, fake):
        await client.say(post(CALL, SESSION, VERSION, "Cookie: a=b", "X-Own: 1"))
        answer = await client.hear()
        await eventually(lambda: len(fake.heard) == 3, what="the reply")
        seen = asked(path)

    reply = fake.heard[2]
    assert answer is not None
    assert (b"sampling" in answer.body, PING.encode() in answer.body, RESULT.encode() in answer.body) == (
        False,
        True,
        True,
    )
    assert (reply.line, reply.values(b"mcp-session-id")) == (b"POST /mcp HTTP/1.1", [b"s1"])
    assert reply.values(b"mcp-protocol-version") == [b"2025-11-25"]
    assert (reply.values(b"cookie"), reply.values(b"x-own")) == ([], [])
    assert json.loads(reply.body) == {
        "jsonrpc": "2.0",
        "id": "a1",
        "error": {
            "code": 403,
            "message": "policy does not allow sampling/createMessage on the client",
            "data": {"reason": "denied"},
        },
    }
    assert seen == [("sampling/createMessage", Reason.DENIED, "refused")]


async def test_an_ask_on_a_get_stream_is_judged_too() -> None:
    """And only what passed there may be answered, once, by its own session."""
    server = Scripted(
        news=[chunk(SAMPLING), chunk(SAMPLING.replace("a1", "a3").replace("sampling/createMessage", "roots/list"))]
    )
    async with a_session(server, Allowing("roots/list")) as (path, client, fake):
        stream = await path.dial()
        await stream.say(
            f"GET /mcp HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n{SESSION}\r\n{VERSION}\r\n\r\n".encode()
        )
        event = await stream.until(b"roots/list")
        await eventually(lambda: len(fake.heard) == 3, what="the reply")
        statuses = []
        for request_id, headers in (("a1", (SESSION,)), ("a3", ()), ("a3", (SESSION,)), ("a3", (SESSION,))):
            await client.say(post(json.dumps({"jsonrpc": "2.0", "id": request_id, "result": {}}).encode(), *headers))
            response = await client.hear()
            statuses.append(response and response.line.split()[1])
        seen = asked(path)
        await stream.close()

    assert b"sampling" not in event
    assert seen == [("sampling/createMessage", Reason.DENIED, "refused"), ("roots/list", None, "allowed")]
    assert statuses == [b"202"] * 4  # whether it passed or was dropped: a 4xx would end Python 1.x sessions
    assert [json.loads(each.body).get("id") for each in fake.heard if each.line.startswith(b"POST")] == [1, "a1", "a3"]


async def test_a_resumed_stream_is_filtered() -> None:
    """What it replays answers a request that this connection never made; and only what this caller was told begins it."""
    tools = '{"jsonrpc":"2.0","id":3,"result":{"tools":[{"name":"a"},{"name":"b"}]}}'
    server = Scripted(news=[chunk("", event_id="e1"), chunk(tools, event_id="e2"), b"0\r\n\r\n"])

    class OnlyA(Allowing):
        def decide(self, question: Question) -> Verdict:
            return Verdict(allowed=getattr(question.message.target, "name", None) == "a")

    async with a_session(server, OnlyA()) as (path, client, fake):
        for event_id in ("e0", "e1"):
            await client.say(
                f"GET /mcp HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n{SESSION}\r\nLast-Event-ID: {event_id}\r\n\r\n".encode()
            )
            answer = await client.hear()
        removed = [each.removed for each in path.exchanges]
        hidden = [each.hidden for each in path.exchanges]

    assert answer is not None
    assert (
        answer.body == b'id: e1\ndata: \n\nid: e2\ndata: {"jsonrpc":"2.0","id":3,"result":{"tools":[{"name":"a"}]}}\n\n'
    )
    assert [each.values(b"last-event-id") for each in fake.heard[1:]] == [[], [b"e1"]]
    assert removed == [(), ("last-event-id",), ()]
    assert hidden == [0, 1, 1]


URL = "https://bank.test/pay"
INPUT = (
    '{"jsonrpc":"2.0","id":7,"result":{"resultType":"input_required","requestState":"s","inputRequests":'
    f'{{"k":{{"method":"elicitation/create","params":{{"mode":"url","url":"{URL}"}}}}}}}}}}'
)
ERROR = (
    '{"jsonrpc":"2.0","id":7,"error":{"code":-32042,"message":"open it","data":{"elicitations":'
    f'[{{"mode":"url","url":"{URL}","elicitationId":"1","message":""}}]}}}}}}'
)


@pytest.mark.parametrize("answer", [INPUT, ERROR], ids=["result", "error"])
@pytest.mark.parametrize("form", ["json", "stream"])
@pytest.mark.parametrize("may_open", [True, False])
async def test_what_an_answer_asks_is_judged(answer: str, form: str, may_open: bool) -> None:
    """It passes as it came, or an error stands in its place; the record says so, without the URL's query."""
    length = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
    pieces = (length, answer.encode()) if form == "json" else (HEAD, chunk(answer), b"0\r\n\r\n")
    async with a_session(Scripted(*pieces), Allowing("tools/call", *([URL] if may_open else []))) as (path, client, _):
        await client.say(post(CALL, SESSION, VERSION))
        heard = await client.hear()
        seen, call = asked(path), path.exchanges[-1]
        urls = [json.loads(line(each))["message"]["url"] for each in path.exchanges]

    assert heard is not None
    body = heard.body if form == "json" else heard.body.removeprefix(b"data: ")
    assert seen == [("elicitation/create", *((None, "allowed") if may_open else (Reason.DENIED, "refused")))]
    assert urls == [None, URL, None]
    if may_open:
        assert body.rstrip() == answer.encode()
    else:
        assert (json.loads(body)["id"], json.loads(body)["error"]["code"]) == (7, 403)
        assert call.refusal is not None
        assert (call.refusal.reason, call.admission is not None, call.error_code) == (Reason.DENIED, True, 403)


async def test_news_of_a_resource_passes_to_who_may_read_it() -> None:
    """Its URI tells what there is."""
    form = '{{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{{"uri":"{}"}}}}'
    server = Scripted(news=[chunk(form.format("x:secret")), chunk(form.format("x:open")), b"0\r\n\r\n"])

    class OnlyOpen(Allowing):
        def decide(self, question: Question) -> Verdict:
            return Verdict(allowed=getattr(question.message.target, "uri", None) == "x:open")

    async with a_session(server, OnlyOpen()) as (_, client, _fake):
        await client.say(f"GET /mcp HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n{SESSION}\r\n\r\n".encode())
        answer = await client.hear()

    assert answer is not None
    assert answer.body == f"data: {form.format('x:open')}\n\n".encode()


async def test_a_task_belongs_to_whom_it_was_given() -> None:
    """In the answer to a call; afterwards, unknown and foreign ones are one and the same."""
    created = '{"jsonrpc":"2.0","id":7,"result":{"task":{"taskId":"t1","status":"working"}}}'
    async with a_session(Scripted(HEAD, chunk(created), b"0\r\n\r\n"), Allowing("tools/call")) as (path, client, fake):
        await client.say(post(CALL, SESSION, VERSION))
        await client.hear()
        answers = []
        for task_id in ("t1", "t2"):
            await client.say(post(a_message("tasks/get", {"taskId": task_id}), SESSION, VERSION))
            answers.append(await client.hear())
        tasks = [json.loads(line(each))["message"]["task"] for each in path.exchanges[2:]]

    assert [each and b"task not found" in each.body for each in answers] == [False, True]
    assert len(fake.heard) == 3
    assert None not in tasks
