"""sidecar/core/builtins/codes.py: encodings, hashes and identifiers, as the real opa answers; and what we say that we do not know."""

from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins.values import Unknown
from tests.sidecar.answers import Answers, is_same

# One expression a line, as a policy would have it. What is undefined to OPA must be undefined here.
EXPRESSIONS = r"""
hex.encode("hé")
hex.decode("68c3a9")
hex.decode("6")
base64url.encode_no_pad("a?>b")
urlquery.encode("a b&c=ü~*'()")
urlquery.decode("a+b%26%C3%BC")
urlquery.decode("%zz")
urlquery.encode_object({"b": "x y", "a": ["1", "2"], "c": {"z", "y"}})
urlquery.decode_object("a=1&b=2&a=3&c")
urlquery.decode_object("a;b=1")
urlquery.decode_object("%=1")
crypto.md5("a")
crypto.sha1("a")
crypto.sha256("a")
crypto.hmac.md5("a", "k")
crypto.hmac.sha1("a", "k")
crypto.hmac.sha256("a", "k")
crypto.hmac.sha512("a", "k")
crypto.hmac.equal("a", "a")
crypto.hmac.equal("a", "b")
uuid.parse("00000000-0000-4000-8000-000000000000")
uuid.parse("{1d7efc12-3a2b-11ef-9262-0242ac120002}")
uuid.parse("urn:uuid:000003e8-48b9-21ee-b200-325096b39f47")
uuid.parse("1d7efc123a2b11ef92620242ac120002")
uuid.parse("x")
"""
LINES = EXPRESSIONS.strip().splitlines()


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What the real opa says of each expression, and what we say."""
    return Answers.to(LINES)


@pytest.mark.parametrize("line", LINES)
def test_a_function_answers_as_opa_does(answers: Answers, line: str) -> None:
    """The same value, or undefined in both."""
    assert is_same(line, answers.ours[line], answers.theirs[line])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hex.decode", ["ff"]),
    ],
)
def test_what_we_do_not_know_is_not_guessed(name: str, arguments: list[Any]) -> None:
    """Unknown denies the decision; undefined or a guess could turn `not f(x)` into a permit."""
    with pytest.raises(Unknown):
        builtins.find(name)(*arguments)
