"""webhook/core/contract.py: the schemas describe the document that engines see, field by field."""

import json
from typing import Any

import cedarpy
import jsonschema
import pytest

from sidecar.core.authorise import Question
from sidecar.core.cedar import translate
from sidecar.core.message import Ask, Message, Prompt, Resource, Shape
from tests.sidecar.questions import a_question, a_user
from webhook.core.contract import ACTIONS, FIELDS, cedar_schema, json_schema

ASK = Ask(method="elicitation/create", mode="url", url="https://x.test")
QUESTIONS = {
    "tool": a_question("t", {"a": [1, {"b": None}]}, user=a_user(email="x@y.test", claims={"c": 1.5})),
    "prompt": a_question(Prompt(name="p", arguments={}), nobody=True),
    "resource": a_question(Resource(uri="file:///x"), workload=None),
}


def asked(question: Question) -> Question:
    """Return the question of the server's own request."""
    message = Message(shape=Shape.REQUEST, method=ASK.method, id=1, target=ASK, params={})
    return Question(
        principal=question.principal, message=message, server=question.server, agent=question.agent, time_ns=1
    )


def paths(value: Any, prefix: str = "") -> set[str]:
    """Return the path of every member, not those inside what callers write."""
    found: set[str] = set()
    for name, member in value.items() if isinstance(value, dict) else ():
        path = f"{prefix}.{name}".lstrip(".")
        found.add(path)
        if name not in ("args", "claims"):
            found |= paths(member, path)
    return found


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_document_is_as_the_schema_says(kind: str) -> None:
    """Every question is valid, and one with a field more is not."""
    document = QUESTIONS[kind].document()

    jsonschema.validate(document, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "more": 1}, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "server": {**document["server"], "more": 1}}, json_schema())


def test_the_table_has_the_documents_fields_and_no_others() -> None:
    """A field that is added to the document must be added to the contract."""
    seen = set().union(*(paths(each.document()) for each in (*QUESTIONS.values(), asked(QUESTIONS["tool"]))))

    assert {name for name, _, _ in FIELDS if not name.startswith("delegation.")} == seen


@pytest.mark.parametrize("kind", QUESTIONS)
def test_cedars_schema_fits_what_cedar_is_asked(kind: str) -> None:
    """Request and entities are valid under it."""
    document = QUESTIONS[kind].document()
    if document["tool"]:
        document["tool"]["args"], document["user"]["claims"] = {"n": 1}, {"c": "x"}
    request, entities = translate(document)
    schema = cedarpy.Schema.from_str(cedar_schema("{n?: Long}", "{c?: String}"))

    described = [json.loads(each)[0] for each in entities]
    result = cedarpy.is_authorized(request, "permit (principal, action, resource);", described, schema=schema)

    assert result.diagnostics.errors == []
    assert result.decision is cedarpy.Decision.Allow


def test_every_method_that_is_judged_has_an_action() -> None:
    """What a policy can be asked about."""
    assert set(ACTIONS) >= {each.message.method for each in QUESTIONS.values()} | {ASK.method}
