"""Every client through the sidecar to every server: it must come through every refusal, and see only what it may.

A walk that came to anything else is a fault, in words. A client that speaks both eras falls back by itself at a server
that speaks only the older one.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.matrix.rig import CLIENTS, LEGACY, MODERN, SERVERS, Place, Program, governed, serving, walk
from tests.parts import PartError

ALLOWED: Final = {"add", "count", "mark", "paced", "wait"}
LONGEST_S: Final = 240.0
SESSIONLESS: Final = "Go 1.8 stateless"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """A client that starts in an era, a server, and how the profile wants denials to look."""

    client: Program
    era: str
    server: Program
    denied: str = "error"

    @property
    def label(self) -> str:
        """What a table calls it."""
        return f"{self.client.name} ({self.era}) at {self.server.name}, {self.denied}"

    @property
    def speaks(self) -> str:
        """The era that both speak in the end."""
        return self.era if self.era in self.server.eras else LEGACY


@dataclass(frozen=True, slots=True, kw_only=True)
class Came:
    """What came of a meeting."""

    meeting: Meeting
    steps: dict[str, dict[str, Any]]
    faults: tuple[str, ...]


def meetings() -> Iterator[Meeting]:
    """Every client at every server with the default shape of denials; the other shapes at one server of both eras."""
    walkers = [(client, era) for client in CLIENTS for era in client.eras]
    for server in SERVERS:
        yield from (Meeting(client=client, era=era, server=server) for client, era in walkers)
    dual = next(server for server in SERVERS if server.name == "Python 2.3")
    for denied in ("tool_error", "conceal"):
        yield from (Meeting(client=client, era=era, server=dual, denied=denied) for client, era in walkers)


async def meet(meeting: Meeting, directory: Path) -> Came:
    """Let them meet through a sidecar of their own."""
    directory.mkdir(parents=True)
    try:
        async with (
            asyncio.timeout(LONGEST_S),
            serving(meeting.server, directory) as server,
            governed(server, directory, denied=meeting.denied) as sidecar,
        ):
            steps = await walk(meeting.client, meeting.era, sidecar.url, directory)
            faults = [
                *_client_faults(meeting, steps),
                *_server_faults(meeting, server),
                *_audit_faults(meeting, sidecar),
            ]
    except (AssertionError, TimeoutError, PartError) as error:
        return Came(meeting=meeting, steps={}, faults=(f"did not happen: {error!r}",))
    return Came(meeting=meeting, steps=steps, faults=tuple(faults))


def _client_faults(meeting: Meeting, steps: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say where the client was worse off than without a sidecar, beyond being refused."""
    sum_ = {"outcome": "result", "is_error": False, "text": "3"}
    said = steps.get("connect", {}).get("text", "")
    expected: dict[str, dict[str, Any]] = {
        "connect": {"outcome": "result", "text": said},
        "call": sum_,
        "stream": {"outcome": "result", "is_error": False, "text": "done", "progress": [f"step {n}" for n in range(3)]},
        "cancel": {"outcome": "cancelled"},
        "call after cancel": sum_,
        "call after denial": sum_,
        "within limit": {"outcome": "result", "is_error": False, "text": "once"},
        "call after limit": sum_,
        "close": {"outcome": "result"},
    }
    for name, wanted in expected.items():
        if steps.get(name) != wanted:
            yield f"{name}: {steps.get(name)}"
    if (said >= "2026") != (meeting.speaks == MODERN):
        yield f"connect: speaks {said or 'nothing'}"
    for name in ("list", "list again"):
        if set(steps.get(name, {}).get("names", ())) != ALLOWED:
            yield f"{name}: {steps.get(name)}"
    for name, codes in (("denied", {"error": 403, "conceal": -32602}), ("limited", {"error": 429, "conceal": 429})):
        step = steps.get(name, {})
        refused = step.get("code") == codes.get(meeting.denied)
        if meeting.denied == "tool_error":  # what is limited may be said either way
            refused = step.get("is_error") is True or (name == "limited" and step.get("code") == 429)
        if not refused:
            yield f"{name}: {step}"


def _server_faults(meeting: Meeting, server: Place) -> Iterator[str]:
    """Say what the server did that it should not have, or the reverse."""
    ran = [line["tool"] for line in server.lines()]
    if "drop" in ran:
        yield "the denied tool ran"
    if ran.count("paced") != 1:
        yield f"the limited tool ran {ran.count('paced')} times"
    # Without sessions there is nothing by which an older client's cancellation finds its call, direct or not.
    sessionless = meeting.server.name == SESSIONLESS and meeting.speaks == LEGACY
    if ("cancelled" in ran) == sessionless:
        yield "the cancellation did not reach the server" if not sessionless else "a cancellation reached the server"


def _audit_faults(meeting: Meeting, sidecar: Place) -> Iterator[str]:
    """Say which refusals were not written down, or should not have been."""
    reasons = [line["decision"]["reason"] for line in sidecar.lines()]
    for reason in ("denied", "throttled"):
        if reasons.count(reason) != 1:
            yield f"{reasons.count(reason)} records say {reason}"
    expected = {None, "denied", "throttled"}
    if meeting.speaks == MODERN or meeting.server.name == SESSIONLESS:
        expected.add("unsolicited")  # Go gives a call up and says so afterwards, when there is no call any more
    if other := set(reasons) - expected:
        yield f"records say {sorted(other)}"
