"""sidecar.shell.ways: the profile that judged a message says where it goes."""

from typing import Any, Literal, cast

import msgspec
import pytest

from sidecar.shell.stdio import Stdio
from sidecar.shell.upstream import Upstream
from sidecar.shell.ways import Ways
from tests.builders import a_server, an_admission, an_exchange


class FakeWay:
    """Counts."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def send(self, *_: Any, **__: Any) -> None:
        """Count a message."""
        self.taken.append("send")

    def reply(self, *_: Any, **__: Any) -> None:
        """Count a reply."""
        self.taken.append("reply")


@pytest.mark.parametrize(("transport", "taken"), [("http", "http"), ("sse", "http"), ("stdio", "stdio")])
def test_the_transport_says_which_way(transport: Literal["http", "sse", "stdio"], taken: str) -> None:
    """For messages, and for replies to the server."""
    http, stdio = FakeWay(), FakeWay()
    ways = Ways(http=cast("Upstream", http), stdio=cast("Stdio", stdio))
    admission = an_admission()
    question = msgspec.structs.replace(admission.permit.question, server=a_server(transport=transport))
    permit = msgspec.structs.replace(admission.permit, question=question)
    admission = msgspec.structs.replace(admission, permit=permit)
    exchange = an_exchange()
    exchange.permit = admission.permit

    ways.send(admission, exchange, cast("Any", None), traceparent=b"")
    ways.reply(exchange, b"{}")

    assert {"http": http.taken, "stdio": stdio.taken}[taken] == ["send", "reply"]
    assert len(http.taken) + len(stdio.taken) == 2
