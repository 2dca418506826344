"""Status conditions in the shape that all of Kubernetes has, with a transition time that moves only with the status.

Source: k8s.io/apimachinery meta/v1 Condition, and SetStatusCondition of k8s.io/apimachinery/pkg/api/meta.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from webhook.core.pod import JSON

MAX_MESSAGE: Final = 1024  # the API takes 32,768; a status is read in a terminal, and held in memory by every watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What is so now. *reason* is one CamelCase word for programs, *message* for people."""

    type: Literal["Accepted", "Compiled", "Distributed"]
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def merge(held: Iterable[JSON], wanted: Iterable[Condition], generation: int, now: datetime) -> list[JSON]:
    """Return the conditions to write for *generation*: a status that was so before keeps its time."""
    before: Mapping[object, JSON] = {each.get("type"): each for each in held}
    merged = []
    for each in wanted:
        known = before.get(each.type, {})
        is_same = known.get("status") == each.status and known.get("lastTransitionTime")
        merged.append(
            {
                "type": each.type,
                "status": each.status,
                "observedGeneration": generation,
                "lastTransitionTime": known["lastTransitionTime"] if is_same else rfc3339(now),
                "reason": each.reason,
                "message": each.message[:MAX_MESSAGE],
            }
        )
    return merged


def find(held: Iterable[JSON], type_: str, generation: int) -> JSON | None:
    """Return the condition of *type_* if it speaks of *generation*."""
    for each in held:
        if each.get("type") == type_ and each.get("observedGeneration") == generation:
            return each
    return None


def rfc3339(moment: datetime) -> str:
    """Return *moment* as the API server writes times: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
