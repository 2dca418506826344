"""The table of public servers can be read, and names what there is."""

from tests.parts import PARTS
from tests.public_servers.probe import table


def test_the_table_names_parts_and_methods_that_exist() -> None:
    """A slip in it is found here, without a download."""
    servers = table()

    assert len({server.name for server in servers}) == len(servers) >= 8
    assert {server.part for server in servers if server.part} <= PARTS.keys()
    assert {server.transport for server in servers} == {"http", "sse", "stdio"}
    assert all(server.requests for server in servers)
