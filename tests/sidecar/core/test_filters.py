"""sidecar.core.filters: lists lose what their reader may not use, and nothing else changes."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.authorise import Engine, Question, Verdict
from sidecar.core.filters import Reader, filtered
from sidecar.core.message import Listing
from sidecar.core.ownership import tasks
from tests.builders import a_permit, a_principal, a_request
from tests.fakes import allowing

PERMIT = a_permit(a_request("tools/list"))
KEYS = {Listing.RESOURCES: "uri", Listing.TEMPLATES: "uriTemplate", Listing.TASKS: "taskId"}
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


def a_reader(*engines: Engine, owned: Sequence[str] = ()) -> Reader:
    """One who asked for the tools, and owns these tasks."""
    memory = tasks()
    for each in owned:
        memory.open(each, a_principal())
    return Reader(permit=PERMIT, engines=engines, tasks=memory)


def a_list(items: str, *, member: str = "tools", rest: str = "") -> bytes:
    """A result with a list, as a server writes it."""
    return f'{{"jsonrpc":"2.0","id":7,"result":{{"{member}":[{items}]{rest}}}}}'.encode()


@given(ITEMS, st.sampled_from([None, 2]), st.sampled_from(list(Listing)))
def test_what_stays_keeps_its_order_and_its_bytes(
    items: list[dict[str, Any]], indent: int | None, listing: Listing
) -> None:
    """White space, number formats, unknown fields, the cursor and `_meta` included."""
    key = KEYS.get(listing, "name")
    written = [json.dumps({key: item.pop("name"), **item}, indent=indent) for item in items]
    rest = ',"nextCursor":"","_meta":{"k": 1.0},"x-own":[1e2]'
    data = a_list(",".join(written), member=listing, rest=rest)
    seen = filtered(data, a_reader(OnlyA(), owned=["a"]))
    kept = [text for text in written if json.loads(text)[key] == "a"]

    assert seen.hidden == len(written) - len(kept)
    if seen.hidden:
        assert seen.data == a_list(",".join(kept), member=listing, rest=rest)
    else:
        assert seen.data is data


def test_every_list_of_a_message_is_filtered() -> None:
    """Also in the answer to something else: a replayed stream can carry any response."""
    form = b'{"jsonrpc":"2.0","id":1,"result":{%b,"_meta":{"k":1.0}}}'
    data = form % b",".join(f'"{each}":[{{"{KEYS.get(each, "name")}":"b"}}]'.encode() for each in Listing)
    seen = filtered(data, a_reader(OnlyA()))

    assert seen.hidden == len(Listing)
    assert seen.data == form % b",".join(f'"{each}":[]'.encode() for each in Listing)


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
    seen = filtered(a_list('{"name":"a"}', rest=rest), a_reader(allowing(kept)))

    assert expected == json.loads(seen.data)["result"].get("cacheScope")


def test_a_resource_that_was_read_is_private_too() -> None:
    """It was authorised for its reader."""
    data = b'{"jsonrpc":"2.0","id":7,"result":{"contents":[],"cacheScope":"public","ttlMs":5}}'

    assert filtered(data, a_reader()).data == data.replace(b"public", b"private")


def test_an_item_without_a_name_is_hidden() -> None:
    """It cannot be judged, and not be called either."""
    assert filtered(a_list('{"title":"a"}'), a_reader(allowing("a"))).hidden == 1


def test_no_engine_hides_everything() -> None:
    """As without a rule nothing may be called."""
    assert filtered(a_list('{"name":"a"}'), a_reader()).data == a_list("")


def test_a_task_of_another_is_hidden() -> None:
    """Whose it is decides, not the policy."""
    data = a_list('{"taskId":"mine"},{"taskId":"other"},{"taskId":""}', member="tasks")
    seen = filtered(data, a_reader(allowing(), owned=["mine"]))

    assert (seen.data, seen.hidden) == (a_list('{"taskId":"mine"}', member="tasks"), 2)


def test_all_tools_that_were_listed_are_told() -> None:
    """Hidden ones too: what their schemas say of headers is the same for everybody."""
    seen = filtered(a_list('{"name":"a","inputSchema":{}},{"name":"b"}'), a_reader(OnlyA()))

    assert [(name, bytes(item)) for name, item in seen.tools] == [
        ("a", b'{"name":"a","inputSchema":{}}'),
        ("b", b'{"name":"b"}'),
    ]


@pytest.mark.parametrize("member", [b"null", b'{"name":"a"}', b'["a"]', b'[{"name":7}]', b'[{"name":"\xff"}]'])
def test_what_is_no_list_is_not_read(member: bytes) -> None:
    """Passing it would show what was not judged."""
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        filtered(b'{"id":7,"result":{"tools":%b}}' % member, a_reader(allowing()))
