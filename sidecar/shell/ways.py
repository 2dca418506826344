"""The two ways to a server, HTTP and standard input and output; the profile in force when a message was judged says which."""

from typing import Protocol

from sidecar.core.limits import Admission
from sidecar.exchange import Exchange
from sidecar.shell.stdio import Stdio
from sidecar.shell.upstream import Call, Sink, Upstream


class Way(Protocol):
    """A way to the server; takes nothing but what was admitted."""

    def send(self, admission: Admission, exchange: Exchange, sink: Sink, *, traceparent: bytes) -> Call:
        """Send the message that was admitted; *sink* receives the response. May raise Refusal."""
        ...

    def reply(self, exchange: Exchange, body: bytes, *, target: str | None = None) -> None:
        """Tell the server that a request of its own does not pass: *body* is an error of ours."""
        ...


class Ways:
    """Both."""

    def __init__(self, *, http: Upstream, stdio: Stdio) -> None:
        self._http = http
        self._stdio = stdio

    def send(self, admission: Admission, exchange: Exchange, sink: Sink, *, traceparent: bytes) -> Call:
        """Send the message that was admitted; *sink* receives the response. May raise Refusal."""
        way = self._of(admission.permit.question.server.transport)
        return way.send(admission, exchange, sink, traceparent=traceparent)

    def reply(self, exchange: Exchange, body: bytes, *, target: str | None = None) -> None:
        """Tell the server that a request of its own does not pass: *body* is an error of ours."""
        assert exchange.permit is not None  # noqa: S101 - nothing comes back without
        self._of(exchange.permit.question.server.transport).reply(exchange, body, target=target)

    def _of(self, transport: str) -> Way:
        return self._stdio if transport == "stdio" else self._http
