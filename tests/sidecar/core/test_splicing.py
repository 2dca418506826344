"""sidecar.core.splicing: parts of texts are replaced, and every other byte stays."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.content import Content
from sidecar.core.detectors import MAX_LOOKS
from sidecar.core.message import parse
from sidecar.core.profile import ContentRule
from sidecar.core.splicing import ANSWER, ARGUMENTS, MAX_MARKS, REQUEST, Rewriter, Scope, Unmaskable, levels
from tests.builders import a_call
from tests.sidecar.core.contents import KEY, a_rule

MARK = b"[masked]"


def rewritten(data: bytes, rule: ContentRule | None = None, scope: Scope = ARGUMENTS) -> bytes:
    """*data* with marks where the rule, by default for AWS keys, finds something."""
    rules = Content([rule or a_rule(patterns=("aws-key",))])._rules
    return Rewriter(rules, frozenset(rules), MARK, scope, bool).rewrite(data)


SAFE = st.lists(
    st.sampled_from([b"x", b" ", b"\\n", b"\\u00e9", "é".encode(), b'\\"', b"\\\\", b"\\/", b"{", b"],", b":", b"\\ud83d\\ude00"]),
    max_size=4,
).map(b"".join)  # fmt: skip
SECRET = st.sampled_from([KEY, b"\\u0041" + KEY[1:], KEY[:-1] + b"\\u0050"])
SPACE = st.sampled_from([b"", b" ", b"\n\t"])
Pair = tuple[bytes, bytes]  # a document, and what must become of it


def joined(*pairs: Pair) -> Pair:
    """Both, one behind the other."""
    return b"".join(pair[0] for pair in pairs), b"".join(pair[1] for pair in pairs)


def same(text: bytes) -> Pair:
    """What stays as it is."""
    return text, text


STRINGS = st.tuples(SAFE, st.lists(st.tuples(SECRET, SAFE), max_size=2)).map(
    lambda drawn: joined(
        same(b'"' + drawn[0]), *(joined((b" " + secret, b" " + MARK), same(b" " + safe)) for secret, safe in drawn[1]), same(b'"')
    )
)  # fmt: skip
DOCUMENTS = st.recursive(
    STRINGS | st.sampled_from([same(b"-1.50e3"), same(b"true"), same(b"null")]),
    lambda inner: (
        st.tuples(SPACE, st.lists(inner, max_size=3)).map(
            lambda drawn: joined(
                same(b"[" + drawn[0]),
                *(joined(same(b"," if at else b""), item) for at, item in enumerate(drawn[1])),
                same(drawn[0] + b"]"),
            )
        )
        | st.tuples(SPACE, st.lists(inner, max_size=3)).map(
            lambda drawn: joined(
                same(b"{" + drawn[0]),
                *(
                    joined(same(b'%b"k%d" :%b' % (b"," if at else b"", at, drawn[0])), item)
                    for at, item in enumerate(drawn[1])
                ),
                same(drawn[0] + b"}"),
            )
        )
    ),
    max_leaves=6,
)


@given(DOCUMENTS)
def test_what_is_not_looked_for_keeps_its_bytes(pair: Pair) -> None:
    """White space, escapes and the spelling of numbers included; a secret is found in every spelling."""
    data, expected = pair
    made = rewritten(data)

    assert made == expected
    assert rewritten(made) is made


@given(DOCUMENTS)
def test_a_document_in_a_text_is_searched_as_well(pair: Pair) -> None:
    """Tools return their structured result a second time as text; its escapes are escaped again."""
    data, expected = (json.dumps({"text": "{" + f'"a":{each.decode()}' + "}"}).encode() for each in pair)

    assert json.loads(rewritten(data)) == json.loads(expected)


VALUES: Any = st.recursive(
    st.sampled_from(["abba", "ab", "a-b", "[masked", "masked]", "aab", "x\nab", '{"k":"ab"}', "\u00e9ab", "", 5511, 12.5, None, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ab", "k", "ssn"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
EXPRESSIONS = st.sampled_from([r"ab", r"b+", r"^a", r"b$", r"\d{2}", r"a\[", r"\]b|ba", r"(?i)AB", r"x\s"])


@given(VALUES, EXPRESSIONS, st.booleans())
def test_what_was_masked_holds_no_match(value: Any, expression: str, is_ascii: bool) -> None:
    """Whatever a customer's expression is; and masking again changes nothing."""
    rule = a_rule(regex=expression)
    (ready,) = Content([rule])._rules
    try:
        made = rewritten(json.dumps(value, ensure_ascii=is_ascii).encode(), rule)
    except Unmaskable:
        return

    assert [text for text in texts(json.loads(made)) if ready.find(text.encode())] == []
    assert rewritten(made, rule) is made


def texts(value: Any) -> list[str]:
    """Every text, number and member name in *value*, and what was not JSON there."""
    match value:
        case dict():
            return [each for key, member in value.items() for each in (key, *texts(member))]
        case list():
            return [each for item in value for each in texts(item)]
        case bool() | None:
            return []
        case _:
            return [str(value)]


def test_names_are_masked_unless_two_become_the_same() -> None:
    """A secret may stand where a member's name does."""
    assert rewritten(b'{"' + KEY + b'": 1}') == b'{"[masked]": 1}'
    with pytest.raises(Unmaskable):
        rewritten(b'{"' + KEY + b'":1,"' + KEY[:-1] + b'Q":2}')


def test_a_number_becomes_a_text() -> None:
    """There is no mark for a number."""
    card = b'{"n": [4111111111111111, 7]}'
    assert rewritten(card, a_rule(patterns=("credit-card",))) == b'{"n": ["[masked]", 7]}'


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("ssn", b'{"a": [{"SSN": "[masked]", "x": null}], "s_s_n": "[masked]", "ssn": null, "t": 3}'),
        ("a", b'{"a": "[masked]", "s_s_n": {"x": 2}, "ssn": null, "t": 3}'),
        ("/a/0/x", b'{"a": [{"SSN": 1, "x": null}], "s_s_n": {"x": 2}, "ssn": null, "t": 3}'),
        ("/s_s_n/x", b'{"a": [{"SSN": 1, "x": null}], "s_s_n": {"x": "[masked]"}, "ssn": null, "t": 3}'),
        ("/a/*", b'{"a": ["[masked]"], "s_s_n": {"x": 2}, "ssn": null, "t": 3}'),
        ("/t", b'{"a": [{"SSN": 1, "x": null}], "s_s_n": {"x": 2}, "ssn": null, "t": "[masked]"}'),
        ("/t/u", None),
    ],
)
def test_a_field_is_masked_as_a_whole(field: str, expected: bytes | None) -> None:
    """By name at any depth, or by path; null says nothing and stays."""
    data = b'{"a": [{"SSN": 1, "x": null}], "s_s_n": {"x": 2}, "ssn": null, "t": 3}'
    assert rewritten(data, a_rule(fields=(field,))) == (expected or data)


def test_an_expression_can_be_bound_to_fields() -> None:
    """Elsewhere the same text stays."""
    rule = a_rule(fields=("note",), regex="ab")
    assert (
        rewritten(b'{"note":["xab",{"k":"ab"}],"k":"ab"}', rule) == b'{"note":["x[masked]",{"k":"[masked]"}],"k":"ab"}'
    )


def test_an_expression_bound_to_fields_may_be_bound_to_the_ends_of_names_in_them() -> None:
    """Many texts are searched at once where nothing is bound to the ends of one: not below such fields."""
    screen = Content([a_rule(fields=("m",), regex="^[a-z]{8}$")]).answered(parse(a_call("a")))
    assert screen is not None
    data = b'{"result":{"m":{"abcdefgh":"abcdefgh"}}}'

    assert screen.screen(data, ANSWER).data == b'{"result":{"m":{"[masked]":"[masked]"}}}'


def test_the_protocols_own_members_are_left() -> None:
    """A rule that fits them would make a message of no protocol."""
    rule = a_rule(regex="(?i)m[eo]")
    asked = b'{"method":"mo","id":"me","params":{"name":"mo","arguments":{"mo":"me"},"_meta":{"x":"me"}}}'
    assert rewritten(asked, rule, REQUEST) == asked.replace(b'{"mo":"me"}', b'{"[masked]":"[masked]"}')
    said = b'{"id":"me","result":{"m":"mo","requestState":"mo","x":[{"mo":1}]}}'
    assert rewritten(said, rule, ANSWER) == said.replace(b'"m":"mo"', b'"m":"[masked]"').replace(
        b'{"mo"', b'{"[masked]"'
    )


def test_paths_begin_at_the_arguments_and_at_the_structured_content() -> None:
    """And at a document in a text, which repeats that."""
    rule = a_rule(fields=("/a",))
    asked = b'{"params":{"a":1,"arguments":{"a":1,"b":{"a":1}}}}'
    assert rewritten(asked, rule, REQUEST) == b'{"params":{"a":1,"arguments":{"a":"[masked]","b":{"a":1}}}}'
    said = b'{"result":{"a":1,"content":[{"text":"{\\"a\\":1}"}],"structuredContent":{"a":1}}}'
    expected = (
        b'{"result":{"a":1,"content":[{"text":"{\\"a\\":\\"[masked]\\"}"}],"structuredContent":{"a":"[masked]"}}}'
    )
    assert rewritten(said, rule, ANSWER) == expected


def test_every_text_stands_in_a_level_as_it_is() -> None:
    """So one search over each level finds what a search over each text would; too many levels are not certain."""
    deep = "a\tb\\\u00e9"
    for _ in range(3):
        deep = json.dumps({"t": deep})
    assert any(level is not None and "a\tb\\\u00e9".encode() in level for level in levels(deep.encode()))
    for _ in range(3):
        deep = json.dumps({"t": deep})
    assert list(levels(deep.encode()))[-1] is None


def test_thousands_of_marks_are_set_in_linear_time() -> None:
    """Of escapes, and of what is found in a text once more after what was found in the document it holds."""
    many, rule = 5_000, a_rule(patterns=("email",))
    assert rewritten(json.dumps("\n a@b.test" * many).encode(), rule) == json.dumps("\n [masked]" * many).encode()

    nested = json.dumps(json.dumps(["a@b.test", "x\n@b.test"] * many)).encode()
    assert json.loads(rewritten(nested, rule)).count("[masked]") == 2 * many


@pytest.mark.parametrize("value", ["a@b.test " * (MAX_MARKS + 1), ["a@b.test"] * (MAX_MARKS + 1)])
def test_what_would_take_more_marks_than_time_allows_cannot_be_masked(value: str | list[str]) -> None:
    """Every other call would wait for it."""
    with pytest.raises(Unmaskable, match=f"more than {MAX_MARKS} places"):
        rewritten(json.dumps(value).encode(), a_rule(patterns=("email",)))


class Counting:
    """An expression that counts how often it is asked."""

    def __init__(self, expression: Any) -> None:
        self.times, self._expression = 0, expression

    def __call__(self, text: bytes) -> object:
        """Search *text*."""
        self.times += 1
        return self._expression.search(text)


def counted(data: bytes, *rules: ContentRule) -> tuple[list[int], int]:
    """How often each of *rules*, none of which masks, found something in *data*, and how many texts were searched."""
    ready = Content(rules)._rules
    searches = Counting(re.compile(b"|".join(each.searches[0][0].pattern for each in ready)))
    rewriter = Rewriter(ready, frozenset(), MARK, ARGUMENTS, searches, is_free=True)

    assert rewriter.rewrite(data) is data
    return [rewriter.counts[each] for each in ready], searches.times


def test_what_is_not_masked_is_counted_only_so_far() -> None:
    """A message full of it must not hold up every other call: when no rule counts on, the rest is not read."""
    many = json.dumps(["a@b.test"] * (3 * MAX_MARKS)).encode()
    (found,), searches = counted(many, a_rule(regex="a@b", action="deny"))
    assert found == MAX_MARKS + 1
    assert searches < 3 * MAX_MARKS

    key = json.dumps(["a@b.test"] * (MAX_MARKS + 9) + [KEY.decode()]).encode()
    both, _ = counted(key, a_rule(regex="a@b", action="redact"), a_rule("keys", regex="AKIA", mode="shadow"))
    assert both == [MAX_MARKS + 1, 1]


@pytest.mark.parametrize("value", ["000-12-3456 " * (MAX_LOOKS + 1), ["000-12-3456"] * (MAX_LOOKS + 1), "2 " * 10**6])
def test_what_only_looks_like_it_is_checked_only_so_often(value: str | list[str]) -> None:
    """Candidates cost more than what is no match at all; whoever sends too many is treated as if all were matches."""
    data = json.dumps(value).encode()
    rule = a_rule(patterns=("us-ssn", "credit-card"))
    with pytest.raises(Unmaskable, match="more than"):
        rewritten(data, rule)

    (ready,) = Content([a_rule(patterns=("us-ssn", "credit-card"), action="redact")])._rules
    rewriter = Rewriter([ready], frozenset(), MARK, ARGUMENTS, bool)
    assert rewriter.rewrite(data) is data
    assert rewriter.counts[ready] == MAX_MARKS + 1


def test_fields_that_are_masked_are_masked_however_much_else_is_found() -> None:
    """A rule that only counts must not end what another one does."""
    data = json.dumps([{"ssn": 1}] * (MAX_MARKS + 1) + ["a@b.test"] * (MAX_MARKS + 1)).encode()
    field, counting = Content([a_rule("field", fields=("ssn",)), a_rule(regex="a@b", action="redact")])._rules
    made = Rewriter([field, counting], frozenset([field]), MARK, ARGUMENTS, bool).rewrite(data)

    assert made.count(MARK) == MAX_MARKS + 1


def test_white_space_takes_linear_time() -> None:
    """At the end too, where no token follows: a million spaces must not take minutes."""
    spaces = b" " * 10**6
    data = b"%b[%b%b,%b]%b" % (spaces, spaces, b'"' + KEY + b'"', b"1", spaces)

    assert rewritten(data) == data.replace(KEY, MARK)


def test_many_texts_are_searched_at_once() -> None:
    """A search for each of a million numbers takes seconds."""
    data = json.dumps([{"n": number, "t": "text"} for number in range(20_000)] + ["a@b.test"]).encode()
    found, searches = counted(data, a_rule(regex="a@b", action="deny"))

    assert found == [1]
    assert searches < 100


@given(VALUES, st.lists(VALUES, max_size=40), EXPRESSIONS, st.booleans())
def test_searching_many_texts_at_once_misses_nothing(
    value: Any, more: list[Any], expression: str, is_ascii: bool
) -> None:
    """The same is found, and the same is left."""
    screen = Content([a_rule(regex=expression)]).answered(parse(a_call("a")))
    assert screen is not None
    (rule,) = screen.rules
    data = json.dumps({"result": [*more, value, {"t": json.dumps(value)}]}, ensure_ascii=is_ascii).encode()
    slow = Rewriter([rule], frozenset([rule]), MARK, ANSWER, bool)
    try:
        expected = slow.rewrite(data)
    except Unmaskable:
        assert screen.screen(data, ANSWER).denied
        return

    screened = screen.screen(data, ANSWER)
    assert (screened.data, [each.count for each in screened.found]) == (
        expected,
        [slow.counts[rule]] if slow.counts[rule] else [],
    )
