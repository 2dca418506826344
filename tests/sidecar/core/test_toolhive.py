"""sidecar/core/toolhive.py: the question in ToolHive's words, and what it has no words for."""

import json
from typing import Any

import pytest

from sidecar.core.cedar import Unspeakable
from sidecar.core.message import Prompt, Resource
from sidecar.core.toolhive import translate
from tests.sidecar.questions import a_question, a_user


def said(*asked: Any, **changes: Any) -> tuple[Any, Any]:
    """Return request and entities of a question."""
    request, entities = translate(a_question(*asked, **changes).document())
    return request, [json.loads(each)[0] for each in entities]


def test_a_tool_call_is_told_as_toolhive_tells_it() -> None:
    """Client, action, tool in its server; claims and arguments with their prefixes, in the context and as attributes."""
    user = a_user(
        groups=("ops",), roles=("dev", "ops"), claims={"email": "x@y.test", "nested": {"a": [1, None]}, "no": None}
    )

    request, (client, tool) = said("deploy", {"s": "x", "n": 2, "o": {}, "z": None}, user=user)

    number = {"__extn": {"fn": "decimal", "arg": "2.0000"}}
    claims = {"claim_email": "x@y.test", "claim_nested": {"a": [{"__extn": {"fn": "decimal", "arg": "1.0000"}}]}}
    arguments = {"arg_s": "x", "arg_n": number, "arg_o_present": True, "arg_z_present": True}
    assert request["principal"] == {"type": "Client", "id": "u-1"}
    assert request["action"] == {"type": "Action", "id": "call_tool"}
    assert request["resource"] == {"type": "Tool", "id": "deploy"}
    assert json.loads(request["context"]) == {**claims, **arguments}
    assert client["attrs"] == claims
    assert [each["id"] for each in client["parents"]] == ["ops", "dev"]
    assert tool["attrs"] == {**arguments, "name": "deploy", "operation": "call", "feature": "tool"}
    assert tool["parents"] == [{"type": "MCP", "id": "database"}]


def test_prompts_and_resources_have_actions_of_their_own() -> None:
    """A URI's punctuation becomes underscores in the id, and stays in the attributes."""
    prompt, _ = said(Prompt(name="p", arguments={}))
    resource, (_, entity) = said(Resource(uri="file:///a b.txt?x=1&y#z"))

    assert (prompt["action"]["id"], prompt["resource"]) == ("get_prompt", {"type": "Prompt", "id": "p"})
    assert (resource["action"]["id"], resource["resource"]["id"]) == ("read_resource", "file____a_b_txt_x_1_y_z")
    assert (entity["attrs"]["name"], entity["attrs"]["uri"]) == ("file:///a b.txt?x=1&y#z",) * 2


def deep(levels: int) -> Any:
    """Return so many nested arrays."""
    return [deep(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nobody": True}, "no principal without a user"),
        ({"arguments": {"n": 1e300}}, "beyond Cedar's decimals"),
        ({"arguments": {"n": float("inf")}}, "beyond Cedar's decimals"),
        ({"user": a_user(claims={"x": {"__entity": {"type": "Client", "id": "admin"}}})}, "reserves"),
        ({"user": a_user(claims={"x": deep(12)})}, "nested that deeply"),
    ],
)
def test_what_toolhive_has_no_words_for_is_refused(changes: dict[str, Any], reason: str) -> None:
    """A denial, never a question with something left out."""
    with pytest.raises(Unspeakable, match=reason):
        said("t", **changes)


def test_other_methods_are_refused() -> None:
    """The server's own requests have no action there."""
    with pytest.raises(Unspeakable, match="no action for sampling/createMessage"):
        translate({**a_question().document(), "method": "sampling/createMessage"})
