"""Works out the part of a question's document that policies can read, and remembers verdicts under exactly that part.

Leaves nothing out that a policy could read: without a proof the document stays whole. Is not for policies that read the
time or call another impure built-in function. A path is a JSON pointer into `input` (RFC 6901) and means the subtree.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from sidecar.core.authorise import PARTS, Engine, Question, Verdict, judge
from sidecar.core.message import Prompt, Resource, Tool

MAX_VERDICTS: Final = 2048
MAX_CALLERS: Final = 1024  # users and workloads that are kept in writing
MAX_KEY_BYTES: Final = 2048  # so 4 MiB at most; longer keys come from large arguments, which seldom repeat


Tree = dict[str, Any] | None  # member names and what is read below them; None: everything


class Projection:
    """What may be read of a document; *reads* are JSON pointers, None when nothing is proven.

    Raises ValueError for what is no pointer.
    """

    __slots__ = ("_tree", "reads")

    def __init__(self, reads: Iterable[str] | None) -> None:
        self.reads = None if reads is None else tuple(reads)
        self._tree: Tree = None if self.reads is None else _grow(self.reads)

    def narrow(self, document: Mapping[str, Any]) -> Any:
        """Return *document* without what nobody reads; what is left is shared, not copied."""
        return document if self._tree is None else _narrow(document, self._tree)

    def part_of(self, question: Question) -> dict[str, Any]:
        """Return the document of *question*, narrowed; what nobody reads is not even made."""
        if self._tree is None:
            return question.document()
        return {
            name: PARTS[name](question) if child is None else _narrow(PARTS[name](question), child)
            for name, child in self._tree.items()
            if name in PARTS
        }

    def below(self, name: str) -> tuple[bool, Tree]:
        """Return whether anything of the document's part *name* is read, and what below it."""
        if self._tree is None:
            return True, None
        return name in self._tree, self._tree.get(name)


def _grow(reads: tuple[str, ...]) -> Tree:
    root: dict[str, Any] = {}  # values are Trees
    for path in sorted(reads):  # a shorter path comes before those below it, and swallows them
        if path == "":
            return None
        *parents, last = steps(path)
        node: Any = root
        for name in parents:
            node = node.setdefault(name, {})
            if node is None:
                break
        else:
            node[last] = None
    return root


def _narrow(value: Any, tree: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: value[name] if child is None else _narrow(value[name], child)
        for name, child in tree.items()
        if name in value
    }


def pointer(names: Iterable[str]) -> str:
    """Return the JSON pointer to the member that *names* lead to; "" is the whole document."""
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def steps(path: str) -> tuple[str, ...]:
    """Return the member names in the JSON pointer *path*; raises ValueError when it is none."""
    if path and not path.startswith("/"):
        raise ValueError(f"{path!r} is no JSON pointer")
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in path.split("/")[1:])


WHOLE: Final = Projection(None)


class _Named:
    """What is read of a tool or a prompt."""

    __slots__ = ("_args", "_has_name", "_is_whole")

    def __init__(self, tree: Tree, *, is_read: bool) -> None:
        self._has_name = is_read and (tree is None or "name" in tree)
        args: Tree = {} if not is_read else None if tree is None else tree.get("args") if "args" in tree else {}
        self._is_whole = args is None
        self._args: tuple[tuple[str, Tree], ...] = tuple((args or {}).items())

    def pieces(self, name: str, arguments: Mapping[str, Any]) -> list[Any] | None:
        """Return what of the two is read, each as a text or as JSON in bytes, None where absent; None: too much."""
        found: list[Any] = [name if self._has_name else None]
        if type(arguments) is not dict:  # what is no dict is never narrowed
            return None
        if self._is_whole:
            found.append(orjson.dumps(arguments))
        for step, below in self._args:
            value = arguments.get(step, _ABSENT)
            if type(value) is str:
                if len(value) > MAX_KEY_BYTES:
                    return None  # a hash of it costs more than most decisions
                found.append(value)
            elif value is _ABSENT:
                found.append(None)
            else:
                found.append(orjson.dumps(value if below is None else _narrow(value, below)))
        return found


_ABSENT: Final = object()
_CALLER: Final = ("user", "workload", "delegation", "server")
_REST: Final = ("agent", "elicitation", "request")


class _Keys:
    """Makes keys of questions: equal only where the projected documents are. Mutated by `of` only.

    Straight from the question, because making the document, narrowing and writing it costs as much as deciding. Who
    asks is the same object for many questions, and written once.
    """

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._tool = _Named(projection.below("tool")[1], is_read=projection.below("tool")[0])
        self._prompt = _Named(projection.below("prompt")[1], is_read=projection.below("prompt")[0])
        self._caller = tuple((name, projection.below(name)[1]) for name in _CALLER if projection.below(name)[0])
        self._rest = tuple((name, projection.below(name)[1]) for name in _REST if projection.below(name)[0])
        self._callers: dict[tuple[int, int], tuple[Any, Any, Any, bytes]] = {}

    def of(self, question: Question) -> tuple[Any, ...] | None:
        """Return the key; None where there is none, or too large a one. Raises TypeError for what is not JSON."""
        message, principal = question.message, question.principal
        target, pieces = message.target, None
        held = self._callers.get((id(principal.user), id(principal.workload)))
        if (
            held is None
            or held[0] is not principal.user
            or held[1] is not principal.workload
            or held[2] is not question.server
        ):
            held = self._written(question)
        kind = type(target)
        if kind is Tool:
            pieces = self._tool.pieces(target.name, target.arguments)  # type: ignore[union-attr] # as its type says
        elif kind is Prompt:
            pieces = self._prompt.pieces(target.name, target.arguments)  # type: ignore[union-attr] # same
        elif kind is Resource:
            pieces = [target.uri]  # type: ignore[union-attr] # same
        else:
            pieces = [orjson.dumps(self._projection.part_of(question))]
        if pieces is None:
            return None
        if self._rest:
            pieces.append(self._part(self._rest, question))
        return (held[3], message.method, kind, *pieces)

    def _written(self, question: Question) -> tuple[Any, Any, Any, bytes]:
        user, workload = question.principal.user, question.principal.workload
        held = (user, workload, question.server, self._part(self._caller, question))
        if len(self._callers) >= MAX_CALLERS:
            del self._callers[next(iter(self._callers))]
        self._callers[id(user), id(workload)] = held
        return held

    @staticmethod
    def _part(names: tuple[tuple[str, Tree], ...], question: Question) -> bytes:
        parts = [(PARTS[name](question), below) for name, below in names]
        return orjson.dumps([part if below is None else _narrow(part, below) for part, below in parts])


class Remembering:
    """Engines that are asked together, and only what they have not been asked before. Mutated by decide only.

    Sound because the engines are pure and see nothing but the projected document, whose parts are the key. It lives as
    long as its bundle.
    """

    def __init__(self, engines: Sequence[Engine], projection: Projection) -> None:
        self.name = "+".join(engine.name for engine in engines)
        self.engines, self._keys = tuple(engines), _Keys(projection)
        self._verdicts: OrderedDict[tuple[Any, ...], Verdict] = OrderedDict()

    def decide(self, question: Question) -> Verdict:
        """Return the engines' joint verdict on *question*."""
        try:
            key = self._keys.of(question)
        except TypeError:  # not JSON as orjson has it, such as an integer beyond 64 bits
            key = None
        if key is None:
            return judge(question, self.engines)
        verdict = self._verdicts.get(key)
        if verdict is not None:
            self._verdicts.move_to_end(key)
            return verdict
        verdict = judge(question, self.engines)
        # An error may pass, such as memory that ran out.
        if not verdict.errors and sum(len(each) for each in key if isinstance(each, str | bytes)) <= MAX_KEY_BYTES:
            if len(self._verdicts) >= MAX_VERDICTS:
                self._verdicts.popitem(last=False)
            self._verdicts[key] = verdict
        return verdict
