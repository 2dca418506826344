"""What reads bytes from elsewhere, each with what must hold: one kind of exception, and no two readings of one input."""

import asyncio
import atexit
import contextlib
import functools
import gzip
import json
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec
import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from jwt.utils import base64url_decode, base64url_encode

from certs.errors import BadToken
from certs.jwt_verify import JwtBundles, verify_token
from sidecar.core import bundle, profile
from sidecar.core.agreement import ParamHeaders, check
from sidecar.core.answer import Answer
from sidecar.core.authorise import Question, Verdict
from sidecar.core.cedar import CedarEngine, Unspeakable
from sidecar.core.content import Content
from sidecar.core.dpop import Proofs, check_proof
from sidecar.core.endpoint import target_of
from sidecar.core.filters import Reader
from sidecar.core.hosts import Barred, Why, host_of
from sidecar.core.identity import authenticate, trust
from sidecar.core.jwk import thumbprint
from sidecar.core.limits import Admission
from sidecar.core.message import Message, Prompt, Resource, Shape, Tool, parse_any
from sidecar.core.oauth import OAuthError, read_token
from sidecar.core.ownership import tasks
from sidecar.core.profile import Identity, Limit, Provider, Server
from sidecar.core.rego import _encode
from sidecar.core.review import review
from sidecar.core.sse import BadStream, Event, Splitter
from sidecar.core.stdio import Lines, LineTooLong, read_line
from sidecar.core.toolhive import translate
from sidecar.errors import BundleError, Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell.inbound import Inbound
from sidecar.shell.openings import HANDSHAKE, opening
from sidecar.shell.serving import Serving
from sidecar.shell.upstream import Call, Sink, _request
from tests.builders import a_call, a_connection, a_permit, a_question, a_request, a_snapshot
from tests.fuzz.engine import Target

VERSIONS: Final = (None, "2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")
META: Final = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}
MESSAGES: Final = (
    a_call("a", {"x": 1, "y": [None, True, 1.5, "é"]}),
    a_call("a", {"x": {"y": {"z": "\u2028"}}}, request_id="i-1"),
    a_request("tools/call", {"name": "a", "arguments": {}, "_meta": META}),
    a_request(
        "resources/read", {"uri": "file:///a", "_meta": {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}}
    ),
    a_request("prompts/get", {"name": "p", "arguments": {"a": "b"}}),
    a_request(
        "completion/complete", {"ref": {"type": "ref/prompt", "name": "p"}, "argument": {"name": "a", "value": ""}}
    ),
    a_request("subscriptions/listen", {"notifications": {"resourceSubscriptions": ["file:///a"]}, "_meta": META}),
    a_request("tasks/get", {"taskId": "t"}),
    a_request("initialize", {"protocolVersion": "2025-11-25", "clientInfo": {"name": "c", "version": "1"}}),
    b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}',
    b'{"jsonrpc":"2.0","id":7,"result":{}}',
    b'{"jsonrpc":"2.0","id":"x","error":{"code":-32000,"message":"m"}}',
    b"[" + a_call("a") + b"," + a_call("b", request_id=8) + b"]",
)


def said(refusal: Refusal) -> str:
    """An outcome: which refusal it is."""
    return f"{refusal.reason} {refusal.public}"[:200]


# Messages


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    assert len(members) == len(pairs), "a duplicate member passed"
    return members


def run_message(data: bytes) -> str:
    """Every JSON reader must read a message that passes alike, and see the very target that is judged."""
    version = VERSIONS[data[0] % len(VERSIONS)] if data else None
    body = data[1:]
    try:
        found = parse_any(body, version)
    except Refusal as refusal:
        return said(refusal)
    document = json.loads(body.decode("utf-8"), object_pairs_hook=_pairs)
    others = (orjson.loads(body), msgspec.json.decode(body), json.loads(body))
    for other in others:
        assert _rounded(other) == _rounded(document), "readers differ"
    messages = found if isinstance(found, tuple) else (found,)
    documents = document if isinstance(found, tuple) else [document]
    assert len(messages) == len(documents)
    for message, one in zip(messages, documents, strict=True):
        if isinstance(message, Message):
            _check_reading(message, one)
    return " ".join(each.method if isinstance(each, Message) else said(each) for each in messages)[:200]


def _rounded(value: Any) -> Any:
    """Return *value* with integers beyond 64 bits as doubles: not every reader keeps them exact."""
    match value:
        case bool():
            return ("bool", value)
        case int():
            return value if abs(value) < 2**63 else float(value)
        case dict():
            return {key: _rounded(member) for key, member in value.items()}
        case list():
            return [_rounded(item) for item in value]
    return value


def _check_reading(message: Message, document: Mapping[str, Any]) -> None:
    assert document["jsonrpc"] == "2.0"
    assert message.id == document.get("id")
    assert type(message.id) is type(document.get("id"))
    if message.shape is Shape.RESPONSE:
        assert "method" not in document
        return
    assert message.method == document["method"]
    params = document.get("params", {})
    match message.target:
        case Tool(name=name, arguments=arguments) | Prompt(name=name, arguments=arguments):
            if "ref" not in params:
                assert (name, arguments) == (params["name"], params.get("arguments") or {})
        case Resource(uri=uri):
            assert uri in (params.get("uri"), params.get("ref", {}).get("uri"))


# Headers and body


def _headed(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Split *data* into header fields, a line each, and a body behind an empty line."""
    head, _, body = data.partition(b"\n\n")
    fields = [line.partition(b":") for line in head.split(b"\n")]
    return [(name.strip().lower(), value.strip()) for name, _, value in fields if name.strip()], body


def run_agreement(data: bytes) -> str:
    """Whatever the headers: in a modern message that passes, header and body name the same."""
    headers, body = _headed(data)
    connection = a_connection(body, headers=headers)
    try:
        found = parse_any(body, connection.header(b"mcp-protocol-version"))
        for message in found if isinstance(found, tuple) else (found,):
            if isinstance(message, Message):
                check(connection, message, ParamHeaders())
    except Refusal as refusal:
        return said(refusal)
    if isinstance(found, Message) and isinstance(found.target, Tool):
        names = [value for name, value in headers if name == b"mcp-name"]
        assert len(names) <= 1, "a repeated Mcp-Name passed"
        assert found.revision.is_modern <= bool(names), "a modern call without Mcp-Name passed"
        plain = [name for name in names if not name.startswith(b"=?base64?")]
        assert all(name == found.target.name.encode() for name in plain), "Mcp-Name and the body differ"
    messages = found if isinstance(found, tuple) else (found,)
    return " ".join(each.method if isinstance(each, Message) else "refused" for each in messages)[:200]


_MODERN_HEADERS: Final = b"mcp-protocol-version: 2026-07-28\nmcp-method: tools/call\nmcp-name: a\n\n"
AGREEMENTS: Final = (
    _MODERN_HEADERS + MESSAGES[2],
    _MODERN_HEADERS.replace(b": a", b": =?base64?YQ==?=") + MESSAGES[2],
    b"mcp-protocol-version: 2025-11-25\nmcp-name: a\n\n" + MESSAGES[0],
    b"mcp-protocol-version: 2025-03-26\n\n" + MESSAGES[-1],
    *(b"mcp-method: x\n\n" + each for each in MESSAGES),
)


# Event streams


def run_sse(data: bytes) -> str:
    """Split anywhere, a stream gives the same events, and their bytes are those that came."""
    step, stream = (data[0] % 7 + 1 if data else 1), data[1:]
    whole, pieces = _events([stream]), _events([stream[at : at + step] for at in range(0, len(stream), step)])
    assert pieces[0][: len(whole[0])] == whole[0], "events depend on where the stream was split"
    assert bool(whole[1]) == bool(pieces[1])
    assert whole[1] or whole == pieces
    raw = b"".join(each.raw for each in pieces[0])
    assert stream.startswith(raw)
    for event in pieces[0]:
        if event.data is not None:
            again = _events([event.replaced(b'{"x":1}')])
            assert [each.data for each in again[0]] == [b'{"x":1}'], "what was replaced cannot be read"
            assert again[1] == ""
    return f"{whole[1]} {len(pieces[0])} {[each.data is None for each in pieces[0]][:8]}"


def _events(pieces: Sequence[bytes]) -> tuple[list[Event], str]:
    splitter, events = Splitter(), []
    try:
        for piece in pieces:
            events += splitter.feed(piece)
        splitter.end()
    except BadStream as error:
        return events, str(error)
    return events, ""


STREAMS: Final = (
    b"\x00data: {}\n\n",
    b"\x01event: message\nid: 1\ndata: {\ndata: }\n\n: comment\n\ndata: x\r\n\r\n",
    b"\x02retry: 100\nid: 2\ndata:\n\nevent: endpoint\ndata: /messages\n\n",
    b"\x03\xef\xbb\xbfdata: x\n\n",
)


def run_endpoint(data: bytes) -> str:
    """Wherever a 2024-11-05 server says to post, it is on that server."""
    try:
        target = target_of(data, "/sse")
    except BadStream as error:
        return str(error)
    except Refusal as refusal:
        return said(refusal)
    assert target.startswith("/")
    assert not target.startswith("//"), target
    assert not set(target) & set("\r\n \t#\\"), target
    return "taken"


# Streams that clients read differently; % is a message.
ODD_STREAMS: Final = (
    b"data: %\r\r", b"data: %\r\n\r\n", b"\xef\xbb\xbfdata: %\n\n", b"data: %\n", b"data: %", b"data:%\n\n",
    b"event: other\ndata: %\n\n", b"event:  message \ndata: %\n\n", b"event: message\nevent: x\ndata: %\n\n",
    b"data: {}\rdata: %\n\n", b": x\rdata: %\n\n", b"id: 1\0\ndata: %\n\n", b"data: [%]\n\n", b"Data: %\n\n",
    b" data: %\n\n", b"data : %\n\n", b"data: {}\xe2\x80\xa8data: %\n\n", b"data: {}\x85data: %\n\n", b"data: \ndata: %\n\n",
    b"event: x\rdata: %\n\n", b"data\ndata: %\ndata\n\n", b"event\ndata: %\n\n", b"\n\ndata: %\n \n\n",
)  # fmt: skip


# What the server says


class OnlyA:
    """Allows what is called a, of any kind."""

    name = "only-a"

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        target = question.message.target
        return Verdict(allowed=isinstance(target, Tool | Prompt) and target.name == "a")


def _judge(_: Message) -> Refusal | None:
    return Refusal(Reason.DENIED, "no")


def run_review(data: bytes) -> str:
    """What must not be seen is in no reading of what passes."""
    reader = Reader(permit=a_permit(a_request("tools/list")), engines=(OnlyA(),), tasks=tasks())
    try:
        passed, seen = review(data, reader, _judge)
    except Refusal as refusal:
        return f"{refusal.reason} {refusal.detail}"[:120]
    if passed:
        _check_shown(json.loads(passed.decode(errors="replace")), passed)  # as JavaScript and Go read it
    return f"{[(each.hidden, each.error_code, bool(each.data), bool(each.reply), each.refusal is None) for each in seen][:4]}"


def _check_shown(document: Any, passed: bytes) -> None:
    for message in document if isinstance(document, list) else [document]:
        result = message.get("result") if isinstance(message, dict) else None
        if not isinstance(result, dict):
            continue
        for listing in ("tools", "prompts"):
            names = [item.get("name") for item in result.get(listing) or ()]
            assert set(names) <= {"a"}, passed
        for listing in ("resources", "resourceTemplates", "tasks"):
            assert not result.get(listing), passed
        assert not result.get("inputRequests"), passed


ANSWERS: Final = (
    b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a","x":1.0},{"name":"b"}],"nextCursor":"","cacheScope":"public"}}',
    b'{"jsonrpc":"2.0","id":7,"result":{"resources":[{"uri":"file:///a"}],"resourceTemplates":[{"uriTemplate":"a"}]}}',
    b'{"jsonrpc":"2.0","id":7,"result":{"tasks":[{"taskId":"t"}],"prompts":[{"name":"a"},{"name":"b"}]}}',
    b'{"jsonrpc":"2.0","id":7,"result":{"content":[],"isError":true}}',
    b'{"jsonrpc":"2.0","id":7,"result":{"resultType":"input_required","inputRequests":{"k":{"method":"sampling/createMessage","params":{}}}}}',
    b'{"jsonrpc":"2.0","id":7,"error":{"code":-32042,"message":"m","data":{"elicitations":[{"url":"https://x.test"}]}}}',
    b'{"jsonrpc":"2.0","id":1,"method":"elicitation/create","params":{"mode":"url","url":"https://x.test","message":"m"}}',
    b'{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":"file:///a"}}',
    b'[{"jsonrpc":"2.0","id":7,"result":{"tools":[]}},{"jsonrpc":"2.0","method":"notifications/message","params":{}}]',
)


def run_content(data: bytes) -> str:
    """No secret is in any reading of what passes, and masking again changes nothing."""
    permit = a_permit(a_call("a"))
    reader = Reader(permit=permit, engines=(OnlyA(),), tasks=tasks(), screen=_CONTENT.answered(permit.question.message))
    try:
        passed, seen = review(data, reader, _judge)
        again, _ = review(passed or b"{}", reader, _judge)
    except Refusal as refusal:
        return f"{refusal.reason} {refusal.detail}"[:120]
    assert not passed or again == passed
    document = json.loads(passed.decode()) if passed else {}
    for message in document if isinstance(document, list) else [document]:
        for name in ("params", "error", "result"):
            _check_masked(message.get(name) if isinstance(message, dict) else None, passed, depth=0)
    return f"{[(bool(each.data), sum(found.count for found in each.found)) for each in seen][:4]}"


_CONTENT: Final = Content(
    [
        profile.ContentRule(name="keys", patterns=("aws-key", "email", "credit-card")),
        profile.ContentRule(name="pins", fields=("pin", "/a/*")),
        profile.ContentRule(name="own", regex=r"^x+y|\[z"),
    ]
)
_KEY_ID: Final = "AKIAABCDEFGHIJKLMNOP"
_LEFT_ALONE: Final = frozenset(
    {"requestState", "nextCursor", "resultType", "taskId"}
)  # only the server reads them again


def _check_masked(value: Any, passed: bytes, depth: int) -> None:
    match value:
        case dict():
            for name, member in value.items():
                if depth or name not in _LEFT_ALONE:
                    assert depth == 0 or _KEY_ID not in re.findall(r"\w+", name), passed
                    assert name != "pin" or member in ("[masked]", None), passed
                    _check_masked(member, passed, depth + 1)
        case list():
            for item in value:
                _check_masked(item, passed, depth + 1)
        case str():
            assert _KEY_ID not in re.findall(r"[A-Za-z0-9_]+", value), passed
            assert not re.match(r"x+y", value), passed


SECRETS: Final = tuple(
    b'{"jsonrpc":"2.0","id":7,"result":' + each + b"}"
    for each in (
        b'{"content":[{"type":"text","text":"key AKIAABCDEFGHIJKLMNOP, \\u0041KIAABCDEFGHIJKLMNOP\\n"}]}',
        b'{"content":[{"text":"{\\"pin\\":1,\\"t\\":\\"\\\\u0041KIAABCDEFGHIJKLMNOP\\"}"}],"structuredContent":{"pin":1,"a":[1]}}',
        b'{"x":{"AKIAABCDEFGHIJKLMNOP":[4111111111111111,"xxy","[z"],"pin":{"a":[]}},"requestState":"AKIAABCDEFGHIJKLMNOP"}',
        b'{ "pin" : "a@b.example" , "pin" : null, "y": "\\ud83d\\ude00 a@b.example \\\\\\"" }',
    )
)


def run_answer(data: bytes) -> str:
    """A response in pieces gives what it gives at once, and no client reads what must not be seen."""
    kind = (b"application/json", b"text/event-stream")[data[0] % 2 if data else 0]
    body = data[1:]
    outcomes = {_answered(kind, [body]), _answered(kind, [body[at : at + 5] for at in range(0, len(body), 5)])}
    passed = {each for each in outcomes if not each.startswith("refused")}
    assert len(passed) < 2, outcomes  # a refusal may come earlier or later, but nothing else may differ
    for each in passed:
        stream = each.encode("latin-1")
        for read in (_as_browsers, _as_go) if kind == b"text/event-stream" else (_as_one,):
            for document in read(stream):
                with contextlib.suppress(ValueError):
                    _check_shown(json.loads(document), stream)
    return min(outcomes)[:60]


def _as_one(body: bytes) -> list[str]:
    return [body.decode(errors="replace")]


def _as_browsers(stream: bytes) -> list[str]:
    """Read an event stream by the letter (WHATWG HTML, 9.2.6), as Python's and TypeScript's clients do."""
    text = stream.decode(errors="replace").removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return _dispatched(lines[:-1])  # what no line break ends is dropped


def _as_go(stream: bytes) -> list[str]:
    """Read an event stream as Go's client does: only a line feed ends a line, and the last event needs no end."""
    return _dispatched([*[line.rstrip("\r") for line in stream.decode(errors="replace").split("\n")], ""])


def _dispatched(lines: Sequence[str]) -> list[str]:
    found, data, kind = [], [], ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "event":
            kind = value
        elif not line:
            if data and kind.strip() in ("", "message"):
                found.append("\n".join(data))
            data, kind = [], ""
    return found


def _answered(kind: bytes, pieces: Sequence[bytes]) -> str:
    reader = Reader(permit=a_permit(a_request("tools/list")), engines=(OnlyA(),), tasks=tasks())
    answer = Answer(reader, _judge)
    passed = b""
    try:
        answer.begin(200, [(b"content-type", kind)])
        for piece in pieces:
            passed += answer.feed(piece)
        passed += answer.end()
    except Refusal as refusal:
        return f"refused {refusal.detail}"[:120]
    return passed.decode("latin-1")


# HTTP


class Transport(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.said = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        """Keep it."""
        self.said += bytes(data)

    def is_closing(self) -> bool:
        """Say whether it is closed."""
        return self.is_closed

    def close(self) -> None:
        """Close."""
        self.is_closed = True

    abort = close

    def can_write_eof(self) -> bool:
        """Have one direction only."""
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Know nothing."""
        return ("127.0.0.1", 1) if name == "peername" else default

    def pause_reading(self) -> None:
        """Be fed all the same."""

    def resume_reading(self) -> None:
        """Be fed all the same."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Have no buffer."""


class Recording:
    """A way to a server that answers nothing, and keeps what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Admission, Exchange, bytes]] = []

    def send(self, admission: Admission, exchange: Exchange, sink: Sink, *, traceparent: bytes) -> Call:
        """Keep the message, with the bytes that would go out."""
        call = Call(sink, _request(exchange, b"127.0.0.1:1", traceparent))
        self.sent.append((admission, exchange, call.request))
        return call

    def reply(self, exchange: Exchange, body: bytes, *, target: str | None = None) -> None:
        """Keep nothing."""


class Faults:
    """Keeps what was observed."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def observe(self, exchange: Exchange) -> None:
        """Keep it."""
        self.exchanges.append(exchange)


def run_http(data: bytes) -> str:
    """No bytes on a connection bring the sidecar into disorder, and only what was judged goes on, once and whole."""
    return _runner().run(_http(data))


@functools.cache
def _runner() -> asyncio.Runner:
    """One loop for all: a new one would take longer than what is looked at."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


async def _http(data: bytes) -> str:
    way, faults = Recording(), Faults()

    def spawn(work: Any) -> None:
        work.close()

    async def resolve(_: Any) -> Refusal | None:
        return None

    serving = Serving(upstream=way, observers=[faults], spawn=spawn, resolve=resolve, why_not_ready=lambda: None)
    serving.snapshot = a_snapshot(OnlyA(), limits=(Limit(name="l", rate_per_s=1000.0, burst=1000),))
    transport, inbound = Transport(), Inbound(serving, "127.0.0.1:1")
    inbound.connection_made(transport)
    step = data[0] if data else 0
    stream = data[1:]
    for at in range(0, len(stream), step or len(stream) or 1):
        if transport.is_closed:
            break
        inbound.data_received(stream[at : at + (step or len(stream))])
    await asyncio.sleep(0)
    inbound.connection_lost(None)
    for admission, exchange, request in way.sent:
        head, _, body = request.partition(b"\r\n\r\n")
        message = admission.permit.question.message
        assert body == exchange.connection.body, "other bytes went out than came"
        assert b"\n" not in head.replace(b"\r\n", b""), "a line within a line"
        assert head.count(b"\r\ncontent-length:") + head.count(b"\r\nContent-Length:") <= 1
        assert b"transfer-encoding" not in head.lower()
        if isinstance(message.target, Tool):
            assert message.target.name == "a"
            assert "b" not in {each.get("params", {}).get("name") for each in _listed(json.loads(body))}
    refusals = [each.refusal for each in faults.exchanges if each.refusal is not None]
    assert all(each.reason is not Reason.FAULT for each in refusals), [each.detail for each in refusals]
    if transport.said:
        assert transport.said.startswith(b"HTTP/1.1 "), transport.said[:80]
    return f"{len(way.sent)} {[each.public[:60] for each in refusals][:3]} {transport.said[9:12]!r}"


def _listed(document: Any) -> list[Any]:
    return document if isinstance(document, list) else [document]


def _posted(body: bytes, *headers: bytes) -> bytes:
    lines = (
        b"POST /mcp HTTP/1.1",
        b"Host: x",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
        *headers,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


REQUESTS: Final = (
    b"\x00" + _posted(a_call("a")),
    b"\x05" + _posted(a_call("b")),
    b"\x00" + _posted(a_call("a")) + _posted(a_call("b")),
    b"\x01" + _posted(MESSAGES[2], b"MCP-Protocol-Version: 2026-07-28", b"Mcp-Method: tools/call", b"Mcp-Name: a"),
    b"\x00" + _posted(MESSAGES[-1]),
    b"\x00" + _posted(MESSAGES[8]),
    b"\x00POST /mcp HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(a_call("a")), a_call("a")),
    b"\x00GET /mcp HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nLast-Event-ID: 7\r\n\r\n",
    b"\x00DELETE /mcp HTTP/1.1\r\nHost: x\r\nMcp-Session-Id: s\r\n\r\n",
    b"\x00OPTIONS /mcp HTTP/1.1\r\nHost: x\r\nOrigin: https://x.test\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    b"\x00" + _posted(a_call("a"), b"Expect: 100-continue", b"Connection: upgrade", b"Upgrade: h2c"),
    b"\x00" + _posted(a_call("a"), b"Authorization: Bearer e30.e30.e30", b"Forwarded: for=x", b"Mcp_Name: b"),
)


# Standard input and output


def run_stdio(data: bytes) -> str:
    """Lines do not depend on where the output was cut, and a message has one reading."""
    step, stream = (data[0] % 7 + 1 if data else 1), data[1:]
    whole = Lines(4096)
    pieces = Lines(4096)
    try:
        lines = whole.feed(stream)
        apart = [line for at in range(0, len(stream), step) for line in pieces.feed(stream[at : at + step])]
    except LineTooLong:
        return "too long"
    assert lines == apart
    outcomes = []
    for line in lines:
        found = read_line(line)
        outcomes.append("none" if found is None else str(found.shape))
        if found is not None:
            assert found.method == json.loads(line.decode(errors="replace")).get("method")
            assert found.code is None or isinstance(found.code, int)
            found.read_params()
    return f"{outcomes[:6]}"


OUTPUTS: Final = tuple(b"\x02" + each + b"\n" + other + b"\r\n" for each in ANSWERS for other in ANSWERS[3:5])


# Bundles

_KEY: Final = ec.derive_private_key(1234567, ec.SECP256R1())
_FILES: Final[Mapping[str, bytes]] = {
    "sidegate.json": profile.encode(
        profile.Profile(
            server=Server(namespace="n", workload="w", name="s", port=1), policies=(profile.PolicySet(cedar=True),)
        )
    ),
    "cedar/a.cedar": b"permit (principal, action, resource);",
}


def run_bundle(data: bytes) -> str:
    """Nothing but the signed files is ever taken from a bundle, however it is packed."""
    first, rest = data[:1], data[1:]
    packed = rest if first == b"z" else gzip.compress(rest, 1, mtime=0)
    try:
        taken = bundle.decode(packed, (_KEY.public_key(),))
    except BundleError as error:
        return _without_digits(error)
    assert dict(taken.files) == _FILES, "files that were not signed"
    return "taken"


def run_profile(data: bytes) -> str:
    """A profile is refused, or is the same when it is written and read again."""
    try:
        taken = profile.decode(data)
    except BundleError as error:
        return _without_digits(error)
    assert profile.decode(profile.encode(taken)) == taken
    return "taken"


# Tokens

_PROVIDER: Final = Provider(name="p", issuer="https://id.test", audiences=("a",))
_IDENTITY: Final = Identity(mtls="permissive", user="required", providers=(_PROVIDER,))
_JWK: Final[dict[str, Any]] = ECAlgorithm.to_jwk(_KEY.public_key(), as_dict=True)
_NOW: Final = datetime(2026, 11, 18, tzinfo=UTC)


def _token(data: bytes) -> bytes:
    """What starts like JSON is signed, header and claims in a line each: what only a good signature leads to."""
    if not data.startswith(b"{"):
        return data
    head, _, claims = data.partition(b"\n")
    text = base64url_encode(head) + b"." + base64url_encode(claims)
    return text + b"." + base64url_encode(ECAlgorithm(ECAlgorithm.SHA256).sign(text, _KEY))


@functools.cache
def _trust() -> Any:
    return trust(_IDENTITY, {"https://id.test": {"k": jwt.PyJWK(_JWK | {"alg": "ES256"})}})


def run_identity(data: bytes) -> str:
    """An access token with claims of any form is refused, or is of its own user."""
    token = _token(data)
    connection = a_connection(b"{}", headers=[(b"authorization", b"Bearer " + token)])
    try:
        principal = authenticate(connection, _trust(), _NOW.timestamp())
    except Refusal as refusal:
        return f"{said(refusal)} {type(refusal).__name__} {refusal.detail[:40]}"
    claims = json.loads(base64url_decode(token.split(b".")[1]))
    assert principal.user is not None
    assert (claims["iss"], claims["sub"]) == ("https://id.test", principal.user.id)
    assert claims["exp"] > _NOW.timestamp() - 60
    return f"taken {len(principal.user.roles)}"


def run_svid(data: bytes) -> str:
    """A workload's token with claims of any form is refused, or proves what it says."""
    token = _token(data)
    try:
        proof = verify_token(token.decode("latin-1"), _BUNDLES, "a", now=_NOW)
    except BadToken as error:
        return _without_digits(error)
    assert json.loads(base64url_decode(token.split(b".")[1]))["sub"] == str(proof.spiffe_id)
    return "taken"


_BUNDLES: Final = JwtBundles.parse(
    {"spiffe://a.test": json.dumps({"keys": [_JWK | {"kid": "k", "use": "jwt-svid"}]}).encode()}
)


def run_keys(data: bytes) -> str:
    """A JWK set of any form is taken or not."""
    bundles = JwtBundles.parse({"spiffe://a.test": data})
    return f"{len(bundles.domains)} {len(bundles.rejected_domains)}"


def run_dpop(data: bytes) -> str:
    """A proof with claims of any form is refused, or is for this very request."""
    connection = a_connection(b"{}", headers=[(b"dpop", _token(data))])
    try:
        check_proof(
            connection, b"x" * 32, thumbprint(_JWK), "https://s.test/mcp", Proofs(), _NOW.timestamp(), nonces=False
        )
    except Refusal as refusal:
        return f"{said(refusal)} {refusal.detail}"
    return "taken"


def run_oauth(data: bytes) -> str:
    """A provider's answer of any form gives a token, or is an error that quotes nothing of it."""
    try:
        issued = read_token(200, data, 0.0)
    except OAuthError as error:
        return str(error)[:80]
    assert 0 < issued.until_s < 10**9
    return "taken"


def _without_digits(error: Exception) -> str:
    return "".join(each for each in str(error) if not each.isdigit())[:80]


_CLAIMS: Final = {
    "iss": "https://id.test",
    "aud": "a",
    "sub": "u",
    "exp": int(_NOW.timestamp()) + 300,
    "iat": int(_NOW.timestamp()),
}
_PROVED: Final = {
    "htm": "POST", "htu": "https://s.test/mcp", "iat": int(_NOW.timestamp()), "jti": "j",
    "ath": base64url_encode(b"x" * 32).decode(),
}  # fmt: skip


def _seeds(typ: str, claims: Mapping[str, Any], **header: Any) -> list[bytes]:
    head = orjson.dumps({"alg": "ES256", "kid": "k", "typ": typ, **header})
    good = head + b"\n" + orjson.dumps(claims)
    odd = orjson.dumps(
        {**claims, "aud": ["a", 1, None], "roles": {"a": [1]}, "act": {"sub": {}}, "nbf": 1.5, "cnf": {}}
    )
    none = base64url_encode(b'{"alg":"none"}') + b"." + base64url_encode(orjson.dumps(claims)) + b"."
    return [good, head + b"\n" + odd, _token(good), none]


# Documents for the engines


@functools.cache
def _cedar() -> CedarEngine:
    text = (
        "permit (principal, action, resource) when { context has args && context.args has x && context.args.x == 1 };"
    )
    return CedarEngine({"a.cedar": text})


def run_engines(data: bytes) -> str:
    """Arguments of any form are put before both engines, or denied."""
    try:
        found = parse_any(data)
    except Refusal as refusal:
        return said(refusal)
    if not isinstance(found, Message) or found.shape is not Shape.REQUEST:
        return "no request"
    question = a_question(found)
    document = question.document()
    try:
        encoded = _encode(document)
    except (TypeError, ValueError) as error:  # RegoEngine.decide makes a denial of them
        encoded = b"null"
        outcome = type(error).__name__
    else:
        outcome = "rego"
    json.loads(encoded)
    verdict = _cedar().decide(question)
    arguments = found.target.arguments if isinstance(found.target, Tool) else {}
    with contextlib.suppress(Unspeakable):
        translate(document)
    if verdict.allowed:
        assert arguments.get("x") == 1, "allowed without its condition"
    return f"{outcome} {verdict.allowed} {'; '.join(verdict.errors)[:60]}"


DOCUMENTS: Final = (
    a_call("a", {"x": 1}),
    *MESSAGES[:6],
    a_call("a", {"x": 1, "__entity": {"type": "User", "id": "x"}}),
    a_call("a", {"x": {"__extn": {"fn": "decimal", "arg": "1.0"}}}),
    a_call("a", {"x": 2**62, "y": -(2**63), "z": [[[]]]}),
)


# The first bytes of a server's own connections


def run_opening(data: bytes) -> str:
    """Read the host by *data* whole and byte by byte; what passes is a name that rules can have, on the dialled port."""
    readings = []
    for pieces in ([data], [data[each : each + 1] for each in range(len(data))]):
        reader, host = opening(data[0] if data else 0, 80), None
        try:
            for piece in pieces:
                host = reader.feed(piece) if host is None or data[0] != HANDSHAKE else host
        except Barred as barred:
            readings.append(barred.why)
            assert reader.refusal(barred) is not None
        else:
            readings.append(host or "more")
            assert host is None or host_of(host) == host
    assert readings[0] == readings[1], f"read as {readings[0]} whole, as {readings[1]} byte by byte"
    return str(readings[0]) if isinstance(readings[0], Why) or readings[0] == "more" else "named"


def _hello() -> bytes:
    context, outgoing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.MemoryBIO()
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="api.example.com").do_handshake()
    return outgoing.read()


OPENINGS: Final = (
    b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
    b"POST http://api.example.com:80/x HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.0\r\nHost: api.example.com.\r\n\r\nGET / HTTP/1.1\r\nHost: b.example\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def _targets() -> Iterator[Target]:
    packed = bundle.encode(_FILES, _KEY)
    profiles = [_FILES["sidegate.json"], *(file.read_bytes() for file in _EXAMPLES.rglob("sidegate.json"))]
    yield Target(name="message", run=run_message, seeds=[b"\x02" + each for each in MESSAGES])
    yield Target(name="agreement", run=run_agreement, seeds=AGREEMENTS)
    yield Target(name="http", run=run_http, seeds=REQUESTS)
    yield Target(name="sse", run=run_sse, seeds=STREAMS)
    ways = (
        b"/messages?sessionId=1",
        b"http://127.0.0.1:8000/messages/?a=b",
        b"messages",
        b"?sessionId=1",
        b"//evil.test/x",
    )
    yield Target(name="endpoint", run=run_endpoint, seeds=ways)
    yield Target(name="review", run=run_review, seeds=ANSWERS)
    yield Target(name="content", run=run_content, seeds=[*SECRETS, *ANSWERS[5:]])
    yield Target(
        name="answer",
        run=run_answer,
        seeds=[
            *(b"\x00" + each for each in ANSWERS),
            *(b"\x01data: " + each + b"\n\n" for each in ANSWERS),
            *(b"\x01" + odd.replace(b"%", ANSWERS[0]) for odd in ODD_STREAMS),
        ],
    )
    yield Target(name="stdio", run=run_stdio, seeds=OUTPUTS)
    yield Target(name="engines", run=run_engines, seeds=DOCUMENTS)
    yield Target(name="identity", run=run_identity, seeds=_seeds("at+jwt", _CLAIMS))
    svid = {**_CLAIMS, "sub": "spiffe://a.test/ns/a/sa/b", "exp": int(_NOW.timestamp()) + 300}
    yield Target(name="svid", run=run_svid, seeds=_seeds("JWT", svid))
    yield Target(name="keys", run=run_keys, seeds=[orjson.dumps({"keys": [_JWK | {"kid": "k", "use": "jwt-svid"}]})])
    yield Target(name="dpop", run=run_dpop, seeds=_seeds("dpop+jwt", _PROVED, jwk=_JWK))
    yield Target(name="oauth", run=run_oauth, seeds=[b'{"access_token":"t","token_type":"Bearer","expires_in":60}'])
    yield Target(name="bundle", run=run_bundle, seeds=[b"z" + packed, b"t" + gzip.decompress(packed)])
    yield Target(name="opening", run=run_opening, seeds=[*OPENINGS, _hello()])
    yield Target(name="profile", run=run_profile, seeds=profiles)


_EXAMPLES: Final = Path(__file__).parents[2] / "examples"
TARGETS: Final = tuple(_targets())
