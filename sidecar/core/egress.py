"""Decides where a call of the application beside us goes, whom it must meet there, and what it says of its agent. Pure.

Only calls to servers that the profile names are ours; everything else passes untouched. The name in the request chooses
the identity that is demanded, never the address: whoever answers there without that identity gets nothing.
Kubernetes, DNS for Services (short names); RFC 9112, 3.2 (forms of a request's target).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from certs.spiffe import SpiffeId, SpiffePattern
from sidecar.core.connection import HOP_BY_HOP, RESERVED_PREFIX, Headers, nominated_in
from sidecar.core.profile import Destination
from sidecar.errors import Reason, Refusal

AGENT_SESSION: Final = b"sidegate-agent-session"
HTTP_PORT: Final = 80
MAX_SESSIONS: Final = 10_000  # about 2 MB; the one opened first goes first
_NOT_SENT: Final = HOP_BY_HOP | {b"traceparent", b"forwarded", b"x-forwarded-for", b"x-forwarded-client-cert"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a request's first line and Host say: where to, and the path in origin form."""

    authority: str
    host: str
    port: int
    path: str  # with its query


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A server that the profile names, and the identity that it must show."""

    host: str
    port: int
    expected: SpiffePattern


def target(url: bytes, host: str | None) -> Target:
    """Return the target of a request for *url*, in origin or absolute form. Raises Refusal(MALFORMED)."""
    text = url.decode("latin-1")
    if text[:7].lower() == "http://":
        authority, slash, rest = text[7:].partition("/")
        path = slash + rest or "/"
    elif text.startswith("/"):
        authority, path = host or "", text
    else:
        raise Refusal(Reason.MALFORMED, "the request target must be a path or an http URL")
    name, port = split_authority(authority, HTTP_PORT)
    return Target(authority=authority, host=name, port=port, path=path)


def split_authority(authority: str, default_port: int | None = None) -> tuple[str, int]:
    """Return host and port of *authority*. Raises Refusal(MALFORMED)."""
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "" if default_port is None else str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or "@" in host or not port.isascii() or not port.isdecimal() or not 0 < int(port[:6]) <= 65535:
        raise Refusal(Reason.MALFORMED, "the request names no host and port")
    return host, int(port)


def canonical(host: str, namespace: str) -> str:
    """Return `service.namespace` for every name by which a pod of *namespace* can call a Service; others as they are."""
    labels = host.lower().removesuffix(".").split(".")
    if len(labels) == 1:
        return f"{labels[0]}.{namespace}"
    return ".".join(labels[:2]) if labels[2:3] == ["svc"] else ".".join(labels)


def find(asked: Target, servers: Sequence[Destination], namespace: str) -> Destination | None:
    """Return the server that a pod of *namespace* calls; None when the call is no business of ours."""
    name = canonical(asked.host, namespace)
    return next((each for each in servers if each.port == asked.port and canonical(each.host, namespace) == name), None)


def route(asked: Target, server: Destination, namespace: str, own: SpiffeId) -> Route:
    """Return the route to *server* for a pod of *namespace*, which is *own*.

    Without a pattern in the profile any service account of the Service's namespace will do, in our own trust domain.
    """
    where = canonical(server.host, namespace).split(".")[1]
    pattern = server.id or f"spiffe://{own.trust_domain}/ns/{where}/sa/*"
    return Route(host=asked.host, port=asked.port, expected=SpiffePattern.parse(pattern))


def outgoing(headers: Headers, *, authority: str, agent_session: str, traceparent: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers to send: the application's, without what belongs to its own hop, and with what we say of it."""
    dropped = _NOT_SENT | nominated_in(headers)
    kept = [(name, value) for name, value in headers if name not in dropped and not name.startswith(RESERVED_PREFIX)]
    stamps = [(AGENT_SESSION, agent_session.encode("latin-1", "replace")), (b"traceparent", traceparent)]
    return [(b"host", authority.encode("latin-1")), *kept, *stamps]


def incoming(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the headers of the answer that the application gets: all but those of the other hop."""
    dropped = HOP_BY_HOP | nominated_in(headers)
    return [pair for pair in headers if pair[0] not in dropped]


@dataclass(slots=True, kw_only=True)
class AgentSessions:
    """Which agent session belongs to which MCP session. Mutated by its own methods only; *mint* draws a new one."""

    mint: Callable[[], str]
    known: dict[str, str] = field(default_factory=dict)

    def of(self, said: str | None, mcp_session: str | None, connection: str) -> str:
        """Return the session to stamp: what the application itself says, its MCP session's, or its *connection*'s."""
        if said:
            return said
        return self.known.get(mcp_session, connection) if mcp_session else connection

    def remember(self, mcp_session: str, agent_session: str) -> None:
        """Know that the server gave *mcp_session* to whom we called *agent_session*."""
        while len(self.known) >= MAX_SESSIONS:
            del self.known[next(iter(self.known))]
        self.known[mcp_session] = agent_session
