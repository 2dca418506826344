"""sidecar.core.stdio: whatever bytes come, lines are lines, and what is no message is known for none."""

import itertools
import json
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.message import Shape
from sidecar.core.stdio import Lines, LineTooLong, one_line, read_line, spliced

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """*data* in pieces."""
    marks = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(marks)]


@given(
    st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=8),
    st.lists(st.integers(0, 400)),
)
def test_lines_are_the_same_wherever_the_stream_is_cut(written: list[bytes], places: list[int]) -> None:
    """Also between the bytes of one character, or of a line's end."""
    data = b"\n".join([*written, b""])
    lines = Lines()
    read = [line for piece in cut(data, places) for line in lines.feed(piece)]

    assert read == [line for each in written if (line := one_line(each))]


@given(st.lists(st.binary(max_size=300)), st.integers(1, 64))
def test_any_bytes_give_lines_within_the_limit_or_a_refusal(chunks: list[bytes], limit: int) -> None:
    """Nothing else, and no line holds a line's end."""
    lines = Lines(limit)
    try:
        read = [line for chunk in chunks for line in lines.feed(chunk)]
    except LineTooLong:
        return
    assert all(0 < len(line) <= limit and b"\n" not in line and b"\r" not in line for line in read)


def test_a_line_that_does_not_end_is_refused() -> None:
    """With its first byte too many, not when memory is full."""
    lines = Lines(10)
    lines.feed(b"x" * 10)

    with pytest.raises(LineTooLong, match="10 bytes"):
        lines.feed(b"x")


@given(VALUES, st.sampled_from([None, 2, "\t"]))
def test_a_document_on_one_line_means_the_same(value: Any, indent: int | str | None) -> None:
    """Line breaks stand between its parts only, where they mean nothing."""
    written = json.dumps(value, indent=indent).replace("\n", "\r\n").encode()
    line = one_line(written)

    assert b"\n" not in line
    assert b"\r" not in line
    assert json.loads(line) == value


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', Shape.RESPONSE),
        (b'{"jsonrpc":"2.0","id":"a","result":null}', Shape.RESPONSE),
        (b'{"jsonrpc":"2.0","id":1,"error":"odd"}', Shape.RESPONSE),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping"}', Shape.REQUEST),
        (b'{"jsonrpc":"2.0","method":"notifications/message"}', Shape.NOTIFICATION),
        (b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"parse error"}}', None),
        (b'{"jsonrpc":"2.0","id":1}', None),
        (b'{"jsonrpc":"2.0","id":1.0,"result":{}}', None),
        (b'{"jsonrpc":"2.0","id":true,"result":{}}', None),
        (b'{"jsonrpc":"2.0","id":9223372036854775807,"method":"ping"}', Shape.REQUEST),
        (b'{"jsonrpc":"2.0","id":9223372036854775808,"method":"ping"}', None),
        (b'{"jsonrpc":"2.0","id":1' + b"0" * 400 + b',"method":"ping"}', None),
        (b'{"jsonrpc":"1.0","id":1,"result":{}}', None),
        (b'[{"jsonrpc":"2.0","id":1,"result":{}}]', None),
        (b"Server running on stdio", None),
        (b"npm WARN deprecated", None),
        (b'{"jsonrpc":"2.0","id":1,"result":{}} trailing', None),
        (b"[" * 100_000, None),
        (b'{"jsonrpc":"2.0","method":"x","params":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ],
)
def test_what_a_server_writes_is_a_message_or_none(data: bytes, shape: Shape | None) -> None:
    """A banner, half a document, an id that is none: no client must be left to guess."""
    line = read_line(data)

    assert (line and line.shape) == shape


@given(st.binary(max_size=200) | VALUES.map(orjson.dumps))
def test_no_line_is_an_exception(data: bytes) -> None:
    """Whatever it holds."""
    line = read_line(data)

    assert line is None or line.shape is not None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (b'{"code":-32601,"message":"x"}', -32601),
        (b'{"message":"x"}', 0),
        (b'"text"', 0),
        (b"[1]", 0),
    ],
)
def test_an_error_has_a_code(error: bytes, code: int) -> None:
    """0 where the server gives none."""
    line = read_line(b'{"jsonrpc":"2.0","id":1,"error":%b}' % error)

    assert line is not None
    assert line.code == code


@pytest.mark.parametrize("params", [b"[]", b"7", b'{"progressToken":true}', b'{"_meta":7}', b"{}", b""])
def test_params_that_name_nothing_are_read_as_such(params: bytes) -> None:
    """A notification does not fail for them."""
    member = b',"params":' + params if params else b""
    line = read_line(b'{"jsonrpc":"2.0","method":"notifications/progress"%b}' % member)

    assert line is not None
    assert line.read_params().progress_token is None


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.integers(1, 2**53), VALUES.map(orjson.dumps))
def test_splicing_changes_one_value_and_no_other_byte(members: dict[str, Any], new_id: int, result: bytes) -> None:
    """Numbers keep their digits, strings their escapes, members their order."""
    others = {name: msgspec.Raw(b"1.50e+2") for name in members if name not in ("id", "result")}
    raw = result[:1] + b" " + result[1:] if result[:1] in b"[{" else result
    document = msgspec.json.encode({**others, "id": 0, "result": msgspec.Raw(raw)})
    changed = spliced(document, ["id"], new_id)

    assert changed == msgspec.json.encode({**others, "id": new_id, "result": msgspec.Raw(raw)})
