"""OPA's published conformance cases through our engine: `python -m tests.rego_conformance [PREFIX...]`.

A case passes when the engine answers what the case wants, or refuses as it wants; it is refused when OPA's compiler,
under our capabilities, does not compile it, or the engine denies with an error; anything else is wrong, and one wrong
case fails the run. Cases that want strict errors, which WebAssembly has not, want here what OPA answers without.
"""

import base64
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import wasmtime

from sidecar.core import rego
from sidecar.core.builtins import values
from sidecar.core.rego import FUEL, MEMORY_BYTES, Trap, _compiled, _Instance
from sidecar.errors import BundleError
from tests.parts import part
from webhook.core import compile as compiler

WORKERS = 2
TIME_NS = 1_795_350_000_000_000_000
Case = dict[str, Any]
# Where OPA's WebAssembly is known to differ from OPA, and why that is borne: OPA's own suite leaves these out as well.
KNOWN: Mapping[str, str] = {
    "data/toplevel integer": 'data[2] means data["2"] to OPA, and is undefined in WebAssembly',
    "data/nested integer": 'data[2] means data["2"] to OPA, and is undefined in WebAssembly',
    "jsonbuiltins/unmarshal number beyond the supported exponent is undefined": "json.unmarshal takes any exponent",
    "jsonbuiltins/unmarshal number with too big an exponent is undefined": "json.unmarshal takes any exponent",
}


def prepare() -> None:
    """Compile without optimising, which takes most of a run's time and changes no answer."""
    configuration = rego._configuration()
    configuration.cranelift_opt_level = "none"
    rego._MACHINE = wasmtime.Engine(configuration)  # type: ignore[misc] # final to everybody else


def cases(prefixes: Sequence[str]) -> Iterator[Case]:
    """Yield every case, compiled or refused, under the capabilities that policies are compiled with."""
    tree, opa = part("opa-cases"), part("opa")
    current = subprocess.run([opa, "capabilities", "--current"], check=True, capture_output=True)  # noqa: S603 - ours
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "capabilities.json")
        path.write_bytes(compiler.capabilities(current.stdout))
        command = [tree / "rego-cases", tree / "v1", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603 - same
            assert process.stdout is not None
            for line in process.stdout:
                case: Case = json.loads(line, parse_float=Decimal)
                if not prefixes or case["note"].startswith(tuple(prefixes)):
                    yield case


def judge(case: Case) -> tuple[str, str]:
    """Return `passed`, `refused` or `wrong`, and why."""
    wants_error = bool(case.get("want_error_code") or case.get("want_error"))
    if "wasm" not in case:
        if wants_error and case.get("code") and case["code"] == case.get("want_error_code"):
            return "passed", "refused as wanted"
        return "refused", _cause(case["refused"])
    if case.get("input_term") is not None:
        try:
            case["input"] = json.loads(case["input_term"], parse_float=Decimal)
        except ValueError:
            return "refused", "an input that is not JSON"
    instance: _Instance | None = None
    try:
        module = _compiled(base64.b64decode(case["wasm"]))
        instance = _Instance(module, _json(case.get("data", {})), FUEL, MEMORY_BYTES)
        document = _json(case["input"]) if "input" in case else b""
        results = _plain(values.read(instance.evaluate_raw("eval", document, TIME_NS, as_rego=True)))
    except (BundleError, Trap) as error:
        return ("passed", "an error as wanted") if wants_error else ("refused", f"denied: {_cause(str(error))}")
    finally:
        if instance is not None:
            instance.close()
    return _compared(case, results, wants_error=wants_error)


def _plain(value: Any) -> Any:
    """Return *value* as JSON has it: a set is an array in Rego's order."""
    match value:
        case values.Set():
            return [_plain(each) for each in values.ordered(value)]
        case list():
            return [_plain(each) for each in value]
        case dict() | values.Pairs():
            pairs = values.pairs_of(value) or ()
            return {_member(key): _plain(member) for key, member in pairs}
        case _:
            return value


def _member(key: Any) -> str:
    """Return what OPA makes of a key: JSON has but strings."""
    return key if isinstance(key, str) else json.dumps(_plain(key), separators=(",", ":"), default=str)


def _compared(case: Case, results: list[Case], *, wants_error: bool) -> tuple[str, str]:
    if wants_error:
        return "wrong", f"wanted an error, got {results}"
    if "want_result" in case:
        wanted: list[Case] = case["want_result"] or []
    else:
        is_defined = bool(results)
        fits = is_defined == case.get("want_defined", is_defined)
        return ("passed", "") if fits else ("wrong", f"defined: {is_defined}")
    if case.get("ignore_generated_vars"):
        results = [{name: value for name, value in each.items() if not name.startswith("$")} for each in results]
    sort = bool(case.get("sort_bindings"))
    if _keys(results, sort=sort) == _keys(wanted, sort=sort):
        return "passed", ""
    return "wrong", f"wanted {_json(wanted).decode()[:400]}, got {_json(results).decode()[:400]}"


def _keys(results: list[Case], *, sort: bool) -> frozenset[Any]:
    bindings = [
        {name: values.ordered(value) if sort and isinstance(value, list) else value for name, value in each.items()}
        for each in results
    ]
    return frozenset(map(_key, bindings))


def _key(value: Any) -> Any:
    match value:
        case dict():
            return frozenset((name, _key(member)) for name, member in value.items())
        case list():
            return tuple(map(_key, value))
        case bool() | None:
            return type(value), value
        case _:
            return value


def _json(value: Any) -> bytes:
    return values.write(value).encode()  # numbers as they are


def _cause(text: str) -> str:
    """Return the kind of a refusal, to count it by."""
    text = text.partition("rego_")[2].partition(": ")[2] or text
    if "undefined function" in text:
        name = text.rpartition(" ")[2].strip()
        return f"function {name.partition('.')[0] if name.startswith(('graphql', 'io.jwt', 'crypto.x509')) else name}"
    return text.splitlines()[0][:80]


def main(prefixes: Sequence[str]) -> int:
    """Print n of m by reason; return 1 when one case is wrong."""
    counted: Counter[tuple[str, str]] = Counter()
    wrong = []
    with ProcessPoolExecutor(WORKERS, initializer=prepare) as pool:
        every = list(cases(prefixes))
        for number, (case, (verdict, why)) in enumerate(zip(every, pool.map(judge, every, chunksize=8), strict=True)):
            if verdict == "wrong" and case["note"] in KNOWN:
                verdict, why = "known", KNOWN[case["note"]]  # noqa: PLW2901 - judged anew
            counted[verdict, "" if verdict == "wrong" else why] += 1
            if verdict == "wrong":
                wrong.append(f"{case['note']}: {why}")
            if number % 100 == 0 and sys.stderr.isatty():
                print(f"\r{number} of {len(every)}", end="", file=sys.stderr, flush=True)
    totals = Counter({each: sum(n for (verdict, _), n in counted.items() if verdict == each) for each, _ in counted})
    summary = ", ".join(f"{totals[verdict]} {verdict}" for verdict in ("refused", "known", "wrong"))
    print(f"{totals['passed']} of {len(every)} passed; {summary}")
    for (verdict, why), number in sorted(counted.items(), key=lambda each: (each[0][0], -each[1])):
        if why:
            print(f"{number:6} {verdict}: {why}")
    for each in wrong:
        print(f"wrong: {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
