"""Decides what a 2024-11-05 stream may announce as the place to post to: always a path of this server's.

An absolute URL names the server as it knows itself, on loopback; clients refuse another origin than the stream's, so
only its path and query go on. Refuses what clients could resolve to somewhere else. MCP 2024-11-05, transports; RFC
3986, 5.2; WHATWG URL reads a backslash as a slash.
"""

import re
from typing import Final
from urllib.parse import urljoin, urlsplit

from sidecar.errors import Reason, Refusal

MAX_CHARS: Final = 512  # as names that are remembered (sidecar/core/ownership.py)

_HERE: Final = "http://server"  # stands for the origin that the client dialled
_VISIBLE: Final = re.compile(r"[!-\[\]-~]+", re.ASCII)  # no backslash


def target_of(announced: bytes, stream_path: str) -> str:
    """Return path and query of the endpoint that a stream at *stream_path* announces; raises Refusal(UPSTREAM)."""
    text = announced.decode("latin-1").strip(" ")
    if _VISIBLE.fullmatch(text):
        try:
            parts = urlsplit(urljoin(_HERE + stream_path, text))
        except ValueError:  # brackets that hold no address
            parts = urlsplit("")
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        is_path = target.startswith("/") and not target.startswith("//")  # two would name another host
        if parts.scheme in ("http", "https") and is_path and len(target) <= MAX_CHARS:
            return target
    raise Refusal(Reason.UPSTREAM, "the server's stream cannot be read", detail=f"endpoint {text[:MAX_CHARS]!r}")
