"""webhook/core/compile.py: what a bundle is made of, what its policies read, and where they are wrong."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import bundle
from sidecar.core.cedar import CedarEngine
from sidecar.core.profile import Identity, Limit, Profile, Provider, Server, decode
from sidecar.core.projection import Projection
from tests.sidecar.questions import a_question, a_user
from webhook.core import compile as compiler
from webhook.core.compile import CEDAR_ENTITIES, Compiled, Data, Policies, files, opa_error
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


# --- Cedar ---


@pytest.mark.parametrize(
    ("condition", "paths"),
    [
        ("true", set()),
        ("context.args.x == 1", {"/tool/args/x", "/prompt/args/x"}),
        ("context.args has x", {"/tool/args/x", "/prompt/args/x"}),
        ("context.claims has y.z", {"/user/claims/y", "/user/claims/y/z"}),
        ('context.args["a/b"].c like "x*"', {"/tool/args/a~1b/c", "/prompt/args/a~1b/c"}),
        ("context.args == {a: 1}", {"/tool/args", "/prompt/args"}),
        ("context has args", {"/tool/args", "/prompt/args"}),
        ("[context.claims.role].contains(1)", {"/user/claims/role"}),
        ('(if context.agent.session == "x" then context.request else context.request).time > 1', {"/agent/session", "/request"}),
        ('context.elicitation.mode == "url"', {"/elicitation/mode"}),
        ("context.delegation.isEmpty()", {"/delegation"}),
        ("context.nothing.at.all", set()),
        ("context has nothing", set()),
    ],
)  # fmt: skip
def test_what_cedar_policies_read(condition: str, paths: set[str]) -> None:
    """Every mention of the context counts; entities are always made."""
    text = f"{PERMIT} forbid (principal, action, resource) when {{ {condition} }};"

    assert compiler.cedar({"a.cedar": text}).reads == {*CEDAR_ENTITIES, *paths}


@pytest.mark.parametrize(
    "condition",
    ["context == {}", '{"k": context}.k.args.x', "[context].contains(1)", "(if true then context else context).args"],
)
def test_a_context_used_as_a_value_proves_nothing(condition: str) -> None:
    """Then the whole document is handed over."""
    text = f"permit (principal, action, resource) when {{ {condition} }};"

    assert compiler.cedar({"a.cedar": text}).reads is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("permit (principal, action, resource) when { && };", (1, 45)),
        (f"{PERMIT}\npermit (princpal, action, resource);", (2, 9)),
        (
            f'{PERMIT}\n// permit (\npermit (principal, action == Action::"x y", resource)\nwhen {{\n  context.x. }};',
            (5, 14),
        ),
        ('permit (principal, action, resource) when { nosuch("x") };', (1, 45)),
        (f"{PERMIT}\npermit (principal,", (2, 19)),
        (f'{PERMIT}\nforbid (principal, action, resource) when {{ "open }};', (2, 45)),
        (f"{PERMIT}&", (1, 38)),
        ("é", (1, 1)),
    ],
)
def test_where_cedar_is_wrong(text: str, place: tuple[int, int]) -> None:
    """Line and column of what the message is about, though Cedar's parser names neither."""
    with pytest.raises(BadPolicy) as caught:
        compiler.cedar({"good.cedar": PERMIT, "bad.cedar": text})

    assert (caught.value.file, caught.value.line, caught.value.column) == ("bad.cedar", *place)


TEXT = """
permit (principal, action, resource) when { context.args has a && context.args.a == principal.role };
permit (principal, action, resource) when { context.args has b.c && context.args.b.c };
permit (principal, action, resource) when { context.args has d && !(context.args.d has e) && context.claims has f };
forbid (principal, action, resource) when { context.args has g && [context.args.g].contains(context.args.h) };
"""
CEDAR_VALUES = st.recursive(
    st.sampled_from([True, False, 1, "analyst"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ce"), inner),
    max_leaves=3,
)
MEMBERS = st.dictionaries(st.sampled_from("abcdefgh"), CEDAR_VALUES)


@given(MEMBERS, MEMBERS)
def test_projection_does_not_change_a_verdict(arguments: dict[str, Any], claims: dict[str, Any]) -> None:
    """What the policies do not read may be left out, errors included."""
    policies = {"a.cedar": TEXT}
    question = a_question("x", arguments, user=a_user(claims=claims))
    projection = Projection(compiler.cedar(policies).reads)

    whole, narrow = CedarEngine(policies), CedarEngine(policies, projection=projection)
    assert whole.decide(question) == narrow.decide(question)


def test_a_template_is_refused() -> None:
    """Nobody links it, so it would decide nothing."""
    with pytest.raises(BadPolicy, match=r"a\.cedar: a template"):
        compiler.cedar({"a.cedar": "permit (principal == ?principal, action, resource);"})


SCHEMA = """
entity Role; entity User in [Role]; entity Tool { name: String };
action "tools/call" appliesTo { principal: User, resource: Tool, context: { args: { destructive?: Bool } } };
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "forbid (principal, action, resource) when { context.args.destructive };",
            "optional attribute `args.destructive`",
        ),
        ('permit (principal in Rolle::"x", action, resource);', "unrecognized entity type `Rolle`"),
    ],
)
def test_policies_are_validated_against_a_schema(text: str, reason: str) -> None:
    """A forbid that could fail, or a type that does not exist, is refused where it is written."""
    with pytest.raises(BadPolicy, match=reason):
        compiler.cedar({"a.cedar": text}, SCHEMA)


def test_valid_policies_pass_the_schema() -> None:
    """Asking first is enough."""
    text = "forbid (principal, action, resource) when { context.args has destructive && context.args.destructive };"

    assert compiler.cedar({"a.cedar": text}, SCHEMA).reads


def test_a_bad_schema_is_refused() -> None:
    """And named as the culprit."""
    with pytest.raises(BadPolicy, match=r"schema\.cedarschema: "):
        compiler.cedar({"a.cedar": PERMIT}, "entity {")
