"""sidecar.core.asks: what a server may ask of a client at all, and by what it is judged."""

from typing import Any

import msgspec
import pytest

from sidecar.core.asks import ASKS, FOLLOW_UPS, read_ask, read_url_elicitations
from sidecar.core.message import Ask
from sidecar.core.revision import Revision
from sidecar.errors import Reason, Refusal

THEN = Revision.V2025_11_25


def raw(text: str) -> msgspec.Raw:
    """Parameters, as the server wrote them."""
    return msgspec.Raw(text.encode())


@pytest.mark.parametrize(
    ("method", "params", "target"),
    [
        ("sampling/createMessage", '{"messages":[],"mode":7}', Ask(method="sampling/createMessage")),
        ("roots/list", "{}", Ask(method="roots/list")),
        ("elicitation/create", '{"message":"?"}', Ask(method="elicitation/create", mode="form")),
        ("elicitation/create", '{"mode":"form"}', Ask(method="elicitation/create", mode="form")),
        (
            "elicitation/create",
            '{"mode":"url","url":"https://x.test/"}',
            Ask(method="elicitation/create", mode="url", url="https://x.test/"),
        ),
    ],
)
def test_an_ask_is_judged_by_what_it_asks(method: str, params: str, target: Ask) -> None:
    """Its method, and an elicitation's mode and URL."""
    message = read_ask(method, raw(params), "s1", THEN)

    assert (message.method, message.target, message.id, message.revision) == (method, target, "s1", THEN)


@pytest.mark.parametrize("method", sorted(FOLLOW_UPS))
def test_what_follows_up_needs_no_rule(method: str) -> None:
    """It reaches nothing that an ask before it did not."""
    assert read_ask(method, raw("{}"), 3, THEN).target is None


@pytest.mark.parametrize("method", ["tools/call", "initialize", "sampling/createmessage", "x/own", ""])
def test_other_requests_are_refused(method: str) -> None:
    """No client answers them, and no policy knows them."""
    with pytest.raises(Refusal) as caught:
        read_ask(method, raw("{}"), 3, THEN)

    assert caught.value.reason is Reason.UNKNOWN_METHOD


@pytest.mark.parametrize("method", sorted(FOLLOW_UPS))
def test_a_result_carries_asks_only(method: str) -> None:
    """Multi round-trip requests know three methods."""
    with pytest.raises(Refusal):
        read_ask(method, raw("{}"), None, THEN)

    assert all(read_ask(each, raw("{}"), None, THEN).target for each in ASKS)


def test_an_elicitation_that_cannot_be_read_is_none() -> None:
    """Its mode and URL are what it is judged by."""
    with pytest.raises(msgspec.DecodeError):
        read_ask("elicitation/create", raw('{"mode":7}'), 1, THEN)


@pytest.mark.parametrize(
    ("data", "urls"),
    [
        ({"elicitations": [{"mode": "url", "url": "https://x.test/"}]}, ["https://x.test/"]),
        ({"elicitations": [{"url": "https://x.test/"}, {"url": "https://y.test/"}]}, ["https://x.test/", "https://y.test/"]),
        ({"elicitations": [{}, {"url": 7}, "x"]}, [None, None, None]),
        ({"elicitations": {}}, [None]),
        ({}, [None]),
        (None, [None]),
        ({"elicitations": []}, []),
    ],
)  # fmt: skip
def test_an_error_asks_to_open_urls(data: Any, urls: list[str | None]) -> None:
    """Each is judged; what cannot be read is judged as an elicitation without URL."""
    asked = read_url_elicitations({"code": -32042, "data": data}, THEN)

    assert [each.target for each in asked] == [Ask(method="elicitation/create", mode="url", url=url) for url in urls]
