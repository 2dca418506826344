"""Decides in which revision of the protocol a message speaks.

Two eras: up to 2025-11-25 a client opens with `initialize` and may have a session; from 2026-07-28 on every request
stands alone and says its revision twice, in a header and in `_meta`. It is decided for each message, never for a server:
one endpoint may serve both. Refuses revisions that are not known here, and two that disagree: servers differ in which
of the two they follow. MCP 2026-07-28, versioning; MCP 2025-06-18 and later, transports, protocol version header.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from sidecar.errors import Reason, Refusal


class Revision(StrEnum):
    """A dated revision; dates compare as their text does."""

    V2024_11_05 = "2024-11-05"  # HTTP+SSE
    V2025_03_26 = "2025-03-26"  # Streamable HTTP; batches
    V2025_06_18 = "2025-06-18"
    V2025_11_25 = "2025-11-25"  # tasks
    V2026_07_28 = "2026-07-28"  # stateless

    @property
    def is_modern(self) -> bool:
        """Say whether every request stands alone, with its own `_meta` and headers that repeat the body."""
        return self is _MODERN  # an enumeration's hash is slow

    @property
    def has_batches(self) -> bool:
        """Say whether a body may be an array of messages."""
        return self is Revision.V2025_03_26


UNSAID: Final = Revision.V2025_03_26  # what a request without the header speaks, on Streamable HTTP
PREFIX: Final = "io.modelcontextprotocol/"  # of the protocol's own members of `_meta`
TASKS: Final = PREFIX + "tasks"  # the extension
VERSION: Final = PREFIX + "protocolVersion"
CAPABILITIES: Final = PREFIX + "clientCapabilities"
CLIENT: Final = PREFIX + "clientInfo"
MAX_VERSION_CHARS: Final = 64  # of an unknown one that is said back

_MODERN: Final = Revision.V2026_07_28  # the only one yet
_LAST_LEGACY: Final = Revision.V2025_11_25
_KNOWN: Final = {str(each): each for each in Revision}
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")


def of_header(header: str | None, unsaid: Revision = UNSAID) -> Revision:
    """Return what MCP-Protocol-Version alone says; *unsaid* without one. Raises Refusal(UNSUPPORTED_VERSION)."""
    if header is None:
        return unsaid
    known = _KNOWN.get(header)
    if known is None or (known is _MODERN and unsaid < UNSAID):
        raise _unsupported(header, unsaid, is_modern=bool(_DATE.fullmatch(header)) and header > _LAST_LEGACY)
    return known


def of_call(
    header: str | None, method: str, params: Mapping[str, Any], *, unsaid: Revision, is_request: bool
) -> Revision:
    """Return the revision of a request or notification whose MCP-Protocol-Version is *header*.

    Raises Refusal: HEADER_MISMATCH when header and body disagree, MALFORMED when `_meta` lacks what the revision
    demands, UNSUPPORTED_VERSION; each with the revision to answer in.
    """
    if method == "initialize":  # there is none in the later era, and it negotiates: nothing that it says is refused
        offered = _KNOWN.get(str(params.get("protocolVersion")), _LAST_LEGACY)
        return min(offered, _LAST_LEGACY)
    meta = params.get("_meta")
    if not isinstance(meta, dict) or VERSION not in meta:
        # Some clients of the older era send other members of the later one's `_meta`.
        revision = of_header(header, unsaid)
        if is_request and revision is _MODERN:
            raise _modern(Refusal(Reason.MALFORMED, f"params._meta must have {VERSION}"))
        return revision
    said = meta[VERSION]
    if not isinstance(said, str):
        raise _modern(Refusal(Reason.MALFORMED, f"params._meta.{VERSION} must be a string"))
    if is_request and not isinstance(meta.get(CAPABILITIES), dict) and said not in _LEGACY:
        raise _modern(Refusal(Reason.MALFORMED, f"params._meta must have {CAPABILITIES}, an object"))
    if header != said:
        what = "is missing" if header is None else "and the version in params._meta differ"
        raise _modern(Refusal(Reason.HEADER_MISMATCH, f"MCP-Protocol-Version {what}"))
    known = _KNOWN.get(said)
    if known is None or (known is _MODERN and unsaid < UNSAID):
        raise _unsupported(said, unsaid, is_modern=True)
    return known


_LEGACY: Final = frozenset(_KNOWN) - {str(_MODERN)}


def _modern(refusal: Refusal) -> Refusal:
    refusal.revision = _MODERN
    return refusal


def _unsupported(said: str, unsaid: Revision, *, is_modern: bool) -> Refusal:
    refusal = Refusal(Reason.UNSUPPORTED_VERSION, "this protocol version is not supported", detail=said[:256])
    if is_modern:
        _modern(refusal)
        # As servers of that era say it: one that says more than its server/discover contradicts itself.
        supported = [str(_MODERN)] if unsaid >= UNSAID else sorted(_LEGACY, reverse=True)
        refusal.data = {"supported": supported, "requested": said[:MAX_VERSION_CHARS]}
    return refusal
