"""Decides under which names callers may reach this server, and which browsers' pages may call it.

Refuses a Host and an Origin that are not known: a page whose name was pointed at this address could use its visitor's
network otherwise (DNS rebinding; MCP transports, security warning). Answers a preflight for the pages that may call: it
has no credentials, so it comes before identity and never reaches the server. WHATWG Fetch, CORS protocol.
"""

import re
from collections.abc import Collection
from typing import Final

from sidecar.core.connection import Connection, Headers
from sidecar.core.replies import Response
from sidecar.errors import Reason, Refusal

MAX_LABEL_CHARS: Final = 256  # of a refused name in the record
MAX_AGE_S: Final = 600  # as long as a browser may go without asking again; Chromium stops at two hours
ALLOWED: Final = b", ".join(
    (
        b"authorization",
        b"content-type",
        b"accept",
        b"dpop",
        b"last-event-id",
        b"mcp-session-id",
        b"mcp-protocol-version",
        b"mcp-method",
        b"mcp-name",
    )
)
EXPOSED: Final = b"mcp-session-id, mcp-protocol-version, www-authenticate, dpop-nonce, retry-after"
CORS: Final = b"access-control-"
_PARAMETER: Final = re.compile(r"mcp-param-[a-z0-9.-]+")  # named by tools' schemas; CORS has no pattern for them


def check_host(connection: Connection, hosts: Collection[str]) -> None:
    """Refuse a Host that is none of *hosts*, in lower case; one without a port stands for every port. Empty: any."""
    host = connection.header(b"host")
    if host is not None and (not hosts or host in hosts):
        return
    folded = "" if host is None else host.lower()
    name, colon, port = folded.rpartition(":")
    has_port = bool(colon) and port.isdigit() and (":" not in name or name.endswith("]"))
    if folded not in hosts and not (has_port and name in hosts):
        raise Refusal(Reason.FORBIDDEN_CALLER, "this Host is not served here", detail=str(host)[:MAX_LABEL_CHARS])


def check_origin(connection: Connection, hosts: Collection[str], origins: Collection[str]) -> None:
    """Refuse a page that is neither of *origins* nor served under one of *hosts*. Without an Origin nothing is judged."""
    origin = connection.header(b"origin")
    if origin is not None and origin not in origins and origin.partition("://")[2] not in hosts:
        raise Refusal(Reason.FORBIDDEN_CALLER, "this Origin may not call", detail=origin[:MAX_LABEL_CHARS])


def preflight(connection: Connection, origins: Collection[str]) -> Response:
    """Return the answer to an OPTIONS request; raises Refusal(METHOD_NOT_ALLOWED) where it is no page's that may call."""
    origin = connection.header(b"origin")
    if origin not in origins or connection.header(b"access-control-request-method") is None:
        raise Refusal(
            Reason.METHOD_NOT_ALLOWED, "OPTIONS is for pages that may call", detail=str(origin)[:MAX_LABEL_CHARS]
        )
    asked = (connection.header(b"access-control-request-headers") or "").lower().split(",")
    parameters = [name.encode() for each in asked if _PARAMETER.fullmatch(name := each.strip(" \t"))]
    allowed = b", ".join((ALLOWED, *parameters))
    headers = (
        *_granted(origin),
        (b"access-control-allow-methods", b"POST, GET, DELETE"),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", b"%d" % MAX_AGE_S),
    )
    return Response(status=204, headers=headers, body=b"")


def shared(headers: Headers, origin: str | None, origins: Collection[str]) -> Headers:
    """Return a response's *headers* as the page at *origin* may read them; the server's own CORS headers never pass."""
    own = [(name, value) for name, value in headers if not name.startswith(CORS)]
    if origin is None or origin not in origins:
        return own
    return [*own, *_granted(origin), (b"access-control-expose-headers", EXPOSED)]


def _granted(origin: str | None) -> Headers:
    return ((b"access-control-allow-origin", str(origin).encode("latin-1")), (b"vary", b"Origin"))
