"""Documents: JSON Patch, subsets, paths of a graph. Sources: OPA, "Object", "Graph"; RFC 6902, RFC 6901."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sidecar.core.builtins.values import Pairs, Set, Undefined, Unknown, identity, is_equal, pairs_of

MAX_PATHS: Final = 10_000
MAX_COPIED: Final = 2_000_000  # members, by all operations of a patch
MAX_COMPARED: Final = 2_000_000  # items, when one array is looked for in another
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_ODD_INDEX: Final = re.compile(r"-0|\+[0-9]|[1-9][0-9]{10}|(?:0|[1-9][0-9]*)(?:\.0*)?(?:[eE]|$)", re.ASCII)


def subset(whole: Any, part: Any) -> bool:
    """Return whether *part* is in *whole*: members of objects at every depth, members of sets, a run of an array."""
    if pairs_of(whole) is not None and pairs_of(part) is not None:
        members = {identity(key): member for key, member in pairs_of(whole) or ()}
        return all(
            identity(key) in members and _covers(members[identity(key)], member) for key, member in pairs_of(part) or ()
        )
    match whole, part:
        case list(), list():
            return _has_run(list(map(identity, whole)), list(map(identity, part)))
        case Set(), Set():
            return set(map(identity, part)) <= set(map(identity, whole))
        case list(), Set():
            # OPA counts members of the array, so one that is there twice counts twice; and nothing is in nothing.
            wanted = set(map(identity, part))
            return 0 < len(wanted) <= sum(identity(each) in wanted for each in whole) or (not wanted and bool(whole))
    raise Undefined


def _covers(whole: Any, part: Any) -> bool:
    if is_equal(whole, part):
        return True
    same_kind = type(whole) is type(part) or (pairs_of(whole) is not None and pairs_of(part) is not None)
    return same_kind and isinstance(whole, list | dict | Set | Pairs) and subset(whole, part)


def _has_run(whole: list[Any], part: list[Any]) -> bool:
    """Return whether OPA finds *part* in *whole*: like it, this goes on behind a partial match and does not go back."""
    if len(whole) * len(part) > MAX_COMPARED:
        raise Unknown("arrays that long")
    start = matched = 0
    while matched < len(part):
        if start + matched >= len(whole):
            return False
        if whole[start + matched] == part[matched]:
            matched += 1
        else:
            start, matched = start + 1, 0
    return True


def patch(document: Any, operations: Any) -> Any:
    """Return *document* after *operations* (RFC 6902); as OPA has it, a set's members are addressed by value."""
    if not isinstance(operations, list):
        raise Undefined
    if len(operations) * _size(document, MAX_COPIED) > MAX_COPIED:
        raise Unknown("a patch that large")
    for operation in operations:
        if not isinstance(operation, dict):
            raise Undefined
        document = _patched(document, operation)
    return document


def _size(value: Any, limit: int) -> int:
    """Return how many members *value* has at every depth, or somewhat more than *limit*."""
    size, rest = 0, [value]
    while rest and size <= limit:
        inner = rest.pop()
        members = [member for _, member in pairs_of(inner) or ()] or (inner if isinstance(inner, list | Set) else ())
        size += 1 + len(members)
        rest.extend(members)
    return size


def _patched(document: Any, operation: dict[str, Any]) -> Any:
    path = _path(operation.get("path"))
    match operation.get("op"):
        case "add":
            return _added(document, path, _value(operation))
        case "remove":
            return _removed(document, path)
        case "replace":
            value = _value(operation)
            return _added(_removed(document, path), path, value) if path else value
        case "move":
            source = _path(operation.get("from"))
            value = _at(document, source)
            return _added(_removed(document, source), path, value)
        case "copy":
            return _added(document, path, _at(document, _path(operation.get("from"))))
        case "test":
            if not is_equal(_at(document, path), _value(operation)):
                raise Undefined
            return document
    raise Undefined


def _value(operation: dict[str, Any]) -> Any:
    if "value" not in operation:
        raise Undefined
    return operation["value"]


def _path(written: Any) -> list[Any]:
    match written:
        case "":
            return []
        case str():
            return [step.replace("~1", "/").replace("~0", "~") for step in written.lstrip("/").split("/")]
        case list():
            return written
    raise Undefined


def _at(document: Any, path: list[Any]) -> Any:
    for step in path:
        match document:
            case dict():
                if not isinstance(step, str) or step not in document:
                    raise Undefined
                document = document[step]
            case list():
                document = document[_index(step, len(document) - 1)]
            case Set():
                found = [each for each in document if is_equal(each, step)]
                if not found:
                    raise Undefined
                document = found[0]
            case Pairs():
                raise Unknown("json.patch of an object whose keys are not strings")
            case _:
                raise Undefined
    return document


def _index(step: Any, last: int) -> int:
    if isinstance(step, str) and step != "-":
        if not _INDEX.fullmatch(step):
            raise Unknown(f"json.patch at {step[:32]!r} of an array") if _ODD_INDEX.match(step) else Undefined
        step = int(step)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= last:
        raise Undefined
    return step


def _changed(document: Any, path: list[Any], change: Callable[[Any, Any], Any]) -> Any:
    """Return *document* with *change* made to what the last step of *path* is in; nothing is changed in place."""
    first, *rest = path
    if not rest:
        return change(document, first)
    inner = _changed(_at(document, [first]), rest, change)
    match document:
        case dict():
            return {**document, first: inner}
        case list():
            at = _index(first, len(document) - 1)
            return [*document[:at], inner, *document[at + 1 :]]
        case _:
            return Set([*(each for each in document if not is_equal(each, first)), inner])


def _added(document: Any, path: list[Any], value: Any) -> Any:
    def add(parent: Any, step: Any) -> Any:
        match parent:
            case dict():
                if not isinstance(step, str):
                    raise Unknown("json.patch that makes a key that is no string")
                return {**parent, step: value}
            case list():
                at = len(parent) if step == "-" else _index(step, len(parent))
                return [*parent[:at], value, *parent[at:]]
            case Set():
                if not is_equal(step, value):
                    raise Undefined
                return Set([*(each for each in parent if not is_equal(each, value)), value])
            case Pairs():
                raise Unknown("json.patch of an object whose keys are not strings")
        raise Undefined

    return _changed(document, path, add) if path else value


def _removed(document: Any, path: list[Any]) -> Any:
    def remove(parent: Any, step: Any) -> Any:
        _at(parent, [step])
        match parent:
            case dict():
                return {key: member for key, member in parent.items() if key != step}
            case list():
                at = _index(step, len(parent) - 1)
                return [*parent[:at], *parent[at + 1 :]]
            case _:
                return Set(each for each in parent if not is_equal(each, step))

    if not path:
        raise Unknown("json.patch that removes all")
    return _changed(document, path, remove)


def reachable_paths(graph: Any, starts: Any) -> Set:
    """Return every path through *graph* from *starts* that ends where nothing follows, or where it would come again."""
    if pairs_of(graph) is None or not isinstance(starts, list | Set):
        raise Undefined
    edges = {identity(node): _vertexes(following) for node, following in pairs_of(graph) or ()}
    found: dict[Any, list[Any]] = {}
    for start in starts:
        ahead = edges.get(identity(start))
        for neighbour in ahead or ():
            _follow(edges, neighbour, [start], frozenset({identity(start)}), found)
        if ahead == []:
            found[identity([start])] = [start]
    return Set(found.values())


def _follow(
    edges: Mapping[Any, list[Any]], node: Any, path: list[Any], reached: frozenset[Any], found: dict[Any, list[Any]]
) -> None:
    """Add to *found*, by identity, the paths that go on from *path* to *node*."""
    ahead = edges.get(identity(node))
    if len(found) > MAX_PATHS:
        raise Unknown("a graph with that many paths")
    if ahead is None:
        found[identity(path)] = path
        return
    path, reached = [*path, node], reached | {identity(node)}
    if not ahead:
        found[identity(path)] = path
    for neighbour in ahead:
        if identity(neighbour) in reached:
            found[identity(path)] = path
        else:
            _follow(edges, neighbour, path, reached, found)


def _vertexes(following: Any) -> list[Any]:
    return list(following) if isinstance(following, list | Set) else []


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "graph.reachable_paths": reachable_paths,
    "json.patch": patch,
    "object.subset": subset,
}
