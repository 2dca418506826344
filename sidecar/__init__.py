"""The data plane: one process in front of one unmodified MCP server."""

__version__ = "0.1.0"
