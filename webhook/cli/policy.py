"""`sidegate policy …`: check, test, explain, replay policies before they act; bundle, sign, verify what carries them.

Everything is decided by the code that decides in the sidecar. What is found goes to standard output, progress and
errors to standard error. Exit 0: nothing wrong; 1: something is, or would change.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.core.authorise import Engine, Question, Verdict, judge
from sidecar.core.bundle import ALLOW, REASONS, WASM, decode, encode, public_keys
from sidecar.core.engines import engines as make_engines
from sidecar.errors import ConfigError
from webhook.cli import directory
from webhook.cli.directory import Directory
from webhook.core.cases import Asked, Human, of_record, question
from webhook.core.check import Finding
from webhook.shell import cedar
from webhook.shell.opa import Opa

EXAMPLE: Final = "example: sidegate policy check policies/ && sidegate policy test policies/"
PROGRESS_EVERY: Final = 1000  # lines of a trail
CUT_SHORT: Final = '{"time":"'  # so a record begins
Item = TypeVar("Item")


def add_to(verbs: Any) -> None:
    """Add the verb's arguments."""
    parser = verbs.add_parser(
        "policy", help="check, test, explain and sign policies", description=__doc__, epilog=EXAMPLE
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, perform, summary in (
        ("check", _check, "compile; find what never matches, always fails or adds nothing"),
        ("test", _test, "run the cases in *_test.toml and the rules test_… in *_test.rego"),
        ("explain", _explain, "say what one caller may do, and which rules decide"),
        ("replay", _replay, "say which calls of an audit trail would be decided otherwise"),
        ("bundle", _bundle, "compile and sign a bundle"),
    ):
        action = actions.add_parser(name, help=summary, description=summary, epilog=EXAMPLE)
        if name == "replay":
            action.add_argument("audit", type=Path, metavar="AUDIT", help="an audit trail: one JSON record a line")
        action.add_argument("directory", type=Path, metavar="DIR", help="a directory of .cedar and .rego files")
        action.add_argument("--opa", default="opa", metavar="PATH", help="the opa program that compiles Rego (default: opa on the PATH)")  # fmt: skip # noqa: E501
        action.add_argument("--vocabulary", choices=("sidegate", "toolhive"), default="sidegate", help="names in the Cedar policies")  # fmt: skip # noqa: E501
        action.set_defaults(perform=perform)
        if name == "explain":
            _add_question(action)
        if name == "bundle":
            action.add_argument("--key", type=Path, required=True, metavar="PEM", help="the private key, P-256")
            action.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the bundle goes")
    sign = actions.add_parser("sign", help="sign a bundle again, with another key", epilog=EXAMPLE)
    sign.add_argument("bundle", type=Path, metavar="BUNDLE")
    sign.add_argument("--trusted", type=Path, required=True, metavar="PEM", help="public keys one of which signed it")
    sign.add_argument("--key", type=Path, required=True, metavar="PEM", help="the private key that signs it now")
    sign.add_argument("--output", type=Path, required=True, metavar="FILE")
    sign.set_defaults(perform=_sign)
    verify = actions.add_parser("verify", help="verify a bundle and say what is in it", epilog=EXAMPLE)
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    verify.add_argument("--key", type=Path, required=True, metavar="PEM", help="public keys one of which signed it")
    verify.set_defaults(perform=_verify)


def _add_question(action: argparse.ArgumentParser) -> None:
    action.add_argument("--user", metavar="ID", help="the user's id; without it there is no user")
    action.add_argument("--issuer", default=Human().issuer, metavar="URL")
    action.add_argument("--email")
    action.add_argument("--role")
    action.add_argument("--group", action="append", default=[], help="may be given again")
    action.add_argument("--claims", default="{}", metavar="JSON")
    action.add_argument("--workload", metavar="SPIFFE-ID")
    action.add_argument("--tool", metavar="NAME")
    action.add_argument("--prompt", metavar="NAME")
    action.add_argument("--resource", metavar="URI")
    action.add_argument("--args", default="{}", metavar="JSON", help="arguments of the tool or prompt")
    action.add_argument("--input", action="store_true", help="print the document that policies see")


def _read(options: argparse.Namespace) -> Directory:
    return directory.read(options.directory, vocabulary=options.vocabulary)


def _engines(found: Directory, options: argparse.Namespace) -> tuple[Engine, ...]:
    return directory.engines_of(found, Opa(options.opa))


# --- check ---


def _check(options: argparse.Namespace) -> int:
    found = _read(options)
    findings = asyncio.run(_findings(found, Opa(options.opa)))
    for each in findings:
        print(each)
    errors = sum(each.severity == "error" for each in findings)
    files = len(found.policies.cedar) + len(found.policies.rego)
    print(f"{files} files, {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


async def _findings(found: Directory, opa: Opa) -> list[Finding]:
    """Return what is wrong; raises BadPolicy for what does not compile."""
    findings: list[Finding] = []
    if found.policies.rego:
        findings += await opa.check(found.policies)
    if found.policies.cedar:
        findings += await cedar.check(found.policies)
    return sorted(findings, key=lambda each: (each.file, each.line, each.column))


# --- test ---


def _test(options: argparse.Namespace) -> int:
    found = _read(options)
    if not found.cases and not found.rego_tests:
        raise ConfigError(f"{found.path}: no tests: neither *_test.toml nor *_test.rego")
    failed = total = 0
    engines = _engines(found, options) if found.cases else ()
    for file, cases in found.cases.items():
        for case in cases:
            total += 1
            verdict = judge(question(case), engines)
            problem = _problem(verdict, allow=case.allow, policies=case.policies)
            failed += bool(problem)
            print(f"{'FAIL' if problem else 'ok  '} {file}: {case.name}" + (f"\n     {problem}" if problem else ""))
    if found.rego_tests:
        for each in asyncio.run(Opa(options.opa).test(found.policies, found.rego_tests)):
            total += 1
            broken = bool(each.get("fail") or each.get("error"))
            failed += broken
            print(f"{'FAIL' if broken else 'ok  '} {each['location']['file'].removeprefix('policy/')}: {each['name']}")
    print(f"{total - failed} of {total} passed")
    return 1 if failed else 0


def _problem(verdict: Verdict, *, allow: bool, policies: Sequence[str] | None) -> str:
    if verdict.allowed != allow:
        return f"expected {_word(allow)}, got {_word(verdict.allowed)}: {_why(verdict)}"
    if policies is not None and set(policies) != set(verdict.policies):
        return f"expected to be decided by {', '.join(policies) or 'nothing'}, was by {', '.join(verdict.policies) or 'nothing'}"
    return ""


def _word(allowed: bool) -> str:
    return "allow" if allowed else "deny"


def _why(verdict: Verdict) -> str:
    return "; ".join((*verdict.errors, *verdict.policies)) or (
        "no rule allows it" if not verdict.allowed else "allowed"
    )


# --- explain ---


def _explain(options: argparse.Namespace) -> int:
    try:
        asked = question(_asked(options))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    engines = _engines(_read(options), options)
    verdicts = [(engine, engine.decide(asked)) for engine in _each(engines)]
    allowed = judge(asked, engines).allowed
    if options.input:
        print(json.dumps(asked.document(), indent=2))
    print(f"{_word(allowed)}: {_described(asked)}")
    for engine, verdict in verdicts:
        clean = verdict.allowed and not verdict.errors
        print(f"  {engine.name}: {_word(clean)}: {_why(verdict)}")
    return 0 if allowed else 1


def _each(engines: Iterable[Engine]) -> Iterator[Engine]:
    """Yield the engines themselves: what remembers verdicts asks several."""
    for engine in engines:
        yield from getattr(engine, "engines", (engine,))


def _asked(options: argparse.Namespace) -> Asked:
    human = None
    if options.user is not None:
        human = Human(
            id=options.user,
            issuer=options.issuer,
            email=options.email,
            role=options.role,
            groups=tuple(options.group),
            claims=_json(options.claims, "--claims"),
        )
    return Asked(
        user=human,
        workload=options.workload,
        tool=options.tool,
        prompt=options.prompt,
        resource=options.resource,
        args=_json(options.args, "--args"),
    )


def _json(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{option}: expected an object, such as {{"limit": 5}}')
    return value


def _described(asked: Question) -> str:
    user, workload = asked.principal.user, asked.principal.workload
    who = " as ".join(str(each) for each in (user and user.id, workload) if each) or "nobody"
    target = asked.message.target
    return f"{who}, {asked.message.method}, {getattr(target, 'label', target)}"


# --- replay ---


def _replay(options: argparse.Namespace) -> int:
    bundle = directory.bundle_of(_read(options), Opa(options.opa))
    engines = make_engines(bundle).enforced
    if any(
        each.reads is None or any(_meets(path, "/user/claims") for path in each.reads)
        for each in bundle.profile.policies
    ):
        print(
            "note: an audit trail holds no claims, and rules that read them see none: their verdicts below may be wrong"
            "\nhint: map what rules need to role, roles or groups (IdentityProvider, spec.claims); those are on record",
            file=sys.stderr,
        )
    same, changed, skipped = 0, 0, dict[str, int]()
    for number, record in _progress(_records(options.audit)):
        asked = of_record(record)
        if isinstance(asked, str):
            skipped[asked] = skipped.get(asked, 0) + 1
            continue
        decision = record.get("decision") or {}
        was = decision.get("reason") != "denied"
        verdict = judge(question(asked), engines)
        if verdict.allowed == was:
            same += 1
            continue
        changed += 1
        when, change = record.get("time", f"line {number}"), f"{_word(was)} -> {_word(verdict.allowed)}"
        print(f"{when}: {_described(question(asked))}: {change}: {_why(verdict)}")
    print(f"{changed} would change, {same} would not")
    for why, count in sorted(skipped.items()):
        print(f"{count} left out: {why}")
    return 1 if changed else 0


def _meets(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="strict") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                if line.startswith(CUT_SHORT):  # by a kill in the middle of writing it
                    continue
                raise ConfigError(f"{path}:{number}: not a record of an audit trail: {error}") from error
            if isinstance(record, dict) and record.get("phase") != "begin":
                yield number, record


def _progress(items: Iterable[Item]) -> Iterator[Item]:
    for number, item in enumerate(items, start=1):
        if number % PROGRESS_EVERY == 0 and sys.stderr.isatty():
            print(f"\r{number} records", end="", file=sys.stderr, flush=True)
        yield item


# --- bundle, sign, verify ---


def _bundle(options: argparse.Namespace) -> int:
    found = directory.bundle_of(_read(options), Opa(options.opa))
    _write(options.output, found.files, _private_key(options.key))
    print(f"{options.output}: revision {found.revision}, {len(found.files)} files")
    return 0


def _sign(options: argparse.Namespace) -> int:
    found = decode(options.bundle.read_bytes(), public_keys(options.trusted.read_text()))
    _write(options.output, found.files, _private_key(options.key))
    print(f"{options.output}: revision {found.revision}, signed again")
    return 0


def _write(output: Path, files: Any, key: ec.EllipticCurvePrivateKey) -> None:
    has_reasons = any(b"mcp/authz/reasons" in files[name] for name in files if name.endswith(WASM))
    output.write_bytes(encode(files, key, entrypoints=(ALLOW, REASONS) if has_reasons else (ALLOW,)))


def _verify(options: argparse.Namespace) -> int:
    found = decode(options.bundle.read_bytes(), public_keys(options.key.read_text()))
    print(f"revision {found.revision}, for {found.profile.server.namespace}/{found.profile.server.workload}")
    for each in found.profile.policies:
        kinds = "+".join(kind for kind in ("cedar", "rego") if getattr(each, kind))
        reads = "everything" if each.reads is None else ", ".join(each.reads) or "nothing"
        print(
            f"policy {each.name}: {each.mode}, {kinds}, {'remembered' if each.pure else 'asked each time'}, reads {reads}"
        )
    for name in sorted(found.files):
        print(f"{len(found.files[name]):9} {name}")
    return 0


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a private key in PEM without password: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(
            f"{path}: expected a P-256 key\nhint: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        )
    return key
