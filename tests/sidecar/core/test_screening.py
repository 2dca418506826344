"""sidecar.core.screening: what a client sends, screened, and the request made of what is left."""

import orjson
import pytest

from sidecar.core.agreement import ParamHeader, ParamHeaders, check
from sidecar.core.connection import Connection
from sidecar.core.content import Content
from sidecar.core.message import Message, parse, parse_any
from sidecar.core.screening import Sent, screen
from sidecar.errors import Reason
from tests.builders import a_call, a_connection, a_request
from tests.sidecar.core.contents import KEY, a_rule

MASK = Content([a_rule(patterns=("aws-key",))])
DENY = Content([a_rule(patterns=("aws-key",), action="deny")])
SECRET = a_call("read", {"key": KEY.decode(), "n": 1})


def sent(connection: Connection, content: Content = MASK) -> Sent:
    """What is left of *connection*."""
    found = parse_any(connection.body, "2025-03-26")
    messages = [each for each in (found if isinstance(found, tuple) else (found,)) if isinstance(each, Message)]
    return screen(connection, messages, content)


def test_what_holds_nothing_is_the_very_same() -> None:
    """No new request is made."""
    for body in (a_call(), a_request("tools/list")):
        connection = a_connection(body)
        assert sent(connection) == Sent(connection=connection, found=((),), refusals=(None,))


def test_a_masked_request_says_the_same_in_its_headers() -> None:
    """A server that compares them must find them equal; digests of the old body go."""
    headers = [
        (b"mcp-param-key", KEY),
        (b"Mcp-Param-Other".lower(), b"1"),
        (b"mcp-name", b"read"),
        (b"content-digest", b"sha-256=:x:"),
    ]
    made = sent(a_connection(SECRET, headers=headers)).connection

    assert made.body == SECRET.replace(KEY, b"[masked]")
    assert [pair for pair in made.headers if pair[0].startswith((b"mcp-", b"content-d"))] == [
        (b"mcp-param-key", b"[masked]"),
        (b"mcp-param-other", b"1"),
        (b"mcp-name", b"read"),
    ]
    annotated = ParamHeaders(known={"read": (ParamHeader(header=b"mcp-param-key", path=("key",)),)})
    check(made, parse(made.body), annotated)


def test_a_masked_header_keeps_its_encoding() -> None:
    """What HTTP cannot carry goes in base64."""
    text = "\u00e9 " + KEY.decode()
    made = sent(
        a_connection(
            a_call("read", {"key": text}),
            headers=[(b"mcp-param-key", b"=?base64?w6kgQUtJQUFCQ0RFRkdISUpLTE1OT1A=?=")],
        )
    ).connection

    annotated = ParamHeaders(known={"read": (ParamHeader(header=b"mcp-param-key", path=("key",)),)})
    check(made, parse(made.body), annotated)
    assert made.values[b"mcp-param-key"] == b"=?base64?w6kgW21hc2tlZF0=?="


def test_each_message_of_a_batch_has_its_own_finding() -> None:
    """The others keep their bytes."""
    clean = b'{ "jsonrpc": "2.0", "id": 8, "method": "ping" }'
    made = sent(a_connection(b"[" + SECRET + b", " + clean + b"]"))

    assert made.connection.body == b"[" + SECRET.replace(KEY, b"[masked]") + b"," + clean + b"]"
    assert [sum(found.count for found in each) for each in made.found] == [1, 0]
    refused = sent(a_connection(b"[" + SECRET + b"," + clean + b"]"), DENY)
    assert [each and each.reason for each in refused.refusals] == [Reason.DENIED, None]


def test_a_refusal_does_not_say_what_was_found() -> None:
    """Its caller may be the one who must not know; the record names the rule."""
    made = sent(a_connection(SECRET), DENY)
    (refusal,) = made.refusals
    assert refusal is not None

    assert (refusal.reason, refusal.detail) == (Reason.DENIED, "content rule secrets")
    assert "AKIA" not in refusal.public + refusal.detail
    assert made.connection.body == SECRET


def test_names_that_would_become_the_same_are_refused() -> None:
    """A reader would take one of the two."""
    body = orjson.dumps({KEY.decode(): 1, "x": 2}).replace(b'"x"', b'"\\u0041' + KEY[1:-1] + b'Q"')
    call = a_request("tools/call", {"name": "read", "arguments": {}}).replace(b'"arguments":{}', b'"arguments":' + body)
    (refusal,) = sent(a_connection(call)).refusals
    assert refusal is not None
    assert "same name" in refusal.detail


def test_answers_of_the_client_are_screened() -> None:
    """What a user typed into an elicitation reaches the server as well."""
    answer = b'{"jsonrpc":"2.0","id":3,"result":{"content":{"key":"' + KEY + b'"}}}'
    assert sent(a_connection(answer)).connection.body == answer.replace(KEY, b"[masked]")


def batched(text: str, count: int) -> Connection:
    """So many calls with *text* in one body."""
    calls = [a_call("read", {"key": text}).replace(b'"id":7', b'"id":%d' % number) for number in range(count)]
    return a_connection(b"[" + b",".join(calls) + b"]")


@pytest.mark.parametrize(
    ("detected", "text"), [("credit-card", "4111 1111 1111 1112 x " * 15_000), ("email", "a@b.test " * 12_000)]
)
def test_messages_of_a_batch_share_what_may_be_looked_at(detected: str, text: str) -> None:
    """Each may take a second by itself: sixty-four of them would hold every other call up for a minute."""
    content = Content([a_rule(patterns=(detected,))])
    refusals = sent(batched(text, 3), content).refusals

    assert refusals[0] is None
    assert ["more than 20000 places" in each.detail for each in refusals[1:] if each is not None] == [True, True]


def test_a_batch_with_little_to_find_is_screened_as_single_messages_are() -> None:
    """What is shared is enough for whatever is sent."""
    content = Content([a_rule(patterns=("email",))])
    made = sent(batched("a@b.test " * 100, 64), content)

    assert (made.refusals, [each[0].count for each in made.found]) == ((None,) * 64, [100] * 64)
