"""The suite's auth/* scenarios, direct and through the sidecar, compared check by check.

The sidecar answers in the server's place when a client asks for metadata, and refuses some calls before the server sees them.
What the suite's server checks there, it cannot see any more: such checks stand apart, each by its name, and are judged here by
what the client did at the sidecar. A scenario that no verifying sidecar can take part in is not run, and its reason is told.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sidecar.core.metadata import location
from tests.conformance import suite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

AT_A_TIME: Final = 2
LEGACY: Final = (
    "auth/metadata-default",
    "auth/metadata-var1",
    "auth/metadata-var2",
    "auth/metadata-var3",
    "auth/basic-cimd",
    "auth/scope-from-www-authenticate",
    "auth/scope-from-scopes-supported",
    "auth/scope-omitted-when-undefined",
    "auth/scope-step-up",
    "auth/scope-retry-limit",
    "auth/token-endpoint-auth-basic",
    "auth/token-endpoint-auth-post",
    "auth/token-endpoint-auth-none",
    "auth/pre-registration",
)
EXTENSIONS: Final = ("auth/client-credentials-basic", "auth/client-credentials-jwt")  # of no revision
SCENARIOS: Final = {
    "2025-11-25": LEGACY,
    "2026-07-28": (
        *LEGACY,
        "auth/resource-mismatch",
        "auth/offline-access-scope",
        "auth/offline-access-not-supported",
        "auth/authorization-server-migration",
        "auth/iss-supported",
        "auth/iss-not-advertised",
        "auth/iss-supported-missing",
        "auth/iss-wrong-issuer",
        "auth/iss-unexpected",
        "auth/iss-normalized",
        "auth/metadata-issuer-mismatch",
        *EXTENSIONS,
    ),
}
OWN_ORIGIN: Final = (
    "the MCP server is its own authorization server there; the sidecar is none, and forwards nothing to one"
)
BOUND: Final = (
    "the Python SDK's client sends no proofs, and the server's tokens are signed with a key that it never publishes"
)
NOT_RUN: Final = {
    "auth/2025-03-26-oauth-metadata-backcompat": OWN_ORIGIN,
    "auth/2025-03-26-oauth-endpoint-fallback": OWN_ORIGIN,
    "auth/dpop": BOUND,
    "auth/dpop-nonce": BOUND,
    "auth/enterprise-managed-authorization": "the authorization server takes grants for the server's own URL alone",
    "auth/wif-jwt-bearer": "the Python SDK's client has no such grant without a client secret",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the client did at the sidecar: where it asked for metadata, what its tokens are for, and what it got."""

    resource: str
    asked: tuple[str, ...]
    wanted: tuple[str, ...]
    got: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """Checks that the suite's server cannot make through the sidecar, why, and what has to hold instead."""

    reason: str
    instead: str
    holds: Callable[[Seen], bool]


ASKED: Final = Apart(
    reason="the sidecar answers for the server",
    instead="the client asked the sidecar, at the well-known path of its URL and nowhere else",
    holds=lambda seen: bool(seen.asked) and set(seen.asked) == {location(seen.resource)},
)
APART: Final[Mapping[str, Apart]] = {
    "prm-pathbased-requested": ASKED,
    "prm-priority-order": ASKED,
    "resource-parameter-matches-prm": Apart(
        reason="the server compares with its own metadata, the client was told the sidecar's URL",
        instead="the client's tokens are for the sidecar's URL",
        holds=lambda seen: bool(seen.wanted) and set(seen.wanted) == {seen.resource},
    ),
    "resource-mismatch-rejected": Apart(
        reason="the sidecar's metadata, which is right, stands in for the server's, which is wrong",
        instead="the client logs in, for the sidecar's URL, and is answered",
        holds=lambda seen: seen.got > 0 and set(seen.wanted) == {seen.resource},
    ),
}
REFUSED_EARLIER: Final = Apart(
    reason="the sidecar itself refuses the call that lacks the scope, so the server sees one token less",
    instead="the client went on, and was answered",
    holds=lambda seen: seen.got > 0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Both runs without the checks that stand apart, what those came to, and which of them got worse."""

    direct: suite.Verdicts
    through: suite.Verdicts
    apart: Mapping[str, str]  # check -> why it stands apart and what holds instead
    worse: list[str]


def run(revision: str, home: Path) -> Result:
    """Run every scenario of *revision* both ways."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        results = list(pool.map(lambda scenario: _scenario(scenario, revision, home), SCENARIOS[revision]))
    return Result(
        direct={check: verdict for each in results for check, verdict in each.direct.items()},
        through={check: verdict for each in results for check, verdict in each.through.items()},
        apart={check: said for each in results for check, said in each.apart.items()},
        worse=[said for each in results for said in each.worse],
    )


def _scenario(scenario: str, revision: str, home: Path) -> Result:
    def go(way: str, *options: str) -> suite.Verdicts:
        command = " ".join([sys.executable, "-m", "tests.conformance.auth_client", *options])
        asked = ("--command", command, "--scenario", scenario, "--spec-version", revision)
        force = ("--force",) if scenario in EXTENSIONS else ()
        return suite.run("client", *asked, *force, output=home / way / scenario)

    (home / "seen").mkdir(parents=True, exist_ok=True)
    file = home / "seen" / f"{scenario.rpartition('/')[2]}.json"
    direct, through = go("direct"), go("through", "--through", str(file.absolute()))
    if not file.exists():
        raise suite.SuiteError(f"{scenario}: its client did not start")
    told = json.loads(file.read_bytes())
    seen = Seen(resource=told["resource"], asked=tuple(told["asked"]), wanted=tuple(told["wanted"]), got=told["got"])
    return separate(direct, through, seen)


def separate(direct: suite.Verdicts, through: suite.Verdicts, seen: Seen) -> Result:
    """Return the runs of one scenario without what stands apart, and that judged by what was *seen*."""
    found = {check: APART[check.id] for check in direct if check.id in APART} | _refused_earlier(direct)
    return Result(
        direct={check: verdict for check, verdict in direct.items() if check not in found},
        through={check: verdict for check, verdict in through.items() if check not in found and check.id not in APART},
        apart={str(check): f"{each.reason}; instead: {each.instead}" for check, each in found.items()},
        worse=[f"{check}: not so: {each.instead}" for check, each in found.items() if not each.holds(seen)],
    )


def _refused_earlier(direct: suite.Verdicts) -> Mapping[suite.Check, Apart]:
    tokens = [each for each in direct if each.scenario == "auth/scope-step-up" and each.id == "valid-bearer-token"]
    return {max(tokens): REFUSED_EARLIER} if tokens else {}


def by_reason(apart: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with the number of its checks and their names."""
    counted = Counter(apart.values())
    return [
        f"apart {count}: {reason}: {', '.join(check for check, said in apart.items() if said == reason)}"
        for reason, count in counted.items()
    ]
