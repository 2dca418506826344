"""`python -m tests.conformance`: every set of the official suite, direct and through the sidecar.

Prints one line a set and writes build/conformance.json. Fails when a check is worse through the sidecar, and when a
reference server is itself worse than it has to be: then 0 worse would mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.errors import BenchError
from tests.conformance import parties, suite
from tests.parts import PartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

RESULT: Final = Path("build/conformance.json")
CLIENT: Final = Path(__file__).with_name("client.py")
SERVERS: Final[dict[str, Callable[[Path], AbstractContextManager[int]]]] = {
    "typescript": parties.typescript,
    "python": parties.python,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSet:
    """Scenarios against a server, and how many checks have to succeed without the sidecar."""

    name: str
    options: tuple[str, ...]
    least: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSet:
    """Scenarios against a client at one revision; auth/* are about tokens, and not among them."""

    name: str
    revision: str
    scenarios: tuple[str, ...]
    least: int


SERVER_SETS: Final = (
    ServerSet(name="2025-03-26", options=("--suite", "all", "--spec-version", "2025-03-26"), least=3),
    ServerSet(name="2025-06-18", options=("--suite", "all", "--spec-version", "2025-06-18"), least=56),
    ServerSet(name="2025-11-25", options=("--requirements", "2025-11-25"), least=84),
    ServerSet(name="2026-07-28", options=("--requirements", "2026-07-28"), least=163),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One set, run both ways."""

    name: str
    direct: suite.Verdicts
    through: suite.Verdicts
    least: int

    @property
    def worse(self) -> list[str]:
        """Return what got worse, or why the comparison is worth nothing."""
        succeeded = suite.successes(self.direct)
        if succeeded < self.least:
            return [f"direct: {succeeded} checks succeeded, {self.least} have to"]
        return suite.worse(self.direct, self.through)

    def line(self) -> str:
        """Return what is printed."""
        direct, through = suite.successes(self.direct), suite.successes(self.through)
        return f"{self.name:24} direct {direct:4}  through {through:4}  worse {len(self.worse)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when nothing is worse."""
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="only sets whose name contains WORD"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and the suite's own output there")
    options = parser.parse_args(arguments)
    started_s = time.monotonic()
    results = {}
    try:
        with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
            home = options.keep or Path(scratch)
            home.mkdir(parents=True, exist_ok=True)
            for compared in _every_set(home, options.only):
                print(compared.line(), *compared.worse, sep="\n    ", flush=True)
                results[compared.name] = {
                    "direct": suite.successes(compared.direct),
                    "through": suite.successes(compared.through),
                    "worse": compared.worse,
                }
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
    for server, start in SERVERS.items():
        wanted = [each for each in SERVER_SETS if _is_wanted(f"{server} {each.name}", only)]
        if not wanted:
            continue
        with contextlib.ExitStack() as stack:
            at = home / server
            at.mkdir(exist_ok=True)
            port = stack.enter_context(start(at))
            front = stack.enter_context(parties.sidecar(at, f"http://127.0.0.1:{port}/mcp"))
            for each in wanted:
                yield _server_set(each, server, at, port, front)
    for each in CLIENT_SETS:
        if _is_wanted(each.name, only):
            yield _client_set(each, home)


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return all(word in name for word in only)


def _server_set(each: ServerSet, server: str, at: Path, port: int, front: int) -> Compared:
    def run(way: str, to: int) -> suite.Verdicts:
        url = f"http://localhost:{to}/mcp"  # dns-rebinding-protection takes no other name
        return suite.run("server", "--url", url, *each.options, output=at / f"{each.name}-{way}")

    return Compared(
        name=f"{server} {each.name}", direct=run("direct", port), through=run("through", front), least=each.least
    )


def _client_set(each: ClientSet, home: Path) -> Compared:
    def run(way: str, *options: str) -> suite.Verdicts:
        verdicts: dict[suite.Check, str] = {}
        command = " ".join([sys.executable, "-m", "tests.conformance.client", *options])
        for scenario in each.scenarios:
            output = home / f"{each.name}-{way}" / scenario
            asked = ("--command", command, "--scenario", scenario, "--spec-version", each.revision)
            verdicts.update(suite.run("client", *asked, output=output))
        return verdicts

    return Compared(name=each.name, direct=run("direct"), through=run("through", "--through"), least=each.least)


if __name__ == "__main__":
    sys.exit(main())
