"""Replaces parts of texts inside a JSON document and leaves every other byte as it came: nothing is serialised anew.

Walks the tokens of a document that a decoder has accepted before; goes into JSON that stands inside a string, as tools
return their structured result a second time as text (MCP 2025-06-18, structured content). RFC 8259.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from sidecar.core.detectors import Looks, Span, TooManyCandidates

MAX_MARKS: Final = 20_000  # of one rule in one message: each takes up to 50 us, and meanwhile every other call waits
MAX_NESTED: Final = 4  # texts within texts; what lies deeper is taken as the text that it is
# What stands between two tokens is taken with the second: signs are half of a document, and a step for each is dear.
_TOKEN: Final = re.compile(rb'([\s,:]*)("[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|[^\s{}\[\],:"]+)', re.DOTALL)
_ESCAPE: Final = re.compile(rb"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)  # fmt: skip # noqa: E501
_SHORT: Final = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"f": b"\f"}
_QUOTE: Final = 34
_COMMON: Final = ((b"\\n", b"\n"), (b'\\"', b'"'))
_MAX_SKIM_BYTES: Final = 2**16
_MIN_SKIM_BYTES: Final = 64
Edit = tuple[int, int, bytes]


class Unmaskable(Exception):  # noqa: N818 - names what was found
    """Two members of an object would get the same name, or too much would be masked; the message says which."""


class _Full(Exception):  # noqa: N818 - names what was found
    """Every rule has found more than is counted."""


class Searching(Protocol):
    """A rule that finds something in texts, in all of them or below some members."""

    @property
    def searches(self) -> Sequence[Any]:
        """Return what it searches for; nothing: what stands there is meant as a whole."""
        ...

    @property
    def is_limited(self) -> bool:
        """Say whether it looks at some members only."""
        ...

    def find(self, text: bytes, looks: Looks | None = None) -> list[Span]:
        """Return where it finds something; raises TooManyCandidates."""
        ...

    def covers(self, path: tuple[str, ...] | None, name: str) -> bool:
        """Say whether the member *name* is one of those; *path* leads there from the root, None outside of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which members of a document are searched, by their first names; *root* is where fields' paths begin."""

    only: frozenset[tuple[str, ...]] | None = None  # None: all
    never: frozenset[tuple[str, ...]] = frozenset()
    root: tuple[str, ...] = ()


# What a client sends: arguments, and answers to what the server asked. Names and URIs are what policies judge.
REQUEST: Final = Scope(
    only=frozenset(
        {("params", name) for name in ("arguments", "argument", "context", "inputResponses")} | {("result",)}
    ),
    root=("params", "arguments"),
)
# What a server says, but for what only it can read again.
ANSWER: Final = Scope(
    never=frozenset(
        {("jsonrpc",), ("id",), ("method",)}
        | {("result", name) for name in ("requestState", "nextCursor", "resultType", "taskId")}
    ),
    root=("result", "structuredContent"),
)
ARGUMENTS: Final = Scope()  # by themselves
RESULT: Final = Scope(root=("structuredContent",))  # a result by itself
_SCOPE_DEPTH: Final = 2  # names that decide


@dataclass(slots=True)
class _Frame:
    """An object or array under way."""

    rules: tuple[Searching, ...]  # that search in it
    top: tuple[str, ...] | None  # where it stands, while that may decide
    path: tuple[str, ...] | None  # from the root; None outside
    is_searched: bool
    is_object: bool
    key: str = ""
    index: int = 0
    wants_key: bool = True
    marked: set[bytes] = field(default_factory=set)  # names that were changed


class _Skimmer:
    """Says of tokens that they hold nothing, many by one search: one for each would take longer than all the rest."""

    def __init__(self, data: bytes, suspects: Callable[[bytes], object], *, is_free: bool) -> None:
        self._data, self._suspects, self._is_free = data, suspects, is_free
        self._clean = 0  # nothing is found up to here
        self._dirty = 0  # something is, so that each is asked for itself
        self._size = _MIN_SKIM_BYTES

    def is_suspect(self, start: int, end: int) -> bool:
        """Say whether the string, number or name between *start* and *end* may hold something that is looked for."""
        data = self._data
        if data[start] == _QUOTE:
            if (
                data.find(b"\\", start, end) >= 0 or data[start + 1] in b" [{"
            ):  # it may be a document, or say something else
                return True
            start, end = start + 1, end - 1
        if end <= self._clean:
            return False
        while self._is_free and start >= self._dirty and self._size > end - start:
            if not self._suspects(data[start : start + self._size]):
                self._clean = start + self._size
                self._size = min(_MAX_SKIM_BYTES, 2 * self._size)
                return False
            if self._size == _MIN_SKIM_BYTES:
                self._dirty = start + self._size
            self._size = max(_MIN_SKIM_BYTES, self._size // 4)
        return bool(self._suspects(data[start:end]))


class Rewriter:
    """Searches by some rules, and puts a mark where *editing* ones find something. Mutated by `rewrite` only.

    Attributes:
        counts: how often each rule found something; more than MAX_MARKS is not counted.
        changes: texts and numbers that were changed: before, after.
    """

    def __init__(
        self,
        rules: Sequence[Searching],
        editing: Collection[Searching],
        mark: bytes,
        scope: Scope,
        suspects: Callable[[bytes], object],
        *,
        is_free: bool = False,
        looks: Mapping[Any, Looks] | None = None,
    ) -> None:
        """*suspects* says of a text whether one of *rules* could find something: most texts are asked no more.

        *is_free*: whatever it finds in a text it finds in what that is a part of, too; no rule is bound to an end.
        *looks* are each rule's, where other messages share them.
        """
        self._suspects, self._is_free = suspects, is_free
        self._rules, self._editing, self._mark, self._scope = tuple(rules), editing, mark, scope
        self._has_limits = any(each.is_limited for each in rules)
        self._everywhere = tuple(each for each in rules if not each.is_limited)
        self.counts: Counter[Searching] = Counter()
        self._looks = {each: Looks() for each in rules} if looks is None else looks
        self.changes: list[tuple[bytes, bytes]] = []

    def rewrite(self, data: bytes) -> bytes:
        """Return *data* with the marks in it; the very object when there are none. Raises Unmaskable."""
        try:
            return _applied(data, self._walk(data, self._scope, self._everywhere, 1))
        except _Full:
            return data  # no rule edits

    def _walk(  # noqa: C901, PLR0912 - one branch for each kind of token
        self, data: bytes, scope: Scope, base: tuple[Searching, ...], level: int
    ) -> list[Edit]:
        edits: list[Edit] = []
        top = None if scope == ARGUMENTS else ()
        stack = [_Frame(base, top, () if top is None else None, scope.only is None, is_object=False)]
        skimmer = _Skimmer(data, self._suspects, is_free=self._is_free)
        hidden_from, hidden_depth = 0, 0  # of a container that is replaced as a whole
        is_first = True
        for token in _TOKEN.finditer(
            data, 0, len(data.rstrip())
        ):  # or it would try each space of the end, again and again
            start, end = token.span(2)
            sign, frame = data[start], stack[-1]
            if hidden_depth:
                hidden_depth += (sign in b"{[") - (sign in b"}]")
                if not hidden_depth:
                    edits.append((hidden_from, end, b'"' + self._mark + b'"'))
                continue
            if b"," in token[1]:
                frame.index += 1
                frame.wants_key = True
            if sign in b"}]":
                stack.pop()
            elif frame.is_object and frame.wants_key:
                frame.wants_key = False
                if self._has_limits or frame.top is not None:
                    frame.key = _decoded(data[start:end])[0].decode(errors="replace")
                if frame.is_searched and frame.top is None:  # those above: the protocol's
                    is_plain = frame.rules is self._everywhere  # others may be bound to ends of the text
                    if not is_plain or skimmer.is_suspect(start, end):
                        edits += self._name(data, start, end, frame)
            else:
                inner = frame if is_first else self._placed(frame, scope)
                is_first = False
                rules, is_plain = inner.rules, inner.rules is self._everywhere
                if sign in b"{[":
                    if inner.is_searched and not is_plain and self._is_whole(rules):
                        hidden_from, hidden_depth = start, 1
                    else:
                        if not is_plain:
                            rules = tuple(each for each in rules if each.searches)  # the others were counted
                        stack.append(_Frame(rules, inner.top, inner.path, inner.is_searched, is_object=sign == 123))
                elif inner.is_searched and not (is_plain and not skimmer.is_suspect(start, end)):
                    edits += self._value(data, start, end, rules, level)
        return edits

    def _placed(self, parent: _Frame, scope: Scope) -> _Frame:
        """Return where the value stands that comes next in *parent*."""
        if parent.top is None and (not self._has_limits or not (parent.is_object or parent.path is not None)):
            return parent
        name = parent.key if parent.is_object else str(parent.index)
        top, path, is_searched = parent.top, parent.path, parent.is_searched
        if path is not None:
            path = (*path, name)
        if top is not None:
            top = (*top, name)
            is_searched = (is_searched or (scope.only is not None and top in scope.only)) and top not in scope.never
            if path is None and scope.root == top:
                path = ()
            if len(top) >= _SCOPE_DEPTH:
                top = None
        rules = parent.rules
        if self._has_limits and parent.is_object and is_searched:
            rules += tuple(each for each in self._rules if each not in rules and each.covers(path, name))
        elif self._has_limits and path is not None and is_searched:
            rules += tuple(each for each in self._rules if each not in rules and each.covers(path, ""))
        return _Frame(rules, top, path, is_searched, is_object=False)

    def _is_whole(self, rules: tuple[Searching, ...]) -> bool:
        """Count what is meant as a whole; say whether it is replaced."""
        is_replaced = False
        for each in rules:
            if each.is_limited and not each.searches:
                self.counts[each] += 1
                is_replaced = is_replaced or each in self._editing
        return is_replaced

    def _name(self, data: bytes, start: int, end: int, frame: _Frame) -> list[Edit]:
        """Return the edits of a member's name; raises Unmaskable."""
        text, units = _decoded(data[start:end])
        marked = self._marked(text, tuple(each for each in frame.rules if each.searches))
        if not marked:
            return []
        new = _applied(text, marked)
        if new in frame.marked:
            raise Unmaskable("two members would have the same name once masked")
        frame.marked.add(new)
        return _raw(marked, units, start)

    def _value(self, data: bytes, start: int, end: int, rules: tuple[Searching, ...], level: int) -> list[Edit]:
        """Return the edits of a text, a number or a literal."""
        raw = data[start:end]
        whole = [(start, end, b'"' + self._mark + b'"')]
        if raw in (b"null", whole[0][2]):
            return []
        text, units = _decoded(raw) if raw[:1] == b'"' else (raw, [])
        if self._is_whole(rules):
            self.changes.append((text, self._mark))
            return whole
        if not units and not (raw[0] == 45 or 48 <= raw[0] <= 57):
            return []  # true and false
        before = self.counts.copy() if units and level < MAX_NESTED and _may_be_json(text) else None
        nested = [] if before is None else self._nested(text, rules, level)
        searching = tuple(each for each in rules if each.searches)
        if before is not None:  # what was found there, and left, would be found again
            searching = tuple(each for each in searching if each in self._editing or self.counts[each] == before[each])
        marked = _composed(nested, self._marked(_applied(text, nested), searching))
        if not marked:
            return []
        new = _applied(text, marked)
        self.changes.append((text, new))
        if not units:
            self.changes[-1] = (text, self._mark)
            return whole
        return _raw(marked, units, start)

    def _nested(self, text: bytes, rules: tuple[Searching, ...], level: int) -> list[Edit]:
        """Return the edits of *text*, if it is a document of its own."""
        try:
            orjson.loads(text)
        except orjson.JSONDecodeError:
            return []
        changes = len(self.changes)
        edits = self._walk(text, ARGUMENTS, rules, level + 1)
        del self.changes[changes:]
        return edits

    def _marked(self, text: bytes, rules: tuple[Searching, ...]) -> list[Edit]:
        """Return what of *text* is replaced, so that nothing that is looked for is left in it."""
        if not rules or not self._suspects(text):
            return []
        spans: list[Span] = []
        editing = [each for each in rules if each in self._editing]
        for each in rules:
            if self.counts[each] <= MAX_MARKS:
                found = self._found(each, text)
                if each in self._editing:
                    spans += found
        if not spans:
            return []
        edits = [(start, end, self._mark) for start, end in _merged(spans)]
        # A mark may complete what stands around it.
        new = _applied(text, edits)
        return [(0, len(text), self._mark)] if any(each.find(new) for each in editing) else edits

    def _found(self, rule: Searching, text: bytes) -> list[Span]:
        """Return where *rule* finds something, and count it; raises Unmaskable, and _Full when no rule counts on."""
        looks = self._looks[rule]
        try:
            found = rule.find(text, looks)
            self.counts[rule] += len(found)
            looks.found += len(found)
            is_full = bool(found) and looks.found > MAX_MARKS
        except TooManyCandidates:
            found, is_full = [], True
        if is_full:
            self.counts[rule] = MAX_MARKS + 1
            if rule in self._editing:
                raise Unmaskable(f"a rule would mask more than {MAX_MARKS} places")
            if not self._editing and all(self.counts[each] > MAX_MARKS for each in self._rules):
                raise _Full
        return found


def levels(data: bytes) -> Iterator[bytes | None]:
    """Yield *data*, a JSON document, without escapes, then without those that were escaped themselves …; None: too deep."""
    if b"\\" not in data:
        yield data
        return
    for _ in range(MAX_NESTED):
        data = b"\\".join([_plain(part) for part in data.split(b"\\\\")])  # the leftmost two are an escape
        yield data
        if b"\\" not in data:
            return
    yield None


def _plain(part: bytes) -> bytes:
    """Return *part*, without an escaped backslash in it, without its escapes: by expression it takes ten times as long."""
    for short, plain in _COMMON:
        if b"\\" not in part:
            return part
        part = part.replace(short, plain)
    return _ESCAPE.sub(_unescaped, part) if b"\\" in part else part


def _unescaped(found: "re.Match[bytes]") -> bytes:
    high, low, unit, short = found.groups()
    if short is not None:
        return _SHORT.get(short, short)
    if high is not None:
        return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00).encode()
    return chr(int(unit, 16)).encode(errors="replace")  # a lone surrogate is a question mark


def _decoded(raw: bytes) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Return the text of the JSON string *raw*, and where its parts come from.

    A part is (where it begins in the text, where in *raw*, how long an escape is there; 0: as it is).
    """
    inner = raw[1:-1]
    if b"\\" not in inner:
        return inner, [(0, 1, 0), (len(inner), len(raw) - 1, 0)]
    pieces: list[bytes] = []
    units: list[tuple[int, int, int]] = []
    size, at = 0, 0
    for found in _ESCAPE.finditer(inner):
        if found.start() > at:
            units.append((size, at + 1, 0))
            pieces.append(inner[at : found.start()])
            size += found.start() - at
        units.append((size, found.start() + 1, found.end() - found.start()))
        pieces.append(_unescaped(found))
        size += len(pieces[-1])
        at = found.end()
    if at < len(inner):
        units.append((size, at + 1, 0))
        pieces.append(inner[at:])
        size += len(inner) - at
    units.append((size, len(raw) - 1, 0))
    return b"".join(pieces), units


def _raw(edits: Sequence[Edit], units: list[tuple[int, int, int]], start: int) -> list[Edit]:
    """Return *edits* of a text as those of the document, in which its string begins at *start*."""
    begins = [unit[0] for unit in units]
    made: list[Edit] = []
    for first, last, new in edits:
        place = units[bisect_right(begins, first) - 1]
        begin = place[1] + (0 if place[2] else first - place[0])
        place = units[max(0, bisect_right(begins, last - 1) - 1)]
        end = place[1] + (place[2] or last - place[0])
        made.append((start + begin, start + end, new.replace(b"\\", b"\\\\").replace(b'"', b'\\"')))
    return made


def _applied(text: bytes, edits: Sequence[Edit]) -> bytes:
    if not edits:
        return text
    pieces: list[bytes] = []
    at = 0
    for start, end, new in edits:
        pieces += (text[at:start], new)
        at = end
    return b"".join([*pieces, text[at:]])


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _composed(first: list[Edit], second: list[Edit]) -> list[Edit]:
    """Return the edits that have the effect of *first*, and then of *second* on what that made."""
    if not second or not first:
        return first or second
    back: list[tuple[int, int, int, int]] = []  # where each of *first* stands afterwards, and before
    shift = 0
    for start, end, new in first:
        back.append((start + shift, start + shift + len(new), start, end))
        shift += len(new) - (end - start)

    begins = [each[0] for each in back]

    def before(at: int, *, is_end: bool) -> int:
        place = (bisect_left if is_end else bisect_right)(begins, at) - 1
        if place < 0:
            return at
        _, end, old_begin, old_end = back[place]
        if at < end or (is_end and at == end):
            return old_end if is_end else old_begin
        return at + old_end - end

    mapped = [(before(start, is_end=False), before(end, is_end=True), new) for start, end, new in second]
    begins_of_mapped = [each[0] for each in mapped]
    kept = []
    for one in first:
        place = bisect_right(begins_of_mapped, one[0]) - 1
        if place < 0 or one[1] > mapped[place][1]:  # nothing covers it
            kept.append(one)
    return sorted([*kept, *mapped])


def _may_be_json(text: bytes) -> bool:
    return text.lstrip()[:1] in (b"{", b"[")
