"""A trace context is read as the specification demands, and everything else is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.trace import TraceContext, of_message, parse, sent_id, traceparent

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_context_names_trace_parent_and_sampling() -> None:
    """The three facts of a traceparent."""
    assert parse(f"00-{TRACE_ID}-{SPAN_ID}-01") == TraceContext(trace_id=TRACE_ID, parent_id=SPAN_ID, sampled=True)
    assert parse(f"00-{TRACE_ID}-{SPAN_ID}-00") == TraceContext(trace_id=TRACE_ID, parent_id=SPAN_ID, sampled=False)


def test_later_version_may_say_more() -> None:
    """Its unknown end is ignored (section 4, versioning), unknown flags too."""
    assert parse(f"cc-{TRACE_ID}-{SPAN_ID}-ff-what-the-future-holds") is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"00-{TRACE_ID}-{SPAN_ID}",
        f"00-{TRACE_ID}-{SPAN_ID}-01-more",  # version 00 ends here
        f"00-{TRACE_ID}-{SPAN_ID}-01-",
        f"00-{TRACE_ID}-{SPAN_ID}-01\n",
        f"cc-{TRACE_ID}-{SPAN_ID}-01more",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f" 00-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID[:-1]}\u0661-{SPAN_ID}-01",
    ],
)
def test_anything_else_is_no_context(text: str) -> None:
    """A malformed context must not be continued: a new trace begins."""
    assert parse(text) is None


@pytest.mark.parametrize("params", [{}, {"_meta": None}, {"_meta": []}, {"_meta": {"traceparent": 1}}])
def test_message_without_context_has_none(params: dict[str, object]) -> None:
    """Whatever stands in `_meta`."""
    assert of_message(params) is None


def test_context_of_the_message_is_found() -> None:
    """SEP-414: unprefixed `traceparent` in `_meta`."""
    found = of_message({"_meta": {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}})

    assert found is not None
    assert found.trace_id == TRACE_ID


@given(text=st.text())
def test_any_text_is_read(text: str) -> None:
    """Never raises."""
    assert parse(text) is None


def test_id_of_our_other_span_differs_in_its_last_digit() -> None:
    """And leads back to the first; none is zero where the first's bits above the last are not."""
    for digit in "0123456789abcdef":
        span_id = f"b7ad6b716920333{digit}"

        assert sent_id(span_id) != span_id
        assert sent_id(span_id)[:-1] == span_id[:-1]
        assert sent_id(sent_id(span_id)) == span_id


def test_header_is_read_back_as_it_was_written() -> None:
    """Both flags."""
    for sampled in (True, False):
        context = parse(traceparent("a" * 32, "b" * 16, sampled=sampled).decode())

        assert context == TraceContext(trace_id="a" * 32, parent_id="b" * 16, sampled=sampled)
