"""Makes the files of one bundle from policies and a profile, and works out what those policies can read.

Refuses policies that no engine would load and a profile that no sidecar would. Compiles no Rego itself: OPA does
(webhook/shell/opa.py), with the built-in functions below, so that a rule which the sidecar could not run is refused
where it is written. What a policy reads is proven on its syntax tree, where `input` (Rego) and `context` (Cedar) stand
by name; `opa deps` misses values of `with`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from sidecar.core import profile as profiles
from sidecar.core.builtins import IMPURE, PURE
from sidecar.core.bundle import ALLOW, DATA, PROFILE, REASONS, SCHEMA, WASM
from sidecar.core.content import compiled as compiled_content
from sidecar.core.projection import pointer
from sidecar.errors import BundleError
from webhook.core import cedar as cedar_text
from webhook.errors import BadPolicy

# What OPA 1.22 compiles into policy.wasm itself (its internal/compiler/wasm, builtinsFunctions), by families.
_NATIVE: Final = """
    eq assign equal neq gt gte lt lte plus minus mul div rem abs round ceil floor numbers.range to_number
    bits.and bits.lsh bits.negate bits.or bits.rsh bits.xor and or set_diff union intersection
    is_array is_boolean is_null is_number is_object is_set is_string type_name count sum product max min sort all any
    array.concat array.flatten array.reverse array.slice internal.member_2 internal.member_3 internal.template_string
    object.filter object.get object.keys object.remove object.union object.union_n
    json.filter json.remove json.marshal json.unmarshal json.is_valid walk graph.reachable
    base64.decode base64.encode base64.is_valid base64url.decode base64url.encode
    concat contains endswith startswith format_int indexof lower upper replace split strings.replace_n strings.reverse
    substring trim trim_left trim_prefix trim_right trim_space trim_suffix
    glob.match re_match regex.match regex.is_valid regex.find_all_string_submatch_n
    net.cidr_contains net.cidr_intersects net.cidr_overlap
    print internal.print internal.test_case
    """
NATIVE: Final = frozenset(_NATIVE.split())
CEDAR_ENTITIES: Final = tuple(map(pointer, cedar_text.ENTITIES))
VOLATILE: Final = ("/request/time", "/request/trace_id")  # never twice the same: nothing to remember


class Data:
    """What Rego finds below `data`: the text of data.json, made once, and by what megabytes of it are compared.

    Raises ValueError for what JSON or UTF-8 cannot hold.
    """

    __slots__ = ("digest", "text")

    def __init__(self, content: Mapping[str, Any]) -> None:
        # In the form in which it is hashed, so that neither we nor a sidecar has to make that of it.
        written = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        self.text = written.encode() if content else b""
        self.digest = hashlib.sha256(self.text).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Say whether both hold the same."""
        return isinstance(other, Data) and self.digest == other.digest

    def __hash__(self) -> int:
        """Return what is the same for the same content."""
        return hash(self.digest)


NO_DATA: Final = Data({})


def key_of(*parts: Any) -> bytes:
    """Return a digest of *parts*, policies and profiles, by which what was made of them is found again."""
    encoded = msgspec.json.encode(parts, order="sorted", enc_hook=_digest)
    return hashlib.sha256(encoded).digest()


def _digest(value: Any) -> str:
    assert isinstance(value, Data)  # noqa: S101 - all else in policies and profiles is JSON
    return value.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """One policy as it was applied: file name without directory -> text. The first fields are those of PolicySet."""

    name: str = "policies"
    path: str = ""
    mode: Literal["enforce", "shadow"] = "enforce"
    grants: bool = True
    vocabulary: Literal["sidegate", "toolhive"] = "sidegate"
    cedar: Mapping[str, str] = field(default_factory=dict)
    rego: Mapping[str, str] = field(default_factory=dict)
    data: Data = NO_DATA
    schema: str | None = None  # of Cedar; None: policies are parsed, not validated

    def rego_files(self) -> dict[str, bytes]:
        """Return what OPA reads, by path in the bundle."""
        files = {f"policy/{name}": text.encode() for name, text in self.rego.items()}
        if self.rego and self.data.text:
            files[DATA] = self.data.text
        return files


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the compilers found: *reads* are JSON pointers into `input`, None when nothing is proven."""

    reads: frozenset[str] | None
    is_pure: bool = True
    wasm: bytes | None = None


def capabilities(current: bytes) -> bytes:
    """Return OPA's own capabilities (`opa capabilities --current`) less what the sidecar cannot run."""
    document = json.loads(current)
    allowed = NATIVE | PURE | IMPURE
    document["builtins"] = [each for each in document["builtins"] if each["name"] in allowed]
    document["allow_net"] = []  # a policy fetches nothing
    return json.dumps(document).encode()


def files(
    policies: Sequence[Policies], profile: profiles.Profile, compiled: Sequence[Sequence[Compiled]]
) -> dict[str, bytes]:
    """Return the files of the bundle, in order; the profile in it says what the engines may leave out.

    *compiled* is what the compilers found of each of *policies*. Raises BadPolicy for a profile that no sidecar would
    accept.
    """
    made: dict[str, bytes] = {}
    for each, found in zip(policies, compiled, strict=True):
        inner = each.rego_files()
        inner |= {f"cedar/{name}": text.encode() for name, text in each.cedar.items()}
        if each.cedar and each.schema is not None:
            inner[SCHEMA] = each.schema.encode()
        for one in found:
            if one.wasm is not None:
                inner[WASM] = one.wasm
        made |= {each.path + name: content for name, content in inner.items()}
    announced = tuple(_announced(each, found) for each, found in zip(policies, compiled, strict=True))
    made[PROFILE] = profiles.encode(msgspec.structs.replace(profile, policies=announced))
    try:
        compiled_content(profiles.decode(made[PROFILE]).content)  # made from values that nobody checked as a whole
    except BundleError as error:
        raise BadPolicy("bundle", str(error)) from error
    return dict(sorted(made.items()))


def _announced(policies: Policies, compiled: Sequence[Compiled]) -> profiles.PolicySet:
    parts = [each.reads for each in compiled]
    reads = None if any(part is None for part in parts) else frozenset().union(*(part for part in parts if part))
    is_pure = all(each.is_pure for each in compiled) and reads is not None and not _overlap(reads, VOLATILE)
    return profiles.PolicySet(
        name=policies.name,
        path=policies.path,
        mode=policies.mode,
        grants=policies.grants,
        vocabulary=policies.vocabulary,
        cedar=bool(policies.cedar),
        rego=bool(policies.rego),
        reads=None if reads is None else tuple(sorted(reads)),
        pure=is_pure,
    )


def _overlap(reads: Iterable[str], paths: Iterable[str]) -> bool:
    return any(
        f"{path}/".startswith(f"{read}/") or f"{read}/".startswith(f"{path}/") for read in reads for path in paths
    )


# --- Rego ---


def entrypoints(modules: Iterable[Any]) -> tuple[str, ...]:
    """Return the entrypoints that *modules* (syntax trees of `opa parse`) can be compiled for."""
    reasons = any(
        _constant(module["package"]["path"][1:]) == ("mcp", "authz")
        and any(rule["head"]["ref"][0]["value"] == "reasons" for rule in module.get("rules") or ())
        for module in modules
    )
    return (ALLOW, REASONS) if reasons else (ALLOW,)


def rego_reads(modules: Iterable[Any]) -> frozenset[str]:
    """Return every path below `input` that *modules* mention; a bare `input` is "", the whole document."""
    paths = (_constant(ref[1:]) for module in modules for ref in _refs(module) if ref[0].get("value") == "input")
    return frozenset(pointer(path) for path in paths)


def is_pure(modules: Iterable[Any]) -> bool:
    """Return whether none of *modules* mentions an impure built-in function."""
    named = {".".join([str(ref[0].get("value")), *_constant(ref[1:])]) for module in modules for ref in _refs(module)}
    return not named & IMPURE


def _refs(node: Any) -> Iterator[list[Any]]:
    """Yield each reference in a syntax tree as its list of terms; a variable alone is a reference of one term."""
    if isinstance(node, list):
        for child in node:
            yield from _refs(child)
    elif isinstance(node, dict):
        kind, value = node.get("type"), node.get("value")
        if kind == "ref" and isinstance(value, list):
            if value[0].get("type") == "var":
                yield value
            else:  # a call, a literal or a comprehension, with references of its own: `split(input.a, "/")[0]`
                yield from _refs(value[0])
            yield from _refs(value[1:])
        elif kind == "var":
            yield [node]
        else:
            yield from _refs(list(node.values()))


def _constant(terms: Iterable[Any]) -> tuple[str, ...]:
    """Return the leading member names of *terms*, up to the first that is not a constant string."""
    names: list[str] = []
    for term in terms:
        if term.get("type") != "string":
            break
        names.append(str(term["value"]))
    return tuple(names)


def opa_errors(output: bytes) -> list[dict[str, Any]]:
    """Return the errors in *output* of `opa … --format json`; none when it is no such output."""
    try:
        errors = json.loads(output)["errors"]
    except (ValueError, LookupError, TypeError):
        return []
    return [each for each in errors if isinstance(each, dict)]


def opa_error(output: bytes) -> BadPolicy:
    """Return the first error in *output* of `opa … --format json`, and how many more there are."""
    try:
        errors = json.loads(output)["errors"]
        first = errors[0]
        message = str(first["message"]) + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")
        location = first.get("location") or {}
        name = str(location.get("file", "rego")).removeprefix("policy/")
        line, column = int(location.get("row", 0)), int(location.get("col", 0))
        return BadPolicy(name, message, line=line, column=max(column, 1) if line else 0)  # a sudden end has no column
    except (ValueError, LookupError, TypeError):
        lines = output.decode(errors="replace").strip().splitlines() or ["opa failed without a word"]
        if "does not refer to a rule" in lines[0]:
            return BadPolicy("rego", "there is no rule allow in package mcp.authz, and no other rule decides")
        return BadPolicy("rego", lines[0].removeprefix("error: ")[:512])


# --- Cedar ---


def cedar(paths: Iterable[Iterable[str]] | None) -> Compiled:
    """Return what webhook/core/cedar.py found: the member names that lead to what is read, None when nothing is proven."""
    return Compiled(reads=None if paths is None else frozenset(map(pointer, paths)))
