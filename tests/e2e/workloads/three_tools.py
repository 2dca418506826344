"""The three tools of the article's rules, on the official SDK; it knows nothing of Sidegate."""

import sys
import time

from mcp.server import MCPServer

server = MCPServer("records")


@server.tool()
def read_schema() -> str:
    """Return the schema."""
    return "customers(id integer, name text)"


@server.tool()
def list_tables() -> list[str]:
    """Return the tables."""
    return ["customers"]


@server.tool()
def execute_query(sql: str, password: str = "", destructive: bool = False, seconds: float = 0) -> str:
    """Run a query; it can take *seconds*."""
    time.sleep(seconds)
    return f"ran {sql!r}, {len(password)} characters of password, destructive={destructive}"


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="0.0.0.0", port=int(sys.argv[1]))
