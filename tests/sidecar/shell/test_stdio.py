"""sidecar.shell.stdio: HTTP outside, processes inside; each client gets its own answers, and no process outlives its use."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import orjson
import pytest

from sidecar.core.revision import CAPABILITIES, VERSION
from sidecar.errors import Reason
from sidecar.shell import stdio, turnaround
from sidecar.shell.stdio import Stdio
from tests.builders import a_snapshot
from tests.fakes import Client, FakeEngine, Heard, Path, a_path, allowing, eventually, post
from tests.relays import is_alive, relayed

PROGRAM = (sys.executable, "-I", "-S", str(File(__file__).with_name("line_server.py")))
ACCEPT = "Accept: application/json, text/event-stream"
MODERN = "2026-07-28"


@dataclass
class Governed:
    """The path with a stdio server behind it, and what a client does."""

    path: Path
    stdio: Stdio

    async def post(self, document: Any, *headers: str) -> Heard:
        """Send one message on a connection of its own; return the whole response."""
        client = await self.path.dial()
        await client.say(post(orjson.dumps(document), ACCEPT, *headers))
        heard = await client.hear()
        await client.close()
        assert heard is not None
        return heard

    async def open(self, name: str = "test") -> str:
        """Begin a session; return its id."""
        heard = await self.post(initialize(name))
        assert heard.line == b"HTTP/1.1 200 OK"
        (session_id,) = heard.values(b"mcp-session-id")
        note = await self.post({"jsonrpc": "2.0", "method": "notifications/initialized"}, *session(session_id.decode()))
        assert note.line == b"HTTP/1.1 202 Accepted"
        return session_id.decode()

    async def read(self, do: str, session_id: str, *, request_id: int | str = 7, **params: Any) -> Heard:
        """Have the server of a session do something; return the whole response."""
        return await self.post(request(do, request_id, **params), *session(session_id))

    async def get(self, session_id: str, *headers: str) -> Client:
        """Open a session's stream."""
        client = await self.path.dial()
        lines = ["GET /mcp HTTP/1.1", "Host: billing.test", "Accept: text/event-stream", *session(session_id), *headers]
        await client.say("\r\n".join([*lines, "", ""]).encode())
        return client

    async def delete(self, session_id: str) -> Heard:
        """End a session."""
        client = await self.path.dial()
        lines = ["DELETE /mcp HTTP/1.1", "Host: billing.test", *session(session_id), "", ""]
        await client.say("\r\n".join(lines).encode())
        heard = await client.hear()
        await client.close()
        assert heard is not None
        return heard

    @property
    def processes(self) -> int:
        """How many there are, those that are ending included."""
        return len(self.stdio._processes)


def session(session_id: str) -> tuple[str, ...]:
    """The headers of a message within a session."""
    return (f"Mcp-Session-Id: {session_id}", "MCP-Protocol-Version: 2025-11-25")


def initialize(name: str = "test", request_id: int | str = 0) -> dict[str, Any]:
    """The first message of a session."""
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": name, "version": "1"}}
    return {"jsonrpc": "2.0", "id": request_id, "method": "initialize", "params": params}


def request(do: str, request_id: int | str = 7, **params: Any) -> dict[str, Any]:
    """A request for tests/sidecar/shell/line_server.py."""
    return {"jsonrpc": "2.0", "id": request_id, "method": "resources/read", "params": {"uri": do, **params}}


def modern(do: str, request_id: int | str = 7, **meta: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The same without a session (MCP 2026-07-28), and its headers."""
    document = request(do, request_id, _meta={VERSION: MODERN, CAPABILITIES: {}, **meta})
    return document, (f"MCP-Protocol-Version: {MODERN}", "Mcp-Method: resources/read", f"Mcp-Name: {do}")


def result(heard: Heard) -> Any:
    """The JSON result of a response."""
    assert heard.values(b"content-type") == [b"application/json"], heard
    return json.loads(heard.body)["result"]


def events(body: bytes) -> list[Any]:
    """The messages of a stream."""
    return [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]


@asynccontextmanager
async def governed(
    engine: FakeEngine | None = None,
    *,
    command: tuple[str, ...] = PROGRAM,
    port: int | None = None,
    most: int = 8,
    idle_s: float = 600,
    **server: Any,
) -> AsyncIterator[Governed]:
    """The path in front of *command*, or of the relay on *port*."""
    made: list[Stdio] = []

    def make(spawn: Callable[..., object]) -> Stdio:
        made.append(Stdio("127.0.0.1", spawn, command=() if port else command, max_processes=most, idle_s=idle_s))
        return made[0]

    snapshot = a_snapshot(engine or allowing(), transport="stdio", port=port or 1, **server)
    async with asyncio.timeout(60), a_path(snapshot, make_stdio=make) as path:
        yield Governed(path, made[0])
        leftovers = tuple(made[0]._processes)
    assert made[0]._processes == set()
    for each in leftovers:
        pid = getattr(each.pipe, "pid", 0)
        assert not (pid and is_alive(pid))


async def test_a_session_is_a_process() -> None:
    """Two sessions are two; what is asked within one is answered by its own."""
    async with governed() as it:
        one, two = await it.open(), await it.open()
        pids = [result(await it.read("answer", each))["pid"] for each in (one, two, one)]

        assert pids[0] == pids[2] != pids[1]
        assert it.processes == 2


async def test_the_judged_bytes_reach_the_process() -> None:
    """A pretty-printed body arrives on one line and means the same."""
    async with governed() as it:
        session_id = await it.open()
        client = await it.path.dial()
        body = (
            json.dumps(request("answer", 'ä\u2028\n"x"'), indent=2, ensure_ascii=False).replace("\n", "\r\n").encode()
        )
        await client.say(post(body, ACCEPT, *session(session_id)))
        heard = await client.hear()
        await client.close()

    assert heard is not None
    answer = json.loads(heard.body)
    assert answer["id"] == answer["result"]["heard"]["id"] == 'ä\u2028\n"x"'


async def test_progress_makes_the_answer_a_stream() -> None:
    """Each event at once, the result last."""
    async with governed() as it:
        session_id = await it.open()
        heard = await it.read("progress", session_id, _meta={"progressToken": "t"})

    assert heard.values(b"content-type") == [b"text/event-stream"]
    assert [each.get("method") for each in events(heard.body)] == ["notifications/progress"] * 3 + [None]
    assert events(heard.body)[-1]["id"] == 7


async def test_what_belongs_to_no_request_goes_to_the_stream_of_the_session() -> None:
    """And, without one, with the answer that is under way."""
    async with governed() as it:
        session_id, other = await it.open(), await it.open()
        heard = await it.read("log", session_id)
        assert [each.get("method") for each in events(heard.body)] == ["notifications/message", None]

        stream, others = await it.get(session_id), await it.get(other)
        await stream.until(b"\r\n\r\n")
        await others.until(b"\r\n\r\n")
        heard = await it.read("log", session_id)
        assert result(heard)["heard"]["params"]["uri"] == "log"
        assert b'"said aloud"' in await stream.until(b"\n\n\r\n")
        assert (await it.delete(other)).line == b"HTTP/1.1 200 OK"
        assert await others.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        for each in (stream, others):
            await each.close()


async def test_the_server_asks_the_client_and_hears_its_answer() -> None:
    """A request of the server's passes to the stream, the client's response to the process."""
    async with governed() as it:
        session_id = await it.open()
        stream = await it.get(session_id)
        await stream.until(b"\r\n\r\n")
        await it.read("ask", session_id)
        assert events(await stream.until(b"\n\n\r\n"))[0]["method"] == "roots/list"
        answer = {"jsonrpc": "2.0", "id": "ask-1", "result": {"roots": []}}
        assert (await it.post(answer, *session(session_id))).line == b"HTTP/1.1 202 Accepted"
        assert events(await stream.until(b"\n\n\r\n"))[0]["params"]["data"] == answer
        await stream.close()


async def test_garbage_is_dropped_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """A banner on standard output is the most usual mistake."""
    async with governed() as it:
        session_id = await it.open()
        assert result(await it.read("garbage", session_id))["heard"]["id"] == 7

    dropped = [record for record in caplog.records if "dropped a line" in record.message]
    assert [record.__dict__["line"] for record in dropped] == ["npm WARN this is a banner", "{"]


async def test_standard_error_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Line by line; it is no part of the protocol."""
    caplog.set_level("INFO")
    async with governed() as it:
        session_id = await it.open()
        await it.read("stderr", session_id)
        await eventually(
            lambda: "a word to the operator" in [each.__dict__.get("stderr") for each in caplog.records], what="the log"
        )


async def test_a_process_that_dies_is_answered_for_and_its_session_ends() -> None:
    """An error with the id, then 404: clients open another session."""
    async with governed() as it:
        session_id = await it.open()
        stream = await it.get(session_id)
        await stream.until(b"\r\n\r\n")
        hanging = await it.path.dial()
        await hanging.say(post(orjson.dumps(request("hang", 8)), ACCEPT, *session(session_id)))
        heard = await it.read("die", session_id)
        other = await hanging.hear()

        assert other is not None
        for each, request_id in ((heard, 7), (other, 8)):
            assert each.line == b"HTTP/1.1 200 OK"
            assert (json.loads(each.body)["id"], json.loads(each.body)["error"]["code"]) == (request_id, -32603)
        assert await stream.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        assert (await it.read("answer", session_id)).line == b"HTTP/1.1 404 Not Found"
        assert result(await it.read("answer", await it.open()))
        for client in (hanging, stream):
            await client.close()
        refused = [each.refusal for each in it.path.exchanges if each.refusal]

    assert {(each.reason, each.detail) for each in refused[:2]} == {
        (Reason.UPSTREAM, "the process is gone: exit status 3")
    }


async def test_delete_ends_the_process() -> None:
    """Nothing of it is left, and the session is not open any more."""
    async with governed() as it:
        session_id = await it.open()
        pid = result(await it.read("answer", session_id))["pid"]
        assert (await it.delete(session_id)).line == b"HTTP/1.1 200 OK"
        await eventually(lambda: not is_alive(pid), what="the end of the process")
        await eventually(lambda: it.processes == 0, what="the end of its record")
        assert (await it.read("answer", session_id)).line == b"HTTP/1.1 404 Not Found"


async def test_a_command_that_cannot_run_is_answered_for() -> None:
    """The caller gets an error with its id, the operator the reason."""
    async with governed(command=("/no/such/server",)) as it:
        heard = await it.post(initialize())
        (exchange,) = it.path.exchanges

    assert (json.loads(heard.body)["id"], json.loads(heard.body)["error"]["code"]) == (0, -32603)
    assert exchange.refusal is not None
    assert "No such file" in exchange.refusal.detail


async def test_an_unwelcome_client_has_no_session() -> None:
    """Its process ends with the answer."""
    async with governed() as it:
        heard = await it.post(initialize("unwelcome"))
        await eventually(lambda: it.processes == 0, what="the end of the process")

    assert json.loads(heard.body)["error"]["message"] == "not you"
    assert heard.values(b"mcp-session-id") == []


async def test_no_more_processes_than_allowed() -> None:
    """The next client is told when to come again; those that are there go on; a place that is free is given."""
    async with governed(most=2) as it:
        one, two = await it.open(), await it.open()
        refused = json.loads((await it.post(initialize())).body)
        assert (refused["id"], refused["error"]["code"]) == (0, 429)
        assert refused["error"]["data"]["retryAfterSeconds"] == stdio.RETRY_S
        assert result(await it.read("answer", one))
        assert it.path.exchanges[-2].refusal is not None
        assert "SIDEGATE_MAX_PROCESSES" in it.path.exchanges[-2].refusal.detail
        await it.delete(two)
        await eventually(lambda: it.processes == 1, what="a free place")
        assert await it.open()


async def test_an_unused_process_ends_and_one_with_a_stream_does_not() -> None:
    """A client that listens is still there."""
    async with governed(idle_s=0.3) as it:
        unused, used = await it.open(), await it.open()
        stream = await it.get(used)
        await stream.until(b"\r\n\r\n")
        await eventually(lambda: it.processes == 1, what="the end of the unused process")
        assert (await it.read("answer", unused)).line == b"HTTP/1.1 404 Not Found"
        assert result(await it.read("answer", used))
        await stream.close()
        await eventually(lambda: it.processes == 0, what="the end of the other")


async def test_a_line_without_end_ends_the_process() -> None:
    """What follows could not be told from it."""
    async with governed() as it:
        session_id = await it.open()
        heard = await it.read("endless", session_id)

        assert json.loads(heard.body)["error"]["code"] == -32603
        assert it.path.exchanges[-1].refusal is not None
        assert "a line of more than" in it.path.exchanges[-1].refusal.detail
        assert (await it.read("answer", session_id)).line == b"HTTP/1.1 404 Not Found"


async def test_a_process_that_does_not_read_is_not_fed_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is told; memory is not filled."""
    monkeypatch.setattr(stdio, "MAX_UNREAD_BYTES", 100_000)
    async with governed() as it:
        session_id = await it.open()
        waiting = []
        for number in range(20):
            client = await it.path.dial()
            body = orjson.dumps(request("deaf", number, filler="x" * 50_000))
            await client.say(post(body, ACCEPT, *session(session_id)))
            waiting.append(client)
        await eventually(lambda: it.path.exchanges[2:], what="a refusal")
        assert it.path.exchanges[-1].refusal is not None
        assert it.path.exchanges[-1].refusal.detail == "it does not read its input"
        for client in waiting:
            await client.close()


async def test_a_client_that_disconnects_cancels_nothing_before_2026() -> None:
    """The process is told nothing, and its late answer disturbs nobody."""
    async with governed() as it:
        session_id = await it.open()
        client = await it.path.dial()
        await client.say(post(orjson.dumps(request("hang", 1)), ACCEPT, *session(session_id)))
        await eventually(lambda: len(it.path.serving.connections) == 1, what="the call")
        await client.close()
        await eventually(lambda: it.path.exchanges[-1].aborted, what="its end")
        ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
        heard = result(await it.post(ping, *session(session_id)))["heard"]

    assert [each["method"] for each in heard] == ["initialize", "notifications/initialized", "resources/read", "ping"]


async def test_a_session_belongs_to_the_one_it_was_given_to() -> None:
    """Without an id there is none; a made-up one is not found."""
    async with governed() as it:
        await it.open()
        missing = await it.post(request("answer"))
        assert b"Mcp-Session-Id is missing" in missing.body
        assert (await it.read("answer", "made-up")).line == b"HTTP/1.1 404 Not Found"


async def test_a_client_that_cannot_read_streams_is_told_so() -> None:
    """Before anything is sent."""
    async with governed() as it:
        client = await it.path.dial()
        await client.say(post(orjson.dumps(initialize()), "Accept: application/json"))
        heard = await client.hear()
        await client.close()

        assert heard is not None
        assert b"Accept must list application/json and text/event-stream" in heard.body
        assert it.processes == 0


async def test_stateless_requests_share_a_process() -> None:
    """Equal ids of two clients get their own answers; tokens come back as they were."""
    async with governed() as it:
        heard = await asyncio.gather(*(it.post(*_flat(modern("progress", 1, progressToken=f"t{n}"))) for n in range(5)))
        streams = [events(each.body) for each in heard]

        assert it.processes == 1
    assert [stream[-1]["id"] for stream in streams] == [1] * 5
    assert len({stream[-1]["result"]["pid"] for stream in streams}) == 1
    for number, stream in enumerate(streams):
        assert {each["params"]["progressToken"] for each in stream[:-1]} == {f"t{number}"}


def _flat(message: tuple[dict[str, Any], tuple[str, ...]]) -> tuple[Any, ...]:
    return message[0], *message[1]


async def test_a_stateless_client_that_disconnects_cancels() -> None:
    """MCP 2026-07-28: the process hears of it by the id that it knows."""
    async with governed() as it:
        document, headers = modern("hang", "mine")
        client = await it.path.dial()
        await client.say(post(orjson.dumps(document), ACCEPT, *headers))
        await eventually(lambda: it.processes, what="the call")
        (process,) = it.stdio._processes
        await eventually(lambda: process.pipe is not None, what="the process")
        await client.close()
        await eventually(lambda: it.path.exchanges, what="its end")
        document, headers = modern("history")
        heard = result(await it.post(document, *headers))["heard"]

    assert [each["method"] for each in heard] == ["resources/read", "notifications/cancelled", "resources/read"]
    assert heard[1]["params"]["requestId"] == heard[0]["id"] != "mine"


async def test_a_stateless_error_has_its_status() -> None:
    """MCP 2026-07-28, transports: an unknown method is a 404, with the error in it."""
    async with governed() as it:
        document, headers = modern("fail")
        heard = await it.post(document, *headers)

    assert heard.line == b"HTTP/1.1 404 Not Found"
    assert json.loads(heard.body)["error"] == {"code": -32601, "message": "no"}


async def test_a_shared_process_serves_all_sessions() -> None:
    """It is initialized once; each session has its own id, and ends alone."""
    async with governed(processes="shared") as it:
        one, two = await it.open("one"), await it.open("two")
        answers = await asyncio.gather(*(it.read("answer", each, request_id=1) for each in (one, two) for _ in "xyz"))
        assert len({result(each)["pid"] for each in answers}) == 1
        assert it.processes == 1
        await it.delete(one)
        assert (await it.read("answer", one)).line == b"HTTP/1.1 404 Not Found"
        ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
        heard = result(await it.post(ping, *session(two)))["heard"]

    assert [each["method"] for each in heard].count("initialize") == 1
    assert [each["method"] for each in heard].count("notifications/initialized") == 1


async def test_a_shared_process_tells_all_that_its_lists_changed_and_asks_nobody() -> None:
    """A log line, which could be about another, goes to nobody."""
    async with governed(processes="shared") as it:
        one, two = await it.open("one"), await it.open("two")
        streams = [await it.get(each) for each in (one, two)]
        for stream in streams:
            await stream.until(b"\r\n\r\n")
        for do in ("log", "ask", "changed"):
            assert result(await it.read(do, one))
        for stream in streams:
            assert events(await stream.until(b"\n\n\r\n"))[0]["method"] == "notifications/tools/list_changed"
            await stream.close()


async def test_a_slow_client_of_a_shared_process_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, with a bound on what waits for it."""
    monkeypatch.setattr(turnaround, "MAX_OWED_BYTES", 100_000)
    async with governed(processes="shared") as it:
        slow, quick = await it.open("slow"), await it.open("quick")
        client = await it.path.dial()
        await client.say(post(orjson.dumps(request("progress", 1, _meta={"progressToken": 1})), ACCEPT, *session(slow)))
        await client.hear()
        await client.say(post(orjson.dumps(request("large", 2, bytes=8_000_000)), ACCEPT, *session(slow)))
        answers = [result(await it.read("answer", quick, request_id=number)) for number in range(5)]
        assert len(answers) == 5
        await client.close()


async def test_a_slow_client_of_its_own_process_holds_it_back() -> None:
    """The process waits; the answer comes whole when the client reads on."""
    async with governed() as it:
        session_id = await it.open()
        client = await it.path.dial()
        await client.say(post(orjson.dumps(request("large", 1, bytes=6_000_000)), ACCEPT, *session(session_id)))
        await client.until(b"\r\n\r\n")
        await asyncio.sleep(0)
        body = await client.reader.readexactly(6_000_000)
        assert body.startswith(b'{"jsonrpc"')
        await client.close()


async def test_a_batch_is_a_line_for_each_message() -> None:
    """Servers on a pipe need know nothing of batches; each answer is an event."""
    async with governed() as it:
        session_id = await it.open()
        batch: list[Mapping[str, Any]] = [
            request("answer", 1),
            {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"},
            request("answer", 2),
        ]
        heard = await it.post(batch, f"Mcp-Session-Id: {session_id}", "MCP-Protocol-Version: 2025-03-26")

    assert [each["id"] for each in events(heard.body)] == [1, 2]


async def test_a_batch_for_a_session_that_is_gone_is_answered_once() -> None:
    """As a single message would be; nothing of it is recorded as allowed."""
    async with governed() as it:
        session_id = await it.open()
        await it.read("die", session_id)
        headers = (f"Mcp-Session-Id: {session_id}", "MCP-Protocol-Version: 2025-03-26")
        heard = await it.post([request("answer", 1), request("answer", 2)], *headers)
        refused = [each for each in it.path.exchanges if each.refusal and each.refusal.reason is Reason.NOT_FOUND]

    assert heard.line in (b"HTTP/1.1 404 Not Found", b"HTTP/1.1 200 OK")
    assert heard.body.count(b'"error"') in (1, 2)
    assert len(refused) == 2
    assert all(each.admission is None for each in refused)


async def test_through_the_relay_it_is_the_same() -> None:
    """A connection is a process; DELETE ends it; the relay's end is everybody's."""
    async with relayed(*PROGRAM) as port, governed(port=port) as it:
        one, two = await it.open(), await it.open()
        pids = [result(await it.read("answer", each))["pid"] for each in (one, two)]
        assert len(set(pids)) == 2
        await it.delete(one)
        await eventually(lambda: not is_alive(pids[0]), what="the end of the process")
        heard = await it.read("die", two)
        assert json.loads(heard.body)["error"]["code"] == -32603
        assert (await it.read("answer", two)).line == b"HTTP/1.1 404 Not Found"
        assert result(await it.read("answer", await it.open()))


async def test_a_relay_that_is_not_there_is_answered_for() -> None:
    """As a server that is not there."""
    async with governed(port=1) as it:
        heard = await it.post(initialize())

    assert (json.loads(heard.body)["id"], json.loads(heard.body)["error"]["code"]) == (0, -32603)
