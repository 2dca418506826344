"""Whatever is done to a trail after it was written is found: twenty ways to tamper, and none that goes unseen."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.chain import NOTHING, Chain, Event, Link, Verifier, event_line, hash_of, verify

TIME = "2026-11-22T10:00:00.000000000Z"
SIGNER = "spiffe://a.test/ns/shop/sa/ledger"


def sign(claims: Mapping[str, Any], signer: str = SIGNER) -> str:
    """Return a signature that `believed` believes: here the signer's word is enough."""
    return json.dumps({"signer": signer, "claims": claims})


def believed(signature: str) -> tuple[str, Mapping[str, Any]]:
    """Return signer and claims of a signature that was made by SIGNER; raises ValueError."""
    document = json.loads(signature)
    if not str(document.get("signer")).startswith("spiffe://a.test/"):
        raise ValueError("signed by a stranger")
    return document["signer"], document.get("claims", {})


def record(number: int) -> bytes:
    """Return a record, before it is sealed."""
    return json.dumps({"schema": "sidegate.audit/v1", "number": number}, separators=(",", ":")).encode() + b"\n"


def trail(
    count: int = 6,
    *,
    every: int = 3,
    chain_id: str = "c1",
    after: str = NOTHING,
    closed: bool = True,
    signer: str = SIGNER,
    begin: int = 0,
) -> list[bytes]:
    """Return a chain of *count* records with a checkpoint behind *every* so many."""
    chain, lines = Chain(chain_id, after=after), []

    def write(text: bytes) -> None:
        lines.append(chain.sealed(text))
        chain.passed(lines[-1])

    def mark(event: Event) -> None:
        write(event_line(event, TIME, 0, sign(chain.link.claims(event, TIME, 0), signer)))

    for number in range(begin, begin + count):
        write(record(number))
        if (number - begin + 1) % every == 0:
            mark(Event.CHECKPOINT)
    if closed:
        mark(Event.CLOSED)
    return lines


def findings(lines: list[bytes], verifier: Verifier | None = believed) -> list[str]:
    """Return what is found."""
    return [each.what for each in verify(lines, verifier).findings]


def test_an_untouched_trail_is_whole_and_covered() -> None:
    """To its last line."""
    report = verify(trail(), believed)

    assert report.is_sound
    (state,) = report.chains.values()
    assert (state.lines, state.covered, state.signer, state.closed) == (9, 9, SIGNER, True)


def test_lines_behind_the_last_checkpoint_are_not_covered() -> None:
    """A trail under way, or one that was cut there: it says so."""
    (state,) = verify(trail(5, closed=False), believed).chains.values()

    assert (state.lines, state.covered, state.closed) == (6, 4, False)


def test_a_sealed_line_is_still_one_json_object() -> None:
    """With the link as its last member."""
    document = json.loads(Chain("c1").sealed(record(1)))

    assert list(document) == ["schema", "number", "chain"]
    assert document["chain"] == {"id": "c1", "seq": 1, "prev": NOTHING}


def test_a_line_that_was_not_written_takes_no_place() -> None:
    """The next one takes it."""
    chain = Chain("c1")
    chain.sealed(record(1))
    assert chain.link.seq == 1

    chain.passed(chain.sealed(record(2)))
    assert chain.link == Link(id="c1", seq=2, prev=hash_of(Chain("c1").sealed(record(2))))


def test_two_lives_in_one_file_follow_each_other() -> None:
    """A restart begins a chain behind the last line of the one before."""
    first = trail()
    assert findings([*first, *trail(chain_id="c2", after=hash_of(first[-1]))]) == []


def test_two_sidecars_on_one_stream_are_told_apart() -> None:
    """As when a collector merges their output."""
    mixed = [line for pair in zip(trail(), trail(chain_id="c2"), strict=True) for line in pair]

    report = verify(mixed, believed)
    assert report.is_sound
    assert {state.covered for state in report.chains.values()} == {9}


def test_other_lines_are_counted() -> None:
    """A sidecar's log goes to the same stream as its records."""
    lines = trail()
    report = verify([b'{"msg":"listening"}\n', *lines[:2], b"plain text\n", *lines[2:]], believed)

    assert report.is_sound
    assert report.other_lines == 2


def test_a_line_begun_twice_is_no_other_line() -> None:
    """A full disk took half of it; then it was written again."""
    lines = trail()
    report = verify([*lines[:2], lines[2][:40] + b"\n", *lines[2:]], believed)

    assert report.is_sound
    assert report.other_lines == 0


def altered(line: bytes) -> bytes:
    """Return *line* with another number in it."""
    return line.replace(b'"number":1', b'"number":8')


def relinked(lines: list[bytes]) -> list[bytes]:
    """Return *lines* with every link made anew, as by somebody who knows how but cannot sign."""
    chain, made = Chain("c1"), []
    for line in lines:
        document = json.loads(line)
        del document["chain"]
        made.append(chain.sealed(json.dumps(document, separators=(",", ":")).encode() + b"\n"))
        chain.passed(made[-1])
    return made


def continued(lines: list[bytes], text: bytes) -> bytes:
    """Return *text* as the next line of *lines*."""
    chain = Chain("c1")
    for line in lines:
        chain.passed(line)
    return chain.sealed(text)


def with_event(lines: list[bytes], index: int, **changes: object) -> list[bytes]:
    """Return *lines* with members of the event at *index* changed, and every link made anew."""
    document = json.loads(lines[index])
    changed = json.dumps(document | changes, separators=(",", ":")).encode() + b"\n"
    return relinked([*lines[:index], changed, *lines[index + 1 :]])


TAMPERING: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a record altered": (lambda t: [t[0], altered(t[1]), *t[2:]], "is not as it was written"),
    "a byte of white space added": (lambda t: [t[0].replace(b":", b": ", 1), *t[1:]], "is not as it was written"),
    "a member added": (lambda t: [b'{"x":1,' + t[0][1:], *t[1:]], "is not as it was written"),
    "the first record removed": (lambda t: t[1:], "begins in its middle"),
    "a record removed": (lambda t: [t[0], *t[2:]], "1 lines are missing"),
    "several records removed": (lambda t: [t[0], *t[5:]], "4 lines are missing"),
    "a checkpoint removed": (lambda t: [*t[:3], *t[4:]], "1 lines are missing"),
    "a record repeated": (lambda t: [t[0], t[0], *t[1:]], "stands behind line"),
    "two records exchanged": (lambda t: [t[1], t[0], *t[2:]], "begins in its middle"),
    "two later records exchanged": (lambda t: [t[0], t[2], t[1], *t[3:]], "lines are missing"),
    "a record moved to the end": (lambda t: [t[0], *t[2:], t[1]], "lines are missing"),
    "a record added": (lambda t: [*t[:2], t[1].replace(b'"seq":2', b'"seq":3'), *t[2:]], "is not as it was written"),
    "a record of another chain put in": (lambda t: [*t[:2], trail(chain_id="c2")[2], *t[2:]], "begins in its middle"),
    "the link cut off a record": (lambda t: [t[0], record(1), *t[2:]], "1 lines are missing"),
    "the sequence renumbered": (lambda t: [t[0].replace(b'"seq":1', b'"seq":2'), *t[1:]], "begins in its middle"),
    "a record altered and every link renewed": (lambda t: relinked([t[0], altered(t[1]), *t[2:]]), "is of another one"),
    "a record removed and every link renewed": (lambda t: relinked([t[0], *t[2:]]), "is of another one"),
    "all signed anew by a stranger": (
        lambda _: trail(signer="spiffe://b.test/x"),
        "does not hold: signed by a stranger",
    ),
    "signed on by another workload": (lambda t: [*t[:4], *trail(signer=SIGNER + "2")[4:]], "and by"),
    "a signature replaced by an older one": (
        lambda t: with_event(t, 7, signature=json.loads(t[3])["signature"]),
        "is of another one",
    ),
    "a signature emptied": (lambda t: with_event(t, 3, signature=None), "cannot be read"),
    "the count of lost records lowered": (lambda t: with_event(t, 7, lost=-1), "goes back"),
    "the time of a checkpoint changed": (lambda t: with_event(t, 3, time="2020-01-01"), "is of another one"),
    "a chain removed before its successor": (
        lambda t: trail(chain_id="c3", after=hash_of(trail(chain_id="c2", after=hash_of(t[-1]))[-1])),
        "was begun behind another line",
    ),
    "a record added behind the end": (lambda t: [*t, continued(t, record(9))], "goes on after it was closed"),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_tampering_is_found(how: str) -> None:
    """Each by a text that says what happened."""
    tamper, expected = TAMPERING[how]
    tampered = tamper(trail())

    assert tampered != trail()
    assert any(expected in what for what in findings(tampered)), findings(tampered)


@given(st.data())
def test_no_change_of_a_byte_goes_unseen(data: st.DataObject) -> None:
    """Wherever it is; the last line, which none follows, is then no longer covered, or still says the same."""
    lines = trail(4, every=2)
    index = data.draw(st.integers(0, len(lines) - 1))
    line = bytearray(lines[index])
    at = data.draw(st.integers(0, len(line) - 2))
    line[at] = data.draw(st.integers(32, 126).filter(lambda byte: byte != line[at]))
    report = verify([*lines[:index], bytes(line), *lines[index + 1 :]], believed)
    whole = verify(lines, believed)

    is_last = index == len(lines) - 1
    assert (
        not report.is_sound
        or (is_last and report.chains["c1"].covered < whole.chains["c1"].covered)
        or (is_last and json.loads(line) == json.loads(lines[index]))
    )


@given(st.sets(st.integers(0, 5), min_size=1))
def test_no_record_can_be_taken_out(taken: set[int]) -> None:
    """Any selection of them, the end apart, which only closing covers."""
    lines = trail(6, every=100)
    left = [line for number, line in enumerate(lines) if number not in taken]

    assert findings(left)


@given(st.lists(st.binary(max_size=80)))
def test_any_bytes_give_a_report(lines: list[bytes]) -> None:
    """What is no line of a trail is counted as such."""
    assert verify(lines, believed).other_lines <= len(lines)


@pytest.mark.parametrize(
    "line",
    [
        b'{"chain":{"id":"c","seq":1,"prev":"x"},"schema":"sidegate.audit.chain/v1"}',
        b'{"chain":{"id":"c","seq":1,"prev":"x"},"schema":"sidegate.audit.chain/v1","event":"opened","time":"","lost":0,"signature":""}',
    ],
)
def test_an_event_that_cannot_be_read_is_a_finding(line: bytes) -> None:
    """It could be anything."""
    assert "chain c: line 1 of it cannot be read" in findings([line])


def test_without_verifier_only_links_are_checked() -> None:
    """And nothing counts as covered."""
    report = verify(trail(signer="spiffe://b.test/x"), None)

    assert report.is_sound
    assert report.chains["c1"].covered == 0


def phase(name: str, span_id: str) -> bytes:
    """Return a record of this phase, before it is sealed."""
    document = {"time": TIME, "schema": "sidegate.audit/v1", "phase": name, "span_id": span_id}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def phases() -> list[bytes]:
    """Return a closed chain of three calls under way at a time."""
    chain, lines = Chain("c1"), []
    parts = [phase("begin", "a"), phase("begin", "b"), phase("end", "a"), phase("begin", "c"), phase("end", "c")]
    for text in (*parts, phase("end", "b"), None):
        made = text or event_line(Event.CLOSED, TIME, 0, sign(chain.link.claims(Event.CLOSED, TIME, 0)))
        lines.append(chain.sealed(made))
        chain.passed(lines[-1])
    return lines


def test_a_call_that_ended_is_no_longer_begun() -> None:
    """Whatever was between."""
    report = verify(phases(), believed)

    assert report.is_sound
    assert report.begun == {}


def test_a_call_that_a_kill_cut_off_is_told() -> None:
    """By the line that began it; the trail itself is whole as far as it goes."""
    report = verify(phases()[:4], believed)

    assert report.is_sound
    assert report.begun == {"b": 2, "c": 4}


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (lambda t: [*t[:1], *t[2:]], "1 lines are missing"),
        (lambda t: [*t[:2], *t[3:]], "1 lines are missing"),
        (lambda t: [t[0], t[2], t[1], *t[3:]], "lines are missing"),
        (lambda t: [t[0].replace(b'"begin"', b'"end"'), *t[1:]], "is not as it was written"),
        (lambda t: [*t[:2], t[2].replace(b'"a"', b'"b"'), *t[3:]], "is not as it was written"),
        (lambda t: relinked([*t[:2], *t[3:]]), "is of another one"),
        (lambda t: relinked([*t[:1], *t[2:]]), "is of another one"),
    ],
    ids=["begin removed", "end removed", "exchanged", "begin made an end", "another call's end", "end relinked away",
         "begin relinked away"],
)  # fmt: skip
def test_tampering_with_begun_calls_is_found(tamper: Callable[[list[bytes]], list[bytes]], expected: str) -> None:
    """To hide that a call was made, or that it came to an end."""
    assert any(expected in what for what in findings(tamper(phases())))


def test_a_line_cut_short_is_told_from_other_lines() -> None:
    """It begins as ours do; a log line does not."""
    report = verify(
        [*phases()[:2], b'{"time":"2026-11-22T', b'{"level":"info"', b"", b'{"schema":"sidegate.au'], believed
    )

    assert report.is_sound
    assert report.torn == [3, 6]
    assert report.other_lines == 4


def test_a_life_begun_behind_a_torn_line_is_in_order() -> None:
    """The line before that is the one it names."""
    first = phases()[:2]
    report = verify([*first, b'{"time":"2026-11-22T', *trail(chain_id="c2", after=hash_of(first[-1]))], believed)

    assert report.is_sound
    assert report.torn == [3]
