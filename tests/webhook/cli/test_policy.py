"""`sidegate policy …` as a user meets it, wrong input included: what it prints, where, and its exit status."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.parts import part
from webhook.cli.__main__ import main

ARTICLE = Path(__file__).parents[3] / "examples" / "article"
PERMIT = "permit (principal, action, resource);\n"
REGO = "package mcp.authz\n\ndefault allow := false\n\n"
Said = tuple[int, str, str]
Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb; give status, standard output and standard error."""

    def perform(*arguments: object) -> Said:
        status = main(["policy", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return perform


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write files into a directory; give it."""

    def perform(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return tmp_path

    return perform


def opa() -> tuple[str, str]:
    """Return the option that names the real opa."""
    return "--opa", str(part("opa"))


# --- check ---


def test_the_example_is_clean(run: Run) -> None:
    """Nothing to say of it."""
    assert run("check", ARTICLE, *opa()) == (0, "2 files, 0 errors, 0 warnings\n", "")


def test_a_field_that_there_is_not_is_found_in_both_languages(run: Run, write: Callable[..., Path]) -> None:
    """With its place, and the fields that there are."""
    cedar = 'permit (principal, action == Action::"tools/call", resource) when { resource.nam == "x" };'
    where = write(a__cedar=cedar, b__rego=REGO + 'allow if input.user.rol == "x"\n')

    status, out, _ = run("check", where, *opa())

    assert status == 1
    assert out == (
        "a.cedar:1:78: error: attribute `nam` on entity type `Tool` not found\n"
        "  hint: the fields are in docs/reference/policy-input.md\n"
        "b.rego:5:10: error: undefined ref: input.user.rol\n"
        "  hint: one of claims, email, groups, id, issuer, role, roles\n"
        "2 files, 2 errors, 0 warnings\n"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'forbid (principal, action == Action::"tools/call", resource) when { context.args.destructive };',
            "a.cedar:1:82: error: fails whenever args.destructive is absent, and a failing policy denies\n  hint: ask",
        ),
        (
            'permit (principal, action == Action::"tools/call", resource) when { principal.role == "x" };',
            "  hint: ask first: principal is User && …",
        ),
        (
            'permit (principal, action == Action::"call", resource);',
            'a.cedar:1:20: error: unrecognized action `Action::"call"`\n  hint: one of tools/call, prompts/get, resources/read',
        ),
        (
            'permit (principal in Server::"x", action, resource);',
            "a.cedar:1:1: error: never matches: unable to find an applicable action",
        ),
        (
            'permit (principal, action, resource)\nwhen { resource.name == "a" && resource.name == "b" };',
            "a.cedar:1:1: error: never matches: the same field is both 'a' and 'b'",
        ),
        (
            PERMIT + '@id("more")\npermit (principal in Role::"x", action, resource);',
            "a.cedar:2:1: warning: more adds nothing: a.cedar#0 says the same and more",
        ),
        (
            PERMIT + "forbid (principal, action, resource);",
            "a.cedar:1:1: warning: a.cedar#0 adds nothing: a.cedar#1 forbids all that it permits",
        ),
    ],
)
def test_what_is_wrong_with_cedar_is_said(run: Run, write: Callable[..., Path], text: str, said: str) -> None:
    """Rules that fail, never match or add nothing, each with its place and a hint."""
    status, out, _ = run("check", write(a__cedar=text))

    assert said in out
    assert status == (0 if "warning" in said else 1)


def test_arguments_have_the_types_that_policies_take_them_for(run: Run, write: Callable[..., Path]) -> None:
    """Nested, of every kind, asked for with `has`: nothing to say."""
    text = (
        'permit (principal, action == Action::"tools/call", resource) when { context.args has a && context.args.a > 5 };\n'
        'permit (principal, action == Action::"tools/call", resource) when { context.args has b && context.args.b has c'
        ' && context.args.b.c like "x*" };\n'
        'permit (principal, action == Action::"tools/call", resource) when { context.args has d && !context.args.d };\n'
        'permit (principal, action == Action::"tools/call", resource) when { context.args has e'
        ' && context.args.e.contains("x") && ["a", "b"].contains(context.args.e2) };\n'
        'permit (principal, action == Action::"tools/call", resource) when {'
        " context.claims has t && [1, 2].containsAll(context.claims.t) };\n"
    )

    _, out, _ = run("check", write(a__cedar=text))

    assert "args.e2 is absent" in out
    assert out.endswith("1 files, 1 errors, 0 warnings\n")


def test_what_is_wrong_with_rego_is_said(run: Run, write: Callable[..., Path]) -> None:
    """A comparison that never holds, a rule that decides nothing; comparing with null is right."""
    rego = REGO + "allow if input.user.role == 5\nallow if input.user == null\nalow if true\n"

    status, out, _ = run("check", write(a__rego=rego), *opa())

    assert status == 1
    assert "a.rego:5:10: error: never holds: string is compared with number\n" in out
    assert "a.rego:7:1: warning: rule alow is used by nothing, and decides nothing\n" in out
    assert out.endswith("1 files, 1 errors, 1 warnings\n")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a__rego": REGO + "allow if foo(1)\n"}, "a.rego:5:10: rego_type_error: undefined function foo"),
        ({"a__rego": REGO + 'allow if http.send({"url": "x"})\n'}, "a.rego:5:10: "),
        ({"a__cedar": "permit (principal, action, resource)"}, "a.cedar:1:"),
        ({"a__txt": ""}, "holds no .cedar and no .rego file"),
        ({"a__cedar": PERMIT, "data__json": "[]"}, "data.json: expected an object"),
        ({"a__cedar": PERMIT, "data__json": "{"}, "data.json: not JSON"),
        ({"a__cedar": PERMIT, "x_test__toml": "[[case]]"}, "x_test.toml: case 'number 1': "),
        ({"a__cedar": PERMIT, "x_test__toml": "case = 1"}, "x_test.toml: expected [[case]] and [default]"),
        ({"a__cedar": PERMIT, "x_test__toml": "="}, "x_test.toml: not TOML"),
        (
            {"a__cedar": PERMIT, "x_test__toml": '[[case]]\nname = "n"\nallow = true\ntool = "t"\nresource = "r"'},
            "x_test.toml: case 'n': one of tool, prompt and resource must be given",
        ),
        (
            {"a__cedar": PERMIT, "x_test__toml": '[[case]]\nname = "n"\nallow = true\ntool = "t"\nuser.rol = "x"'},
            "x_test.toml: case 'n': Object contains unknown field `rol`",
        ),
        (
            {"a__cedar": PERMIT, "x_test__toml": '[[case]]\nname = "n"\nallow = true\ntool = "t"\nworkload = "x"'},
            "x_test.toml: case 'n': workload: ",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(run: Run, write: Callable[..., Path], files: dict[str, str], said: str) -> None:
    """The error names file, place or field, on standard error, and nothing is on standard output."""
    status, out, err = run("check", write(**files), *opa())

    assert (status, out) == (1, "")
    assert err.startswith("sidegate: error: ")
    assert said.removeprefix("a.rego:5:10: rego_type_error: ") in err


def test_a_directory_that_there_is_not_is_refused(run: Run, tmp_path: Path) -> None:
    """By its path."""
    assert run("check", tmp_path / "x")[2] == f"sidegate: error: {tmp_path / 'x'}: no such directory\n"


def test_without_opa_rego_is_refused_with_a_hint(run: Run, write: Callable[..., Path]) -> None:
    """How to get it."""
    status, _, err = run("check", write(a__rego=REGO), "--opa", "/nowhere/opa")

    assert status == 1
    assert "hint: install opa" in err


# --- test ---


def test_the_examples_tests_pass(run: Run) -> None:
    """Cases for both languages, and OPA's own tests."""
    status, out, _ = run("test", ARTICLE, *opa())

    assert status == 0
    assert "ok   article_test.toml: an engineer does not destroy\n" in out
    assert "ok   article_test.rego: test_engineer_may_query\n" in out
    assert out.endswith("11 of 11 passed\n")


def test_a_case_that_fails_says_what_was_expected_and_why_not(run: Run, write: Callable[..., Path]) -> None:
    """Verdict or deciding rules."""
    cases = (
        '[[case]]\nname = "denied"\ntool = "t"\nallow = false\n'
        '[[case]]\nname = "by another"\nprompt = "p"\nallow = true\npolicies = ["x"]\n'
        '[[case]]\nname = "fine"\nresource = "file:///x"\nallow = true\npolicies = ["all"]\n'
    )

    status, out, _ = run("test", write(a__cedar='@id("all") ' + PERMIT, a_test__toml=cases))

    assert status == 1
    assert out == (
        "FAIL a_test.toml: denied\n     expected deny, got allow: all\n"
        "FAIL a_test.toml: by another\n     expected to be decided by x, was by all\n"
        "ok   a_test.toml: fine\n"
        "1 of 3 passed\n"
    )


def test_a_failing_rego_test_fails(run: Run, write: Callable[..., Path]) -> None:
    """OPA's own tests count."""
    tests = "package mcp.authz_test\nimport data.mcp.authz\ntest_it if authz.allow\n"

    status, out, _ = run("test", write(a__rego=REGO, a_test__rego=tests), *opa())

    assert (status, out) == (1, "FAIL a_test.rego: test_it\n0 of 1 passed\n")


def test_a_directory_without_tests_is_refused(run: Run, write: Callable[..., Path]) -> None:
    """Nothing tested is no success."""
    status, _, err = run("test", write(a__cedar=PERMIT))

    assert status == 1
    assert "no tests: neither *_test.toml nor *_test.rego" in err


# --- explain ---


def test_a_verdict_is_explained_by_engine_and_rule(run: Run) -> None:
    """Who, what, the joint verdict, and what each engine says."""
    call = ("--user", "u-1", "--role", "engineer", "--tool", "execute_query", "--args", '{"destructive": true}')

    status, out, _ = run("explain", ARTICLE, *opa(), *call)

    assert status == 1
    assert out == (
        "deny: u-1, tools/call, tool 'execute_query'\n  cedar: deny: nobody-destroys\n  rego: deny: no rule allows it\n"
    )


def test_the_input_can_be_shown(run: Run, write: Callable[..., Path]) -> None:
    """The document that policies see, for a workload without user as well."""
    call = ("--workload", "spiffe://demo.test/ns/a/sa/b", "--resource", "file:///x", "--input")

    status, out, _ = run("explain", write(a__cedar=PERMIT), *call)

    document = json.loads(out.partition("\nallow: ")[0])
    assert status == 0
    assert (document["user"], document["resource"]) == (None, {"uri": "file:///x"})
    assert "allow: spiffe://demo.test/ns/a/sa/b, resources/read, resource 'file:///x'\n" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one of tool, prompt and resource must be given"),
        (("--tool", "t", "--args", "[1]"), "--args: expected an object"),
        (("--tool", "t", "--args", "{"), "--args: not JSON"),
        (("--tool", "t", "--user", "u", "--claims", "1"), "--claims: expected an object"),
        (("--tool", "t", "--workload", "http://x"), "workload: "),
    ],
)
def test_a_question_that_nobody_can_ask_is_refused(
    run: Run, write: Callable[..., Path], arguments: tuple[str, ...], said: str
) -> None:
    """The error names the option."""
    status, out, err = run("explain", write(a__cedar=PERMIT), *arguments)

    assert (status, out) == (1, "")
    assert said in err


# --- replay ---


def record(tool: str | None, reason: str | None = None, **changes: Any) -> str:
    """Return one line of an audit trail."""
    made: dict[str, Any] = {
        "time": "2026-11-22T15:00:00Z",
        "message": {"method": "tools/call" if tool else "initialize", "tool": tool},
        "who": {"user": {"id": "u-1", "issuer": "https://id.test", "provider": "p", "email": None, "role": "analyst",
                         "roles": [], "groups": []}, "workload": None},
        "server": {"namespace": "n", "workload": "w", "name": "s"},
        "arguments": {"content": {}, "truncated": False, "redacted": False},
        "decision": {"reason": reason},
    }  # fmt: skip
    return json.dumps({**made, **changes}) + "\n"


def test_a_trail_is_replayed(run: Run, write: Callable[..., Path]) -> None:
    """Which calls would be decided otherwise; what cannot be known any more is counted by its reason."""
    trail = (
        record("read")
        + record("write")
        + record("read", "denied")
        + record("write", "denied")
        + record(None)
        + record("read", arguments={"content": None, "truncated": False, "redacted": False})
        + record("read", who={"user": {"id": 5}})
        + "\n"
    )
    where = write(a__cedar='@id("reads") permit (principal, action, resource) when { resource.name == "read" };')
    (where / "audit.jsonl").write_text(trail)

    status, out, err = run("replay", where / "audit.jsonl", where)

    assert (status, err) == (1, "")
    assert out == (
        "2026-11-22T15:00:00Z: u-1, tools/call, tool 'write': allow -> deny: no rule allows it\n"
        "2026-11-22T15:00:00Z: u-1, tools/call, tool 'read': deny -> allow: reads\n"
        "2 would change, 2 would not\n"
        "1 left out: it cannot be read: Expected `str`, got `int` - at `$.user.id`\n"
        "1 left out: its arguments were not kept whole\n"
        "1 left out: no rule was asked\n"
    )


def test_a_trail_that_is_none_is_refused(run: Run, write: Callable[..., Path]) -> None:
    """By file and line."""
    where = write(a__cedar=PERMIT, x__log="{}\nnonsense\n")

    status, _, err = run("replay", where / "x.log", where)

    assert status == 1
    assert "x.log:2: not a record of an audit trail" in err


# --- bundle, sign, verify ---


def keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Return the paths of a new private key and its public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = directory / f"{name}.key.pem", directory / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_bundle_is_made_signed_again_and_verified(run: Run, write: Callable[..., Path]) -> None:
    """From a directory to a bundle that another key vouches for."""
    where = write(a__cedar=PERMIT)
    private, public = keys(where, "one")
    other_private, other_public = keys(where, "other")
    made, again = where / "b.tar.gz", where / "again.tar.gz"

    assert run("bundle", where, "--key", private, "--output", made)[0] == 0
    assert run("sign", made, "--trusted", public, "--key", other_private, "--output", again)[0] == 0
    status, out, _ = run("verify", again, "--key", other_public)

    assert status == 0
    assert "policy policies: enforce, cedar, remembered, reads " in out
    assert "cedar/a.cedar" in out
    assert "not signed by a key that is trusted here" in run("verify", again, "--key", public)[2]


@pytest.mark.parametrize("key", ["nonsense", "-----BEGIN PRIVATE KEY-----\n"])
def test_a_key_that_is_none_is_refused(run: Run, write: Callable[..., Path], key: str) -> None:
    """By its path."""
    where = write(a__cedar=PERMIT, k__pem=key)

    status, _, err = run("bundle", where, "--key", where / "k.pem", "--output", where / "b")

    assert status == 1
    assert "k.pem: not a private key in PEM without password" in err


def test_a_key_of_another_curve_is_refused(run: Run, write: Callable[..., Path]) -> None:
    """With a hint how to make the right one."""
    where = write(a__cedar=PERMIT)
    key = ec.generate_private_key(ec.SECP384R1())
    (where / "k.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    assert (
        "hint: openssl ecparam -name prime256v1"
        in run("bundle", where, "--key", where / "k.pem", "--output", where / "b")[2]
    )


def test_a_bundle_that_is_not_what_it_was_is_refused(run: Run, write: Callable[..., Path]) -> None:
    """Changed, signed by somebody else, or no bundle at all: by verify, and before it is signed again."""
    where = write(a__cedar=PERMIT, nonsense__gz="x")
    private, public = keys(where, "ours")
    other, strange = keys(where, "other")
    bundle, changed = where / "b.tar.gz", where / "changed.tar.gz"
    assert run("bundle", where, "--key", private, "--output", bundle)[0] == 0
    changed.write_bytes(gzip.compress(gzip.decompress(bundle.read_bytes()).replace(b"permit", b"PERMIT")))

    for path, key, said in (
        (bundle, strange, "signature"),
        (changed, public, "a.cedar"),
        (where / "nonsense.gz", public, "bundle: truncated"),
        (where / "missing.gz", public, "missing.gz"),
        (bundle, where / "missing.pem", "missing.pem"),
        (bundle, where / "a.cedar", "PEM"),
    ):
        status, out, err = run("verify", path, "--key", key)
        assert (status, out) == (1, ""), path
        assert err.startswith("sidegate: error: ")
        assert said in err
    status, _, err = run("sign", bundle, "--trusted", strange, "--key", other, "--output", where / "again.tar.gz")
    assert (status, (where / "again.tar.gz").exists()) == (1, False)
    assert "signature" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: ACTION"),
        (["prove"], "invalid choice: 'prove'"),
        (["check"], "the following arguments are required: DIR"),
        (["replay", "x"], "the following arguments are required: DIR"),
        (["explain", "x", "--args"], "expected one argument"),
        (["bundle", "x"], "the following arguments are required: --key, --output"),
        (["sign", "x"], "the following arguments are required: --trusted, --key, --output"),
        (["verify", "x"], "the following arguments are required: --key"),
        (["test", "x", "--vocabulary", "other"], "invalid choice: 'other'"),
    ],
)
def test_misuse_is_told_with_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """Exit status 2, nothing on standard output."""
    with pytest.raises(SystemExit) as ended:
        main(["policy", *arguments])
    told = capsys.readouterr()

    assert (ended.value.code, told.out) == (2, "")
    assert told.err.startswith("usage: ")
    assert said in told.err


def test_a_replay_leaves_out_what_no_policy_decided(run: Run, write: Callable[..., Path]) -> None:
    """A call's first record, and what a content rule refused; where rules read claims, it says that there are none."""
    content = [{"rule": "keys", "action": "deny", "mode": "enforce", "where": "arguments", "count": 1}]
    where = write(
        a__cedar="permit (principal, action, resource) when { context.claims has dept };",
        audit__jsonl=record("read", phase="begin")
        + record("read", "denied", decision={"reason": "denied", "content": content}),
    )

    status, out, err = run("replay", where / "audit.jsonl", where)

    assert (status, out) == (
        0,
        "0 would change, 0 would not\n1 left out: a content rule decided\n",
    )
    assert err.startswith("note: an audit trail holds no claims")


def test_a_content_rule_that_cannot_work_is_refused(run: Run, write: Callable[..., Path]) -> None:
    """A profile beside the policies may hold some."""
    server = {"namespace": "n", "workload": "w", "name": "s", "port": 1}
    profile = {"server": server, "content": [{"name": "mine", "regex": "("}]}
    where = write(a__cedar=PERMIT, sidegate__json=json.dumps(profile))

    status, _, err = run("bundle", where, "--key", keys(where, "ours")[0], "--output", where / "b.tar.gz")

    assert status == 1
    assert "content rule mine: regex: missing )" in err
