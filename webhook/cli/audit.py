"""`sidegate audit`: prove that a trail is whole, follow it, search it, say it in the words of a SIEM."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import orjson
from cryptography import x509

from certs.spiffe import SpiffePattern, TrustDomain
from certs.statement import BadStatement
from certs.statement import verify as verify_statement
from certs.verify import TrustBundles
from sidecar.core import chain
from sidecar.errors import ConfigError
from sidecar.record import SCHEMA
from webhook.core import siem

EXAMPLE: Final = "example: sidegate audit verify audit.jsonl --trust-domain example.org --trust-bundle bundle.pem"
FOLLOW_S: Final = 0.5  # between looks at a file that grows
_ROTATED: Final = re.compile(r"(?P<name>.+)\.(?P<number>[0-9]{6,})")

# What can be searched for, and where a record has it.
FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "user": ("who", "user", "id"),
    "email": ("who", "user", "email"),
    "workload": ("who", "workload"),
    "agent-session": ("agent", "session"),
    "session": ("session",),
    "server": ("server", "name"),
    "method": ("message", "method"),
    "tool": ("message", "tool"),
    "phase": ("phase",),
    "outcome": ("decision", "outcome"),
    "reason": ("decision", "reason"),
    "trace": ("trace_id",),
}


def add_to(verbs: Any) -> None:
    """Add the verb's own verbs and their arguments."""
    parser = verbs.add_parser("audit", help="verify, follow, search or export an audit trail", description=__doc__, epilog=EXAMPLE)  # fmt: skip # noqa: E501
    own = parser.add_subparsers(dest="what", required=True, metavar="VERB")
    check = own.add_parser("verify", help="find missing, altered, added or moved lines", epilog=EXAMPLE)
    check.add_argument("file", nargs="+", metavar="FILE|DIR", help="the trail; rotated files oldest first, or their directory; - for standard input")  # fmt: skip # noqa: E501
    check.add_argument("--trust-domain", metavar="NAME", help="whose SVIDs may sign checkpoints")
    check.add_argument("--trust-bundle", type=Path, metavar="PEM", help="its CA certificates, those of the trail's time among them")  # fmt: skip # noqa: E501
    check.add_argument("--signer", default="", metavar="PATTERN", help="SPIFFE IDs that may sign, such as spiffe://td/ns/shop/sa/ledger (default: any of the domain)")  # fmt: skip # noqa: E501
    check.add_argument("--closed", action="store_true", help="fail, too, where the last lines are not covered by a signature")  # fmt: skip
    check.set_defaults(perform=_verify)
    for name, what, perform in (
        ("tail", "follow the trail", _tail),
        ("search", "print the records that match", _search),
    ):
        shown = own.add_parser(name, help=what)
        shown.add_argument(
            "file", metavar="FILE" if name == "tail" else "FILE|DIR", help="the trail; - for standard input"
        )
        for field in FIELDS:
            shown.add_argument(f"--{field}", metavar="VALUE", help=f"only where {'.'.join(FIELDS[field])} is this")
        shown.add_argument("--since", metavar="TIME", help="only from then on: RFC 3339, or a beginning of it such as 2026-11-22T16")  # fmt: skip # noqa: E501
        shown.add_argument("--until", metavar="TIME", help="only before then")
        shown.add_argument("--json", action="store_true", help="whole records, a line each")
        shown.set_defaults(perform=perform)
    export = own.add_parser("export", help="print each record as an event of a SIEM")
    export.add_argument("file", nargs="+", metavar="FILE|DIR", help="the trail; - for standard input")
    export.add_argument("--format", required=True, choices=("ecs", "ocsf"), help="Elastic Common Schema, or OCSF API Activity")  # fmt: skip
    export.set_defaults(perform=_export)


def _verify(options: argparse.Namespace) -> int:
    """Say what the trail proves; return 1 when anything is wrong with it."""
    verifier = _verifier(options)
    places: list[str] = []  # of each line read
    report = chain.verify(_lines(options.file, places), verifier)
    if not report.chains:
        raise ConfigError(f"{', '.join(options.file)}: no line of an audit trail in it")
    for finding in report.findings:
        print(f"{places[finding.line - 1]}: {finding.what}")
    for number in report.torn:
        print(f"{places[number - 1]}: cut short while it was written, by a kill or a full disk")
    is_sound = report.is_sound
    for chain_id, state in sorted(report.chains.items()):
        left = state.lines - state.covered
        print(f"chain {chain_id}: {state.lines} lines, {_coverage(state, left, is_believed=verifier is not None)}")
        if state.lost:
            print(f"chain {chain_id}: {state.lost} records were lost before they could be written")
        is_sound = is_sound and not (options.closed and (left or not state.closed))
    if report.other_lines > len(report.torn):
        print(f"{report.other_lines - len(report.torn)} lines belong to no chain")
    if report.begun:
        first = places[min(report.begun.values()) - 1]
        print(f"{len(report.begun)} calls were begun and have no end: under way, or cut off by a kill; first {first}")
    print("the trail is whole" if is_sound else "the trail is NOT whole")
    return 0 if is_sound else 1


def _lines(paths: Sequence[str], places: list[str]) -> Iterator[bytes]:
    for path in _files(paths):
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                places.append(f"{path}:{number}")
                yield line


def _files(paths: Sequence[str]) -> Iterator[str]:
    """Yield *paths*; in place of a directory the trails in it, each from its oldest file to its newest."""
    for path in paths:
        if path == "-" or not Path(path).is_dir():
            yield path
            continue
        yield from map(str, sorted((each for each in Path(path).iterdir() if _is_trail(each)), key=_age))


def _is_trail(path: Path) -> bool:
    name = found["name"] if (found := _ROTATED.fullmatch(path.name)) else path.name
    return path.is_file() and name.endswith((".jsonl", ".log", ".json"))


def _age(path: Path) -> tuple[str, bool, int]:
    found = _ROTATED.fullmatch(path.name)
    return (found["name"], False, int(found["number"])) if found else (path.name, True, 0)


def _coverage(state: chain.State, left: int, *, is_believed: bool) -> str:
    if not is_believed:
        return "linked; signatures were not checked: --trust-bundle says by what"
    signed = f"{state.covered} of them signed for by {state.signer}" if state.covered else "none of them signed for"
    return signed + ("" if not left else f", the last {left} only linked") + (", closed" if state.closed else "")


def _verifier(options: argparse.Namespace) -> chain.Verifier | None:
    if (options.trust_bundle is None) != (options.trust_domain is None):
        raise ConfigError("--trust-bundle and --trust-domain go together: whose certificates, and of which domain")
    if options.trust_bundle is None:
        if options.closed or options.signer:
            raise ConfigError("--closed and --signer need --trust-bundle: without it no signature is checked")
        return None
    try:
        anchors = x509.load_pem_x509_certificates(options.trust_bundle.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{options.trust_bundle}: expected certificates in PEM: {error}") from error
    bundles = TrustBundles({TrustDomain(options.trust_domain): anchors})
    pattern = SpiffePattern.parse(options.signer) if options.signer else None

    def believed(statement: str) -> tuple[str, Mapping[str, Any]]:
        signer, claims = verify_statement(statement, bundles)
        if pattern is not None and not pattern.matches(signer):
            raise BadStatement(f"{signer} is not {options.signer}")
        return str(signer), claims

    return believed


def _tail(options: argparse.Namespace) -> int:
    """Print matching records, and those that come, until interrupted."""
    matches = _matcher(options)
    with _opened(options.file) as file:
        pending = b""
        while True:
            line = file.readline()
            if not line:
                sys.stdout.flush()
                time.sleep(FOLLOW_S)
                continue
            pending += line
            if pending.endswith(b"\n"):
                _show(pending, matches, options)
                pending = b""


def _search(options: argparse.Namespace) -> int:
    """Print matching records; return 1 when there are none."""
    matches = _matcher(options)
    found = [_show(line, matches, options) for line in _lines([options.file], [])]
    return 0 if any(found) else 1


def _export(options: argparse.Namespace) -> int:
    """Print each message of the trail once, whether or not the trail is whole."""
    records = (record for line in _lines(options.file, []) if (record := _record(line)) is not None)
    for each in siem.settled(records):
        print(orjson.dumps(siem.said(each, options.format)).decode())
    return 0


def _matcher(options: argparse.Namespace) -> Callable[[dict[str, Any]], bool]:
    wanted = [
        (FIELDS[name], value) for name in FIELDS if (value := getattr(options, name.replace("-", "_"))) is not None
    ]
    since, until = options.since or "", options.until or "\x7f"

    def matches(record: dict[str, Any]) -> bool:
        is_then = since <= str(record.get("time")) < until
        return is_then and all(str(_at(record, path)) == value for path, value in wanted)

    return matches


def _show(line: bytes, matches: Callable[[dict[str, Any]], bool], options: argparse.Namespace) -> bool:
    record = _record(line)
    if record is None or not matches(record):
        return False
    print(line.decode(errors="backslashreplace").rstrip("\n") if options.json else _summary(record))
    return True


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record in *line*; None for a line of another kind, or one that was cut short."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def _summary(record: dict[str, Any]) -> str:
    """Return a record in one line for people: when, who, what, and what came of it."""
    user = _at(record, FIELDS["email"]) or _at(record, FIELDS["user"]) or "nobody"
    target = next(
        (_at(record, ("message", kind)) for kind in ("tool", "prompt", "resource") if _at(record, ("message", kind))),
        "",
    )
    outcome, reason = _at(record, FIELDS["outcome"]), _at(record, FIELDS["reason"])
    outcome = "begun" if record.get("phase") == "begin" else outcome
    parts = (
        str(record.get("time", ""))[:23],
        outcome if reason is None else f"{outcome} ({reason})",
        user,
        "via",
        _at(record, FIELDS["workload"]) or "no workload",
        _at(record, FIELDS["server"]) or "",
        _at(record, FIELDS["method"]) or _at(record, ("http", "method")) or "",
        target,
    )
    return " ".join(_printable(str(part)) for part in parts if part)


def _printable(text: str) -> str:
    """Return *text* as a terminal may show it: names are chosen by callers."""
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)


def _at(record: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _opened(path: str) -> IO[bytes]:
    return sys.stdin.buffer if path == "-" else Path(path).open("rb")
