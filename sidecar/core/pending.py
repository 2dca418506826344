"""Remembers which requests wait for an answer: the server's to a client, and a client's to the server.

An answer that nobody asked for and a cancellation of another's request are refused, so both sides are known by id
within a scope: the session, and the principal where there is none. MCP 2025-03-26 to 2025-11-25, sampling, elicitation,
roots, cancellation; CVE-2026-25536 (answers routed by ids that collide).
"""

from dataclasses import dataclass, field
from typing import Final

from sidecar.core.message import RequestId

MAX_PENDING: Final = 10_000  # about 3 MB; the oldest goes first

Key = tuple[str, RequestId]  # scope and id; 1 and "1" are two ids, and two keys


@dataclass(slots=True)
class Pending:
    """Requests of one direction. Mutated by the pipeline only."""

    waiting: dict[Key, int] = field(default_factory=dict)  # how many; clients that start anew reuse their ids

    def add(self, scope: str, request_id: RequestId) -> None:
        """Remember a request that was passed on."""
        key = (scope, request_id)
        while len(self.waiting) >= MAX_PENDING:
            del self.waiting[next(iter(self.waiting))]
        self.waiting[key] = self.waiting.get(key, 0) + 1

    def has(self, scope: str, request_id: RequestId) -> bool:
        """Say whether a request waits."""
        return (scope, request_id) in self.waiting

    def forget(self, scope: str) -> None:
        """Forget all requests of *scope*: it is another's now."""
        self.waiting = {key: count for key, count in self.waiting.items() if key[0] != scope}

    def remove(self, scope: str, request_id: RequestId) -> None:
        """Forget one request, answered or given up."""
        key = (scope, request_id)
        left = self.waiting.get(key, 0) - 1
        if left > 0:
            self.waiting[key] = left
        else:
            self.waiting.pop(key, None)
