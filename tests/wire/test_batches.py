"""Batches of 2025-03-26 against a server that takes them: all of a body's messages pass, or none does."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from sidecar.core.profile import Limit
from sidecar.errors import Reason
from sidecar.exchange import Exchange
from sidecar.record import line
from tests.builders import a_snapshot
from tests.fakes import Heard, a_path, a_server, allowing, post, response

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
VERSION = "MCP-Protocol-Version: 2025-03-26"


class BatchServer:
    """Answers every request of a body: as one JSON array, as an event each, or as one event with an array."""

    def __init__(self, form: str) -> None:
        self.form = form

    async def __call__(self, heard: Heard, writer: asyncio.StreamWriter) -> None:
        """Answer."""
        answers = [self.answer(each) for each in json.loads(heard.body) if "method" in each and "id" in each]
        if not answers:
            writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
        elif self.form == "array":
            writer.write(response(json.dumps(answers).encode()))
        else:
            events = answers if self.form == "events" else [answers]
            writer.write(STREAM + b"".join(chunk(each) for each in events) + b"0\r\n\r\n")

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the response to *request*."""
        if request["method"] == "tools/list":
            result: dict[str, Any] = {"tools": [{"name": "a"}, {"name": "b"}]}
        else:
            result = {"content": [{"type": "text", "text": request["params"]["name"]}]}
        return {"jsonrpc": "2.0", "id": request["id"], "result": result}


def chunk(data: Any) -> bytes:
    """An event as a chunk."""
    event = f"data: {json.dumps(data)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def a_call(request_id: int | str, name: str) -> dict[str, Any]:
    """A request."""
    return {"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": {"name": name}}


LIST = {"jsonrpc": "2.0", "id": "l", "method": "tools/list"}
NOTE = {"jsonrpc": "2.0", "method": "notifications/initialized"}


async def exchange_batch(
    server: Any, batch: Sequence[dict[str, Any]], *headers: str, limits: Sequence[Limit] = ()
) -> tuple[Heard, list[Heard], list[Exchange], bytes]:
    """Send *batch* through the sidecar; gives the answer, what the server heard, the records, and what was sent."""
    body = json.dumps(batch, indent=1).encode()
    async with (
        a_server(server) as (fake, port),
        a_path(a_snapshot(allowing("a"), port=port, limits=limits)) as path,
    ):
        client = await path.dial()
        await client.say(post(body, *(headers or (VERSION,))))
        answer = await client.hear()
        await client.close()
    assert answer is not None
    return answer, fake.heard, path.exchanges, body


@pytest.mark.parametrize("form", ["array", "events", "event of an array"])
@pytest.mark.parametrize("headers", [(), ("X: no revision said",)])
async def test_a_batch_passes_whole(form: str, headers: tuple[str, ...]) -> None:
    """As the very bytes; each message has its own record, and lists are filtered in every form of answer."""
    batch = [LIST, a_call(1, "a"), NOTE, a_call(2, "a")]
    answer, heard, exchanges, body = await exchange_batch(BatchServer(form), batch, *headers)
    events = [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: ")]
    answers = {"array": lambda: json.loads(answer.body), "events": lambda: events}.get(form, lambda: events[0])()

    assert [each.body for each in heard] == [body]
    assert [each["id"] for each in answers] == ["l", 1, 2]
    assert answers[0]["result"]["tools"] == [{"name": "a"}]
    assert [(each.message and each.message.id, each.hidden) for each in exchanges] == [
        ("l", 1),
        (1, 0),
        (None, 0),
        (2, 0),
    ]
    assert [each.result is not None and json.loads(each.result)["id"] for each in exchanges] == ["l", 1, False, 2]
    assert {orjson.loads(line(each))["decision"]["outcome"] for each in exchanges} == {"allowed"}
    assert len({each.span_id for each in exchanges}) == 4


async def test_one_that_is_refused_holds_all_back() -> None:
    """Nothing is sent; each request is told why it was not, and the notification needs no answer."""
    batch = [a_call(1, "a"), NOTE, a_call(2, "b"), {"jsonrpc": "2.0", "id": 3, "method": "x"}]
    answer, heard, exchanges, _ = await exchange_batch(BatchServer("array"), batch)
    errors = {each["id"]: each["error"] for each in json.loads(answer.body)}

    assert (answer.line, heard) == (b"HTTP/1.1 200 OK", [])
    assert {key: error["data"]["reason"] for key, error in errors.items()} == {
        1: "not_sent",
        2: "denied",
        3: "unknown_method",
    }
    assert errors[1]["message"] == "not sent: another message of the batch was refused"
    assert [each.refusal and each.refusal.reason for each in exchanges] == [
        Reason.NOT_SENT,
        Reason.NOT_SENT,
        Reason.DENIED,
        Reason.UNKNOWN_METHOD,
    ]
    assert {orjson.loads(line(each))["decision"]["outcome"] for each in exchanges} == {"refused"}


async def test_a_limit_counts_each_call_of_a_batch() -> None:
    """A batch is no way around it, and one that is refused takes nothing."""
    limit = Limit(name="calls", rate_per_s=1e-6, burst=2)
    answer, heard, exchanges, _ = await exchange_batch(
        BatchServer("array"), [a_call(number, "a") for number in range(3)], limits=[limit]
    )

    assert heard == []
    assert [each["error"]["code"] for each in json.loads(answer.body)] == [424, 424, 429]
    assert answer.values(b"retry-after") != []
    assert all(each.admission is None for each in exchanges)


@pytest.mark.parametrize("version", ["2024-11-05", "2025-06-18", "2025-11-25"])
async def test_other_revisions_have_no_batches(version: str) -> None:
    """Some servers run them all the same."""
    answer, heard, _, _ = await exchange_batch(
        BatchServer("array"), [a_call(1, "a")], f"MCP-Protocol-Version: {version}"
    )

    assert (answer.line.split()[1], heard) == (b"400", [])


async def test_a_batch_that_the_server_does_not_answer_is_answered() -> None:
    """By an error for each request; those that were answered already keep their answer."""

    async def cut(heard: Heard, writer: asyncio.StreamWriter) -> None:
        if heard.body.startswith(b"["):
            writer.write(STREAM + chunk({"jsonrpc": "2.0", "id": 1, "result": {}}))
            await writer.drain()
            writer.close()

    async def vanish(heard: Heard, writer: asyncio.StreamWriter) -> None:
        if heard.body.startswith(b"["):
            writer.close()

    batch = [a_call(1, "a"), NOTE, a_call(2, "a")]
    half, _, halves, _ = await exchange_batch(cut, batch)
    none, _, nothing, _ = await exchange_batch(vanish, batch)
    events = [json.loads(line[6:]) for line in half.body.split(b"\n") if line.startswith(b"data: ")]

    assert [(each["id"], "error" in each) for each in events] == [(1, False), (2, True)]
    assert [each.refusal and each.refusal.reason for each in halves] == [None, Reason.UPSTREAM, Reason.UPSTREAM]
    assert [(each["id"], each["error"]["code"]) for each in json.loads(none.body)] == [(1, -32603), (2, -32603)]
    assert {each.refusal and each.refusal.reason for each in nothing} == {Reason.UPSTREAM}


async def test_a_batch_of_answers_is_acknowledged() -> None:
    """Nobody asked for these, so they are dropped; a 4xx would end the session of older clients."""
    batch = [{"jsonrpc": "2.0", "id": 5, "result": {}}, NOTE]
    answer, heard, exchanges, _ = await exchange_batch(BatchServer("array"), batch)

    assert (answer.line.split()[1], answer.body, heard) == (b"202", b"", [])
    assert [each.refusal and each.refusal.reason for each in exchanges] == [Reason.UNSOLICITED, Reason.NOT_SENT]
