"""sidecar.shell.snapshot: what a bundle and the process make of a snapshot."""

import pytest

from sidecar.core.bundle import Bundle
from sidecar.core.profile import Profile
from sidecar.shell.snapshot import Snapshots
from tests.builders import a_server, a_snapshot
from tests.fakes import a_path


@pytest.mark.parametrize(
    ("process", "profile", "known"),
    [
        ((), (), frozenset()),
        (("localhost:8080",), (), frozenset({"localhost:8080"})),
        ((), ("mcp.test",), frozenset({"mcp.test"})),
        (("localhost:8080",), ("mcp.test",), frozenset({"localhost:8080", "mcp.test"})),
    ],
)
async def test_the_names_of_process_and_profile_add_up(
    process: tuple[str, ...], profile: tuple[str, ...], known: frozenset[str]
) -> None:
    """Each is written by who knows them; without any, every Host is taken."""
    bundle = Bundle(revision="r2", files={}, profile=Profile(server=a_server(hosts=profile)))
    async with a_path(a_snapshot()) as path:
        await (await path.dial()).close()
        await Snapshots(path.serving, hosts=frozenset(process), work_dir=None).activate(bundle)
        snapshot = path.serving.snapshot

    assert snapshot is not None
    assert (snapshot.revision, snapshot.hosts) == ("r2", known)
