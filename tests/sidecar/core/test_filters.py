"""sidecar.core.filters: lists lose what the principal may not use, and nothing else changes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.authorise import Question, Verdict
from sidecar.core.filters import review
from sidecar.core.message import Listing
from sidecar.errors import Reason, Refusal
from tests.builders import a_call, a_permit, a_request
from tests.fakes import FakeEngine, allowing

LISTING = a_permit(a_request("tools/list"))
ITEMS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["a", "b", "c"])},
        optional={
            "description": st.text(max_size=8),
            "x-own": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        },
    ),
    max_size=6,
)


class OnlyA:
    """Allows what is called a, of any kind."""

    name = "only-a"

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        return Verdict(allowed=question.message.target.label.endswith("'a'"))  # type: ignore[union-attr]


def a_list(items: str, *, member: str = "tools", rest: str = "") -> bytes:
    """A result with a list, as a server writes it."""
    return f'{{"jsonrpc":"2.0","id":7,"result":{{"{member}":[{items}]{rest}}}}}'.encode()


@given(ITEMS, st.sampled_from([None, 2]), st.sampled_from([each for each in Listing if each is not Listing.TASKS]))
def test_what_stays_keeps_its_order_and_its_bytes(
    items: list[dict[str, Any]], indent: int | None, listing: Listing
) -> None:
    """White space, number formats and unknown fields included."""
    key = {Listing.RESOURCES: "uri", Listing.TEMPLATES: "uriTemplate"}.get(listing, "name")
    written = [json.dumps({key: item.pop("name"), **item}, indent=indent) for item in items]
    data = a_list(",".join(written), member=listing, rest=',"nextCursor":""')
    seen = review(data, LISTING, [OnlyA()])
    kept = [text for text in written if json.loads(text)[key] == "a"]

    assert seen.hidden == len(written) - len(kept)
    if seen.hidden:
        assert seen.data == a_list(",".join(kept), member=listing, rest=',"nextCursor":""')
    else:
        assert seen.data is data


def test_every_list_of_a_message_is_filtered() -> None:
    """Also in the answer to something else: a replayed stream can carry any response."""
    lists = [("tools", "name"), ("prompts", "name"), ("resources", "uri"), ("resourceTemplates", "uriTemplate")]
    form = b'{"jsonrpc":"2.0","id":1,"result":{%b,"_meta":{"k":1.0}}}'
    data = form % b",".join(f'"{member}":[{{"{key}":"b"}}]'.encode() for member, key in lists)
    seen = review(data, a_permit(a_call()), [OnlyA()])

    assert (seen.hidden, seen.answers) == (4, False)
    assert seen.data == form % b",".join(f'"{member}":[]'.encode() for member, _ in lists)


@pytest.mark.parametrize(
    ("scope", "kept", "expected"),
    [
        ("public", "a", "private"),
        ("public", "b", "private"),
        ("private", "a", "private"),
        ("private", "b", "private"),
        (None, "b", None),
    ],
)
def test_what_was_judged_for_one_reader_is_private(scope: str | None, kept: str, expected: str | None) -> None:
    """Whether or not an item was hidden: all pages must agree, and another reader may see less."""
    rest = "" if scope is None else f',"cacheScope":"{scope}"'
    seen = review(a_list('{"name":"a"}', rest=rest), LISTING, [allowing(kept)])

    assert expected == json.loads(seen.data)["result"].get("cacheScope")


def test_a_resource_that_was_read_is_private_too() -> None:
    """It was authorised for its reader."""
    data = b'{"jsonrpc":"2.0","id":7,"result":{"contents":[],"cacheScope":"public","ttlMs":5}}'
    seen = review(data, a_permit(a_request("resources/read", {"uri": "x"})), [])

    assert seen.data == b'{"jsonrpc":"2.0","id":7,"result":{"contents":[],"cacheScope":"private","ttlMs":5}}'


def test_an_item_without_a_name_is_hidden() -> None:
    """It cannot be judged, and not be called either."""
    assert review(a_list('{"title":"a"}'), LISTING, [allowing("a")]).hidden == 1


def test_no_engine_hides_everything() -> None:
    """As without a rule nothing may be called."""
    assert review(a_list('{"name":"a"}'), LISTING, []).data == a_list("")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"[]",
        b'"text"',
        b'{"id":7,"result":{"tools":[]}}{}',
        b'\xef\xbb\xbf{"id":7,"result":{"tools":[]}}',
        b'{"id":7,"result":{"tools":null}}',
        b'{"id":7,"result":{"tools":{"name":"a"}}}',
        b'{"id":7,"result":{"tools":["a"]}}',
        b'{"id":7,"result":{"tools":[{"name":7}]}}',
        b'{"id":7,"result":[{"tools":[]}]}',
        b'{"id":true,"result":{}}',
        b'{"id":7,"method":7}',
        b'{"id":7,"result":{"tools":[{"name":"\xff"}]}}',
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes) -> None:
    """Passing it would show what was not judged."""
    with pytest.raises(Refusal) as caught:
        review(data, LISTING, [allowing()])

    assert (caught.value.reason, caught.value.public) == (Reason.UPSTREAM, "the server's answer cannot be read")


@given(st.binary(max_size=60))
def test_any_bytes_are_seen_or_refused(data: bytes) -> None:
    """No answer makes a defect."""
    try:
        seen = review(data, LISTING, [allowing()])
    except Refusal as refusal:
        assert refusal.reason is Reason.UPSTREAM  # noqa: PT017 - either way is right
    else:
        assert seen.data is data


@pytest.mark.parametrize(
    ("data", "answers", "error_code", "tool_failed"),
    [
        (b'{"id":7,"result":{}}', True, None, False),
        (b'{"id":"7","result":{}}', False, None, False),
        (b'{"id":7,"result":{"isError":true}}', True, None, True),
        (b'{"id":7,"result":{"isError":null}}', True, None, False),
        (b'{"id":7,"result":{"isError":"yes"}}', True, None, False),
        (b'{"id":7,"error":{"code":-32602,"message":"x"}}', True, -32602, False),
        (b'{"id":7,"error":{"code":"x"}}', True, None, False),
        (b'{"id":7,"error":{"code":true}}', True, None, False),
        (b'{"id":7,"error":"invalid_token"}', True, None, False),
        (b'{"id":7,"method":"sampling/createMessage"}', False, None, False),
        (b'{"method":"notifications/progress"}', False, None, False),
        (b'{"id":7,"result":{"content":[{"text":"[] {}"}]}}', True, None, False),
    ],
)
def test_the_answer_is_told_apart(data: bytes, answers: bool, error_code: int | None, tool_failed: bool) -> None:
    """From the server's own requests and notifications; how it ended is for the record. The bytes stay."""
    seen = review(data, a_permit(a_call()), [FakeEngine()])

    assert (data, answers, error_code, tool_failed) == (seen.data, seen.answers, seen.error_code, seen.tool_failed)
