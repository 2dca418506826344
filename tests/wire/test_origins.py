"""Pages that may call: their preflights are answered here, and what they get they may read."""

import asyncio

import pytest

from sidecar.core.profile import Identity
from tests.builders import a_call, a_snapshot
from tests.fakes import Heard, a_path, a_server, allowing, post, response

PAGE = "https://app.example"
RESULT = b'{"jsonrpc":"2.0","id":7,"result":{}}'
USERS_ONLY = Identity(mtls="permissive", user="required")


async def careless(_: Heard, writer: asyncio.StreamWriter) -> None:
    """A server that lets every page read everything."""
    writer.write(response(RESULT, headers=["Access-Control-Allow-Origin: *", "access-control-allow-credentials: true"]))


def preflight(origin: str) -> bytes:
    """What a browser asks before it posts."""
    lines = [
        "OPTIONS /mcp HTTP/1.1",
        "Host: billing.test",
        f"Origin: {origin}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: content-type, mcp-protocol-version, mcp-param-region",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize(("origin", "status"), [(PAGE, b"204"), ("https://other.example", b"403"), ("null", b"403")])
async def test_a_preflight_is_answered_here(origin: str, status: bytes) -> None:
    """Before the user's identity, which a browser does not send with it; nothing reaches the server."""
    async with (
        a_server(careless) as (server, port),
        a_path(a_snapshot(allowing(), identity=USERS_ONLY, port=port, origins=(PAGE,))) as path,
    ):
        client = await path.dial()
        await client.say(preflight(origin))
        head = await client.until(b"\r\n\r\n")
        await client.close()

    told = Heard(head=head, body=b"")
    assert (told.line.split()[1], server.heard) == (status, [])
    assert told.values(b"access-control-allow-origin") == ([PAGE.encode()] if status == b"204" else [])
    if status == b"204":
        assert b"mcp-param-region" in told.values(b"access-control-allow-headers")[0]
        assert path.exchanges == []


@pytest.mark.parametrize(("tool", "code"), [("a", None), ("b", 403)])
@pytest.mark.parametrize("origin", [PAGE, None])
async def test_an_answer_may_be_read_by_the_page_that_called(tool: str, code: int | None, origin: str | None) -> None:
    """A refusal as well; the server's own word on that is not passed on."""
    async with (
        a_server(careless) as (_, port),
        a_path(a_snapshot(allowing("a"), port=port, origins=(PAGE,))) as path,
    ):
        client = await path.dial()
        await client.say(post(a_call(tool), *([f"Origin: {origin}"] if origin else [])))
        answer = await client.hear()
        await client.close()

    assert answer is not None
    assert answer.values(b"access-control-allow-origin") == ([] if origin is None else [PAGE.encode()])
    assert answer.values(b"access-control-allow-credentials") == []
    assert bool(answer.values(b"access-control-expose-headers")) is (origin is not None)
    assert (b'"code":403' in answer.body) is (code == 403)
