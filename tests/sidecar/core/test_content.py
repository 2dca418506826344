"""sidecar.core.content: which rules hold for which message, what they find, and what a rule may not be."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.content import ANSWER, ARGUMENTS, RESULT, Content, compiled, summary
from sidecar.core.message import parse, parse_any
from sidecar.core.profile import ContentRule
from sidecar.core.splicing import REQUEST
from sidecar.errors import BundleError
from tests.builders import STREAM, a_call, a_request
from tests.sidecar.core.contents import KEY, a_rule
from tests.sidecar.core.test_splicing import EXPRESSIONS, VALUES

RULES = (
    a_rule("everywhere", patterns=("aws-key",)),
    a_rule("asked", regex="x", where="arguments", action="deny"),
    a_rule("of_a", regex="a1", tools=("a",)),
    a_rule("told", regex="y", where="results", action="redact"),
)


def names(body: bytes) -> tuple[str, str]:
    """The rules for the message in *body*, and for what comes back."""
    message = STREAM if body == b"" else parse_any(body, "2025-03-26")
    message = message if not isinstance(message, tuple) else message[0]
    assert not isinstance(message, Exception)
    content = Content(RULES)
    screens = (content.requested(message), content.answered(message))
    first, second = (" ".join(each.rule.name for each in screen.rules) if screen else "" for screen in screens)
    return first, second


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (a_call("a"), ("everywhere asked of_a", "everywhere of_a told")),
        (a_call("b"), ("everywhere asked", "everywhere told")),
        (a_request("prompts/get", {"name": "a"}), ("everywhere asked", "everywhere told")),
        (a_request("resources/read", {"uri": "a"}), ("", "everywhere told")),
        (a_request("tools/list"), ("", "everywhere of_a told")),
        (a_request("initialize"), ("", "everywhere of_a told")),
        (a_request("tasks/result", {"taskId": "t"}), ("", "everywhere of_a told")),
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', ("everywhere asked of_a", "everywhere of_a told")),
        (b"[" + a_call("b") + b"]", ("everywhere asked", "everywhere of_a told")),
        (b"[" + a_request("tools/list") + b"," + a_call("b", request_id=8) + b"]", ("", "everywhere of_a told")),
        (b"[" + a_request("ping") + b"," + a_call("b", request_id=8) + b"]", ("", "everywhere of_a told")),
        (b"", ("", "everywhere of_a told")),
    ],
)  # fmt: skip
def test_rules_hold_where_they_say(body: bytes, expected: tuple[str, str]) -> None:
    """Where it is not known which tool answers, a rule for one tool holds for all."""
    assert expected == names(body)


def test_no_rule_screens_nothing() -> None:
    """What most profiles have costs nothing."""
    assert compiled(()) is None
    assert Content([a_rule(regex="x", where="results")]).requested(parse(a_call())) is None


def test_what_was_found_is_counted_and_never_told() -> None:
    """By rule, in arguments and in results."""
    message = parse(a_call("a", {"k": [KEY.decode()] * 3, "x": "x"}))
    screen = Content(RULES).requested(message)
    assert screen is not None
    screened = screen.screen(message.body, REQUEST)

    assert screened.data == message.body.replace(KEY, b"[masked]")
    assert screened.denied == "content rule asked"
    assert list(summary(screened.found)) == [
        {"rule": "everywhere", "action": "mask", "mode": "enforce", "where": "arguments", "count": 3},
        {"rule": "asked", "action": "deny", "mode": "enforce", "where": "arguments", "count": 2},
    ]
    assert screened.changes == ((KEY, b"[masked]"),) * 3


@pytest.mark.parametrize("action", ["mask", "deny", "redact"])
def test_a_shadow_is_counted_and_nothing_follows(action: str) -> None:
    """The very bytes come back."""
    screen = Content([a_rule(patterns=("aws-key",), action=action, mode="shadow")]).requested(parse(a_call("a")))
    assert screen is not None
    data = a_call("a", {"k": KEY.decode()})
    screened = screen.screen(data, REQUEST)

    assert screened.data is data
    assert (screened.denied, [each.count for each in screened.found]) == ("", [1])
    assert Content([each.rule for each in screen.rules]).redacted(data, screened.found, RESULT) is data


def test_redaction_is_for_the_record_only() -> None:
    """The message stays, and what is kept of it does not tell."""
    content = Content([a_rule(patterns=("aws-key",), action="redact"), a_rule("other", regex="q")])
    screen = content.answered(parse(a_call("a")))
    assert screen is not None
    data = b'{"jsonrpc":"2.0","id":7,"result":{"content":["' + KEY + b'"]}}'
    screened = screen.screen(data, ANSWER)

    assert screened.data is data
    assert (
        content.redacted(b'{"content":["' + KEY + b'","q"]}', screened.found, RESULT)
        == b'{"content":["[redacted]","q"]}'
    )
    assert content.redacted(b'{"' + KEY + b'":1,"' + KEY + b' ":2, "x": 1}', screened.found, ARGUMENTS) == (
        b'{"[redacted]":1,"[redacted] ":2, "x": 1}'
    )
    assert (
        content.redacted(b'{"' + KEY + b'":1,"\\u0041' + KEY[1:] + b'":2}', screened.found, ARGUMENTS)
        == b'"[redacted]"'
    )


@given(VALUES, EXPRESSIONS, st.booleans())
def test_the_quick_look_misses_nothing(value: object, expression: str, is_ascii: bool) -> None:
    """A message that is passed over holds no match: what the walk finds, the search over the whole finds as well."""
    rule = a_rule(regex=expression)
    screen = Content([rule]).answered(parse(a_call("a")))
    assert screen is not None
    option = 0 if is_ascii else orjson.OPT_INDENT_2
    data = orjson.dumps(
        {"jsonrpc": "2.0", "result": [{"t": orjson.dumps(value).decode()}, {"deep": value}]}, option=option
    )
    quick = screen.may_hold(data)
    screen._needles = None  # looks at everything

    assert quick or not screen.screen(data, ANSWER).found


@pytest.mark.parametrize("field", ["ssn", "/a/SSN", "x-y", "/a/*", "\u00fc"])
@pytest.mark.parametrize(
    "text", ['{"a":{"s_s_n":1}}', '{"t":"{\\"SSN\\":1}"}', '{"\\u0073sn":1}', '{"X_Y":1,"\u00dc":2}']
)
def test_the_quick_look_knows_fields(field: str, text: str) -> None:
    """In any spelling of their names."""
    screen = Content([a_rule(fields=(field,))]).answered(parse(a_call("a")))
    assert screen is not None
    data = b'{"result":{"structuredContent":' + text.encode() + b"}}"
    quick = screen.may_hold(data)
    screen._needles = None

    assert quick or not screen.screen(data, ANSWER).found


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (a_rule(regex="("), r"content rule secrets: regex: missing \): .*RE2"),
        (a_rule(regex="(?=x)"), "content rule secrets: regex: invalid perl operator"),
        (a_rule(regex=r"(a)\1"), "content rule secrets: regex: invalid escape"),
        (a_rule(regex="((a{100}){100}){100}"), "content rule secrets: regex: "),
        (a_rule(regex="a*"), "matches the empty text"),
        (a_rule(regex=r"\w+"), r"matches \[masked\], which is put in its place"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(rule: ContentRule, complaint: str) -> None:
    """By its name, when the bundle is read."""
    with pytest.raises(BundleError, match=complaint):
        compiled((rule,))


def test_a_rule_looks_for_something() -> None:
    """Without anything to look for it would be a misunderstanding."""
    with pytest.raises(ValueError, match="needs fields, patterns or regex"):
        ContentRule(name="x")
