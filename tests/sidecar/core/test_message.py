"""sidecar.core.message: one unambiguous message, or a refusal that says why."""

import json
import math
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.core.document import MAX_DEPTH
from sidecar.core.message import (
    EXTENSION,
    GONE,
    MAX_BATCH,
    MAX_ID,
    MAX_ID_CHARS,
    MAX_SUBSCRIBED,
    NOTIFICATIONS,
    REQUESTS,
    Ask,
    Listing,
    Message,
    Prompt,
    Resource,
    Shape,
    Subscription,
    Task,
    Tool,
    parse,
    parse_any,
)
from sidecar.core.revision import Revision
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_request

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
MEMBERS = st.sampled_from(["jsonrpc", "method", "params", "id", "result", "error", "name", "arguments", "uri", "ref"])
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.sampled_from(["2.0", "1.0", 2.0]),
        "id": JSON,
        "method": st.sampled_from(sorted(REQUESTS) + sorted(NOTIFICATIONS)) | JSON,
        "params": st.dictionaries(MEMBERS, JSON, max_size=3) | JSON,
        "result": JSON,
        "error": JSON,
    },
)


def refused(body: bytes) -> Refusal:
    """Return the refusal of *body*."""
    with pytest.raises(Refusal) as caught:
        parse(body)
    return caught.value


@given(st.binary(max_size=200) | NEARLY.map(lambda document: json.dumps(document).encode()) | st.text().map(str.encode))
@example(b"")
@example(b"[" * 2000)
@example(b'{"a":' * 500 + b"1" + b"}" * 500)
def test_any_bytes_give_a_message_or_a_refusal(body: bytes) -> None:
    """Whatever comes, parse ends in one of two ways, and never in another exception."""
    try:
        message = parse(body)
    except Refusal as refusal:
        assert refusal.reason in (Reason.MALFORMED, Reason.UNKNOWN_METHOD)  # noqa: PT017 - either end is right
    else:
        assert isinstance(message, Message)
        assert message.body is body


@given(st.lists(NEARLY, max_size=4), st.sampled_from([None, *map(str, Revision), "x"]))
@example([{"jsonrpc": "2.0", "id": 1, "method": "ping"}, {"jsonrpc": "2.0", "id": "1", "method": "ping"}], None)
@example([[]], None)
def test_any_batch_gives_messages_or_a_refusal(documents: list[Any], version: str | None) -> None:
    """As many as it has, in order, each with its id known; only where the revision has batches."""
    body = json.dumps(documents).encode()
    try:
        found = parse_any(body, version)
    except Refusal:
        return
    assert version in (None, Revision.V2025_03_26)
    assert isinstance(found, tuple)
    assert [document.get("id") for document in documents] == [each.id for each in found]


@given(NEARLY, st.sampled_from([None, 1]), st.booleans())
def test_accepted_bytes_mean_the_same_to_three_readers(document: Any, indent: int | None, ascii_only: bool) -> None:
    """What passes is read alike by the standard library, orjson and msgspec."""
    body = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    try:
        message = parse(body)
    except Refusal:
        return
    for read in (json.loads, orjson.loads, msgspec.json.decode):
        again = read(body)
        assert again.get("method", "response") == message.method
        assert again.get("id") == message.id


@pytest.mark.parametrize(
    ("body", "why"),
    [
        pytest.param(b"", "one JSON document", id="empty"),
        pytest.param(b"{}{}", "one JSON document", id="two documents"),
        pytest.param(a_call() + b" x", "one JSON document", id="trailing garbage"),
        pytest.param(b"\xef\xbb\xbf" + a_call(), "one JSON document", id="byte order mark"),
        pytest.param(a_call().decode().encode("utf-16"), "one JSON document", id="UTF-16"),
        pytest.param(a_call().decode().encode("utf-32-le"), "one JSON document", id="UTF-32"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","x":NaN}', "one JSON document", id="NaN"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","x":Infinity}', "one JSON document", id="Infinity"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","x":1e400}', "", id="a number beyond doubles"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","x":"\\ud800"}', "one JSON document", id="lone surrogate"
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","x":"\\udc00\\ud800"}', "one JSON", id="surrogates swapped"
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","x":"\xed\xa0\x80"}', "one JSON", id="surrogate as bytes"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","x":"\xff"}', "one JSON document", id="no UTF-8"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","x":' + b"9" * 5000 + b"}", "one JSON", id="huge integer"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/list"}', "twice", id="duplicate method"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","\\u006dethod":"x"}', "twice", id="duplicate by escape"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":1,"a":1}}', "twice", id="duplicate in depth"
        ),
        pytest.param(b"[" + a_call() + b"]", "batch", id="batch"),
        pytest.param(b"[]", "batch", id="empty batch"),
        pytest.param(b'"ping"', "object", id="string"),
        pytest.param(b"null", "object", id="null"),
        pytest.param(b'{"id":1,"method":"ping"}', "jsonrpc", id="no version"),
        pytest.param(b'{"jsonrpc":2.0,"id":1,"method":"ping"}', "jsonrpc", id="version as number"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}', "both", id="request and response"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","error":{}}', "both", id="request and error"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}', "both", id="result and error"),
        pytest.param(b'{"jsonrpc":"2.0","id":1}', "has a method", id="neither"),
        pytest.param(b'{"jsonrpc":"2.0","id":1}', "has a method", id="neither method nor result"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","Method":"tools/call"}',
            "only in case",
            id="method in another case",
        ),
        pytest.param(a_request("tools/call", {"name": "a", "Name": "b"}), "only in case", id="name in another case"),
        pytest.param(
            a_request("tools/call", {"name": "a", "argument\u017f": {}}), "only in case", id="a letter that folds to s"
        ),
        pytest.param(
            a_request("completion/complete", {"ref": {"type": "ref/prompt", "name": "a", "NAME": "b"}}),
            "only in case",
            id="reference in another case",
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"result":{},"Method":"ping"}', "only in case", id="answer with a method"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":7}', "method must be a string", id="method is a number"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', "params must be", id="params by position"
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":null}', "params must be", id="params null"),
        pytest.param(b'{"jsonrpc":"2.0","id":null,"method":"ping"}', "id must be", id="id null"),
        pytest.param(b'{"jsonrpc":"2.0","id":true,"method":"ping"}', "id must be", id="id true"),
        pytest.param(b'{"jsonrpc":"2.0","id":1.0,"method":"ping"}', "id must be", id="id 1.0"),
        pytest.param(b'{"jsonrpc":"2.0","id":{},"method":"ping"}', "id must be", id="id object"),
        pytest.param(
            b'{"jsonrpc":"2.0","id":9223372036854775808,"method":"ping"}', "id must be", id="id beyond 64 bit"
        ),
        pytest.param(b'{"jsonrpc":"2.0","result":{}}', "id must be", id="response without id"),
        pytest.param(a_request("ping", request_id="x" * (MAX_ID_CHARS + 1)), "id must be", id="id too long"),
        pytest.param(a_request("tools/call", {}), "params.name", id="call without name"),
        pytest.param(a_request("tools/call", {"name": 7}), "params.name", id="call of a number"),
        pytest.param(a_request("tools/call", {"name": "x", "arguments": []}), "arguments", id="arguments by position"),
        pytest.param(a_request("resources/read", {}), "params.uri", id="read without uri"),
        pytest.param(a_request("completion/complete", {"ref": "x"}), "params.ref", id="reference is text"),
        pytest.param(
            a_request("completion/complete", {"ref": {"type": "ref/tool"}}), "params.ref", id="unknown reference"
        ),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(body: bytes, why: str) -> None:
    """Each ambiguity is MALFORMED, and says which."""
    refusal = refused(body)

    assert refusal.reason is Reason.MALFORMED
    assert why in refusal.public


@pytest.mark.parametrize("extra", [0, 1])
def test_nesting_is_allowed_up_to_the_cap(extra: int) -> None:
    """MAX_DEPTH levels pass, one more does not."""
    inner = MAX_DEPTH - 3 + extra  # the message, params and arguments are three
    body = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":{"a":%b%b}}}'
    body %= (b"[" * inner, b"]" * inner)

    if extra:
        assert "nested deeper" in refused(body).public
    else:
        assert parse(body).shape is Shape.REQUEST


def test_many_shallow_brackets_are_no_depth() -> None:
    """Only nesting counts, not the number of lists, and a bracket in a string is none."""
    arguments = {"rows": [[] for _ in range(200)], "text": "[" * 100}

    assert isinstance(parse(a_call(arguments=arguments)).target, Tool)


@pytest.mark.parametrize(
    ("method", "params", "target"),
    [
        ("initialize", {}, None),
        ("ping", {}, None),
        ("server/discover", {}, None),
        ("logging/setLevel", {"level": "debug"}, None),
        ("tools/list", {}, Listing.TOOLS),
        ("prompts/list", {}, Listing.PROMPTS),
        ("resources/list", {}, Listing.RESOURCES),
        ("resources/templates/list", {}, Listing.TEMPLATES),
        ("tools/call", {"name": "x "}, Tool(name="x ", arguments={})),
        ("tools/call", {"name": "x", "arguments": None}, Tool(name="x", arguments={})),
        ("prompts/get", {"name": "x", "arguments": {"a": "b"}}, Prompt(name="x", arguments={"a": "b"})),
        ("resources/read", {"uri": "db://a"}, Resource(uri="db://a")),
        ("resources/subscribe", {"uri": "db://a"}, Resource(uri="db://a")),
        ("resources/unsubscribe", {"uri": "db://a"}, Resource(uri="db://a")),
        ("completion/complete", {"ref": {"type": "ref/prompt", "name": "x"}}, Prompt(name="x", arguments={})),
        ("completion/complete", {"ref": {"type": "ref/resource", "uri": "db://{a}"}}, Resource(uri="db://{a}")),
        ("tasks/list", {}, Listing.TASKS),
        ("tasks/get", {"taskId": "t"}, Task(id="t")),
        ("tasks/result", {"taskId": "t"}, Task(id="t")),
        ("tasks/cancel", {"taskId": "t"}, Task(id="t")),
        ("tasks/update", {"taskId": "t", "inputResponses": {}}, Task(id="t")),
        ("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, Subscription(resources=(), tasks=())),
        (
            "subscriptions/listen",
            {"notifications": {"resourceSubscriptions": ["db://a", "db://b"], "taskIds": ["t"]}},
            Subscription(resources=("db://a", "db://b"), tasks=("t",)),
        ),
    ],
)
def test_each_request_is_authorised_on_its_target(method: str, params: dict[str, Any], target: object) -> None:
    """The table says what a request is about, exactly as it was written."""
    message = parse(a_request(method, params))

    assert (Shape.REQUEST, method, 7, target) == (message.shape, message.method, message.id, message.target)


def test_every_known_request_is_tried_above() -> None:
    """No method enters the table without a case in the test before."""
    marks = test_each_request_is_authorised_on_its_target.pytestmark  # type: ignore[attr-defined]

    assert set(REQUESTS) == {case[0] for case in marks[0].args[1]}


@pytest.mark.parametrize("method", ["tools/destroy", "Tools/call", "tools/call ", "notifications/initialized", ""])
def test_an_unknown_request_is_refused_with_its_id(method: str) -> None:
    """A method outside the table goes no further, and the caller's SDK finds its call again."""
    refusal = refused(a_request(method, {"name": "x"}, request_id="r-1"))

    assert (refusal.reason, refusal.id) == (Reason.UNKNOWN_METHOD, "r-1")


@pytest.mark.parametrize("method", ["tools/call", "ping", "notifications/unknown"])
def test_an_unknown_notification_is_refused(method: str) -> None:
    """A call without an id is no notification of MCP's: some servers would run it."""
    refusal = refused(b'{"jsonrpc":"2.0","method":"%b","params":{"name":"x"}}' % method.encode())

    assert (refusal.reason, refusal.id) == (Reason.UNKNOWN_METHOD, None)


@pytest.mark.parametrize("method", sorted(NOTIFICATIONS))
def test_a_known_notification_passes(method: str) -> None:
    """What clients send unasked is read as that."""
    message = parse(b'{"jsonrpc":"2.0","method":"%b"}' % method.encode())

    assert (message.shape, message.id, message.target) == (Shape.NOTIFICATION, None, None)


@pytest.mark.parametrize("outcome", [b'"result":{}', b'"error":{"code":1,"message":""}'])
def test_an_answer_of_the_client_passes(outcome: bytes) -> None:
    """Answers to sampling and elicitation requests are responses."""
    message = parse(b'{"jsonrpc":"2.0","id":3,%b}' % outcome)

    assert (message.shape, message.id) == (Shape.RESPONSE, 3)


@pytest.mark.parametrize("request_id", [0, -1, MAX_ID, -MAX_ID, "", "x" * MAX_ID_CHARS, "1"])
def test_an_id_is_kept_as_it_is(request_id: str | int) -> None:
    """1 and "1" are two ids; both may be echoed."""
    kept = parse(a_request("ping", request_id=request_id)).id

    assert request_id == kept
    assert type(request_id) is type(kept)


def test_a_refusal_of_bad_parameters_carries_the_id() -> None:
    """The caller's SDK finds its call again only by the id."""
    assert refused(a_request("tools/call", {}, request_id=9)).id == 9


def test_long_integers_of_arguments_are_exact() -> None:
    """A policy sees the number that the server will see, not the nearest double."""
    target = parse(
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":{"n":%d}}}' % 10**29
    ).target

    assert isinstance(target, Tool)
    assert target.arguments == {"n": 10**29}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_finite_numbers_pass(number: float) -> None:
    """Whatever way a client writes a double."""
    target = parse(b'{"jsonrpc":"2.0", "id":1,"method":"tools/call","params":{"name":"x","arguments":{"n":%b}}}' % repr(number).encode()).target  # fmt: skip # noqa: E501

    assert isinstance(target, Tool)
    assert math.isclose(target.arguments["n"], number, rel_tol=0)


@pytest.mark.parametrize(
    ("target", "label"),
    [
        (Tool(name="x", arguments={}), "tool 'x'"),
        (Prompt(name="x", arguments={}), "prompt 'x'"),
        (Resource(uri="db://x"), "resource 'db://x'"),
        (Task(id="t"), "task 't'"),
        (Subscription(resources=("db://x",), tasks=()), "this subscription"),
        (Ask(method="roots/list"), "the client"),
    ],
)
def test_a_target_is_called_by_its_kind_and_name(
    target: Tool | Prompt | Resource | Task | Subscription | Ask, label: str
) -> None:
    """That is what a refusal says."""
    assert label == target.label


@pytest.mark.parametrize(
    ("target", "method"),
    [
        (Tool(name="x", arguments={}), "tools/call"),
        (Prompt(name="x", arguments={}), "prompts/get"),
        (Resource(uri="db://x"), "resources/read"),
        (Ask(method="sampling/createMessage"), "sampling/createMessage"),
    ],
)
def test_a_listed_item_is_judged_by_the_message_that_uses_it(target: Tool | Prompt | Resource, method: str) -> None:
    """A listing shows what could be called."""
    message = parse(a_request("tools/list")).about(target)

    assert (method, target) == (message.method, message.target)


# revisions

MODERN = "2026-07-28"
META = {"io.modelcontextprotocol/protocolVersion": MODERN, "io.modelcontextprotocol/clientCapabilities": {}}


def test_a_message_knows_its_revision() -> None:
    """By the header, and without one by the transport."""
    assert parse(a_call(), "2025-06-18").revision is Revision.V2025_06_18
    assert parse(a_call()).revision is Revision.V2025_03_26
    assert parse(a_call(), None, Revision.V2024_11_05).revision is Revision.V2024_11_05
    assert parse(a_request("tools/call", {"name": "x", "_meta": META}), MODERN).revision is Revision.V2026_07_28
    assert parse(b'{"jsonrpc":"2.0","id":1,"result":{}}', "2025-11-25").revision is Revision.V2025_11_25


@pytest.mark.parametrize(
    ("body", "version", "reason"),
    [
        (a_request("tools/call", {"name": "x"}), MODERN, Reason.MALFORMED),
        (a_request("tools/call", {"name": "x", "_meta": META}), None, Reason.HEADER_MISMATCH),
        (a_request("tools/call", {"name": "x"}), "2030-01-01", Reason.UNSUPPORTED_VERSION),
        (a_request("tools/call", {"_meta": META}), MODERN, Reason.MALFORMED),
        (a_request("tools/destroy", {"_meta": META}), MODERN, Reason.UNKNOWN_METHOD),
    ],
)
def test_a_refusal_says_in_which_era_to_answer(body: bytes, version: str | None, reason: Reason) -> None:
    """And whose request it was: a client of the later era knows other codes."""
    with pytest.raises(Refusal) as caught:
        parse(body, version)

    assert (caught.value.reason, caught.value.id, caught.value.revision) == (reason, 7, MODERN)


@pytest.mark.parametrize("method", sorted(GONE))
def test_the_later_era_has_fewer_methods(method: str) -> None:
    """Whatever their params: its servers do not know them, and an intermediary that still does would let them differ."""
    with pytest.raises(Refusal) as caught:
        parse(a_request(method, {"_meta": META}), MODERN)

    assert caught.value.reason is Reason.UNKNOWN_METHOD
    assert method in REQUESTS


@pytest.mark.parametrize("method", sorted(EXTENSION))
@pytest.mark.parametrize("extensions", [None, {}, [], "io.modelcontextprotocol/tasks", {"x/tasks": {}}])
def test_tasks_are_an_extension_that_the_client_declares(method: str, extensions: object) -> None:
    """SEP-2663: without it, the request is refused before anybody looks whose task it is."""
    capabilities = {} if extensions is None else {"extensions": extensions}
    meta = {**META, "io.modelcontextprotocol/clientCapabilities": capabilities}
    with pytest.raises(Refusal) as caught:
        parse(a_request(method, {"taskId": "t", "_meta": meta}), MODERN)

    assert (caught.value.reason, caught.value.id, caught.value.revision) == (Reason.UNDECLARED, 7, MODERN)
    assert caught.value.data == {"requiredCapabilities": {"extensions": {"io.modelcontextprotocol/tasks": {}}}}


def test_a_declared_extension_opens_its_methods() -> None:
    """And then ownership decides."""
    declared = {"extensions": {"io.modelcontextprotocol/tasks": {}}}
    meta = {**META, "io.modelcontextprotocol/clientCapabilities": declared}

    assert parse(a_request("tasks/get", {"taskId": "t", "_meta": meta}), MODERN).target == Task(id="t")


def test_a_client_sends_no_response_in_the_later_era() -> None:
    """What servers need of clients, they ask for in results."""
    with pytest.raises(Refusal, match="no response"):
        parse(b'{"jsonrpc":"2.0","id":1,"result":{}}', MODERN)


# batches


def a_batch(*bodies: bytes) -> bytes:
    """Several messages in one body."""
    return b"[" + b",".join(bodies) + b"]"


NOTE = b'{"jsonrpc":"2.0","method":"notifications/initialized"}'
ANSWER = b'{"jsonrpc":"2.0","id":1,"result":{}}'


def test_a_batch_is_read_message_by_message() -> None:
    """Each knows the whole body, because that is what would be sent."""
    body = a_batch(a_call("x", request_id=1), NOTE, ANSWER, a_call("y", request_id="1"))
    found = parse_any(body)

    assert isinstance(found, tuple)
    messages = [each for each in found if isinstance(each, Message)]
    assert [each.shape for each in messages] == [Shape.REQUEST, Shape.NOTIFICATION, Shape.RESPONSE, Shape.REQUEST]
    assert all(each.body is body for each in messages)


@pytest.mark.parametrize("version", ["2024-11-05", "2025-06-18", "2025-11-25", MODERN])
def test_other_revisions_have_no_batches(version: str) -> None:
    """TypeScript's servers execute them all the same."""
    with pytest.raises(Refusal, match="batch"):
        parse_any(a_batch(a_call()), version)


def test_a_refused_request_stands_in_its_place() -> None:
    """So that each request gets its own answer."""
    found = parse_any(
        a_batch(a_call(request_id=1), a_request("tools/destroy", request_id=2), a_request("ping", request_id=3))
    )

    assert isinstance(found, tuple)
    assert [(type(each), each.id) for each in found] == [(Message, 1), (Refusal, 2), (Message, 3)]


def test_an_unknown_notification_stands_in_its_place() -> None:
    """The others of its batch must still be answered."""
    found = parse_any(a_batch(a_call(), b'{"jsonrpc":"2.0","method":"notifications/unknown"}'))

    assert isinstance(found, tuple)
    assert isinstance(found[1], Refusal)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (a_batch(), "1 to"),
        (a_batch(*[NOTE] * (MAX_BATCH + 1)), "1 to"),
        (a_batch(a_call(), b"7"), "object"),
        (a_batch(a_batch(a_call())), "object"),
        (a_batch(a_call(), b'{"jsonrpc":"2.0","id":null,"method":"ping"}'), "id must be"),
        (a_batch(a_request("initialize", request_id=1), a_call(request_id=2)), "initialize"),
        (a_batch(a_call(request_id=1), a_call(request_id=1)), "same id"),
        (a_batch(a_call(request_id=1), a_request("tools/destroy", request_id=1)), "same id"),
    ],
)
def test_a_batch_that_nobody_could_answer_is_refused(body: bytes, why: str) -> None:
    """Whole: there is no id to tell it to, or two answers would have the same."""
    with pytest.raises(Refusal, match=why) as caught:
        parse_any(body)

    assert caught.value.reason is Reason.MALFORMED


# names that only look like the protocol's


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tasks/get", {"taskId": "mine", "taskid": "yours"}),
        ("tasks/get", {"taskId": "mine", "TASKID": "yours"}),
        ("tasks/get", {"taskId": "mine", "ta\u017f\u212aid": "yours"}),
        ("subscriptions/listen", {"Notifications": {}}),
        ("subscriptions/listen", {"notifications": {"ResourceSubscriptions": ["db://a"]}}),
        ("subscriptions/listen", {"notifications": {"taskids": ["t"]}}),
        ("tools/call", {"name": "x", "_META": {}}),
        ("tools/call", {"name": "x", "_meta": {"io.modelcontextprotocol/ProtocolVersion": MODERN}}),
        ("notifications/cancelled", {"RequestId": 1}),
    ],
)
def test_a_member_that_differs_only_in_case_is_refused(method: str, params: dict[str, Any]) -> None:
    """Go's encoding/json would take it for the one that was judged."""
    assert "only in case" in refused(a_request(method, params)).public


@pytest.mark.parametrize(
    "params",
    [
        {"notifications": []},
        {"notifications": {"resourceSubscriptions": "db://a"}},
        {"notifications": {"resourceSubscriptions": [7]}},
        {"notifications": {"taskIds": None}},
        {"notifications": {"taskIds": ["t"] * (MAX_SUBSCRIBED + 1)}},
    ],
)
def test_a_subscription_names_what_it_wants(params: dict[str, Any]) -> None:
    """Or nothing of it could be judged."""
    assert "params.notifications" in refused(a_request("subscriptions/listen", params)).public
