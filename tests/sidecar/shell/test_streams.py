"""sidecar.shell.streams: an exchange of 2024-11-05 is over once, when both of its halves are."""

import pytest

from sidecar.core.message import Message, Shape
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange
from sidecar.shell import streams as module
from sidecar.shell.streams import Stream
from tests.builders import a_principal, an_exchange


def posted(request_id: str | int = 7, *, shape: Shape = Shape.REQUEST, status: int = 202) -> Exchange:
    """What was posted, and acknowledged."""
    exchange = an_exchange(message=Message(shape=shape, method="x", id=request_id, params={}))
    exchange.status = status
    return exchange


def a_stream() -> tuple[Stream, list[bytes]]:
    """An open stream, and what is said on it."""
    said: list[bytes] = []
    return Stream("/messages?s=1", a_principal(), said.append), said


def test_an_answer_after_the_post_ends_the_exchange() -> None:
    """The usual order."""
    stream, _ = a_stream()
    exchange = posted()
    stream.expect(exchange)

    assert (stream.is_awaited, stream.settle(exchange)) == (True, False)
    assert stream.answered(7) == (exchange, True)
    assert (stream.is_awaited, stream.answered(7)) == (False, (None, False))


def test_an_answer_before_the_posts_end_leaves_that_to_the_post() -> None:
    """They come on two connections, in any order."""
    stream, _ = a_stream()
    exchange = posted()
    stream.expect(exchange)

    assert stream.answered(7) == (exchange, False)
    assert stream.settle(exchange)


@pytest.mark.parametrize(
    "change", [{"status": 400}, {"aborted": "client gone"}, {"refusal": Refusal(Reason.UPSTREAM, "x")}]
)
def test_a_post_that_failed_is_not_answered(change: dict[str, object]) -> None:
    """Its exchange is over with it."""
    stream, _ = a_stream()
    exchange = posted()
    stream.expect(exchange)
    for name, value in change.items():
        setattr(exchange, name, value)

    assert stream.settle(exchange)
    assert stream.answered(7) == (None, False)


@pytest.mark.parametrize("shape", [Shape.NOTIFICATION, Shape.RESPONSE])
def test_what_is_no_request_waits_for_nothing(shape: Shape) -> None:
    """Nor does what was never expected."""
    stream, _ = a_stream()
    exchange = posted(shape=shape)
    stream.expect(exchange)

    assert (stream.is_awaited, stream.settle(exchange)) == (False, True)


def test_an_id_under_way_is_refused() -> None:
    """Its answer would be taken for the other's; the first one goes on."""
    stream, _ = a_stream()
    first, second = posted(), posted()
    stream.expect(first)
    with pytest.raises(Refusal) as caught:
        stream.expect(second)

    assert caught.value.reason is Reason.MALFORMED
    assert (stream.settle(second), stream.settle(first)) == (True, False)


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers nothing must not fill our memory."""
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    stream, _ = a_stream()
    stream.expect(posted(1))
    with pytest.raises(Refusal) as caught:
        stream.expect(posted(2))

    assert caught.value.reason is Reason.THROTTLED


def test_the_end_of_the_stream_ends_what_waited() -> None:
    """But for a POST that is still under way: that ends itself."""
    stream, _ = a_stream()
    over, under_way = posted(1), posted(2)
    for exchange in (over, under_way):
        stream.expect(exchange)
    stream.settle(over)

    assert stream.end() == [over]
    assert stream.settle(under_way)


def test_what_is_said_is_an_event() -> None:
    """As the server's own."""
    stream, said = a_stream()
    stream.say(b'{"id":7}')

    assert said == [b'event: message\ndata: {"id":7}\n\n']
