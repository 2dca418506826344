"""Remembers which task the server gave to whom.

A name is worth something only to the principal that it was given to; an unknown one and another's are not told apart,
because the difference would tell a guesser which exist. Stores names, nothing else. MCP 2025-11-25, tasks, security.
"""

from dataclasses import dataclass, field
from typing import Final

from sidecar.core.identity import Principal
from sidecar.errors import Reason, Refusal

MAX_OWNED: Final = 10_000  # about 2 MB; the one unused for longest goes first
MAX_NAME_CHARS: Final = 512  # servers mint UUIDs; a longer one is not remembered, so nobody gets it


@dataclass(slots=True, kw_only=True)
class Owned:
    """Names of one kind and their owners. Mutated by the pipeline only."""

    reason: Reason
    public: str  # what everybody else is told
    owners: dict[str, str] = field(default_factory=dict)

    def open(self, name: str, principal: Principal) -> None:
        """Remember that the server gave *name* to *principal*; whose it is already keeps it."""
        if len(name) > MAX_NAME_CHARS or name in self.owners:
            return
        while len(self.owners) >= MAX_OWNED:
            del self.owners[next(iter(self.owners))]
        self.owners[name] = principal.key

    def owns(self, name: str, principal: Principal) -> bool:
        """Say whether *name* is *principal*'s."""
        return self.owners.get(name) == principal.key

    def require(self, name: str, principal: Principal) -> None:
        """Pass when *name* is *principal*'s; raises Refusal."""
        owner = self.owners.get(name)
        if owner is None or owner != principal.key:
            detail = "unknown" if owner is None else "of another principal"
            raise Refusal(self.reason, self.public, detail=detail)
        self.owners[name] = self.owners.pop(name)  # used last: goes last

    def close(self, name: str) -> None:
        """Forget *name*."""
        self.owners.pop(name, None)


def tasks() -> Owned:
    """Return the memory of task ids."""
    return Owned(reason=Reason.UNKNOWN_TASK, public="task not found")
