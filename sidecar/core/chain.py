"""Links the lines of an audit trail, so that one that is missing, altered, added or moved is found afterwards.

Each line names its chain (one life of one sidecar), its place in it and the SHA-256 of the line before. Checkpoints among
them are signed with the SVID's key as JWS (RFC 7515, `x5c`): who rewrites the file and every link after it still cannot
sign. What follows the last checkpoint is linked and not yet covered; a trail that was cut there looks like one that goes on,
unless its chain was closed. A call that was begun and has no end was cut off by a kill, or is under way: that is told, and
is no fault of the trail. Refuses nothing: `verify` tells what it found. Pure.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

import orjson

SCHEMA: Final = "sidegate.audit.chain/v1"
NOTHING: Final = "0" * 64  # stands for the line before the first
FAMILY: Final = "sidegate.audit"  # of all our schemas
BEGINNINGS: Final = (b'{"time":"', b'{"schema":"sidegate.audit')  # of our lines, by which one cut short is known
TORN: Final = 16  # bytes of a line that was begun anew; fewer could be anybody's

# Path, type, meaning: what each line ends in.
FIELDS: Final[tuple[tuple[str, str, str], ...]] = (
    ("chain", "object", "The line's place, which is not the message's."),
    (
        "chain.id",
        "string",
        "One life of one sidecar, 32 random hex digits. With `seq` it names a line that came twice.",
    ),
    ("chain.seq", "integer", "The line's place in it, from 1."),
    ("chain.prev", "string", "SHA-256 of the line before, without its newline; zeros before the first of a stream."),
)


class Event(StrEnum):
    """What a line of the chain's own says; both are signed."""

    CHECKPOINT = "checkpoint"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The place of a line: the *seq*-th of chain *id*, after the line with hash *prev*."""

    id: str
    seq: int
    prev: str

    def claims(self, event: Event, time: str, lost: int) -> dict[str, Any]:
        """Return what the signature of a checkpoint at this place states."""
        return {"id": self.id, "seq": self.seq, "prev": self.prev, "event": str(event), "time": time, "lost": lost}


class Chain:
    """One chain under way. A line takes its place by `sealed`, and holds it once it is written and `passed`."""

    def __init__(self, chain_id: str, *, after: str = NOTHING) -> None:
        """Begin chain *chain_id*; *after*: the hash of the line that stands before it in the same file."""
        self._id = chain_id.encode("ascii")
        self._prev = after.encode("ascii")
        self._seq = 1

    @property
    def link(self) -> Link:
        """Return the place of the next line."""
        return Link(id=self._id.decode(), seq=self._seq, prev=self._prev.decode())

    def sealed(self, line: bytes) -> bytes:
        """Return *line*, a JSON object and its newline, with the next place in it."""
        return b'%b,"chain":{"id":"%b","seq":%d,"prev":"%b"}}\n' % (line[:-2], self._id, self._seq, self._prev)

    def passed(self, sealed: bytes) -> None:
        """Know that *sealed* stands in the trail."""
        self._seq += 1
        self._prev = sha256(sealed[:-1]).hexdigest().encode("ascii")


def hash_of(line: bytes) -> str:
    """Return the hash by which the next line names *line*, which may end in its newline."""
    return sha256(line.removesuffix(b"\n")).hexdigest()


def event_line(event: Event, time: str, lost: int, signature: str) -> bytes:
    """Return a line of the chain's own; *lost* counts records that could not be written until now."""
    return orjson.dumps(
        {"schema": SCHEMA, "time": time, "event": event, "lost": lost, "signature": signature},
        option=orjson.OPT_APPEND_NEWLINE,
    )


# Returns who signed the JWS, and the claims that it states; raises ValueError saying why it is not believed.
Verifier = Callable[[str], tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong, at which line of the input (from 1)."""

    line: int
    what: str


@dataclass(slots=True, kw_only=True)
class State:
    """One chain, as far as it was read."""

    link: Link
    hash: str
    lines: int = 0
    covered: int = 0  # lines up to the last signed checkpoint
    lost: int = 0
    signer: str | None = None
    closed: bool = False


@dataclass(slots=True, kw_only=True)
class Report:
    """What was read, and what is wrong with it."""

    chains: dict[str, State] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    begun: dict[str, int] = field(default_factory=dict)  # by span id, the line: calls that have no end
    torn: list[int] = field(default_factory=list)  # lines of which only the beginning was written
    other_lines: int = 0  # that belong to no chain: a sidecar's log on the same stream

    @property
    def is_sound(self) -> bool:
        """Say whether nothing is wrong."""
        return not self.findings


def verify(lines: Iterable[bytes], verifier: Verifier | None) -> Report:
    """Return what *lines* prove; without *verifier* signatures are not looked at, and nothing is covered by one."""
    report = Report()
    torn, last = b"", NOTHING
    for number, raw in enumerate(lines, start=1):
        line = raw.removesuffix(b"\n")
        found = _read(line)
        if found is None:
            if line and any(line.startswith(each[: len(line)]) for each in BEGINNINGS):
                report.torn.append(number)
            report.other_lines += 1
            torn = line
            continue
        if torn and len(torn) >= TORN and line.startswith(torn):  # its rest could not be written; here it is again
            report.other_lines -= 1
            report.torn = [each for each in report.torn if each != number - 1]
        torn = b""
        document, link = found
        match document:
            case {"phase": "begin", "span_id": str(span_id)}:
                report.begun[span_id] = number
            case {"phase": "end", "span_id": str(span_id)}:
                report.begun.pop(span_id, None)
        for what in _judged(document, link, report.chains, last, verifier):
            report.findings.append(Finding(line=number, what=what))
        last = report.chains[link.id].hash = hash_of(line)
    return report


def _read(line: bytes) -> tuple[dict[str, Any], Link] | None:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    match document:
        case {"chain": {"id": str(chain_id), "seq": int(seq), "prev": str(prev)}}:
            return document, Link(id=chain_id, seq=seq, prev=prev)
    return None


def _judged(
    document: dict[str, Any], link: Link, chains: dict[str, State], last: str, verifier: Verifier | None
) -> Iterator[str]:
    """Yield what is wrong with a line at *link*; *chains* takes it in."""
    state = chains.get(link.id)
    if state is None:
        state = chains[link.id] = State(link=link, hash="")
        if link.seq != 1:
            yield f"chain {link.id} begins in its middle: {link.seq - 1} lines are missing before"
        elif link.prev not in (last, NOTHING):
            yield f"chain {link.id} was begun behind another line than the one above"
    else:
        if state.closed:
            yield f"chain {link.id} goes on after it was closed"
        if link.seq > state.link.seq + 1:
            yield f"chain {link.id}: {link.seq - state.link.seq - 1} lines are missing before line {link.seq} of it"
        elif link.seq <= state.link.seq:
            yield f"chain {link.id}: line {link.seq} of it stands behind line {state.link.seq}"
        elif link.prev != state.hash:
            yield f"chain {link.id}: line {state.link.seq} of it is not as it was written"
    state.link = link
    state.lines += 1
    if document.get("schema") == SCHEMA:
        yield from _checked(document, state, verifier)


def _checked(document: dict[str, Any], state: State, verifier: Verifier | None) -> Iterator[str]:
    """Yield what is wrong with a line of the chain's own."""
    link = state.link
    match document:
        case {"event": str(name), "time": str(time), "lost": int(lost), "signature": str(signature)} if name in tuple(
            Event
        ):
            event = Event(name)
        case _:
            yield f"chain {link.id}: line {link.seq} of it cannot be read"
            return
    if lost < state.lost:
        yield f"chain {link.id}: the count of lost records goes back"
    state.lost = lost
    state.closed = event is Event.CLOSED
    if verifier is None:
        return
    try:
        signer, claims = verifier(signature)
    except ValueError as error:
        yield f"chain {link.id}: the signature of line {link.seq} of it does not hold: {error}"
        return
    if any(claims.get(name) != value for name, value in link.claims(event, time, lost).items()):
        yield f"chain {link.id}: the signature of line {link.seq} of it is of another one"
    elif state.signer not in (None, signer):
        yield f"chain {link.id}: signed by {signer}, and by {state.signer} before"
    else:
        state.signer, state.covered = signer, state.lines
