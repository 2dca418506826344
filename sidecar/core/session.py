"""Binds an MCP session to the principal that opened it.

Stores no message. Refuses a session id shown by anyone else, and one that this sidecar did not see opened: a leaked or
guessed id must be worthless to another workload. MCP 2025-03-26 to 2025-11-25, transports, session management (404
makes a client open a new session, so a restarted sidecar costs one handshake).
"""

from dataclasses import dataclass, field
from typing import Final

from sidecar.core.authorise import Agent
from sidecar.core.identity import Principal
from sidecar.errors import Reason, Refusal

MAX_SESSIONS: Final = 10_000  # about 4 MB; the session unused for longest goes first
MAX_ID_CHARS: Final = 256  # SDKs mint UUIDs


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One MCP session: whose it is, and what its client said of itself."""

    owner: str
    agent: Agent


@dataclass(slots=True)
class Sessions:
    """The sessions that were opened through this sidecar. Mutated by the pipeline only."""

    opened: dict[str, Session] = field(default_factory=dict)

    def open(self, session_id: str, principal: Principal, agent: Agent) -> bool:
        """Remember that the server gave *session_id* to *principal*; say whether it was another's until now.

        It is the server's to give. One that counts its sessions gives the same ids again once it was restarted, and who
        had one before must not enter the other's.
        """
        before = self.opened.pop(session_id, None)
        while len(self.opened) >= MAX_SESSIONS:
            del self.opened[next(iter(self.opened))]
        self.opened[session_id] = Session(owner=principal.key, agent=agent)
        return before is not None and before.owner != principal.key

    def require(self, session_id: str, principal: Principal) -> Session:
        """Return the session; raises Refusal(NOT_FOUND) when it is not open or not the principal's.

        The two are not told apart: the difference would tell a guesser which ids exist.
        """
        session = self.opened.get(session_id)
        if session is None or session.owner != principal.key:
            detail = "unknown" if session is None else "opened by another principal"
            raise Refusal(Reason.NOT_FOUND, "this session is not open", detail=detail)
        self.opened[session_id] = self.opened.pop(session_id)  # used last: goes last
        return session

    def close(self, session_id: str) -> None:
        """Forget *session_id*."""
        self.opened.pop(session_id, None)
