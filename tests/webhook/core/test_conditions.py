"""The standard shape of conditions."""

from datetime import UTC, datetime, timedelta, timezone

from webhook.core.conditions import MAX_MESSAGE, Condition, find, merge, rfc3339

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=5)
GOOD = Condition(type="Compiled", status="True", reason="Compiled", message="compiles")
BAD = Condition(type="Compiled", status="False", reason="DoesNotCompile", message="p.rego:2:1: no")


def test_condition_has_the_fields_that_kubernetes_asks_for() -> None:
    """Tools such as `kubectl wait` and Argo CD read this shape."""
    assert merge([], [GOOD], 3, NOON) == [
        {
            "type": "Compiled",
            "status": "True",
            "observedGeneration": 3,
            "lastTransitionTime": "2026-11-22T12:00:00Z",
            "reason": "Compiled",
            "message": "compiles",
        }
    ]


def test_time_moves_only_with_the_status() -> None:
    """A new message or generation is no transition."""
    first = merge([], [BAD], 1, NOON)
    (same,) = merge(first, [Condition(type="Compiled", status="False", reason="Other", message="m")], 2, LATER)
    (changed,) = merge(first, [GOOD], 2, LATER)

    assert (same["lastTransitionTime"], same["observedGeneration"]) == ("2026-11-22T12:00:00Z", 2)
    assert changed["lastTransitionTime"] == "2026-11-22T12:05:00Z"


def test_condition_without_time_gets_one() -> None:
    """Somebody else may have written it."""
    (merged,) = merge([{"type": "Compiled", "status": "True"}], [GOOD], 1, NOON)

    assert merged["lastTransitionTime"] == "2026-11-22T12:00:00Z"


def test_message_is_bounded() -> None:
    """Every watcher of the resource holds it."""
    (merged,) = merge([], [Condition(type="Accepted", status="False", reason="Invalid", message="x" * 99_999)], 1, NOON)

    assert len(merged["message"]) == MAX_MESSAGE


def test_condition_of_another_generation_is_not_found() -> None:
    """It says nothing of the present spec."""
    held = merge([], [GOOD], 3, NOON)

    assert find(held, "Compiled", 3) == held[0]
    assert find(held, "Compiled", 4) is None
    assert find(held, "Accepted", 3) is None


def test_times_are_written_in_utc() -> None:
    """Whatever zone the clock is in."""
    assert rfc3339(NOON.astimezone(timezone(timedelta(hours=2)))) == "2026-11-22T12:00:00Z"
