"""sidecar.core.revision: which era a message is of; servers must not be left to choose."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.revision import CAPABILITIES, CLIENT, MAX_VERSION_CHARS, UNSAID, VERSION, Revision, of_call, of_header
from sidecar.errors import Reason, Refusal

MODERN = str(Revision.V2026_07_28)
ENVELOPE = {VERSION: MODERN, CAPABILITIES: {}}
VERSIONS = st.sampled_from([*map(str, Revision), "2030-01-01", "2024-01-01", "x", ""])
VALUES: st.SearchStrategy[Any] = VERSIONS | st.none() | st.integers() | st.just([])


def called(
    header: str | None,
    meta: Any = None,
    *,
    method: str = "tools/call",
    is_request: bool = True,
    unsaid: Revision = UNSAID,
    **params: Any,
) -> Revision:
    """The revision of a call; *meta* is its `_meta`."""
    params = params if meta is None else {**params, "_meta": meta}
    return of_call(header, method, params, unsaid=unsaid, is_request=is_request)


def refused(header: str | None, meta: Any = None, **more: Any) -> Refusal:
    """The refusal of a call."""
    with pytest.raises(Refusal) as caught:
        called(header, meta, **more)
    return caught.value


def test_revisions_are_ordered_by_date() -> None:
    """The later one is the greater one."""
    assert list(Revision) == sorted(Revision)


def test_only_the_last_one_is_stateless() -> None:
    """Its requests carry their own `_meta`."""
    assert [each for each in Revision if each.is_modern] == [Revision.V2026_07_28]


def test_one_revision_has_batches() -> None:
    """2025-03-26, which is also what a request without the header speaks."""
    assert [each for each in Revision if each.has_batches] == [UNSAID]


@pytest.mark.parametrize("revision", [each for each in Revision if not each.is_modern])
def test_the_header_names_an_older_revision(revision: Revision) -> None:
    """Stray members of the later era's `_meta` change nothing: ChatGPT's connector sends them."""
    assert called(revision) is revision
    assert called(revision, {CLIENT: {"name": "x"}, CAPABILITIES: {}}) is revision
    assert called(revision, {VERSION: str(revision)}) is revision


def test_without_any_word_it_is_the_transports_first_revision() -> None:
    """2025-03-26 on Streamable HTTP, 2024-11-05 on HTTP+SSE."""
    assert called(None) is Revision.V2025_03_26
    assert called(None, "odd") is Revision.V2025_03_26
    assert called(None, unsaid=Revision.V2024_11_05) is Revision.V2024_11_05


def test_header_and_meta_together_make_a_stateless_request() -> None:
    """Both must be there and equal."""
    assert called(MODERN, ENVELOPE) is Revision.V2026_07_28
    assert called(MODERN, None, is_request=False) is Revision.V2026_07_28
    assert called(MODERN, {VERSION: MODERN}, is_request=False) is Revision.V2026_07_28


@pytest.mark.parametrize(
    "header", [None, "2025-11-25", "2025-03-26", "2030-01-01", "x", "", MODERN + " ", f" {MODERN}"]
)
def test_a_disagreement_is_refused(header: str | None) -> None:
    """Python's server would follow the header, TypeScript's and Go's refuse."""
    refusal = refused(header, ENVELOPE)

    assert (refusal.reason, refusal.revision) == (Reason.HEADER_MISMATCH, MODERN)
    assert refused(MODERN, {**ENVELOPE, VERSION: "2025-11-25"}).reason is Reason.HEADER_MISMATCH


@pytest.mark.parametrize(
    ("header", "meta"),
    [
        (MODERN, None),
        (MODERN, {}),
        (MODERN, "odd"),
        (MODERN, {CAPABILITIES: {}}),
        (MODERN, {VERSION: MODERN}),
        (MODERN, {VERSION: MODERN, CAPABILITIES: None}),
        (MODERN, {VERSION: MODERN, CAPABILITIES: []}),
        (MODERN, {VERSION: None, CAPABILITIES: {}}),
        (None, {VERSION: 7}),
        ("2025-11-25", {VERSION: [MODERN]}),
    ],
)
def test_a_stateless_request_says_what_it_must(header: str | None, meta: Any) -> None:
    """Version and capabilities; clientInfo may be left out."""
    refusal = refused(header, meta)

    assert (refusal.reason, refusal.revision) == (Reason.MALFORMED, MODERN)


@pytest.mark.parametrize("version", ["2026-07-29", "2030-01-01", "9999-99-99", "x", "", "2025-01-01"])
def test_an_unknown_stateless_revision_is_refused_with_the_known_one(version: str) -> None:
    """So that the client can choose it; more would contradict the server's own server/discover."""
    refusal = refused(version, {**ENVELOPE, VERSION: version})

    assert (refusal.reason, refusal.revision) == (Reason.UNSUPPORTED_VERSION, MODERN)
    assert refusal.data == {"supported": [MODERN], "requested": version}


def test_what_is_said_back_is_cut() -> None:
    """It is the caller's own text."""
    refusal = refused("x" * 999, {**ENVELOPE, VERSION: "x" * 999})

    assert refusal.data is not None
    assert refusal.data["requested"] == "x" * MAX_VERSION_CHARS


@pytest.mark.parametrize(
    ("version", "modern"),
    [("2026-07-29", True), ("2025-11-26", True), ("2025-01-01", False), ("x", False), ("", False), ("1.0", False)],
)
def test_an_unknown_header_alone_is_refused_in_the_era_that_it_looks_like(version: str, *, modern: bool) -> None:
    """A date after the last older revision is of the later era; everything else never was one."""
    refusal = refused(version)

    assert (refusal.reason, refusal.revision) == (Reason.UNSUPPORTED_VERSION, MODERN if modern else None)
    assert (refusal.data is not None) is modern


@pytest.mark.parametrize(
    ("offered", "revision"),
    [
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        (MODERN, "2025-11-25"),
        ("1999-01-01", "2025-11-25"),
        (None, "2025-11-25"),
        ([], "2025-11-25"),
    ],
)
@pytest.mark.parametrize("header", [None, MODERN, "2025-03-26", "x"])
def test_initialize_negotiates(header: str | None, offered: object, revision: str) -> None:
    """It is of the older era whatever it says, and nothing that it says is refused."""
    assert called(header, ENVELOPE, method="initialize", protocolVersion=offered) == revision


def test_the_old_transport_knows_no_stateless_messages() -> None:
    """Its servers would read them as their own, without what the headers promise."""
    refusal = refused(MODERN, ENVELOPE, unsaid=Revision.V2024_11_05)

    assert refusal.reason is Reason.UNSUPPORTED_VERSION
    assert refusal.data is not None
    assert MODERN not in refusal.data["supported"]
    assert refused(MODERN, unsaid=Revision.V2024_11_05).reason is Reason.UNSUPPORTED_VERSION


def test_the_header_alone_speaks_for_get_and_delete() -> None:
    """They have no body to say it in."""
    assert of_header("2025-06-18") is Revision.V2025_06_18
    assert of_header(MODERN) is Revision.V2026_07_28
    with pytest.raises(Refusal) as caught:
        of_header("1.0")

    assert caught.value.reason is Reason.UNSUPPORTED_VERSION


@given(
    st.none() | VERSIONS,
    st.none() | st.dictionaries(st.sampled_from([VERSION, CAPABILITIES, CLIENT]), VALUES),
    st.booleans(),
)
def test_who_says_stateless_says_it_twice(header: str | None, meta: Any, is_request: bool) -> None:
    """Whatever was said: a request is stateless only when header and body both say so, and nothing but a refusal comes out."""
    try:
        revision = called(header, meta, is_request=is_request)
    except Refusal as refusal:
        assert refusal.reason in (Reason.MALFORMED, Reason.HEADER_MISMATCH, Reason.UNSUPPORTED_VERSION)  # noqa: PT017 - either end is right
        return
    assert header in (None, revision)
    if revision.is_modern and is_request:
        assert meta is not None
        assert (header, meta[VERSION]) == (MODERN, MODERN)
