"""webhook/shell/opa.py against the real opa: what compiles, what is refused where, and what policies read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.core import bundle, profile
from sidecar.core.projection import Projection
from sidecar.core.rego import RegoEngine
from tests.parts import part
from tests.sidecar.questions import SERVER, a_question
from webhook.core.compile import Compiled, Data, Policies
from webhook.errors import BadPolicy
from webhook.shell import opa as opa_module
from webhook.shell.opa import Opa, Remembering, compiled, files

PROFILE = profile.Profile(server=SERVER)
ALLOW = "package mcp.authz\ndefault allow = false\n"


@pytest.fixture
def opa() -> Opa:
    """The real opa."""
    return Opa(part("opa"))


def rego(text: str, **data: Any) -> Policies:
    """Return policies of one Rego file."""
    return Policies(rego={"p.rego": text}, data=Data(data))


@pytest.mark.parametrize("default", ["default allow = false", "default allow := false"])
async def test_rules_compile_and_decide(opa: Opa, default: str) -> None:
    """Both spellings of the default load; no import is needed for `if` and `in`."""
    made = await files(
        [rego(f"package mcp.authz\n{default}\nallow if input.tool.name in data.tools", tools=["a"])], PROFILE, opa
    )
    engine = RegoEngine(made["policy.wasm"], data=made["data.json"])

    assert list(made) == ["data.json", "policy.wasm", "policy/p.rego", "sidegate.json"]
    assert [engine.decide(a_question(tool)).allowed for tool in "ab"] == [True, False]


async def test_reasons_become_an_entrypoint(opa: Opa) -> None:
    """When the rule is there, and only then."""
    text = ALLOW + 'allow if input.user\nreasons contains "a user" if allow'
    engine = RegoEngine((await opa.compile(rego(text))).wasm or b"")

    assert engine.decide(a_question()).policies == ("a user",)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        (ALLOW + "allow if {\n  foo(1)\n}", (4, 3), "undefined function foo"),
        (ALLOW + "allow if {{", (3, 11), "unexpected eof token"),
        (ALLOW + "allow { true }", (3, 1), "`if` keyword is required"),
        (ALLOW + 'allow if http.send({"url": "x", "method": "get"}).status_code == 200', (3, 10), "undefined function http.send"),
        (ALLOW + "allow if rand.intn(1, 2) == 1", (3, 10), "undefined function rand.intn"),
        (ALLOW + "allow if { x := 1; true }", (3, 12), "assigned var x unused"),
        ("package other\nallow := true", (0, 0), "there is no rule allow in package mcp.authz"),
    ],
)  # fmt: skip
async def test_what_does_not_compile_is_refused(opa: Opa, text: str, place: tuple[int, int], reason: str) -> None:
    """With file, line and column, strictly, and with the sidecar's own list of functions."""
    with pytest.raises(BadPolicy, match=reason) as caught:
        await opa.compile(rego(text))

    assert (caught.value.line, caught.value.column) == place
    assert caught.value.file == ("p.rego" if place[0] else "rego")


async def test_the_time_makes_policies_impure(opa: Opa) -> None:
    """Their verdicts are not remembered."""
    assert not (await opa.compile(rego(ALLOW + "allow if time.now_ns() > 1"))).is_pure
    assert not (await opa.compile(rego(ALLOW + "allow if [time.now_ns()][0] > 1"))).is_pure
    assert (await opa.compile(rego(ALLOW + "allow if input.time.now_ns"))).is_pure


@pytest.mark.parametrize(
    ("rule", "paths"),
    [
        ("allow if true", set()),
        ('allow if input.user.role == "a"', {"/user/role"}),
        ("allow if input.tool.args[_] == 1", {"/tool/args"}),
        ("allow if input.tool.args[0].x", {"/tool/args"}),
        ('allow if input["a/b"].c', {"/a~1b/c"}),
        ("allow if data.users[input.user.id]", {"/user/id"}),
        ("allow if not input.a.b", {"/a/b"}),
        ("allow if every x in input.a { x == input.b }", {"/a", "/b"}),
        ("allow if count([x | x := input.a[_]; x > input.b]) > 1", {"/a", "/b"}),
        ("allow if { true } else := input.c", {"/c"}),
        ('allow if $"{input.a}-{input.b.c}" == "x"', {"/a", "/b/c"}),
        ("f(x) if x.y\nallow if f(input.a)", {"/a"}),
        ("allow if f(input)\nf(x) if x.y", {""}),
        ("allow if { x := input; x.y }", {""}),
        ("allow if walk(input, [_, 1])", {""}),
        ('allow if object.get(input, ["a"], 1) == 1', {""}),
        ("allow if ok with input.z as input.user.email\nok if input.z == 1", {"/z", "/user/email"}),
        ('allow if ok with input as {"z": input.a}\nok if input.z == 1', {"", "/a", "/z"}),
    ],
)
async def test_what_rego_policies_read(opa: Opa, rule: str, paths: set[str]) -> None:
    """Every mention of the input counts, also where `opa deps` does not look: in the values of `with`."""
    assert (await opa.compile(rego(ALLOW + rule))).reads == paths


@pytest.mark.parametrize("imported", ["import input.user as u\nallow if u.role", "import input as i\nallow if i.user"])
async def test_imports_of_the_input_are_read(opa: Opa, imported: str) -> None:
    """An alias is a mention as well."""
    text = "package mcp.authz\n" + imported

    assert (await opa.compile(rego(text))).reads in ({"/user"}, {""})


RULES = (
    ALLOW
    + """
allow if { input.tool.args.a == input.user.role; not input.tool.args.b.c }
allow if { some k; input.tool.args.d[k] == "x"; not input.tool.args.b }
allow if ok with input.z as input.tool.args.e
ok if input.z == ["x"]
"""
)
VALUES = st.recursive(
    st.sampled_from([None, True, 1, "x", "analyst"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def both() -> Callable[[Any], tuple[Any, Any]]:
    """Return how one policy decides a question with the whole document, and with the projected one."""
    import asyncio  # noqa: PLC0415 - a fixture of the whole module cannot be async

    compiled = asyncio.run(Opa(part("opa")).compile(rego(RULES)))
    wasm = compiled.wasm or b""
    whole, narrow = RegoEngine(wasm), RegoEngine(wasm, projection=Projection(compiled.reads))
    return lambda question: (whole.decide(question), narrow.decide(question))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from("abcdefg"), VALUES))
def test_projection_does_not_change_a_verdict(
    both: Callable[[Any], tuple[Any, Any]], arguments: dict[str, Any]
) -> None:
    """What the policy does not read may be left out."""
    whole, narrow = both(a_question("x", arguments))

    assert whole == narrow


A, B = "input.tool.args.a", "input.tool.args.b"
SHAPES = {
    "call": (f'f if split({A}, "/")[1] == "etc"', {"a": "/etc"}),
    "call of a function": (f"g(x) := [x]\nf if g({A})[0] == 1", {"a": 1}),
    "nested call": (f'f if split(split({A}, ":")[1], "/")[1] == "etc"', {"a": "x:/etc"}),
    "call as an argument": (f'f if count(split({A}, "/")[1]) == 3', {"a": "/etc"}),
    "array": (f"f if [{A}][0] == 1", {"a": 1}),
    "array by a member": (f"f if [1, 2][{A}] == 2", {"a": 1}),
    "array of arrays": (f"f if [[{A}]][0][0] == 1", {"a": 1}),
    "object": (f'f if {{"d": {A}}}.d == 1', {"a": 1}),
    "key of an object": (f"f if {{{A}: 1}}.x == 1", {"a": "x"}),
    "set": (f"f if {{{A}}}[1]", {"a": 1}),
    "list comprehension": (f"f if [x | x := {A}[_]][0] == 1", {"a": [1]}),
    "set comprehension": (f"f if {{x | x := {A}[_]}}[1]", {"a": [1]}),
    "object comprehension": (f"f if {{k: v | v := {A}[k]}}.c == 1", {"a": {"c": 1}}),
    "call in a comprehension": (f'f if {{x | x := split({A}, "/")[_]}}.etc', {"a": "/etc"}),
    "some in": (f'f if {{ some x in split({A}, "/"); [x][0] == "etc" }}', {"a": "/etc"}),
    "some with a key": (f"f if {{ some k, v in [{A}][0]; k == v }}", {"a": {"c": "c"}}),
    "every": (f"f if every x in [{A}, {B}] {{ [x, {B}][0] == 1 }}", {"a": 1, "b": 1}),
    "with": (f"h if input.z == 1\nf if h with input.z as [{A}][0]", {"a": 1}),
    "with of data": (f'h if data.z == 1\nf if h with data.z as {{"d": {A}}}.d', {"a": 1}),
    "with of a function": (f"g(_) := 2\nh(_) := [{A}][0]\nk if g(1) == 1\nf if k with g as h", {"a": 1}),
    "else": (f"h := 2 if {B} == 1 else := [{A}][0]\nf if h == 1", {"a": 1}),
    "body of else": (f'h if {B} == 1 else if split({A}, "/")[1] == "etc"\nf if h', {"a": "/etc"}),
    "value of a function": (f'g(x) := [x, {A}][1]\nf if g({B}) == "y"', {"a": "y", "b": 1}),
    "value of a rule": (f"h := [{A}][0]\nf if h == 1", {"a": 1}),
    "key of a rule": (f"h contains [{A}][0]\nf if h[1]", {"a": 1}),
    "name of a rule": (f"h[[{A}][0]] := 1\nf if h.x == 1", {"a": "x"}),
    "index": (f'f if data.mcp.authz.t[split({A}, "/")[1]]\nt := {{"etc": true}}', {"a": "/etc"}),
    "negation": (f'f if not [{A}][0] == "harmless"', {"a": 1}),
    "template": (f'f if $"{{[{A}][0]}}" == "1"', {"a": 1}),
    "import": ("import input.tool.args as i\nf if [i.a][0] == 1", {"a": 1}),
}


@pytest.mark.parametrize(("rules", "forbidden"), SHAPES.values(), ids=SHAPES)
async def test_no_shape_of_a_reference_hides_what_a_rule_reads(opa: Opa, rules: str, forbidden: dict[str, Any]) -> None:
    """A rule that denies must not fall away because the projection left out what it looks at."""
    compiled = await opa.compile(rego(f"package mcp.authz\n{rules}\ndefault allow := false\nallow if not f"))
    wasm = compiled.wasm or b""
    whole, narrow = RegoEngine(wasm), RegoEngine(wasm, projection=Projection(compiled.reads))

    for arguments, is_allowed in ((forbidden, False), ({"a": "harmless", "b": 0}, True)):
        question = a_question("x", {**arguments, "unread": 1})
        assert whole.decide(question) == narrow.decide(question)
        assert narrow.decide(question).allowed is is_allowed


async def test_tests_are_run(opa: Opa) -> None:
    """A policy's own tests, one record each."""
    policies = rego(ALLOW + 'allow if input.user.role == "a"')
    holds = "if data.mcp.authz.allow with input.user.role as"
    tests = {"p_test.rego": f'package mcp.authz_test\ntest_a {holds} "a"\ntest_b {holds} "b"\n'}
    results = await opa.test(policies, tests)

    assert {each["name"]: each.get("fail", False) for each in results} == {"test_a": False, "test_b": True}


async def test_no_tests_are_no_results(opa: Opa) -> None:
    """An empty answer is an empty list."""
    assert await opa.test(rego(ALLOW), {}) == []


async def test_without_rego_there_is_no_module(opa: Opa) -> None:
    """Cedar alone is checked and packed; opa has nothing to do."""
    made = await files([Policies(cedar={"p.cedar": "permit (principal, action, resource);"})], PROFILE, opa)

    assert list(made) == ["cedar/p.cedar", "sidegate.json"]


async def test_a_run_ends_at_its_deadline(tmp_path: Path) -> None:
    """A compiler that hangs is killed."""
    program = tmp_path / "opa"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)

    with pytest.raises(BadPolicy, match=r"opa capabilities took longer than 0\.2 s"):
        await Opa(program, deadline_s=0.2).compile(rego(ALLOW))


async def test_a_policy_is_compiled_once_for_all_workloads(opa: Opa, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again only when it has changed; the oldest are forgotten."""
    monkeypatch.setattr(opa_module, "MAX_REMEMBERED", 2)
    asked: list[Policies] = []

    async def counted(policies: Policies, program: Opa) -> list[Compiled]:
        asked.append(policies)
        return await compiled(policies, program)

    monkeypatch.setattr(opa_module, "compiled", counted)
    remembering = Remembering(opa)
    first, second, third = (
        Policies(cedar={"p.cedar": f'permit (principal, action, resource == Tool::"s/{n}");'}) for n in range(3)
    )
    made = [await remembering.files([each], PROFILE) for each in (first, first, second, first, third, second)]

    assert asked == [first, second, third, second]
    assert made[0] == made[1] == await files([first], PROFILE, opa)
    with pytest.raises(BadPolicy):
        await remembering.files([Policies(cedar={"p.cedar": "permit"})], PROFILE)
    with pytest.raises(BadPolicy):
        await remembering.files([Policies(cedar={"p.cedar": "permit"})], PROFILE)


async def test_the_committed_example_is_what_its_policies_make(opa: Opa) -> None:
    """The signed bundle that `make demo` uses can be made again, byte for byte."""
    from examples.article.build import HERE, build  # noqa: PLC0415 - a script beside the packages

    assert await build(str(opa.path)) == (HERE / "bundle.tar.gz").read_bytes()


async def test_the_examples_own_tests_pass(opa: Opa) -> None:
    """The policy author's tests of the article's rules."""
    from examples.article.build import HERE, policies  # noqa: PLC0415 - same

    results = await opa.test(policies(), {"article_test.rego": (HERE / "rego" / "article_test.rego").read_text()})
    assert [each.get("fail", False) for each in results] == [False] * 5


async def test_a_bundle_of_both_languages_is_loaded_by_the_sidecar(opa: Opa) -> None:
    """What is compiled here is what the sidecar reads."""
    key = bundle.ec.generate_private_key(bundle.ec.SECP256R1())
    policies = Policies(rego={"p.rego": ALLOW}, cedar={"p.cedar": "permit (principal, action, resource);"})
    read = bundle.decode(bundle.encode(await files([policies], PROFILE, opa), key), [key.public_key()])

    assert (read.profile.policies[0].cedar, read.profile.policies[0].rego) == (True, True)
