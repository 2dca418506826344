"""sidecar.core.document: one JSON document that every reader reads alike, or a refusal."""

import json
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.core.document import MAX_DEPTH, read_json
from sidecar.errors import Reason, Refusal

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
@example(b"1" * 400)
@example(b"-1E400")
@example(b'"\\ud800"')
@example(b"\xff")
def test_any_bytes_give_a_document_or_a_refusal(body: bytes) -> None:
    """Never another exception."""
    try:
        read_json(body)
    except Refusal as refusal:
        assert refusal.reason is Reason.MALFORMED  # noqa: PT017 - either end is right


@given(JSON, st.sampled_from([None, 1]), st.booleans())
def test_what_is_read_is_what_others_read(document: Any, indent: int | None, ascii_only: bool) -> None:
    """Three readers, one document; only integers beyond 64 bits are more exact here than in some."""
    body = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    try:
        read = read_json(body)
    except Refusal:
        return
    assert read == json.loads(body) == msgspec.json.decode(body)
    if orjson.dumps(orjson.loads(body)) == body:
        assert read == orjson.loads(body)


@pytest.mark.parametrize(
    "body", [b'{"a":1,"a":1}', b'[{"b":{"a":1,"\\u0061":2}}]', b'{"a":1, "a":2}', b'{"":1,"":2}', b'{"a":1,"a":1.0}']
)
def test_a_member_that_stands_twice_is_refused(body: bytes) -> None:
    """At any depth, however it is spelt: readers differ in which one they take."""
    with pytest.raises(Refusal, match="twice"):
        read_json(body)


@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_ends_where_readers_end(brackets: tuple[bytes, bytes]) -> None:
    """MAX_DEPTH levels pass, one more does not; brackets in a text are none."""
    opening, closing = brackets
    read_json(opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH)
    read_json(b'["' + b"[{" * 1000 + b'"]')
    with pytest.raises(Refusal, match="deeper"):
        read_json(opening * (MAX_DEPTH + 1) + b"1" + closing * (MAX_DEPTH + 1))
