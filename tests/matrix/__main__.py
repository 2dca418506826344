"""`make matrix`: client SDKs and ambiguous requests at real servers, through the sidecar; 1 when anything is amiss.

Prints two tables and writes them, whole, to build/matrix.json. `python -m tests.matrix shapes` prints a third, which is no
test: what clients make of refusals of other shapes.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tests.matrix.clients import Came, Meeting, meet, meetings
from tests.matrix.differential import Caller, Effect, rows
from tests.matrix.rig import CLIENTS, SERVERS, Program, governed, serving
from tests.matrix.shapes import SHAPES, measure

AT_ONCE: Final = 3  # meetings; most of their time is starting and waiting
OUTPUT: Final = Path("build/matrix.json")
Cells = dict[str, dict[str, tuple[Effect, Effect]]]  # row -> column -> (direct, through the sidecar)


async def main(only: str) -> int:
    """Run what *only* names, or both tables; return the exit status."""
    amiss = 0
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
        if only in ("", "clients"):
            came = await _clients(Path(scratch))
            amiss += _print_clients(came)
            said["clients"] = {each.meeting.label: {"steps": each.steps, "faults": each.faults} for each in came}
        if only in ("", "requests"):
            cells = await _requests(Path(scratch))
            amiss += _print_requests(cells)
            said["requests"] = {
                name: {column: {"direct": direct.label, "through": through.label, "unjudged": through.unjudged}
                       for column, (direct, through) in each.items()}
                for name, each in cells.items()
            }  # fmt: skip
        if only == "shapes":
            said["shapes"] = await measure(Path(scratch), 2 * AT_ONCE)
            lines = [[client, *shapes.values()] for client, shapes in said["shapes"].items()]
            _table("client", SHAPES, lines)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(said, indent=1))
    return 1 if amiss else 0


async def _clients(scratch: Path) -> list[Came]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, meeting: Meeting) -> Came:
        async with gate:
            came = await meet(meeting, scratch / f"meeting-{number}")
        for fault in came.faults:
            print(f"fault: {meeting.label}: {fault}", flush=True)
        return came

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(number, meeting)) for number, meeting in enumerate(meetings())]
    return [task.result() for task in running]


def _print_clients(came: list[Came]) -> int:
    """Print who came through; return how many did not."""
    found = {
        (each.meeting.client.name, each.meeting.era, each.meeting.server.name, each.meeting.denied): each
        for each in came
    }
    columns = [(server.name, "error") for server in SERVERS] + [
        ("Python 2.3", shape) for shape in ("tool_error", "conceal")
    ]
    heads = [name if shape == "error" else f"{name}, {shape}" for name, shape in columns]
    lines = []
    for client in CLIENTS:
        for era in client.eras:
            each = [found[client.name, era, *column] for column in columns]
            lines.append(
                [f"{client.name} ({era})", *("ok" if not one.faults else f"{len(one.faults)} faults" for one in each)]
            )
    _table("client", heads, lines)
    faulty = sum(1 for one in came if one.faults)
    print(f"clients: {len(came)} meetings, {faulty} with faults")
    return faulty


async def _requests(scratch: Path) -> Cells:
    """Return what every request leads to at every server, direct and through the sidecar, all servers at once."""
    columns = [(server, era) for server in SERVERS for era in server.eras]
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(_column(server, era, scratch / f"column-{number}"))
            for number, (server, era) in enumerate(columns)
        ]
    cells: Cells = {row.name: {} for row in rows()}
    for (server, era), task in zip(columns, running, strict=True):
        for name, effects in task.result().items():
            cells[name][f"{server.name} ({era})"] = effects
    return cells


async def _column(server: Program, era: str, directory: Path) -> dict[str, tuple[Effect, Effect]]:
    directory.mkdir()
    effects = {}
    async with serving(server, directory) as place, governed(place, directory) as sidecar:
        direct, through = Caller(place, era), Caller(sidecar, era)
        for row in rows():
            if era in row.eras:
                alone = await direct.effect(row, place, None)
                effects[row.name] = alone, await through.effect(row, place, sidecar)
    return effects


def _print_requests(cells: Cells) -> int:
    """Print what servers execute of each request when nothing stands before them; return how many ran unjudged."""
    columns = [f"{server.name} ({era})" for server in SERVERS for era in server.eras]
    lines, unjudged, alone, same = [], 0, 0, 0
    for name, effects in cells.items():
        line = [name]
        for column in columns:
            direct, through = effects.get(column, (None, None))
            if direct is None or through is None:
                line.append("")
                continue
            alone, same = alone + bool(direct.ran), same + bool(through.ran)
            unjudged += through.unjudged
            line.append(direct.label + ("" if not through.unjudged else " UNJUDGED"))
        lines.append(line)
    _table("request, at the server without a sidecar", columns, lines)
    print(f"requests: {len(cells)}, executed without a sidecar: {alone}, with one: {same}, unjudged: {unjudged}")
    return unjudged


def _table(corner: str, heads: Iterable[str], lines: Iterable[list[str]]) -> None:
    table = [[corner, *heads], *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "")))
