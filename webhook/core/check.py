"""Finds what is wrong with policies that compile: fields that there are not, rules that never match, always fail or add nothing.

Cedar is validated against the contract's schema; what the contract leaves open, arguments and claims, gets the types that
the policies themselves take it for, and may be absent: a policy that reads such a field without `has` fails whenever it
is, and a failing policy denies. Rego is checked by OPA against the contract's JSON Schema. Refuses nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import cedarpy

from webhook.core import contract
from webhook.core.cedar import context_path, tokens
from webhook.core.compile import opa_errors
from webhook.core.contract import ACTIONS

_OPTIONAL: Final = re.compile(r"optional attribute `(?P<path>[^`]+)`")
_MISSING: Final = re.compile(r"attribute `(?P<name>[^`]+)` .*not found")
_SAID: Final = re.compile(r"^for policy `[^`]+`, ")
_OPEN: Final = {"args": ("tool", "args"), "claims": ("user", "claims")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something an author should know. An error is a policy that does not do what it says."""

    file: str
    message: str
    line: int = 0
    column: int = 0
    severity: Literal["error", "warning"] = "error"
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.severity}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


# --- Rego ---


def rego(output: bytes) -> list[Finding]:
    """Return what `opa check --schema` found, less comparisons with null: the schema does not say that null may be."""
    found = []
    for each in opa_errors(output):
        details = each.get("details") or {}
        if each.get("message") == "match error" and "null" in {_kind(details.get("a")), _kind(details.get("b"))}:
            continue
        location = each.get("location") or {}
        found.append(
            Finding(
                file=str(location.get("file", "rego")).removeprefix("policy/"),
                line=int(location.get("row", 0)),
                column=int(location.get("col", 0)),
                message=_rego_message(str(each.get("message")), details),
                hint=_rego_hint(details),
            )
        )
    return found


def _kind(described: Any) -> str:
    return str(described.get("type")) if isinstance(described, dict) else ""


def _rego_message(message: str, details: Mapping[str, Any]) -> str:
    if message == "match error":
        return f"never holds: {_kind(details.get('a'))} is compared with {_kind(details.get('b'))}"
    return message


def _rego_hint(details: Mapping[str, Any]) -> str:
    return f"one of {', '.join(map(str, details['oneOf']))}" if details.get("oneOf") else ""


def unused_rules(modules: Sequence[tuple[str, Any]], entrypoints: Sequence[str]) -> list[Finding]:
    """Return the rules of *modules* (file, syntax tree) that no decision reaches: nobody mentions their name."""
    text = json.dumps([tree for _, tree in modules])
    found: dict[tuple[str, str], Finding] = {}
    wanted = {each.rpartition("/")[2] for each in entrypoints} | {"reasons"}
    for file, tree in modules:
        for rule in tree.get("rules") or ():
            head = rule["head"]
            name = str(head["ref"][0]["value"])
            mentions = text.count(f'"value": "{name}"') - _heads(modules, name)
            if name not in wanted and mentions <= 0:
                place = head.get("location") or rule.get("location") or {}
                found[file, name] = Finding(
                    file=file, line=int(place.get("row", 0)), column=int(place.get("col", 0)), severity="warning",
                    message=f"rule {name} is used by nothing, and decides nothing",
                    hint="only allow decides; is it called by another name?",
                )  # fmt: skip
    return list(found.values())


def _heads(modules: Sequence[tuple[str, Any]], name: str) -> int:
    rules = (rule for _, tree in modules for rule in tree.get("rules") or ())
    return sum(json.dumps(rule["head"].get("ref", [])).count(f'"value": "{name}"') for rule in rules)


# --- Cedar ---


@dataclass(frozen=True, slots=True, eq=False)
class _Policy:
    file: str
    number: int
    tree: Mapping[str, Any]
    start: int  # in the text
    text: str

    def find(
        self, message: str, *, word: str = "", hint: str = "", severity: Literal["error", "warning"] = "error"
    ) -> Finding:
        """Return a finding at *word* within the policy, or at its beginning."""
        at = self.start
        if word:
            inside = re.search(rf"\b{re.escape(word)}\b", self.text[self.start :])
            at += inside.start() if inside else 0
        line, column = self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)
        return Finding(file=self.file, line=line, column=column, message=message, hint=hint, severity=severity)

    @property
    def name(self) -> str:
        annotation = (self.tree.get("annotations") or {}).get("id")
        return str(annotation) if annotation else f"{self.file}#{self.number}"

    @property
    def scope(self) -> list[Any]:
        return [self.tree[part] for part in ("principal", "action", "resource")]

    @property
    def conditions(self) -> list[str]:
        return [json.dumps(each, sort_keys=True) for each in self.tree["conditions"]]


def cedar(policies: Mapping[str, str], *, vocabulary: str = "sidegate") -> list[Finding]:
    """Return what is wrong with *policies*, file name -> text, which all parse; run it where a parser may crash."""
    parsed = [each for file in sorted(policies) for each in _policies(file, policies[file])]
    found = [finding for each in parsed if (finding := _never(each))]
    found += _shadowed(parsed)
    if vocabulary == "sidegate":
        schema = cedarpy.Schema.from_str(cedar_schema([each.tree for each in parsed]))
        for file in sorted(policies):
            ours = [each for each in parsed if each.file == file]
            result = cedarpy.validate_policies(policies[file], schema)
            found += [
                _explained(ours[int(each.policy_id.removeprefix("policy"))], each.error) for each in result.errors
            ]
    return list(dict.fromkeys(found))


def cedar_schema(trees: Sequence[Any]) -> str:
    """Return the schema for policies of *trees*: arguments and claims as they take them."""
    types: dict[str, Any] = {"args": {}, "claims": {}}
    for tree in trees:
        for condition in tree["conditions"]:
            _infer(condition["body"], "Bool", types)
    return contract.cedar_schema(_record(types["args"]), _record(types["claims"]))


def _policies(file: str, text: str) -> Iterator[_Policy]:
    trees = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
    starts, is_start, depth = [], True, 0
    for token in tokens(text):
        if token[0].startswith("//"):
            continue
        if is_start:
            starts.append(token.start())
        depth += token[0] in ("(", "{", "[")
        depth -= token[0] in (")", "}", "]")
        is_start = token[0] == ";" and depth == 0
    for number in range(len(trees)):
        yield _Policy(file, number, trees[f"policy{number}"], starts[number], text)


def _explained(policy: _Policy, error: str) -> Finding:
    message = _SAID.sub("", error)
    if optional := _OPTIONAL.search(message):
        path = optional["path"]
        last = path.rpartition(".")[2]
        owner = re.search(rf"([\w.]+)\.{re.escape(last)}\b", policy.text[policy.start :])
        message = f"fails whenever {path} is absent, and a failing policy denies"
        return policy.find(message, word=last, hint=f"ask first: {owner[1] if owner else 'context'} has {last} && …")
    if missing := _MISSING.search(message):
        of_user = "Anonymous" in message or "Workload" in message
        hint = "ask first: principal is User && …" if of_user else "the fields are in docs/reference/policy-input.md"
        return policy.find(message, word=missing["name"], hint=hint)
    if "unrecognized action" in message:
        return policy.find(message, word="action", hint=f"one of {', '.join(ACTIONS)}")
    if "applicable action" in message:
        return policy.find(f"never matches: {message}", hint="tools are for tools/call, prompts for prompts/get …")
    return policy.find(message)


def _never(policy: _Policy) -> Finding | None:
    """Return why *policy* can never match, when two of its conditions contradict each other or one is plainly false."""
    wanted: dict[str, Any] = {}
    for condition in policy.tree["conditions"]:
        if condition["kind"] != "when":
            continue
        for part in _conjuncts(condition["body"]):
            match part:
                case {"Value": False}:
                    return policy.find("never matches: a condition is false")
                case {"==": {"left": left, "right": {"Value": value}}} | {
                    "==": {"left": {"Value": value}, "right": left}
                }:
                    key = json.dumps(left, sort_keys=True)
                    if "Value" in left and left["Value"] != value:
                        return policy.find(f"never matches: {left['Value']!r} is not {value!r}")
                    if wanted.setdefault(key, value) != value:
                        return policy.find(f"never matches: the same field is both {wanted[key]!r} and {value!r}")
    return None


def _conjuncts(node: Any) -> Iterator[Any]:
    match node:
        case {"&&": {"left": left, "right": right}}:
            yield from _conjuncts(left)
            yield from _conjuncts(right)
        case _:
            yield node


def _shadowed(policies: Sequence[_Policy]) -> Iterator[Finding]:
    """Yield the policies that another makes superfluous: wherever one matches, the other decides the same or overrides it."""
    for number, one in enumerate(policies):
        for other_number, other in enumerate(policies):
            if one is other or not _covers(other, one):
                continue
            same = one.tree["effect"] == other.tree["effect"]
            if same and number < other_number and _covers(one, other):
                continue  # of two that say the same, the later one adds nothing
            if same or one.tree["effect"] == "permit":
                does = "says the same and more" if same else "forbids all that it permits"
                yield one.find(f"{one.name} adds nothing: {other.name} {does}", severity="warning")
                break


def _covers(wide: _Policy, narrow: _Policy) -> bool:
    """Return whether *wide* certainly matches wherever *narrow* does."""
    scopes = zip(wide.scope, narrow.scope, strict=True)
    return all(ours["op"] == "All" or ours == theirs for ours, theirs in scopes) and set(wide.conditions) <= set(
        narrow.conditions
    )


# --- What policies take arguments and claims for ---


def _infer(node: Any, expected: str, types: dict[str, Any]) -> None:
    """Note in *types* what the fields of arguments and claims in *node* must be, where *expected* is wanted."""
    path = context_path(node) if isinstance(node, dict) and "has" not in node else None
    if path and path[0] in _OPEN and len(path) > 1:
        _note(types, path, expected)
        return
    if isinstance(node, list):
        for child in node:
            _infer(child, "String", types)
    if not isinstance(node, dict):
        return
    for operator, operands in node.items():
        _infer_operands(operator, operands, expected, types)


def _infer_operands(  # noqa: C901, PLR0912 - one line an operator of Cedar's
    operator: str, operands: Any, expected: str, types: dict[str, Any]
) -> None:
    left, right = (operands.get(side) for side in ("left", "right")) if isinstance(operands, dict) else (None, None)
    match operator:
        case "has":
            path = context_path(left)
            if path and path[0] in _OPEN:
                _note(types, (*path, str(operands["attr"])), "")
        case "==" | "!=":
            _infer(left, _literal(right) or "String", types)
            _infer(right, _literal(left) or "String", types)
        case "<" | "<=" | ">" | ">=" | "+" | "-" | "*" | "neg":
            for each in operands.values():
                _infer(each, "Long", types)
        case "&&" | "||" | "!":
            for each in operands.values():
                _infer(each, "Bool", types)
        case "contains":
            _infer(left, f"Set<{_literal(right) or 'String'}>", types)
            _infer(right, _element(left), types)
        case "containsAll" | "containsAny":
            _infer(left, f"Set<{_element(right)}>", types)
            _infer(right, f"Set<{_element(left)}>", types)
        case "if-then-else":
            _infer(operands["if"], "Bool", types)
            _infer(operands["then"], expected, types)
            _infer(operands["else"], expected, types)
        case _ if isinstance(operands, dict):
            for each in operands.values():
                _infer(each, "String", types)
        case _:
            _infer(operands, "String", types)


def _note(types: dict[str, Any], path: Sequence[str], kind: str) -> None:
    node = types
    for name in path[:-1]:
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = node[name] = {}
        node = inner
    if not isinstance(node.get(path[-1]), dict):
        node[path[-1]] = kind or node.get(path[-1], "")


def _literal(node: Any) -> str:
    match node:
        case {"Value": bool()}:
            return "Bool"
        case {"Value": int()}:
            return "Long"
        case {"Value": str()}:
            return "String"
        case {"Set": [*_]}:
            return f"Set<{_element(node)}>"
    return ""


def _element(node: Any) -> str:
    match node:
        case {"Set": [first, *_]}:
            return _literal(first) or "String"
    return "String"


def _record(types: Mapping[str, Any]) -> str:
    members = (
        f"{json.dumps(name)}?: {_record(kind) if isinstance(kind, dict) else kind or 'String'}"
        for name, kind in types.items()
    )
    return f"{{{', '.join(members)}}}"
