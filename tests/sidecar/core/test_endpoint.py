"""sidecar.core.endpoint: what a stream of 2024-11-05 announces stays on this server."""

from urllib.parse import urljoin, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.endpoint import MAX_CHARS, target_of
from sidecar.errors import Reason, Refusal


@pytest.mark.parametrize(
    ("announced", "target"),
    [
        (b"/message?sessionId=1", "/message?sessionId=1"),
        (b" /message?sessionId=1 ", "/message?sessionId=1"),
        (b"http://127.0.0.1:3001/message?sessionId=1", "/message?sessionId=1"),
        (b"https://server/message?a=1&b=%2F#part", "/message?a=1&b=%2F"),
        (b"//elsewhere.test/message", "/message"),
        (b"messages/?session_id=ab", "/v1/messages/?session_id=ab"),
        (b"../messages/", "/messages/"),
        (b"?session_id=ab", "/v1/sse?session_id=ab"),
    ],
)
def test_an_endpoint_is_a_path_here(announced: bytes, target: str) -> None:
    """As the client resolves it against the stream's own URL, without any other origin."""
    assert target_of(announced, "/v1/sse") == target


@pytest.mark.parametrize(
    "announced",
    [
        b"",
        b" ",
        b"http://server",
        b"http://server//elsewhere.test/message",
        b"javascript:alert(1)",
        b"mailto:a@b.test",
        b"/\\elsewhere.test/message",
        b"/message\n/other",
        b"/message?x=\xc3\xa4",
        b"http://[::1/message",
        b"/" + b"a" * MAX_CHARS,
    ],
)
def test_what_could_lead_elsewhere_is_refused(announced: bytes) -> None:
    """A client must post to nobody else."""
    with pytest.raises(Refusal) as caught:
        target_of(announced, "/sse")

    assert (caught.value.reason, caught.value.detail[:9]) == (Reason.UPSTREAM, "endpoint ")


@given(st.binary(max_size=40))
def test_whatever_is_announced_the_client_comes_back_here(announced: bytes) -> None:
    """Any bytes are refused, or resolve to the origin that was dialled."""
    try:
        target = target_of(announced, "/sse")
    except Refusal as refusal:
        assert refusal.reason is Reason.UPSTREAM  # noqa: PT017 - either way is right
    else:
        parts = urlsplit(urljoin("https://dialled.test/sse", target))
        assert (parts.scheme, parts.netloc) == ("https", "dialled.test")
