"""webhook/core/compile.py: what a bundle is made of, what its policies read, and where they are wrong."""

import json
from typing import Any

import msgspec
import pytest

from sidecar.core import bundle
from sidecar.core.profile import Identity, Limit, Profile, Provider, Server, decode
from webhook.core import compile as compiler
from webhook.core.compile import Compiled, Data, Policies, files, opa_error
from webhook.errors import BadPolicy

PROFILE = Profile(server=Server(namespace="n", workload="w", name="s", port=1))
PERMIT = "permit (principal, action, resource);"


def announced(*compiled: Compiled, policies: Policies | None = None) -> Any:
    """Return what the profile in the bundle says of its policies."""
    return decode(files([policies or Policies()], PROFILE, [compiled])["sidegate.json"]).policies[0]


def test_the_files_of_a_bundle_in_order() -> None:
    """Both languages, the schema, the data, the module and the profile, sorted by name."""
    policies = Policies(
        cedar={"b.cedar": PERMIT}, rego={"a.rego": "package x"}, data=Data({"k": 1}), schema="entity User;"
    )
    made = files([policies], PROFILE, [[Compiled(reads=frozenset(), wasm=b"wasm")]])

    assert list(made) == [
        "cedar/b.cedar",
        "cedar/schema.cedarschema",
        "data.json",
        "policy.wasm",
        "policy/a.rego",
        "sidegate.json",
    ]
    assert (made["data.json"], made["policy.wasm"], made["policy/a.rego"]) == (b'{"k":1}', b"wasm", b"package x")


def test_data_as_the_control_plane_writes_it_is_canonical() -> None:
    """Else nothing would be saved."""
    content = {"b": [1, 1.5, True, None, -3], "a": {"é\n\x01\x7f": '<x>&"'}}

    assert bundle._is_canonical(Data(content).text)
    assert not bundle._is_canonical(Data({"a": "\u2028"}).text)
    assert not bundle._is_canonical(b'{"b":1,"a":2}')
    assert not bundle._is_canonical(b'{"a":1.50}')
    assert not bundle._is_canonical(b"[" * 100_000)


def test_without_policies_the_bundle_is_the_profile() -> None:
    """Data without Rego and a schema without Cedar are nobody's."""
    assert list(files([Policies(data=Data({"k": 1}), schema="x")], PROFILE, [[]])) == ["sidegate.json"]


def test_engines_are_announced() -> None:
    """The sidecar enforces what is announced and refuses what is not."""
    made = announced(policies=Policies(cedar={"a.cedar": PERMIT}))

    assert (made.cedar, made.rego, made.pure, made.reads) == (True, False, True, ())


def test_reads_of_both_engines_are_joined() -> None:
    """One projection serves both."""
    made = announced(Compiled(reads=frozenset({"/b"})), Compiled(reads=frozenset({"/a"})))

    assert (made.reads, made.pure) == (("/a", "/b"), True)


@pytest.mark.parametrize(
    "compiled",
    [
        Compiled(reads=None),
        Compiled(reads=frozenset({"/a"}), is_pure=False),
        Compiled(reads=frozenset({"/request"})),
        Compiled(reads=frozenset({"/request/time"})),
        Compiled(reads=frozenset({"/request/trace_id/x"})),
        Compiled(reads=frozenset({""})),
    ],
)
def test_what_differs_from_call_to_call_is_not_remembered(compiled: Compiled) -> None:
    """Unproven reads, impure functions, the time and the trace."""
    assert not announced(compiled).pure


def test_a_member_whose_name_starts_alike_is_another() -> None:
    """Paths are compared by whole names."""
    assert announced(Compiled(reads=frozenset({"/request/timezone"}))).pure


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"limits": (Limit(name="l", rate_per_s=1e-7, burst=1),)}, r"bundle: .*>= 1e-06.*limits"),
        (
            {"limits": (Limit(name="l", rate_per_s=float("inf"), burst=1),)},
            "bundle: .*ratePerSecond and burst go together.*limits",
        ),
        ({"providers": (Provider(name="p", issuer="http://", audiences=("a",)),)}, "bundle: .*issuer"),
    ],
)
def test_a_profile_that_no_sidecar_accepts_is_not_published(changes: dict[str, Any], reason: str) -> None:
    """It would be refused in every pod instead, after it had been signed."""
    limits, identity = changes.get("limits", ()), Identity(providers=changes.get("providers", ()))

    with pytest.raises(BadPolicy, match=reason):
        files([], msgspec.structs.replace(PROFILE, limits=limits, identity=identity), [])


def test_capabilities_hold_what_the_sidecar_can_run() -> None:
    """The rest is refused by opa where it is written; nothing fetches anything."""
    current = {
        "builtins": [{"name": name} for name in ("eq", "sprintf", "http.send", "time.now_ns", "io.jwt.decode")],
        "features": ["x"],
    }
    kept = json.loads(compiler.capabilities(json.dumps(current).encode()))

    assert [each["name"] for each in kept["builtins"]] == ["eq", "sprintf", "time.now_ns"]
    assert (kept["features"], kept["allow_net"]) == (["x"], [])


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            b'{"errors": [{"message": "m", "location": {"file": "policy/a.rego", "row": 3, "col": 5}}]}',
            ("a.rego", 3, 5, "m"),
        ),
        (b'{"errors": [{"message": "m"}, {}]}', ("rego", 0, 0, "m (and 1 more)")),
        (b"error: no rule\nusage", ("rego", 0, 0, "no rule")),
        (b"", ("rego", 0, 0, "opa failed without a word")),
        (b'{"errors": []}', ("rego", 0, 0, '{"errors": []}')),
    ],
)
def test_opas_errors_are_read(output: bytes, expected: tuple[str, int, int, str]) -> None:
    """With file, line and column where opa says them."""
    error = opa_error(output)

    assert (error.file, error.line, error.column, error.message) == expected


# --- Rego: syntax trees as `opa parse` prints them; what it really prints is in tests/webhook/shell/test_opa.py ---


def ref(*terms: Any) -> dict[str, Any]:
    """Return a reference: the first term is a variable, other strings are constants, records are themselves."""
    value = [{"type": "string", "value": term} if isinstance(term, str) else term for term in terms]
    return {"type": "ref", "value": [{"type": "var", "value": terms[0]}, *value[1:]]}


def headed(head: dict[str, Any], *terms: Any) -> dict[str, Any]:
    """Return a reference into what *head*, no variable, stands for."""
    return {"type": "ref", "value": [head, *ref("_", *terms)["value"][1:]]}


def module(*nodes: Any, package: tuple[str, ...] = ("mcp", "authz"), rule: str = "allow") -> dict[str, Any]:
    """Return a module of one rule with *nodes* in its body."""
    return {
        "package": {"path": ref("data", *package)["value"]},
        "rules": [{"head": {"ref": ref(rule)["value"]}, "body": list(nodes)}],
    }


@pytest.mark.parametrize(
    ("node", "paths"),
    [
        (ref("input", "user", "role"), {"/user/role"}),
        (ref("input", "args", {"type": "var", "value": "k"}, "x"), {"/args"}),
        (ref("input", "args", {"type": "number", "value": 0}), {"/args"}),
        (ref("data", "users", ref("input", "user", "id")), {"/user/id"}),
        ({"type": "var", "value": "input"}, {""}),
        (ref("input"), {""}),
        (headed({"type": "call", "value": [ref("split"), ref("input", "a")]}, "x"), {"/a"}),
        (headed({"type": "array", "value": [ref("input", "a")]}, ref("input", "b")), {"/a", "/b"}),
        (headed(headed({"type": "set", "value": [ref("input", "a")]})), {"/a"}),
        (ref("data", "input", "x"), set()),
        ({"type": "string", "value": "input"}, set()),
    ],
)
def test_every_mention_of_the_input_is_read(node: Any, paths: set[str]) -> None:
    """Up to the first member that is not a constant string; `input` is only ever a variable."""
    assert compiler.rego_reads([module({"terms": [node]})]) == paths


def test_impure_functions_are_mentions_too() -> None:
    """A call is a reference by the function's name."""
    assert not compiler.is_pure([module({"type": "call", "value": [ref("time", "now_ns")]})])
    assert not compiler.is_pure([module(headed({"type": "call", "value": [ref("time", "now_ns")]}))])
    assert compiler.is_pure([module(ref("input", "time", "now_ns"), ref("time", "clock"))])


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([module()], ("mcp/authz/allow",)),
        ([module(), module(rule="reasons")], ("mcp/authz/allow", "mcp/authz/reasons")),
        ([module(), module(rule="reasons", package=("other",))], ("mcp/authz/allow",)),
        ([{"package": {"path": ref("data", "mcp", "authz")["value"]}}], ("mcp/authz/allow",)),
    ],
)
def test_reasons_are_an_entrypoint_where_they_are_a_rule(modules: list[Any], expected: tuple[str, ...]) -> None:
    """OPA refuses an entrypoint that is no rule."""
    assert compiler.entrypoints(modules) == expected
