"""An MCP server that asks a protected API on behalf of whoever calls it; it knows nothing of Sidegate.

Arguments: port, URL of the API. It sends on the Authorization header that its own call came with, as such servers do.
"""

import sys
import urllib.error
import urllib.request

from mcp.server import MCPServer
from mcp.server.mcpserver import Context

server = MCPServer("orders")


@server.tool()
def my_orders(ctx: Context) -> str:
    """Return the orders of the user, as the API tells them."""
    headers = ctx.headers or {}
    request = urllib.request.Request(sys.argv[2], headers={"authorization": headers.get("authorization", "")})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return f"refused by the API: {error.code}"


@server.tool()
def headers(ctx: Context) -> dict[str, str]:
    """Return the headers that this call came with."""
    return {name.lower(): value for name, value in (ctx.headers or {}).items()}


if __name__ == "__main__":
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
