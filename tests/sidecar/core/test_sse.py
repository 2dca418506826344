"""sidecar.core.sse: events as every client reads them, or none."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.sse import MAX_EVENT_BYTES, BadStream, Event, Splitter, message

LINE = st.sampled_from(
    [
        b"data: {}",
        b"data:{}",
        b"data",
        b"data:",
        b": ping",
        b"id: 1",
        b"event: message",
        b"event: other",
        b"retry: 5",
        b"x",
    ]
)
ENDING = st.sampled_from([b"\n", b"\r\n"])
STREAM = st.lists(st.tuples(st.lists(st.tuples(LINE, ENDING), max_size=4), ENDING), max_size=5).map(
    lambda events: b"".join(b"".join(line + end for line, end in lines) + blank for lines, blank in events)
)


def split(*chunks: bytes) -> list[Event]:
    """Return the events of a whole stream."""
    splitter = Splitter()
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    splitter.end()
    return events


@given(STREAM, st.data())
def test_a_stream_cut_at_any_byte_gives_the_same_events(stream: bytes, data: st.DataObject) -> None:
    """Where TCP cuts is nobody's meaning."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(bounds)]

    assert _outcome(stream) == _outcome(*pieces)


@given(STREAM)
def test_events_are_the_bytes_that_came(stream: bytes) -> None:
    """Nothing is lost, added or changed up to the last whole event."""
    splitter = Splitter()

    raw = b"".join(event.raw for event in splitter.feed(stream))

    assert stream.startswith(raw)


def _outcome(*chunks: bytes) -> list[Event] | str:
    try:
        return split(*chunks)
    except BadStream as error:
        return str(error)


def test_each_event_is_given_as_soon_as_it_is_whole() -> None:
    """The first does not wait for the second."""
    splitter = Splitter()

    assert splitter.feed(b"data: 1\n") == []
    assert splitter.feed(b"\ndata: 2") == [Event(raw=b"data: 1\n\n", data=b"1")]
    assert splitter.feed(b"\r\n\r\n") == [Event(raw=b"data: 2\r\n\r\n", data=b"2")]


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: 1\n\n", b"1"),
        (b"data:1\n\n", b"1"),
        (b"data:  1\n\n", b" 1"),
        (b"data: {\ndata: }\n\n", b"{\n}"),
        (b"event: message\ndata: 1\n\n", b"1"),
        (b"event: message \ndata: 1\n\n", b"1"),
        (b"event:\ndata: 1\n\n", b"1"),
        (b"event: other\nevent: message\ndata: 1\n\n", b"1"),
        (b": ping\n\n", None),
        (b"id: 1\nretry: 5\n\n", None),
        (b"id: 1\ndata:\n\n", None),
        (b"id: 1\ndata: \n\n", None),
        (b"datax: 1\n\n", None),
        (b" data: 1\n\n", None),
    ],
)
def test_only_messages_have_data(raw: bytes, data: bytes | None) -> None:
    """What some client would read as a message is one; comments, primers and other events are not."""
    (event,) = split(raw)

    assert (event.raw, event.data) == (raw, data)


@pytest.mark.parametrize(
    "raw", [b"id: 1\ndata:\n\n", b"id:1\n\n", b"data: x\r\nid: 0\r\nid: 1 \r\n\r\n", b"event: y\nid: 1\n\n"]
)
def test_any_event_may_have_an_id(raw: bytes) -> None:
    """A client remembers the last one."""
    (event,) = split(raw)

    assert event.id == b"1"


@pytest.mark.parametrize("kind", [b"endpoint", b" endpoint "])
def test_an_endpoint_is_no_message(kind: bytes) -> None:
    """It says where to post (2024-11-05)."""
    raw = b"event:" + kind + b"\ndata: /messages?x=1\n\n"

    assert split(raw) == [Event(raw=raw, data=None, endpoint=b"/messages?x=1")]


def test_a_message_of_our_own_reads_as_one() -> None:
    """By every client."""
    assert [each.data for each in split(message(b'{"id":7}'))] == [b'{"id":7}']


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ((b"\xef\xbb\xbfdata: 1\n\n",), "byte order mark"),
        ((b"\xef", b"\xbb\xbfdata: 1\n\n"), "byte order mark"),
        ((b"\n\xef\xbb\xbfdata: 1\ndata: 2\n\n",), "byte order mark"),
        ((b"data: 1\n\xef\xbb\xbfdata: 2\n\n",), "byte order mark"),
        ((b"data: 1\rdata: 2\n\n",), "carriage return"),
        ((b"data: 1\r\r\n\r\n",), "carriage return"),
        ((b"data: 1\n\rdata: 2\n\n",), "carriage return"),
        ((b"data: 1",), "within an event"),
        ((b"data: 1\n",), "within an event"),
        ((b"id: 1\ndata: 1\r\n",), "within an event"),
        ((b"data: " + b"x" * MAX_EVENT_BYTES,), "bytes"),
    ],
)
def test_what_clients_read_differently_is_refused(chunks: tuple[bytes, ...], why: str) -> None:
    """Each with its reason."""
    with pytest.raises(BadStream, match=why):
        split(*chunks)


def test_an_unfinished_comment_at_the_end_is_dropped() -> None:
    """It says nothing, so its end harms nobody."""
    assert split(b"data: 1\n\n: pi") == [Event(raw=b"data: 1\n\n", data=b"1")]


def test_the_cap_is_for_one_event_not_for_the_stream() -> None:
    """A long stream of small events goes on."""
    splitter = Splitter()
    half = b"data: " + b"x" * (MAX_EVENT_BYTES // 2) + b"\n\n"

    assert [len(splitter.feed(half)) for _ in range(3)] == [1, 1, 1]


def test_replaced_data_keeps_the_other_fields() -> None:
    """Ids and retry hints belong to resumption."""
    event = split(b": c\r\nid: 1\r\nevent: message\r\ndata: {\r\ndata: }\r\nretry: 5\r\n\r\n")[0]

    assert event.replaced(b"{}") == b": c\nid: 1\nevent: message\nretry: 5\ndata: {}\n\n"


def test_replaced_data_of_several_lines_stays_data() -> None:
    """White space that a filter kept within an item must not end the event."""
    event = split(b"data: x\n\n")[0]
    again = split(event.replaced(b"{\n\n}"))

    assert [each.data for each in again] == [b"{\n\n}"]
