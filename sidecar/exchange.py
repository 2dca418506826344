"""All that is known of one message, from its first byte to its last: what audit, metrics and spans are made of.

Filled in stage by stage; the record of a refused message shows how far it got. One for every message, refused and
unreadable ones included.
"""

from dataclasses import dataclass, field
from typing import Final

from certs.spiffe import SpiffeId
from sidecar.core.authorise import Agent, Difference, Permit
from sidecar.core.connection import Connection, Headers
from sidecar.core.content import Found
from sidecar.core.identity import Principal
from sidecar.core.limits import Admission, Reservation
from sidecar.core.message import Message, RequestId
from sidecar.core.profile import Profile
from sidecar.core.trace import TraceContext
from sidecar.errors import Refusal

NOBODY: Final = Agent()  # says nothing of itself


@dataclass(slots=True, kw_only=True)
class Outbound:
    """Where a call of the agent beside us went, or a connection that the server beside us opened itself."""

    host: str
    port: int
    expected: str  # SPIFFE ID pattern; empty for a server's connection
    server: SpiffeId | None = None  # as its certificate proved; None: not reached or not proven, and nothing was sent
    address: str | None = None  # that a server's connection was let out to; None: it was not


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Mutated by the pipeline and by the return path in sidecar/shell/inbound.py; read-only for observers."""

    connection: Connection
    profile: Profile | None  # None: refused before any bundle was there
    revision: str
    started_ns: int  # Unix time
    clock_s: float  # monotonic, at the same moment
    trace_id: str
    span_id: str
    parent_id: str | None = None
    link: TraceContext | None = None  # of the HTTP request, where the message has another parent
    sampled: bool = True
    session_id: str | None = None
    agent: Agent = NOBODY
    protocol_version: str | None = None
    principal: Principal | None = None
    message: Message | None = None
    permit: Permit | None = None
    shadow: tuple[Difference, ...] = ()  # policies in shadow mode that would have decided otherwise
    content: tuple[Found, ...] = ()  # what content rules found in the message and in what came back
    reservation: Reservation | None = None  # while the store of global limits has still to speak
    admission: Admission | None = None
    refusal: Refusal | None = None
    judged_s: float = 0.0  # seconds from the first line to the admission or refusal
    sent_s: float | None = None  # seconds from the first line to handing it to the server; None: never sent
    upstream_s: float | None = None  # seconds from the first line to the answer's; None: never sent
    total_s: float = 0.0
    status: int = 0  # HTTP status that the client got
    removed: tuple[str, ...] = ()  # headers that said who the user is; the server never sees them
    credentials: Headers = field(default=(), repr=False)  # what the server gets instead of the user's token; secret
    result: bytes | None = None  # the response message, when there was one small enough to keep
    result_bytes: int = 0
    result_sha256: str | None = None
    error_code: int | None = None  # of the server's JSON-RPC error
    tool_failed: bool = False
    hidden: int = 0  # list items that the principal may not see
    outbound: Outbound | None = None  # in agent role
    recorded: bytes | None = None  # message and arguments as the audit keeps them, once that was worked out
    aborted: str | None = None  # why the answer did not reach its end: client gone, upstream cut, drained

    @property
    def was_sent(self) -> bool:
        """Say whether the message went on to the server."""
        if self.outbound is None:
            return self.admission is not None
        return self.outbound.server is not None or self.outbound.address is not None

    @property
    def request_id(self) -> RequestId | None:
        """Return the id of the JSON-RPC request, which may be known of a message that could not be read further."""
        if self.message is not None:
            return self.message.id
        return None if self.refusal is None else self.refusal.id
