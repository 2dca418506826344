"""sidecar.core.revision: the revisions, their order and what they imply."""

from sidecar.core.revision import UNSAID, Revision


def test_revisions_are_ordered_by_date() -> None:
    """The later one is the greater one."""
    assert list(Revision) == sorted(Revision)


def test_only_the_last_one_is_stateless() -> None:
    """Its requests carry their own `_meta`."""
    assert [each for each in Revision if each.is_modern] == [Revision.V2026_07_28]


def test_one_revision_has_batches() -> None:
    """2025-03-26, which is also what a request without the header speaks."""
    assert [each for each in Revision if each.has_batches] == [UNSAID]
