"""Works out the part of a question's document that policies can read, and remembers verdicts under exactly that part.

Leaves nothing out that a policy could read: without a proof the document stays whole. Is not for policies that read the
time or call another impure built-in function. A path is a JSON pointer into `input` (RFC 6901) and means the subtree.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from sidecar.core.authorise import Engine, Question, Verdict, judge

MAX_VERDICTS: Final = 2048
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


class Remembering:
    """Engines that are asked together, and only what they have not been asked before. Mutated by decide only.

    Sound because the engines are pure and see nothing but the projected document, whose bytes are the key. It lives as
    long as its bundle.
    """

    def __init__(self, engines: Sequence[Engine], projection: Projection) -> None:
        self.name = "+".join(engine.name for engine in engines)
        self.engines, self._projection = tuple(engines), projection
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()

    def decide(self, question: Question) -> Verdict:
        """Return the engines' joint verdict on *question*."""
        try:
            key = orjson.dumps(self._projection.narrow(question.document()))
        except TypeError:  # not JSON as orjson has it, such as an integer beyond 64 bits
            return judge(question, self.engines)
        verdict = self._verdicts.get(key)
        if verdict is not None:
            self._verdicts.move_to_end(key)
            return verdict
        verdict = judge(question, self.engines)
        if len(key) <= MAX_KEY_BYTES and not verdict.errors:  # an error may pass, such as memory that ran out
            if len(self._verdicts) >= MAX_VERDICTS:
                self._verdicts.popitem(last=False)
            self._verdicts[key] = verdict
        return verdict
