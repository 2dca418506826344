"""The matrix, as far as what the tests are installed with reaches; `make matrix` runs all of it.

And that it would tell: a server that runs what nobody judged, and a client that is worse off.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.matrix.clients import Meeting, _client_faults, meet
from tests.matrix.differential import Caller, _unjudged, compose, rows
from tests.matrix.rig import CLIENTS, LEGACY, MODERN, SERVERS, governed, serving

SERVER = next(server for server in SERVERS if server.name == "Python 2.3")
CLIENT = next(client for client in CLIENTS if client.name == "Python 2.3")


@pytest.mark.parametrize(("era", "denied"), [(LEGACY, "error"), (MODERN, "conceal"), (LEGACY, "tool_error")])
async def test_a_client_comes_through_every_refusal(era: str, denied: str, tmp_path: Path) -> None:
    """It connects, lists, calls, streams, cancels, is denied, is limited, and goes on after each."""
    came = await meet(Meeting(client=CLIENT, era=era, server=SERVER, denied=denied), tmp_path / "meeting")

    assert came.faults == ()


@pytest.mark.parametrize("era", [LEGACY, MODERN])
async def test_no_ambiguous_request_is_executed_unjudged(era: str, tmp_path: Path) -> None:
    """Every tool that ran did so with a record of its own, which allowed just that."""
    unjudged, executed = {}, 0
    async with serving(SERVER, tmp_path) as server, governed(server, tmp_path) as sidecar:
        caller = Caller(sidecar, era)
        for row in rows():
            if era in row.eras:
                effect = await caller.effect(row, server, sidecar)
                executed += len(effect.ran)
                if effect.unjudged:
                    unjudged[row.name] = effect

    assert unjudged == {}
    assert executed > 0, "nothing reached the server: the requests are not what they are meant to be"


@pytest.mark.parametrize(
    ("ran", "allowed", "unjudged"),
    [
        ([], [], 0),
        ([("mark", {"text": "good"})], [("mark", {"text": "good"})], 0),
        ([("mark", {"text": "evil"})], [("mark", {"text": "good"})], 1),
        ([("drop", {"table": "t"})], [("mark", {"table": "t"})], 1),
        ([("drop", {"table": "t"})] * 2, [("drop", {"table": "t"})], 1),
        ([("add", {"a": 2**53, "b": 1})], [("add", {"a": 2**53 + 1, "b": 1})], 0),  # the same double
        ([("add", {"a": 1, "b": 1})], [("add", {"a": True, "b": 1})], 1),
        ([("mark", {"text": "good"})], [("mark", {"text": "good", "more": 1})], 0),
        ([("mark", {"text": "good"})], [("mark", None)], 1),
    ],
)
def test_what_ran_without_its_own_record_is_counted(ran: list[Any], allowed: list[Any], unjudged: int) -> None:
    """By tool, arguments and number; what a tool ignores does not matter."""
    assert _unjudged(ran, allowed) == unjudged


def test_requests_have_names_of_their_own_and_can_be_written() -> None:
    """In every era that they are for."""
    table = rows()

    assert len({row.name for row in table}) == len(table)
    assert all(compose(row, era, 1, "s") for row in table for era in row.eras)


def test_a_client_that_is_left_dead_is_told() -> None:
    """Whatever it could not do after a refusal."""
    meeting = Meeting(client=CLIENT, era=LEGACY, server=SERVER)
    faults = list(
        _client_faults(meeting, {"denied": {"outcome": "error", "code": 403}, "call after denial": {"outcome": "hang"}})
    )

    assert "call after denial: {'outcome': 'hang'}" in faults
    assert not any(fault.startswith("denied") for fault in faults)
