"""Finds what content rules look for in MCP messages, and puts a mark in its place: every other byte stays as it was.

`deny` stops what holds it, `mask` takes it out of the message, `redact` out of audit and telemetry. Member names,
strings and numbers are searched, also in JSON inside a string; not what is encoded otherwise, such as base64. Refuses
rules whose mark would match them again. Customers' expressions run on RE2 only, in linear time.
Reads no message for which there is no rule.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Final

import msgspec

from sidecar.core.detectors import DETECTORS, Looks, Span, TooManyCandidates, spans
from sidecar.core.message import Message, Prompt, Resource, Shape, Task, Tool
from sidecar.core.profile import ContentRule
from sidecar.core.splicing import ANSWER, ARGUMENTS, MAX_MARKS, RESULT, Rewriter, Scope, Unmaskable, levels
from sidecar.errors import BundleError

__all__ = ["ANSWER", "ARGUMENTS", "RESULT", "Content", "Found", "Screen", "Screened", "compiled"]

MASKED: Final = b"[masked]"
REDACTED: Final = b"[redacted]"
MAX_SCREENED_BYTES: Final = 4 * 2**20  # of one message; the SDKs' own limit. Searching it takes 20 ms, masking a second
_ANCHOR: Final = re.compile(r"\^|\$|\\[Az]")  # `[^` is none, but nothing is lost by taking it for one
_MAX_MEM: Final = 2**21
_ALL_MEM: Final = 2**26
_LOWER: Final = bytes(range(256)).lower()
# What is asked there is listed or agreed upon, no content.
_ARGUED: Final = frozenset({"tools/call", "prompts/get", "completion/complete", "tasks/update"})
_BARE: Final = frozenset({"initialize", "ping", "server/discover", "logging/setLevel"})


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """How often a rule found something in a message."""

    rule: ContentRule
    where: str  # arguments or results
    count: int


class Screened(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was searched; *data* is the very object when nothing was masked."""

    data: bytes
    found: tuple[Found, ...] = ()
    denied: str = ""  # why it may not go on; for operators
    changes: tuple[tuple[bytes, bytes], ...] = ()  # texts and numbers that were masked: before, after


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A rule, ready to search."""

    rule: ContentRule
    searches: tuple[tuple[Any, Any], ...]  # compiled expression, and what refines what it finds
    names: frozenset[str]  # of fields, folded
    paths: tuple[tuple[str, ...], ...]

    @property
    def is_limited(self) -> bool:
        """Say whether it looks at some fields only."""
        return bool(self.names or self.paths)

    def find(self, text: bytes, looks: Looks | None = None) -> list[Span]:
        """Return where it finds something in *text*, in order; of more than can be masked, some.

        Raises TooManyCandidates when there are no *looks* left; None: there always are.
        """
        each = (islice(spans(text, compiled_, refine, looks), MAX_MARKS + 1) for compiled_, refine in self.searches)
        found = list(chain.from_iterable(each))
        return found if len(self.searches) < 2 else sorted(found)

    def covers(self, path: tuple[str, ...] | None, name: str) -> bool:
        """Say whether the member *name*, at *path* from the root of the arguments or the result, is one of its fields."""
        if fold(name) in self.names:
            return True
        return path is not None and any(
            len(each) == len(path) and all(one in ("*", other) for one, other in zip(each, path, strict=True))
            for each in self.paths
        )


def fold(name: str) -> str:
    """Return *name* as names of fields are compared: without regard to case, `_` and `-`, as in audit's redaction."""
    return name.lower().replace("_", "").replace("-", "")


class Screen:
    """The rules that hold for one message, or for what comes back to it."""

    def __init__(self, rules: Sequence[Rule], where: str, *, is_beside: bool) -> None:
        """*is_beside*: they hold for what travels beside the answer, and not for that: it is a listing or an agreement."""
        self.rules, self._where, self.is_beside = tuple(rules), where, is_beside
        self._expression = _alternatives([each.rule for each in rules if not each.is_limited])
        self._in_text = _alternatives([each.rule for each in rules])
        self._needles = _needles(rules)
        self._edits = frozenset(each for each in rules if each.rule.action == "mask" and each.rule.mode == "enforce")

    def may_hold(self, data: bytes) -> bool:
        """Say whether some rule could find something; False is certain, and cheap."""
        if self._needles is None:
            return True
        # Every text that the message holds, JSON in a string included, stands in one of these as it is.
        return any(level is None or self._is_suspect(level) for level in levels(data))

    def _is_suspect(self, text: bytes) -> bool:
        if self._expression is not None and self._expression.search(text) is not None:
            return True
        folded = text.translate(_LOWER, b"_-") if self._needles else b""
        return any(each in folded for each in self._needles or ())

    def screen(self, data: bytes, scope: Scope, looks: Mapping[Rule, Looks] | None = None) -> Screened:
        """Return *data*, one JSON document, screened; raises UnicodeDecodeError. *looks*: what a batch has left."""
        data.decode()
        if not self.may_hold(data):
            return Screened(data=data)
        suspects = self._in_text.search if self._in_text else _nothing
        is_free = self._needles is not None
        rewriter = Rewriter(self.rules, self._edits, MASKED, scope, suspects, is_free=is_free, looks=looks)
        denied = ""
        try:
            data = rewriter.rewrite(data)
        except Unmaskable as error:
            denied = str(error)
        found = tuple(
            Found(rule=each.rule, where=self._where, count=rewriter.counts[each])
            for each in self.rules
            if rewriter.counts[each]
        )
        denying = (each.rule for each in found if each.rule.action == "deny" and each.rule.mode == "enforce")
        denied = next((f"content rule {each.name}" for each in denying), denied)
        return Screened(data=data, found=found, denied=denied, changes=tuple(rewriter.changes))

    def look(self, text: bytes, looks: Mapping[Rule, Looks]) -> Screened:
        """Return *text*, which is no JSON, or nothing where a rule would mask some of it or denies it.

        *looks* are those that each rule has left for it and for what came with it.
        """
        if self._expression is None or self._expression.search(text) is None:
            return Screened(data=text)
        found = []
        for each in self.rules:
            try:
                count = 0 if each.is_limited else len(each.find(text, looks[each]))
            except TooManyCandidates:
                count = MAX_MARKS + 1
            if count:
                found.append(Found(rule=each.rule, where=self._where, count=count))
        is_held = any(each.rule.action != "redact" and each.rule.mode == "enforce" for each in found)
        return Screened(data=b"" if is_held else text, found=tuple(found))


class Content:
    """The content rules of a profile; immutable."""

    def __init__(self, rules: Sequence[ContentRule]) -> None:
        """Compile *rules*; raises BundleError naming the rule and what is wrong with it."""
        self._rules = tuple(_rule(each) for each in rules)
        self._screens: dict[tuple[tuple[Rule, ...], str, bool], Screen] = {}

    def requested(self, message: Message) -> Screen | None:
        """Return what screens *message*, which a client sends; None: nothing does."""
        if message.shape is not Shape.RESPONSE and message.method not in _ARGUED:
            return None
        target = message.target
        name = target.name if isinstance(target, Tool) else "" if isinstance(target, Prompt | Resource) else None
        return self._screen(self._of("arguments", name), "arguments")

    def answered(self, message: Message) -> Screen | None:
        """Return what screens what the server says on the way back of *message*; None: nothing does.

        Where it is not known which tool speaks, on a stream of its own, beside a listing or for a task, rules for tools
        hold for all.
        """
        target = message.target
        is_batch = message.body.lstrip(b" \t\r\n")[:1] == b"["  # whose answer holds those to its other messages, too
        is_bare = message.method in _BARE or (target is not None and message.method.endswith("/list"))
        is_any = is_bare or message.shape is not Shape.REQUEST or isinstance(target, Task) or is_batch
        name = None if is_any else target.name if isinstance(target, Tool) else ""
        return self._screen(self._of("results", name), "results", is_beside=is_bare and not is_batch)

    def redacted(self, data: bytes, found: Sequence[Found], scope: Scope) -> bytes:
        """Return *data*, a part of an audit record, without what the rules in *found* look for there."""
        rules = {each.rule for each in found if each.rule.mode == "enforce"}
        active = [each for each in self._rules if each.rule in rules]
        if not active:
            return data
        if any(each.count > MAX_MARKS and each.rule in rules for each in found):  # to look again takes as long
            return b'"' + REDACTED + b'"'
        try:
            return Rewriter(active, frozenset(active), REDACTED, scope, bool).rewrite(data)  # every text is suspect
        except Unmaskable:
            return b'"' + REDACTED + b'"'

    def _of(self, where: str, tool: str | None) -> tuple[Rule, ...]:
        """Return the rules for *where* and *tool*; "" is none, None may be any."""
        return tuple(
            each
            for each in self._rules
            if each.rule.where in (where, "both") and (not each.rule.tools or tool is None or tool in each.rule.tools)
        )

    def _screen(self, rules: tuple[Rule, ...], where: str, *, is_beside: bool = False) -> Screen | None:
        if not rules:
            return None
        made = self._screens.get((rules, where, is_beside))
        if made is None:  # at most a few for each set of rules
            made = self._screens[rules, where, is_beside] = Screen(rules, where, is_beside=is_beside)
        return made


@lru_cache(maxsize=8)  # a bundle has one list; the one before it may still be in use
def compiled(rules: tuple[ContentRule, ...]) -> Content | None:
    """Return *rules*, ready; None when there are none. Raises BundleError."""
    return Content(rules) if rules else None


def _rule(rule: ContentRule) -> Rule:
    wanted: list[tuple[str, Any]] = [(DETECTORS[each].pattern, DETECTORS[each].refine) for each in rule.patterns]
    if rule.regex is not None:
        wanted.append((rule.regex, None))
    searches = tuple((_expression(rule.name, pattern), refine) for pattern, refine in wanted)
    if any(expression.search(b"") is not None for expression, _ in searches):
        raise BundleError(f"content rule {rule.name}: regex: matches the empty text, and so everything")
    if rule.action == "mask" and any(expression.search(MASKED) is not None for expression, _ in searches):
        raise BundleError(f"content rule {rule.name}: regex: matches {MASKED.decode()}, which is put in its place")
    pointers = [each for each in rule.fields if each.startswith("/")]
    return Rule(
        rule=rule,
        searches=searches,
        names=frozenset(fold(each) for each in rule.fields if not each.startswith("/")),
        paths=tuple(
            tuple(step.replace("~1", "/").replace("~0", "~") for step in each.split("/")[1:]) for each in pointers
        ),
    )


def _expression(name: str, pattern: str, max_mem: int = _MAX_MEM) -> Any:
    import re2  # noqa: PLC0415 - 3 MB that few bundles need

    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, max_mem
    try:
        return re2.compile(pattern.encode(), options)
    except re2.error as error:
        text = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise BundleError(f"content rule {name}: regex: {text} (the syntax is RE2's)") from error


def _nothing(_: bytes) -> bool:
    return False


def _alternatives(rules: Sequence[ContentRule]) -> Any:
    """Return one expression that finds whatever one of *rules* could; None when there are none."""
    patterns = [DETECTORS[each].pattern for rule in rules for each in rule.patterns]
    patterns += [rule.regex for rule in rules if rule.regex is not None]
    if not patterns:
        return None
    return _expression("*", "|".join(f"(?:{each})" for each in dict.fromkeys(patterns)), _ALL_MEM)


def _needles(rules: Sequence[Rule]) -> tuple[bytes, ...] | None:
    """Return what a message must hold, in lower case without `_` and `-`, for rules that look at fields; None: anything.

    A match stands in the message as in its text, unless it is bound to the ends of that by an anchor. Only ASCII folds
    the same everywhere.
    """
    if any(not each.is_limited and each.rule.regex and _ANCHOR.search(each.rule.regex) for each in rules):
        return None
    names = {name for each in rules for name in each.names} | {fold(path[-1]) for each in rules for path in each.paths}
    if not all(name.isascii() and name.strip("*0123456789") for name in names):
        return None
    return tuple(sorted(name.encode() for name in names))


def merged(found: Sequence[Found]) -> tuple[Found, ...]:
    """Return *found* with one entry for each rule and place; a stream has no end, and finds come with every event."""
    counts: Counter[tuple[ContentRule, str]] = Counter()
    for each in found:
        counts[each.rule, each.where] += each.count
    return tuple([Found(rule=rule, where=where, count=count) for (rule, where), count in counts.items()])


def summary(found: Sequence[Found]) -> Iterator[Mapping[str, Any]]:
    """Yield what an audit record says of *found*: never what it was."""
    for each in merged(found):
        rule = each.rule
        yield {"rule": rule.name, "action": rule.action, "mode": rule.mode, "where": each.where, "count": each.count}
