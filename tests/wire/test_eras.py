"""Both eras over real sockets: what reaches a server of either, and how a refusal looks to its clients."""

import asyncio
import base64
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from sidecar.core.replies import Denied
from sidecar.errors import Reason
from tests.builders import a_request, a_snapshot
from tests.fakes import Heard, a_path, a_server, allowing, post, response

MODERN = "2026-07-28"
META = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {"extensions": {"io.modelcontextprotocol/tasks": {}}},
}
VERSION = f"MCP-Protocol-Version: {MODERN}"
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{"content":[]}}'


async def answering(heard: Heard, writer: asyncio.StreamWriter) -> None:
    """A server that runs whatever it gets."""
    writer.write(response(RESULT, headers=["Mcp-Session-Id: s1"]) if b"initialize" in heard.body else response(RESULT))


def modern(method: str = "tools/call", **params: Any) -> bytes:
    """A request of 2026-07-28."""
    return a_request(method, {**params, "_meta": META})


def code_of(answer: Heard) -> tuple[int, int | None]:
    """HTTP status and JSON-RPC code of *answer*."""
    body = json.loads(answer.body) if answer.body else {}
    return int(answer.line.split()[1]), body.get("error", {}).get("code")


async def told(*requests: bytes, denied: Denied = "error") -> tuple[list[Heard], list[Heard], list[Reason | None]]:
    """Send *requests* one after the other; gives the answers, what the server heard, and why what was refused."""
    async with a_server(answering) as (server, port):
        snapshot = a_snapshot(allowing("a", "\u00fc"), port=port)
        snapshot = replace(snapshot, profile=msgspec.structs.replace(snapshot.profile, denied=denied))
        async with a_path(snapshot) as path:
            client = await path.dial()
            answers = []
            for request in requests:
                await client.say(request)
                answer = await client.hear()
                assert answer is not None
                answers.append(answer)
            await client.close()
    return answers, server.heard, [None if each.refusal is None else each.refusal.reason for each in path.exchanges]


@pytest.mark.parametrize(
    ("request_", "status", "code", "reason"),
    [
        (post(modern(name="a"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: a"), 200, None, None),
        (post(modern(name="b"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: b"), 200, 403, Reason.DENIED),
        (post(modern(name="a"), VERSION, "Mcp-Method: tools/call"), 400, -32020, Reason.HEADER_MISMATCH),
        (post(modern(name="a"), VERSION, "Mcp-Name: a"), 400, -32020, Reason.HEADER_MISMATCH),
        (post(modern(name="a"), VERSION, "Mcp-Method: tools/list", "Mcp-Name: a"), 400, -32020, Reason.HEADER_MISMATCH),
        (post(modern(name="b"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: a"), 400, -32020, Reason.HEADER_MISMATCH),
        (
            post(modern(name="a"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: a", "Mcp-Name: b"),
            400,
            -32020,
            Reason.HEADER_MISMATCH,
        ),
        (post(modern(name="a"), "Mcp-Method: tools/call", "Mcp-Name: a"), 400, -32020, Reason.HEADER_MISMATCH),
        (post(modern(name="a"), "MCP-Protocol-Version: 2025-11-25"), 400, -32020, Reason.HEADER_MISMATCH),
        (post(a_request("tools/call", {"name": "a"}), VERSION), 400, -32602, Reason.MALFORMED),
        (post(modern("tools/destroy"), VERSION), 404, -32601, Reason.UNKNOWN_METHOD),
        (post(modern("tasks/get", taskId="t"), VERSION, "Mcp-Method: tasks/get"), 400, -32602, Reason.UNKNOWN_TASK),
        (post(a_request("tasks/get", {"taskId": "t"})), 200, -32602, Reason.UNKNOWN_TASK),
        (post(a_request("tools/destroy")), 200, -32601, Reason.UNKNOWN_METHOD),
        (post(a_request("tools/call", {"name": "a"}), "Mcp-Name: b"), 400, -32020, Reason.HEADER_MISMATCH),
        (
            post(a_request("tools/call", {"name": "a"}), "MCP-Protocol-Version: 1.0"),
            400,
            -32600,
            Reason.UNSUPPORTED_VERSION,
        ),
        (post(a_request("ping"), "MCP-Protocol-Version: 2030-01-01"), 400, -32022, Reason.UNSUPPORTED_VERSION),
        (post(b'{"jsonrpc":"2.0","id":1,"result":{}}'), 202, None, Reason.UNSOLICITED),
        (
            post(b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}'),
            202,
            None,
            Reason.UNSOLICITED,
        ),
    ],
)
async def test_each_refusal_has_its_eras_shape(
    request_: bytes, status: int, code: int | None, reason: Reason | None
) -> None:
    """And reaches nobody; the record says why."""
    answers, heard, reasons = await told(request_)

    assert (code_of(answers[0]), reasons) == ((status, code), [reason])
    assert len(heard) == (1 if reason is None else 0)


async def test_headers_are_forwarded_as_they_came() -> None:
    """Decoded to be compared only: Go's server does not decode them at all."""
    name = "=?base64?" + base64.b64encode("\u00fc".encode()).decode() + "?="
    body = modern(name="\u00fc")
    _, heard, _ = await told(
        post(body, VERSION, "Mcp-Method: tools/call", f"Mcp-Name: {name}", "Mcp-Param-X: =?base64?!?=")
    )

    assert heard[0].body == body
    assert (heard[0].values(b"mcp-name"), heard[0].values(b"mcp-param-x")) == ([name.encode()], [b"=?base64?!?="])


async def test_a_stateless_message_enters_nobodys_session() -> None:
    """A server of 2025-03-26 would look at nothing but the session's id, and nobody proved whose that is."""
    call = post(modern(name="a"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: a", "Mcp-Session-Id: s1")
    _, heard, reasons = await told(post(a_request("initialize")), call)

    assert reasons == [None, None]
    assert heard[1].values(b"mcp-session-id") == []


async def test_a_session_goes_on_while_stateless_messages_pass_by() -> None:
    """One connection may carry both eras."""
    call = post(modern(name="a"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: a")
    old = post(a_request("tools/call", {"name": "a"}), "Mcp-Session-Id: s1", "MCP-Protocol-Version: 2025-11-25")
    _, heard, reasons = await told(post(a_request("initialize")), call, old, call)

    assert reasons == [None] * 4
    assert [each.values(b"mcp-session-id") for each in heard] == [[], [], [b"s1"], []]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_the_later_era_uses_post_only(method: str) -> None:
    """RFC 9110, 15.5.6: the answer says so."""
    lines = [f"{method} /mcp HTTP/1.1", "Host: billing.test", VERSION, "Accept: text/event-stream", "", ""]
    answers, heard, _ = await told("\r\n".join(lines).encode())

    assert (answers[0].line.split()[1], answers[0].values(b"allow"), heard) == (b"405", [b"POST"], [])


@pytest.mark.parametrize(
    ("denied", "old", "new"),
    [
        ("error", (200, 403), (200, 403)),
        ("tool_error", (200, None), (200, None)),
        ("conceal", (200, -32602), (400, -32602)),
    ],
)
async def test_a_denial_looks_as_the_profile_says(
    denied: Denied, old: tuple[int, int | None], new: tuple[int, int | None]
) -> None:
    """In each era as its clients expect it; the connection goes on."""
    stateless = post(modern(name="b"), VERSION, "Mcp-Method: tools/call", "Mcp-Name: b")
    answers, heard, reasons = await told(post(a_request("tools/call", {"name": "b"})), stateless, denied=denied)

    assert [code_of(each) for each in answers] == [old, new]
    assert (heard, reasons) == ([], [Reason.DENIED] * 2)


async def test_a_refused_batch_of_one_is_answered_by_an_array() -> None:
    """As JSON-RPC has it, and as its client reads it."""
    answers, heard, _ = await told(post(b"[" + a_request("tools/call", {"name": "b"}) + b"]"))

    assert [each["error"]["code"] for each in json.loads(answers[0].body)] == [403]
    assert heard == []
