"""Remembers which events of streams were told to whom: to nobody else is it told again what came after them.

A client that lost its stream names the last event that it has, and the server replays the rest. Servers may keep the
events of all sessions in one place, under ids that can be guessed; so an id that its sender was not told does not reach
the server, and the stream begins with what is new. MCP 2025-03-26 to 2025-11-25, transports, resumability.
"""

from dataclasses import dataclass, field
from typing import Final

HEADER: Final = b"last-event-id"
MAX_EVENTS: Final = 20_000  # of all principals, about 5 MB; the oldest goes first
MAX_ID_BYTES: Final = 256  # servers mint UUIDs and counters; a longer id is not remembered

Key = tuple[str, bytes]  # of a principal, and the event's id


@dataclass(slots=True)
class Told:
    """Ids of events, by whom they were told. Mutated by the return path only."""

    events: dict[Key, None] = field(default_factory=dict)

    def add(self, principal: str, event_id: bytes) -> None:
        """Remember that the principal with this key was told an event."""
        if len(event_id) > MAX_ID_BYTES:
            return
        key = (principal, event_id)
        self.events.pop(key, None)  # told last: goes last
        while len(self.events) >= MAX_EVENTS:
            del self.events[next(iter(self.events))]
        self.events[key] = None

    def has(self, principal: str, event_id: bytes) -> bool:
        """Say whether the principal was told the event."""
        return (principal, event_id) in self.events
