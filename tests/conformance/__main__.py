"""`python -m tests.conformance`: every set of the official suite, and public servers, direct and through the sidecar.

Prints one line a set and writes build/conformance.json. Fails when a check is worse through the sidecar, and when a
reference server is itself worse than it has to be: then 0 worse would mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.errors import BenchError
from tests.conformance import logins, parties, suite
from tests.parts import PartError
from tests.public_servers import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

RESULT: Final = Path("build/conformance.json")
SHOWN: Final = 12  # of the checks that got worse; build/conformance.json has them all
WIDTH: Final = 300  # of an answer that is shown because it differs
CLIENT: Final = Path(__file__).with_name("client.py")
SERVERS: Final[dict[str, Callable[[Path], AbstractContextManager[int]]]] = {
    "typescript": parties.typescript,
    "python": parties.python,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSet:
    """Scenarios against a server, and how many checks have to succeed without the sidecar, by server."""

    name: str
    options: tuple[str, ...]
    least: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSet:
    """Scenarios against a client at one revision; those on tokens are in logins.py."""

    name: str
    revision: str
    scenarios: tuple[str, ...]
    least: int


SERVER_SETS: Final = (
    ServerSet(
        name="2025-03-26", options=("--suite", "all", "--spec-version", "2025-03-26"), least=dict.fromkeys(SERVERS, 3)
    ),
    ServerSet(
        name="2025-06-18", options=("--suite", "all", "--spec-version", "2025-06-18"), least=dict.fromkeys(SERVERS, 56)
    ),
    ServerSet(name="2025-11-25", options=("--requirements", "2025-11-25"), least=dict.fromkeys(SERVERS, 84)),
    ServerSet(name="2026-07-28", options=("--requirements", "2026-07-28"), least={"typescript": 167, "python": 194}),
)
CLIENT_SETS: Final = (
    ClientSet(
        name="client 2025-11-25",
        revision="2025-11-25",
        scenarios=(
            "initialize",
            "tools_call",
            "elicitation-sep1034-client-defaults",
            "sse-retry",
            "json-schema-2020-12-preservation",
        ),
        least=20,
    ),
    ClientSet(
        name="client 2026-07-28",
        revision="2026-07-28",
        scenarios=(
            "tools_call",
            "request-metadata",
            "sep-2322-client-request-state",
            "http-standard-headers",
            "http-custom-headers",
            "http-invalid-tool-headers",
            "json-schema-ref-no-deref",
            "json-schema-2020-12-preservation",
        ),
        least=58,
    ),
)

LOGIN_LEAST: Final = {"2025-11-25": 205, "2026-07-28": 324}  # by revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One set, run both ways: what succeeded direct, what through the sidecar, and what got worse."""

    name: str
    direct: int
    through: int
    worse: list[str]
    apart: Mapping[str, str] = field(default_factory=dict)  # checks that cannot be compared, and why
    not_run: Mapping[str, str] = field(default_factory=dict)  # scenarios, and why

    def lines(self) -> list[str]:
        """Return what is printed."""
        counted = f"{self.name:32} direct {self.direct:4}  through {self.through:4}  worse {len(self.worse)}"
        more = [f"and {len(self.worse) - SHOWN} more"] if len(self.worse) > SHOWN else []
        not_run = [f"not run: {scenario}: {reason}" for scenario, reason in self.not_run.items()]
        return [counted, *self.worse[:SHOWN], *more, *logins.by_reason(self.apart), *not_run]

    def document(self) -> dict[str, Any]:
        """Return what is written."""
        named = {"apart": dict(self.apart), "not_run": dict(self.not_run)}
        counted = {"direct": self.direct, "through": self.through, "worse": self.worse}
        return counted | {name: told for name, told in named.items() if told}


def compared(name: str, direct: suite.Verdicts, through: suite.Verdicts, least: int) -> Compared:
    """Return the comparison of two runs of the suite; one that fails to begin with is worth nothing."""
    succeeded = suite.successes(direct)
    too_few = [f"direct: {succeeded} checks succeeded, {least} have to"] if succeeded < least else []
    worse = suite.worse(direct, through)
    return Compared(name=name, direct=succeeded, through=suite.successes(through), worse=too_few + worse)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when nothing is worse."""
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="only sets whose name contains WORD"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and the suite's own output there")
    options = parser.parse_args(arguments)
    logging.getLogger("mcp").addHandler(logging.NullHandler())  # a broken conversation is reported as a result
    started_s = time.monotonic()
    results = {}
    try:
        with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
            home = options.keep or Path(scratch)
            home.mkdir(parents=True, exist_ok=True)
            for each in _every_set(home, options.only):
                print(*each.lines(), sep="\n    ", flush=True)
                results[each.name] = each.document()
    except (suite.SuiteError, BenchError, PartError) as error:
        print(f"conformance: error: {error}", file=sys.stderr)
        return 1
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    failed = [name for name, result in results.items() if result["worse"]]
    print(f"conformance: {len(results)} sets, {len(failed)} with checks worse, {time.monotonic() - started_s:.0f} s")
    return 1 if failed or not results else 0


def _every_set(home: Path, only: Sequence[str]) -> Iterator[Compared]:
    """Run the sets whose name contains each word of *only*."""
    for name, start in SERVERS.items():
        wanted = [each for each in SERVER_SETS if _is_wanted(f"{name} {each.name}", only)]
        if not wanted:
            continue
        with contextlib.ExitStack() as stack:
            at = home / name
            at.mkdir(exist_ok=True)
            port = stack.enter_context(start(at))
            front = stack.enter_context(parties.sidecar(at, f"http://127.0.0.1:{port}/mcp"))
            for each in wanted:
                yield _server_set(each, name, at, port, front)
    for each in CLIENT_SETS:
        if _is_wanted(each.name, only):
            yield _client_set(each, home)
    for revision in logins.SCENARIOS:
        if _is_wanted(name := f"client auth {revision}", only):
            yield _login_set(name, revision, home)
    for server in probe.table():
        if _is_wanted(server.name, only):
            yield _public_server(server, home)


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return all(word in name for word in only)


def _server_set(each: ServerSet, server: str, at: Path, port: int, front: int) -> Compared:
    def run(way: str, to: int) -> suite.Verdicts:
        url = f"http://localhost:{to}/mcp"  # dns-rebinding-protection takes no other name
        return suite.run("server", "--url", url, *each.options, output=at / f"{each.name}-{way}")

    return compared(f"{server} {each.name}", run("direct", port), run("through", front), each.least[server])


def _client_set(each: ClientSet, home: Path) -> Compared:
    def run(way: str, *options: str) -> suite.Verdicts:
        verdicts: dict[suite.Check, str] = {}
        command = " ".join([sys.executable, "-m", "tests.conformance.client", *options])
        for scenario in each.scenarios:
            output = home / f"{each.name}-{way}" / scenario
            asked = ("--command", command, "--scenario", scenario, "--spec-version", each.revision)
            verdicts.update(suite.run("client", *asked, output=output))
        return verdicts

    return compared(each.name, run("direct"), run("through", "--through"), each.least)


def _login_set(name: str, revision: str, home: Path) -> Compared:
    found = logins.run(revision, home / f"auth-{revision}")  # no space: a shell reads the client's command
    plain = compared(name, found.direct, found.through, LOGIN_LEAST[revision])
    worse = [*plain.worse, *found.worse]
    return dataclasses.replace(plain, worse=worse, apart=found.apart, not_run=logins.NOT_RUN)


def _public_server(server: probe.Server, home: Path) -> Compared:
    """Ask a public server both ways; only the same answer is as good."""
    logs = home / "public" / "".join(letter if letter.isalnum() else "-" for letter in server.name)
    logs.mkdir(parents=True)
    try:
        direct, through = (ask(server, logs / "home", logs) for ask in (probe.direct, probe.through))
    except (BenchError, PartError) as error:
        return Compared(name=server.name, direct=0, through=0, worse=[str(error)])
    worse = [
        f"{asked}: {text[:WIDTH]} -> {through.get(asked, through.get(probe.BROKEN, 'absent'))[:WIDTH]}"
        for asked, text in direct.items()
        if through.get(asked) != text or asked == probe.BROKEN
    ]
    return Compared(name=server.name, direct=len(direct), through=len(direct) - len(worse), worse=worse)


if __name__ == "__main__":
    sys.exit(main())
