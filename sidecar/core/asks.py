"""Reads what the server asks of the client: sampling uses its model, elicitation its human, roots name its files.

Those are judged by policy like a call, with nothing allowed by default. ping and what follows up a task of the client's
pass: they reach nothing that an ask before them did not. Refuses every other method. MCP 2024-11-05 to 2025-11-25,
client features; MCP 2026-07-28, multi round-trip requests.
"""

from typing import Any, Final

import msgspec

from sidecar.core.message import MAX_ID_CHARS, Ask, Message, RequestId, Shape, Target
from sidecar.core.revision import Revision
from sidecar.errors import Reason, Refusal

ASKS: Final = frozenset({"sampling/createMessage", "elicitation/create", "roots/list"})
FOLLOW_UPS: Final = frozenset({"ping", "tasks/get", "tasks/result", "tasks/list", "tasks/cancel"})


class _Elicitation(msgspec.Struct):
    mode: str = "form"  # the only one before 2025-11-25
    url: str | None = None


_elicitation: Final = msgspec.json.Decoder(_Elicitation)


def read_ask(method: str, params: msgspec.Raw, request_id: RequestId | None, revision: Revision) -> Message:
    """Return the message by which the server asks the client; *request_id* is None where a response carries it.

    Raises Refusal(UNKNOWN_METHOD), and msgspec.DecodeError when *params* cannot be read.
    """
    target: Target = None
    if method == "elicitation/create":
        asked = _elicitation.decode(params)
        target = Ask(method=method, mode=asked.mode, url=asked.url)
    elif method in ASKS:
        target = Ask(method=method)
    elif method not in FOLLOW_UPS or request_id is None:
        detail = f"asked by the server: {method[:MAX_ID_CHARS]}"
        raise Refusal(Reason.UNKNOWN_METHOD, "this method is not known here", detail=detail)
    return Message(shape=Shape.REQUEST, method=method, id=request_id, target=target, params={}, revision=revision)


def read_url_elicitations(error: dict[str, Any], revision: Revision) -> list[Message]:
    """Return what a URL_ELICITATION_REQUIRED *error* asks of the client's human (MCP 2025-11-25 only)."""
    data = error.get("data")
    asked = data.get("elicitations") if isinstance(data, dict) else None
    urls = (
        [each.get("url") if isinstance(each, dict) else None for each in asked] if isinstance(asked, list) else [None]
    )
    return [
        Message(
            shape=Shape.REQUEST,
            method="elicitation/create",
            target=Ask(method="elicitation/create", mode="url", url=url if isinstance(url, str) else None),
            params={},
            revision=revision,
        )
        for url in urls
    ]
