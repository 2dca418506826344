"""The official conformance suite: run it, read its checks, say what got worse.

A check is worse when its verdict through the sidecar ranks below the direct one. A check that only one of two runs
made counts by what it says: lost, it was a success; added, it is a failure.
Source: @modelcontextprotocol/conformance, README "Output" (one directory a scenario, holding checks.json).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from tests.parts import part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

RUN_S: Final = 150.0  # a set takes 3 to 8 s; scenarios that wait for what never comes, 30 s each
SCENARIO: Final = re.compile(r"^(?:server-)?(?P<name>.+?)-\d{4}-\d\d-\d\dT[\d-]+Z$")
RANKS: Final = {"FAILURE": 0, "WARNING": 1, "SKIPPED": 2, "SUCCESS": 3}  # INFO is not a verdict


class SuiteError(Exception):
    """The suite itself did not run."""


@dataclass(frozen=True, slots=True, order=True)
class Check:
    """Which check: *occurrence* counts the checks of one id in one scenario, from 1."""

    scenario: str
    id: str
    occurrence: int

    def __str__(self) -> str:
        """Return it as one word."""
        return f"{self.scenario}/{self.id}" + (f"#{self.occurrence}" if self.occurrence > 1 else "")


Verdicts: TypeAlias = "Mapping[Check, str]"


def run(side: str, *options: str, output: Path, env: Mapping[str, str] | None = None) -> Verdicts:
    """Run the suite against a *side*, server or client, and return what it found. Raises SuiteError."""
    command = [part("node"), part("mcp-conformance"), side, *options, "--output-dir", output]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_S, check=False, env=env, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise SuiteError(f"{' '.join(map(str, options))}: no end within {RUN_S:.0f} s") from error
    found = read(output)
    if not found:
        raise SuiteError(f"{' '.join(map(str, options))}: no checks: {done.stdout[-500:]}{done.stderr[-500:]}")
    return found


def read(output: Path) -> Verdicts:
    """Return the verdicts in *output*."""
    verdicts: dict[Check, str] = {}
    for path in sorted(output.glob("**/checks.json")):
        named = SCENARIO.match(path.parent.name)
        if named is None:
            raise SuiteError(f"{path}: its directory names no scenario")
        prefix = "" if path.parent.parent == output else f"{path.parent.parent.relative_to(output)}/"
        verdicts.update(_numbered(prefix + named["name"], json.loads(path.read_bytes())))
    return verdicts


def _numbered(scenario: str, checks: Sequence[Mapping[str, str]]) -> Iterator[tuple[Check, str]]:
    seen: Counter[str] = Counter()
    for check in checks:
        if check["status"] in RANKS:
            seen[check["id"]] += 1
            yield Check(scenario, check["id"], seen[check["id"]]), check["status"]


def successes(verdicts: Verdicts) -> int:
    """Return how many checks succeeded."""
    return sum(verdict == "SUCCESS" for verdict in verdicts.values())


def worse(direct: Verdicts, through: Verdicts) -> list[str]:
    """Return each check that is worse *through* the sidecar than *direct*, with both verdicts."""
    found = []
    for check in sorted({*direct, *through}):
        before, after = direct.get(check), through.get(check)
        if before is None:
            is_worse = after in {"FAILURE", "WARNING"}
        elif after is None:
            is_worse = before == "SUCCESS"
        else:
            is_worse = RANKS[after] < RANKS[before]
        if is_worse:
            found.append(f"{check}: {before or 'absent'} -> {after or 'absent'}")
    return found
