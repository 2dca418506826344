"""sidecar.core.agreement: headers that repeat the body say the same."""

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.core import agreement
from sidecar.core.agreement import ParamHeader, ParamHeaders, check
from sidecar.core.message import Message, parse
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_connection, a_request


def an_item(schema: Any, name: str = "t") -> tuple[str, msgspec.Raw]:
    """A tool as tools/list has it."""
    return name, msgspec.Raw(msgspec.json.encode({"name": name, "inputSchema": schema}))


def test_annotations_are_learned_at_any_depth() -> None:
    """By their exact path of properties."""
    headers = ParamHeaders()
    inner = {"type": "object", "properties": {"id": {"type": "string", "x-mcp-header": "Tenant-Id"}}}
    schema = {"properties": {"region": {"x-mcp-header": "Region"}, "tenant": inner, "plain": {"type": "string"}}}
    headers.learn([an_item(schema)])

    assert set(headers.known["t"]) == {
        ParamHeader(header=b"mcp-param-region", path=("region",)),
        ParamHeader(header=b"mcp-param-tenant-id", path=("tenant", "id")),
    }


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        {"properties": []},
        {"properties": {"a": 7}},
        {"x-mcp-header": "a"},
        {"properties": {"a": {"x-mcp-header": 7}}},
    ],
)
def test_odd_schemas_annotate_nothing(schema: Any) -> None:
    """What the server wrote there is not ours to refuse."""
    headers = ParamHeaders()
    headers.learn([an_item(schema)])

    assert headers.known == {}


def test_an_item_that_cannot_be_read_annotates_nothing() -> None:
    """The filter has refused it before."""
    headers = ParamHeaders()
    headers.learn([("t", msgspec.Raw(b'{"x-mcp-header"')), ("u", msgspec.Raw(b'["x-mcp-header"]'))])

    assert headers.known == {}


def test_a_tool_that_changes_is_learned_anew() -> None:
    """Also when it has no annotation any more."""
    headers = ParamHeaders()
    headers.learn([an_item({"properties": {"a": {"x-mcp-header": "A"}}})])
    headers.learn([an_item({"properties": {"a": {}}})])

    assert headers.known == {}


def test_the_tool_listed_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is bounded."""
    monkeypatch.setattr(agreement, "MAX_TOOLS", 2)
    headers = ParamHeaders()
    schema = {"properties": {"a": {"x-mcp-header": "A"}}}
    headers.learn([an_item(schema, name) for name in ("a", "b", "a", "c")])

    assert list(headers.known) == ["a", "c"]


# headers and body

MODERN = "2026-07-28"
META = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {"extensions": {"io.modelcontextprotocol/tasks": {}}},
}
Headers = list[tuple[bytes, bytes]]


def a_modern(method: str = "tools/call", **params: Any) -> Message:
    """A request of 2026-07-28."""
    return parse(a_request(method, {**params, "_meta": META}), MODERN)


def encoded(text: str) -> bytes:
    """The form for what HTTP cannot carry as it is."""
    return b"=?base64?" + base64.b64encode(text.encode()) + b"?="


def agrees(message: Message, headers: Headers, known: ParamHeaders | None = None) -> bool:
    """Whether *message* passes with *headers*; a refusal must say why."""
    try:
        check(a_connection(headers=headers), message, known or ParamHeaders())
    except Refusal as refusal:
        assert refusal.reason is Reason.HEADER_MISMATCH  # noqa: PT017 - either end is right
        return False
    return True


CALL = [(b"mcp-method", b"tools/call")]


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("tools/call", {"name": "read_schema"}, b"read_schema"),
        ("tools/call", {"name": "gr\u00fc\u00df gott"}, encoded("gr\u00fc\u00df gott")),
        ("tools/call", {"name": "gr\u00fc\u00df"}, "gr\u00fc\u00df".encode()),  # Go's client
        ("tools/call", {"name": "plain"}, encoded("plain")),
        ("tools/call", {"name": " alpha "}, encoded(" alpha ")),
        ("tools/call", {"name": "=?base64?YQ==?="}, encoded("=?base64?YQ==?=")),
        ("tools/call", {"name": "=?BASE64?YQ==?="}, b"=?BASE64?YQ==?="),
        ("tools/call", {"name": ""}, b""),
        ("prompts/get", {"name": "p"}, b"p"),
        ("resources/read", {"uri": "db://a b"}, b"db://a b"),
        ("tasks/get", {"taskId": "t"}, b"t"),
        ("tasks/update", {"taskId": "t"}, b"t"),
        ("tasks/cancel", {"taskId": "t"}, b"t"),
        ("tasks/get", {"taskId": "t"}, None),  # the extension's; Python's client and server do without
        ("tools/list", {}, None),
        ("tools/list", {}, b"whatever"),
        ("completion/complete", {"ref": {"type": "ref/prompt", "name": "p"}}, None),
        ("server/discover", {}, None),
    ],
)
def test_a_name_that_is_repeated_passes(method: str, params: dict[str, Any], name: bytes | None) -> None:
    """As it is, or in base64; only methods that name something repeat a name."""
    headers = [(b"mcp-method", method.encode())] + ([] if name is None else [(b"mcp-name", name)])

    assert agrees(a_modern(method, **params), headers)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("alpha", None),
        ("alpha", b""),
        ("alpha", b"Alpha"),
        ("alpha", b"alpha,alpha"),
        ("alpha ", b"alpha"),
        ("alpha", b"beta"),
        ("alpha", encoded("beta")),
        ("alpha", b"=?base64?YWxwaGE?="),  # no padding
        ("alpha", b"=?base64?YWxw aGE=?="),
        ("alpha", b"=?base64?!!!!?="),
        ("alpha", b"=?base64??="),
        ("a", b"=?base64?YR==?="),  # another spelling of the same bytes
        ("alpha", b"=?BASE64?YWxwaGE=?="),
        ("alpha", b"=?base64?YWxwaGE=?= "),
        ("=?base64?YQ==?=", b"=?base64?YQ==?="),
        ("gr\u00fc\u00df", "gr\u00fc\u00df".encode("latin-1")),
        ("\u212b", "\u00c5".encode()),  # the same to Unicode, not to a server
    ],
)
def test_a_name_that_is_not_repeated_is_refused(name: str, header: bytes | None) -> None:
    """Missing, another one, or one that readers could decode differently."""
    headers = CALL if header is None else [*CALL, (b"mcp-name", header)]

    assert not agrees(a_modern(name=name), headers)


@pytest.mark.parametrize("method", [None, b"", b"Tools/call", b"tools/list", b"tools/call "])
def test_the_method_is_repeated_exactly(method: bytes | None) -> None:
    """Its value is case-sensitive, and it is there."""
    headers = [(b"mcp-name", b"x")] + ([] if method is None else [(b"mcp-method", method)])

    assert not agrees(a_modern(name="x"), headers)


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}',
        b'{"jsonrpc":"2.0","method":"notifications/progress"}',
    ],
)
def test_a_notification_need_not_repeat_its_method(body: bytes) -> None:
    """The revision leaves it open; what is there must agree."""
    message = parse(body, MODERN)

    assert agrees(message, [])
    assert agrees(message, [(b"mcp-method", message.method.encode())])
    assert not agrees(message, CALL)


def test_older_revisions_need_no_such_headers() -> None:
    """Their servers ignore them."""
    assert agrees(parse(a_call("x")), [])
    assert agrees(parse(a_call("x")), [*CALL, (b"mcp-name", b"x")])


@pytest.mark.parametrize("headers", [[(b"mcp-name", b"y")], [(b"mcp-method", b"tools/list")], [(b"mcp-name", b"")]])
def test_but_what_they_say_must_hold(headers: Headers) -> None:
    """Whoever stands before us may have judged by them."""
    assert not agrees(parse(a_call("x")), headers)


def test_a_response_has_no_method_to_repeat() -> None:
    """A header that names one is about another message."""
    response = parse(b'{"jsonrpc":"2.0","id":1,"result":{}}')

    assert agrees(response, [])
    assert not agrees(response, CALL)


@pytest.mark.parametrize("name", [b"mcp-method", b"mcp-name", b"mcp-param-a", b"mcp-session-id", b"mcp-new"])
@pytest.mark.parametrize("values", [(b"x", b"x"), (b"x", b"y")])
def test_a_repeated_routing_header_is_refused(name: bytes, values: tuple[bytes, bytes]) -> None:
    """Go's and older servers take the first one, others refuse; in every revision."""
    headers = [(name, value) for value in values]

    assert not agrees(parse(a_call("x")), headers)


def test_other_repeated_headers_are_not_ours_to_judge() -> None:
    """Accept may stand twice (RFC 9110, 5.3)."""
    assert agrees(parse(a_call("x")), [(b"accept", b"application/json"), (b"accept", b"text/event-stream")])


KNOWN = ParamHeaders(
    known={
        "t": (
            ParamHeader(header=b"mcp-param-region", path=("region",)),
            ParamHeader(header=b"mcp-param-tenant", path=("tenant", "id")),
        )
    }
)


@pytest.mark.parametrize(
    ("arguments", "headers", "passes"),
    [
        ({}, [], True),
        ({"region": None}, [], True),
        ({"region": "eu"}, [(b"mcp-param-region", b"eu")], True),
        ({"region": "\u00fc"}, [(b"mcp-param-region", encoded("\u00fc"))], True),
        ({"region": 42}, [(b"mcp-param-region", b"42")], True),
        ({"region": 42}, [(b"mcp-param-region", b"42.0")], True),
        ({"region": 1e3}, [(b"mcp-param-region", b"1000")], True),
        ({"region": -1.5}, [(b"mcp-param-region", b"-1.5")], True),
        ({"region": True}, [(b"mcp-param-region", b"true")], True),
        ({"region": ["eu"]}, [], True),  # has no form in a header: the server's own business
        ({"tenant": {"id": "a"}}, [(b"mcp-param-tenant", b"a")], True),
        ({"tenant": "odd"}, [], True),
        ({"region": "eu"}, [], False),
        ({"region": "eu"}, [(b"mcp-param-region", b"us")], False),
        ({"region": "eu"}, [(b"mcp-param-region", b"EU")], False),
        ({}, [(b"mcp-param-region", b"us")], False),
        ({"region": None}, [(b"mcp-param-region", b"null")], False),
        ({"region": 42}, [(b"mcp-param-region", b"43")], False),
        ({"region": 42}, [(b"mcp-param-region", b"0x2a")], False),
        ({"region": 42}, [(b"mcp-param-region", "\u0664\u0662".encode())], False),
        ({"region": 42}, [(b"mcp-param-region", b"NaN")], False),
        ({"region": True}, [(b"mcp-param-region", b"1")], False),
        ({"region": 1}, [(b"mcp-param-region", b"true")], False),
        ({"tenant": {"id": "a"}}, [(b"mcp-param-tenant", b"b")], False),
    ],
)
def test_annotated_arguments_are_repeated(arguments: dict[str, Any], headers: Headers, *, passes: bool) -> None:
    """Where the tool's schema was seen; numbers compare as numbers."""
    message = a_modern(name="t", arguments=arguments)

    assert agrees(message, [*CALL, (b"mcp-name", b"t"), *headers], KNOWN) is passes


def test_what_no_schema_was_seen_of_passes() -> None:
    """An unknown Mcp-Param header is forwarded untouched."""
    assert agrees(a_modern(name="u"), [*CALL, (b"mcp-name", b"u"), (b"mcp-param-region", b"x")], KNOWN)


def test_older_revisions_may_leave_annotated_arguments_out() -> None:
    """But not contradict them."""
    message = parse(a_call("t", {"region": "eu"}))

    assert agrees(message, [], KNOWN)
    assert not agrees(message, [(b"mcp-param-region", b"us")], KNOWN)


NAMES = st.text(max_size=6) | st.sampled_from(["alpha", "=?base64?YQ==?=", " a"])
VALUES = st.binary(max_size=24) | NAMES.map(encoded) | NAMES.map(str.encode)


@given(
    NAMES,
    VALUES,
    st.lists(st.tuples(st.sampled_from([b"mcp-name", b"mcp-method", b"mcp-param-region", b"x"]), VALUES), max_size=3),
)
@example("alpha", b"alpha", [(b"mcp-name", b"beta")])
def test_what_passes_has_one_name(name: str, value: bytes, more: Headers) -> None:
    """Whatever the headers: what they say and what the body says is the same, and nothing but a refusal comes out."""
    headers = [*CALL, (b"mcp-name", value), *more]
    if agrees(a_modern(name=name), headers, KNOWN):
        assert [found for key, found in headers if key == b"mcp-name"] == [value]
        assert value in (name.encode(), encoded(name))


@given(
    st.sampled_from(["t", "u"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)  # as far as the builder writes them
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=4),
        lambda inner: st.dictionaries(st.just("id"), inner),
    ),
    VALUES,
)
def test_any_argument_and_header_agree_or_are_refused(name: str, argument: Any, value: bytes) -> None:
    """Never anything else."""
    message = parse(a_call(name, {"region": argument, "tenant": argument}))
    agrees(message, [(b"mcp-param-region", value), (b"mcp-param-tenant", value)], KNOWN)


def test_headers_that_repeat_what_was_changed_repeat_what_came_of_it() -> None:
    """Each is read once, however many changes and headers there are; of two changes of one text the first holds."""
    said = base64.b64encode("é 7".encode())
    headers = [(b"mcp-param-%d" % number, b"text 7") for number in range(100)]
    headers += [(b"mcp-param-e", b"=?base64?" + said + b"?="), (b"mcp-param-none", b""), (b"x-other", b"text 7")]
    changes = [(b"text %d" % number, b"[masked]") for number in range(100_000)]
    made = agreement.repeated(headers, [*changes, (b"text 7", b"other"), ("é 7".encode(), "é".encode())])

    assert made[:100] == [(name, b"[masked]") for name, _ in headers[:100]]
    assert made[100] == (b"mcp-param-e", b"=?base64?" + base64.b64encode("é".encode()) + b"?=")
    assert made[101:] == headers[101:]
