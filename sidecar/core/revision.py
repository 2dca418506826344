"""The protocol revisions that are known here, in their order, and what each of them implies for who reads a message.

Two eras: up to 2025-11-25 a client opens with `initialize` and may have a session; from 2026-07-28 on every request
stands alone and says its revision itself, in a header and in `_meta`. Which one a message belongs to is decided for
each message, never for a server: one endpoint may serve both (MCP 2026-07-28, versioning, backward compatibility).
"""

from enum import StrEnum


class Revision(StrEnum):
    """A dated revision; dates compare as their text does."""

    V2024_11_05 = "2024-11-05"  # HTTP+SSE
    V2025_03_26 = "2025-03-26"  # Streamable HTTP; batches
    V2025_06_18 = "2025-06-18"
    V2025_11_25 = "2025-11-25"  # tasks
    V2026_07_28 = "2026-07-28"  # stateless

    @property
    def is_modern(self) -> bool:
        """Say whether every request stands alone, with its own `_meta` and headers that repeat the body."""
        return self >= Revision.V2026_07_28

    @property
    def has_batches(self) -> bool:
        """Say whether a body may be an array of messages."""
        return self is Revision.V2025_03_26


UNSAID = Revision.V2025_03_26  # what a request without the header speaks (MCP 2025-06-18 and later, transports)
