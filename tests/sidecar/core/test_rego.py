"""sidecar/core/rego.py: what policy.wasm answers, and that everything but a clean true is a denial."""

from pathlib import Path
from typing import Any

import pytest
import wasmtime

from sidecar.core import builtins, rego
from sidecar.core.claims import User
from sidecar.core.projection import Projection
from sidecar.core.rego import RegoEngine
from sidecar.errors import BundleError
from tests.sidecar.questions import a_question, a_user, policy_wasm

DEFAULT = "package mcp.authz\ndefault allow := false\n"
ROLE = DEFAULT + 'allow if input.user.role == "analyst"\n'
REASONS = ROLE + 'reasons contains "because of the role" if allow\nreasons contains "not an analyst" if not allow\n'
SLOW = (
    DEFAULT
    + "allow if { some i in input.tool.args.l; some j in input.tool.args.l; some k in input.tool.args.l; i + j + k == -1 }\n"
)
BOTH = ("mcp/authz/allow", "mcp/authz/reasons")


def test_a_rule_that_holds_allows() -> None:
    """A clean true allows, in the name of the rule."""
    verdict = RegoEngine(policy_wasm(ROLE)).decide(a_question(role="analyst"))

    assert verdict.allowed
    assert verdict.policies == ("data.mcp.authz.allow",)
    assert verdict.errors == ()


def test_no_rule_that_holds_denies() -> None:
    """The default is a denial without error."""
    verdict = RegoEngine(policy_wasm(ROLE)).decide(a_question(role="engineer"))

    assert not verdict.allowed
    assert (verdict.policies, verdict.errors) == ((), ())


@pytest.mark.parametrize("value", ["1", '"true"', "{}", "null", "[true]", '{"allow": true}'])
def test_anything_but_true_denies(value: str) -> None:
    """Rego's rules have any value; only true allows, and 1 is not true."""
    assert not RegoEngine(policy_wasm(f"package mcp.authz\nallow := {value}\n")).decide(a_question()).allowed


def test_undefined_denies() -> None:
    """Without a default, no rule that holds means undefined."""
    assert not RegoEngine(policy_wasm("package mcp.authz\nallow if input.nobody\n")).decide(a_question()).allowed


def test_a_conflict_of_rules_denies() -> None:
    """Two complete rules with different values abort the evaluation, and the instance is made anew."""
    engine = RegoEngine(
        policy_wasm('package mcp.authz\nallow := true if input.user\nallow := false if input.tool.name == "x"\n')
    )

    verdict = engine.decide(a_question("x"))
    assert not verdict.allowed
    assert "assignment conflict" in verdict.errors[0]
    assert engine.decide(a_question("y")).allowed


def test_reasons_are_named_whatever_the_verdict() -> None:
    """The optional rule `reasons` says why; its strings become the policies of the verdict."""
    engine = RegoEngine(policy_wasm(REASONS, *BOTH))

    assert engine.decide(a_question(role="analyst")).policies == ("because of the role",)
    assert engine.decide(a_question(role="engineer")).policies == ("not an analyst",)


def test_reasons_that_are_no_collection_are_left_out() -> None:
    """A badly shaped explanation does not change the verdict."""
    engine = RegoEngine(policy_wasm(ROLE + "reasons := 1 if true\n", *BOTH))

    assert engine.decide(a_question()).policies == ("data.mcp.authz.allow",)


def test_data_is_seen_by_rules_and_stays_between_decisions() -> None:
    """data.json is loaded once; a decision does not disturb the next."""
    wasm = policy_wasm(DEFAULT + "allow if data.tools[_] == input.tool.name\n")
    engine = RegoEngine(wasm, data=b'{"tools": ["a", "b"]}')

    assert [engine.decide(a_question(tool)).allowed for tool in ("a", "c", "b", "c", "a")] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_an_endless_policy_spends_its_fuel_and_denies() -> None:
    """A decision is bounded by instructions, so its verdict does not depend on how busy the machine is."""
    engine = RegoEngine(policy_wasm(SLOW), fuel=2_000_000)

    verdict = engine.decide(a_question("x", {"l": list(range(200))}))
    assert not verdict.allowed
    assert verdict.errors == ("rego: spent all its fuel",)
    assert engine.decide(a_question("x", {"l": []})).errors == ()


HOSTILE = {
    "a loop in a loop in a loop": (
        "some i in numbers.range(1, 2000); some j in numbers.range(1, 2000); some k in numbers.range(1, 2000)\n"
        "  i + j + k == -1"
    ),
    "a range of a thousand million": "count(numbers.range(1, 1000000000)) == 5",
    "a range in steps": "count(numbers.range_step(1, 1000000000, 2)) == 5",
    "a text that grows": 'count(concat("", [input.tool.args.text | some _ in numbers.range(1, 100000)])) == 1',
    "a function of ours in a loop": 'some i in numbers.range(1, 100000); sprintf("%d", [i]) == "x"',
    "our regular expressions in a loop": 'some i in numbers.range(1, 100000); regex.replace(input.tool.args.text, "(a+)+b", "") == "x"',
    "every member of everything": "some i in numbers.range(1, 1000); walk(input.tool.args, [path, value]); path == value",
    "a network with all its addresses": 'count(net.cidr_expand("10.0.0.0/8")) == 5',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_policy_is_stopped_and_the_next_call_served(name: str) -> None:
    """By fuel, memory or what a function may take; then another call is decided as if nothing had been."""
    body = f'allow if {{\n  input.tool.name == "bad"\n  {HOSTILE[name]}\n}}\nallow if input.tool.name == "good"\n'
    engine = RegoEngine(policy_wasm(DEFAULT + body))
    arguments = {"text": "a" * 50_000, "list": list(range(1000))}

    verdict = engine.decide(a_question("bad", arguments))
    assert not verdict.allowed
    assert verdict.errors != ()
    assert engine.decide(a_question("good", arguments)).allowed


@pytest.mark.parametrize(
    "call",
    [
        'regex.match("^(a+)+$", {})',
        'regex.replace({}, "^(a+)+$", "x") == "x"',
        'count(regex.find_n("(a|a)*b", {}, -1)) == 1',
    ],
)
def test_a_catastrophic_regular_expression_is_none(call: str) -> None:
    """RE2 has no backtracking: 50,000 letters and a wrong one at the end are looked at once."""
    engine = RegoEngine(policy_wasm(DEFAULT + f"allow if {call.format('input.tool.args.text')}\n"))

    verdict = engine.decide(a_question("x", {"text": "a" * 50_000 + "!"}))
    assert (verdict.allowed, verdict.errors) == (False, ())


def test_nesting_beyond_what_a_message_may_have_is_stopped() -> None:
    """The parser in the module has its own stack."""
    engine = RegoEngine(policy_wasm(DEFAULT + 'allow if input.tool.name == "good"\n'))
    deep: Any = 1
    for _ in range(200):
        deep = [deep]

    assert not engine.decide(a_question("bad", {"x": deep})).allowed
    assert engine.decide(a_question("good", {"x": [[1]]})).allowed


def used() -> tuple[Any, Any]:
    """Return the instances of an engine that failed once and is gone."""
    engine = RegoEngine(policy_wasm(SLOW), fuel=2_000_000)
    first = engine._instance
    engine.decide(a_question("x", {"l": list(range(200))}))
    engine.decide(a_question("x", {"l": []}))
    return first, engine._instance


def test_an_instance_that_was_thrown_away_gives_its_memory_back() -> None:
    """At once: neither a caller who makes a policy fail nor a bundle that is replaced may fill the memory."""
    first, second = used()

    assert first is not second
    for instance in (first, second):
        with pytest.raises(ValueError, match="closed"):
            instance._store.ptr()


def test_a_policy_that_takes_too_much_memory_denies() -> None:
    """Memory is bounded; the next decision has it all again."""
    engine = RegoEngine(
        policy_wasm(DEFAULT + "allow if count(numbers.range(1, input.tool.args.n)) > 1\n"), memory_bytes=2**22
    )

    assert engine.decide(a_question("x", {"n": 10_000_000})).errors != ()
    assert engine.decide(a_question("x", {"n": 5})).allowed


def test_an_input_that_does_not_fit_denies() -> None:
    """Arguments larger than the memory are a denial with an error, not a crash."""
    engine = RegoEngine(policy_wasm(ROLE), memory_bytes=2**20)

    verdict = engine.decide(a_question("x", {"text": "x" * 2**20}))
    assert not verdict.allowed
    assert "memory" in verdict.errors[0]


def test_a_large_input_is_decided_and_its_memory_given_back() -> None:
    """An instance that grew far beyond its data is not kept: WebAssembly's memory never shrinks."""
    engine = RegoEngine(policy_wasm(ROLE))

    assert engine.decide(a_question("x", {"text": "x" * (rego.KEPT_BYTES + 1)})).allowed
    assert engine._instance is None
    assert engine.decide(a_question("x")).allowed
    assert engine._instance is not None


def test_integers_beyond_64_bits_are_decided() -> None:
    """Rego's numbers have no bounds."""
    engine = RegoEngine(policy_wasm(DEFAULT + "allow if input.tool.args.n > 18446744073709551615\n"))

    assert engine.decide(a_question("x", {"n": 2**64})).allowed


@pytest.mark.parametrize("claims", [{"x": float("nan"), "n": 2**70}, {"x": "\ud800", "n": 2**70}])
def test_what_is_not_json_denies(claims: dict[str, object]) -> None:
    """A value that JSON has not is never handed over."""
    user: User = a_user(claims=claims)

    verdict = RegoEngine(policy_wasm(ROLE)).decide(a_question(user=user))
    assert not verdict.allowed
    assert verdict.errors[0].startswith("rego: the input is not JSON")


def test_only_what_is_projected_is_handed_over() -> None:
    """A member outside the projection is undefined to the policy."""
    engine = RegoEngine(
        policy_wasm(DEFAULT + "allow if input.tool.args.a == 1\n"), projection=Projection(["/tool/name"])
    )

    assert not engine.decide(a_question("x", {"a": 1})).allowed


def test_the_time_is_the_questions() -> None:
    """time.now_ns() is when the question was asked, not when the machine got to it."""
    engine = RegoEngine(policy_wasm(DEFAULT + "allow if time.now_ns() == 42\n"))

    assert engine.decide(a_question(time_ns=42)).allowed
    assert not engine.decide(a_question(time_ns=43)).allowed


def test_a_builtin_in_python_answers() -> None:
    """Sprintf is ours; its answer comes back into the policy."""
    engine = RegoEngine(policy_wasm(DEFAULT + 'allow if sprintf("%s-%d", [input.tool.name, 7]) == "x-7"\n'))

    assert engine.decide(a_question("x")).allowed
    assert not engine.decide(a_question("y")).allowed


def test_an_undefined_builtin_makes_the_rule_undefined() -> None:
    """As in OPA: a function without value does not hold, and is no error."""
    engine = RegoEngine(policy_wasm(DEFAULT + 'allow if units.parse(input.tool.name) != ""\n'))

    verdict = engine.decide(a_question("x"))
    assert (verdict.allowed, verdict.errors) == (False, ())


def test_a_builtin_that_does_not_know_denies_the_decision() -> None:
    """Undefined would turn `not` into a permit: what we cannot answer as OPA does ends the whole decision."""
    engine = RegoEngine(policy_wasm(DEFAULT + 'allow if not startswith(sprintf(input.tool.args.t, [1]), "x")\n'))

    verdict = engine.decide(a_question("x", {"t": "%*d"}))
    assert not verdict.allowed
    assert verdict.errors == ("rego: a built-in function cannot answer: sprintf with '%*'",)
    assert engine.decide(a_question("x", {"t": "%d"})).allowed


def test_a_defect_of_a_builtin_denies_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a function of ours fails with, nothing is allowed for it."""
    monkeypatch.setattr(builtins, "find", lambda _: lambda *_: {}["x"])

    verdict = RegoEngine(policy_wasm(DEFAULT + "allow if not semver.is_valid(input.tool.name)\n")).decide(a_question())
    assert verdict.errors == ("rego: a built-in function failed: KeyError",)


def test_a_builtin_in_python_spends_fuel() -> None:
    """Time spent outside the module counts as well, or a loop over a builtin would have no deadline."""
    text = DEFAULT + 'allow if { some i in input.tool.args.l; sprintf("%d", [i]) == "x" }\n'
    engine = RegoEngine(policy_wasm(text), fuel=rego.CALL_FUEL * 10)

    assert engine.decide(a_question("x", {"l": [1, 2]})).errors == ()
    assert engine.decide(a_question("x", {"l": list(range(20))})).errors == ("rego: spent all its fuel",)


def test_a_builtin_that_is_not_here_is_refused_when_loading() -> None:
    """A gap is found before the first call, and named."""
    wasm = policy_wasm(DEFAULT + "allow if yaml.is_valid(input.tool.name)\n")

    with pytest.raises(BundleError, match=r"built-in functions that are not here: yaml\.is_valid"):
        RegoEngine(wasm)


def test_a_module_without_the_entrypoint_is_refused() -> None:
    """Another entrypoint decides nothing here."""
    wasm = policy_wasm("package other\nallow := true\n", "other/allow")

    with pytest.raises(BundleError, match="has no entrypoint mcp/authz/allow"):
        RegoEngine(wasm)


VERSION = '(global (export "opa_wasm_abi_version") i32 (i32.const 1))'
MINOR = '(global (export "opa_wasm_abi_minor_version") i32 (i32.const 3))'
TABLE = """(func (export "entrypoints") (result i32) (i32.const 0))
  (func (export "opa_json_dump") (param i32) (result i32) (i32.const AT))"""
FULL = f'(data (i32.const 0) "{"x" * 131072}")'
MEMORY = '(import "env" "memory" (memory 2))'


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((), "cannot be loaded"),
        (('(import "env" "nothing" (func))',), "cannot be loaded: .*nothing"),
        ((VERSION.replace("const 1", "const 2"), MINOR), r"its ABI is 2\.3, expected 1\.2"),
        ((VERSION, '(func (export "opa_wasm_abi_minor_version"))'), r"its ABI is 1\.0"),
        ((VERSION, MINOR, '(global (export "entrypoints") i32 (i32.const 3))'), "entrypoints is no function"),
        ((MEMORY, VERSION, MINOR, TABLE.replace("AT", "0")), "a text outside the memory"),
        ((MEMORY, VERSION, MINOR, TABLE.replace("AT", "131072")), "a text outside the memory"),
        ((MEMORY, VERSION, MINOR, TABLE.replace("AT", "9"), FULL), "a text outside the memory"),
        ((MEMORY, VERSION, MINOR, TABLE.replace("AT", "9")), "cannot be loaded"),
    ],
)
def test_a_module_that_is_not_opas_is_refused(parts: tuple[str, ...], reason: str) -> None:
    """Whatever is no policy of OPA's compiler is refused when loading, and no read leaves the module's memory."""
    with pytest.raises(BundleError, match=reason):
        RegoEngine(bytes(wasmtime.wat2wasm(f"(module {' '.join(parts)})")))


def test_bytes_that_are_no_module_are_refused() -> None:
    """Foreign bytes do not compile."""
    with pytest.raises(BundleError, match=r"policy\.wasm: does not compile"):
        RegoEngine(b"\0asm nonsense")


def test_data_that_is_not_json_is_refused() -> None:
    """data.json is read when loading."""
    with pytest.raises(BundleError, match=r"data\.json is not JSON"):
        RegoEngine(policy_wasm(ROLE), data=b"{nonsense")


def test_a_compiled_module_decides_the_same(tmp_path: Path) -> None:
    """What a child compiled is mapped from its file, and answers like the original."""
    wasm = policy_wasm(ROLE)
    compiled = tmp_path / "policy.cwasm"
    compiled.write_bytes(rego.compile(wasm))

    engine = RegoEngine(wasm, compiled=str(compiled))
    compiled.unlink()
    assert engine.decide(a_question(role="analyst")).allowed
    assert not engine.decide(a_question(role="engineer")).allowed


def test_a_compiled_module_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A file that is no compiled module of this machine is refused."""
    (tmp_path / "policy.cwasm").write_bytes(b"nonsense")

    with pytest.raises(BundleError, match="its compiled form is not of this machine"):
        RegoEngine(policy_wasm(ROLE), compiled=str(tmp_path / "policy.cwasm"))


@pytest.mark.parametrize("rego_text", [ROLE, REASONS.replace("reasons", "reasons"), SLOW])
def test_the_fast_call_and_the_plain_call_agree(rego_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way around the package's slow call gives the same verdicts: the guard for a new version of it."""
    questions = [a_question("x", {"l": list(range(40))}, role=role) for role in ("analyst", "engineer")]
    fast = [RegoEngine(policy_wasm(rego_text), fuel=300_000).decide(question) for question in questions]

    monkeypatch.delattr(rego.ffi, "wasmtime_func_call_unchecked")
    plain = [RegoEngine(policy_wasm(rego_text), fuel=300_000).decide(question) for question in questions]

    assert fast == plain


@pytest.mark.parametrize("unchecked", [True, False])
def test_an_abort_of_the_module_denies(unchecked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the module gives up, by either way of calling it, that is a denial and a new instance."""
    if not unchecked:
        monkeypatch.delattr(rego.ffi, "wasmtime_func_call_unchecked")
    engine = RegoEngine(policy_wasm(ROLE))
    assert engine._instance is not None
    engine._instance.entrypoints["mcp/authz/allow"] = 99

    verdict = engine.decide(a_question())
    assert not verdict.allowed
    assert verdict.errors != ()
    assert engine.decide(a_question()).allowed
