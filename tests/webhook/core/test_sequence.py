"""The number that tells the newer of two bundles, also when replicas have seen different parts of the history."""

from hypothesis import given
from hypothesis import strategies as st

from webhook.core.sequence import Seen, number

KINDS = ("policies", "limits")


def test_first_lists_count_from_the_version_that_all_have_reached() -> None:
    """What one list shows beyond the others is no more than they know."""
    seen = Seen(KINDS)
    seen.take("policies", "50", touched=["pay"])
    assert seen.of("pay") == 0

    seen.take("limits", "60", touched=["pay"])
    assert seen.of("pay") == 50


def test_change_counts_for_whom_it_touches() -> None:
    """One namespace, or all of them."""
    seen = Seen(KINDS)
    for kind in KINDS:
        seen.take(kind, "50")
    seen.take("policies", "70", touched=["pay"])
    assert (seen.of("pay"), seen.of("other")) == (70, 50)

    seen.take("limits", "80", touched=[""])
    assert (seen.of("pay"), seen.of("other")) == (80, 80)


def test_bookmarks_of_all_collections_raise_the_floor() -> None:
    """So that replicas that saw the same come to the same number; what is below is forgotten."""
    seen = Seen(KINDS)
    for kind in KINDS:
        seen.take(kind, "50")
    seen.take("policies", "70", touched=["pay"])
    seen.take("limits", "90")
    assert seen.of("other") == 70

    seen.take("policies", "95")
    assert (seen.floor, seen.of("pay"), seen.of("other")) == (90, 90, 90)
    assert not seen._touched


def test_version_never_goes_back_and_may_be_no_integer() -> None:
    """An API server that does not keep to KEP-5504 takes the protection away, and nothing else."""
    seen = Seen(KINDS)
    for kind in KINDS:
        seen.take(kind, "50")
    seen.take("policies", "10", touched=["pay"])

    assert seen.of("pay") == 50
    assert number("v7-abc") == 0
    assert number("") == 0


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(["a", "b", ""])), max_size=20), st.integers(0, 20))
def test_replica_that_has_seen_all_is_never_behind_one_that_has_not(
    events: list[tuple[str, str]], restart: int
) -> None:
    """However far the other had come when it listed, or in whichever order the collections' events reached it."""
    history = [(kind, namespace, 100 + index) for index, (kind, namespace) in enumerate(events)]
    full, part = Seen(KINDS), Seen(KINDS)
    for kind in KINDS:
        full.take(kind, "99")
        part.take(kind, str(99 + min(restart, len(events))))
    for kind, namespace, version in history:
        full.take(kind, str(version), touched=[namespace])
    for only in KINDS:
        for kind, namespace, version in history:
            if kind == only and version > 99 + restart:
                part.take(kind, str(version), touched=[namespace])
    end = str(100 + len(events))
    for kind in KINDS:
        full.take(kind, end)
        part.take(kind, end)

    assert full.of("a") == part.of("a") == int(end)
