"""Named fields are hidden wherever they stand, and a hash never covers them."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.redaction import REDACTED, encode, redact

NAMES = ("password", "api_key")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def _kept(value: Any) -> Any:
    return orjson.loads(redact(value, NAMES).data)


@pytest.mark.parametrize("name", ["password", "Password", "PASS_WORD", "api_key", "apiKey", "API-KEY", "apikey"])
def test_name_is_compared_without_case_and_separators(name: str) -> None:
    """Writers spell one name in many ways; each spelling is hidden."""
    assert {name: REDACTED} == _kept({name: "hunter2"})


@pytest.mark.parametrize("name", ["password_hint", "max_api_keys", "x-api-key", "user"])
def test_other_names_stay(name: str) -> None:
    """A name that merely contains a listed one is another name."""
    assert {name: "v"} == _kept({name: "v"})


def test_whole_value_goes_whatever_its_type() -> None:
    """An object or list under a listed name may be the secret itself."""
    assert _kept({"a": [{"password": {"old": "x", "new": ["y"]}}, 1]}) == {"a": [{"password": REDACTED}, 1]}


def test_json_in_a_string_is_looked_into() -> None:
    """Tools return their structured result again as text."""
    text = json.dumps({"rows": [{"password": "hunter2", "id": 1}]}, indent=2)

    content = redact({"content": [{"type": "text", "text": text}]}, NAMES)

    assert content.redacted
    assert b"hunter2" not in content.data


@pytest.mark.parametrize(
    "text",
    [
        '{"pass\\u0077ord": "hunter2"}',  # another spelling of the same name
        '{"a": {"password": "hunter2"}, "a": 1}',  # the first one vanishes when it is read
        '["{\\"password\\": \\"hunter2\\"}"]',
        '{"password": "hunter2", "n": ' + "9" * 5000 + "}",
    ],
)
def test_ways_around_the_look_into_strings_are_closed(text: str) -> None:
    """Escapes, repeated members, JSON in JSON in a string, numbers that Python refuses."""
    assert b"hunter2" not in redact({"text": text}, NAMES).data


def test_nesting_beyond_the_cap_is_hidden_whole() -> None:
    """What is not looked at is not kept."""
    value: Any = ["hunter2", {"password": ""}]
    for _ in range(70):
        value = [value]

    for document in (value, {"text": json.dumps(value)}, {"text": "[" * 5000 + '"hunter2 password"' + "]" * 5000}):
        assert b"hunter2" not in redact(document, NAMES).data


def test_text_that_is_not_json_stays() -> None:
    """Prose with brackets is no document."""
    assert _kept({"t": "[password] is asked for", "u": "{"}) == {"t": "[password] is asked for", "u": "{"}


def test_nothing_hidden_means_nothing_changed() -> None:
    """Without a listed name the document is kept byte for byte."""
    content = redact({"ö": ["{ }", 1.5, None]}, NAMES)

    assert not content.redacted
    assert orjson.dumps({"ö": ["{ }", 1.5, None]}) == content.data


def test_hash_does_not_cover_what_was_hidden() -> None:
    """Or a four-digit PIN could be found by trying all of them."""
    assert redact({"password": "1234"}, NAMES).sha256 == redact({"password": "9999"}, NAMES).sha256
    assert redact({"user": "a"}, NAMES).sha256 != redact({"user": "b"}, NAMES).sha256


def test_cut_never_splits_a_character() -> None:
    """The kept beginning is valid text."""
    content = redact("ab€", NAMES)  # "ab\xe2\x82\xac"

    assert [content.cut(4), content.cut(5), content.cut(6)] == ['"ab', '"ab', '"ab€']


@pytest.mark.parametrize("value", [2**70, -(2**70), "\ud800", {"\udfff": [2**64]}])
def test_encode_is_total(value: Any) -> None:
    """Legal JSON that orjson refuses is written all the same, and means the same."""
    assert value == json.loads(encode(value))


@given(value=json_values, name=st.sampled_from(["password", "PassWord", "api-key"]))
def test_secret_is_never_kept(value: Any, name: str) -> None:
    """Whatever stands around it, and however often it is wrapped into text."""
    secret = {name: "hunter2-S3CR3T"}
    document = {
        "around": value,
        "in": [secret],
        "text": json.dumps({"in": secret}),
        "twice": json.dumps([json.dumps(secret)]),
    }

    content = redact(document, NAMES)

    assert b"hunter2-S3CR3T" not in content.data
    assert content.redacted


@given(value=json_values)
def test_redacting_twice_changes_nothing_more(value: Any) -> None:
    """Redaction is complete the first time."""
    once = redact(value, NAMES)

    assert once.data == redact(json.loads(once.data), NAMES).data


def test_an_answer_nested_deeper_than_python_recurses_is_said_to_be() -> None:
    """A server may answer anything: the record is written all the same."""
    document: Any = None
    for _ in range(50_000):
        document = [document]

    content = redact(document, NAMES)

    assert content.data == b'"[nested too deeply]"'
    while document is not None:  # undone by hand: letting go of it would recurse as deep
        document = document[0]
