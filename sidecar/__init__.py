"""The data plane: one process in front of one unmodified MCP server."""
