"""webhook/core/cedar.py: where Cedar is wrong, and what of the document it reads."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.cedar import CedarEngine
from sidecar.core.projection import Projection
from tests.sidecar.questions import a_question, a_user
from webhook.core.cedar import read_paths
from webhook.core.compile import CEDAR_ENTITIES, Compiled
from webhook.core.compile import cedar as compiled
from webhook.errors import BadPolicy

PERMIT = "permit (principal, action, resource);"


def found(policies: Mapping[str, str], schema: str | None = None) -> Compiled:
    """Return what the control plane makes of what is read."""
    return compiled(read_paths(policies, schema))


@pytest.mark.parametrize(
    ("condition", "paths"),
    [
        ("true", set()),
        ("context.args.x == 1", {"/tool/args/x", "/prompt/args/x"}),
        ("context.args has x", {"/tool/args/x", "/prompt/args/x"}),
        ("context.claims has y.z", {"/user/claims/y", "/user/claims/y/z"}),
        ('context.args["a/b"].c like "x*"', {"/tool/args/a~1b/c", "/prompt/args/a~1b/c"}),
        ("context.args == {a: 1}", {"/tool/args", "/prompt/args"}),
        ("context has args", {"/tool/args", "/prompt/args"}),
        ("[context.claims.role].contains(1)", {"/user/claims/role"}),
        ('(if context.agent.session == "x" then context.request else context.request).time > 1', {"/agent/session", "/request"}),
        ('context.elicitation.mode == "url"', {"/elicitation/mode"}),
        ("context.delegation.isEmpty()", {"/delegation"}),
        ("context.nothing.at.all", set()),
        ("context has nothing", set()),
    ],
)  # fmt: skip
def test_what_cedar_policies_read(condition: str, paths: set[str]) -> None:
    """Every mention of the context counts; entities are always made."""
    text = f"{PERMIT} forbid (principal, action, resource) when {{ {condition} }};"

    assert found({"a.cedar": text}).reads == {*CEDAR_ENTITIES, *paths}


@pytest.mark.parametrize(
    "condition",
    ["context == {}", '{"k": context}.k.args.x', "[context].contains(1)", "(if true then context else context).args"],
)
def test_a_context_used_as_a_value_proves_nothing(condition: str) -> None:
    """Then the whole document is handed over."""
    text = f"permit (principal, action, resource) when {{ {condition} }};"

    assert found({"a.cedar": text}).reads is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("permit (principal, action, resource) when { && };", (1, 45)),
        (f"{PERMIT}\npermit (princpal, action, resource);", (2, 9)),
        (
            f'{PERMIT}\n// permit (\npermit (principal, action == Action::"x y", resource)\nwhen {{\n  context.x. }};',
            (5, 14),
        ),
        ('permit (principal, action, resource) when { nosuch("x") };', (1, 45)),
        (f"{PERMIT}\npermit (principal,", (2, 19)),
        (f'{PERMIT}\nforbid (principal, action, resource) when {{ "open }};', (2, 45)),
        (f"{PERMIT}&", (1, 38)),
        ("é", (1, 1)),
    ],
)
def test_where_cedar_is_wrong(text: str, place: tuple[int, int]) -> None:
    """Line and column of what the message is about, though Cedar's parser names neither."""
    with pytest.raises(BadPolicy) as caught:
        found({"good.cedar": PERMIT, "bad.cedar": text})

    assert (caught.value.file, caught.value.line, caught.value.column) == ("bad.cedar", *place)


TEXT = """
permit (principal, action, resource) when { context.args has a && context.args.a == principal.role };
permit (principal, action, resource) when { context.args has b.c && context.args.b.c };
permit (principal, action, resource) when { context.args has d && !(context.args.d has e) && context.claims has f };
forbid (principal, action, resource) when { context.args has g && [context.args.g].contains(context.args.h) };
"""
CEDAR_VALUES = st.recursive(
    st.sampled_from([True, False, 1, "analyst"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ce"), inner),
    max_leaves=3,
)
MEMBERS = st.dictionaries(st.sampled_from("abcdefgh"), CEDAR_VALUES)


@given(MEMBERS, MEMBERS)
def test_projection_does_not_change_a_verdict(arguments: dict[str, Any], claims: dict[str, Any]) -> None:
    """What the policies do not read may be left out, errors included."""
    policies = {"a.cedar": TEXT}
    question = a_question("x", arguments, user=a_user(claims=claims))
    projection = Projection(found(policies).reads)

    whole, narrow = CedarEngine(policies), CedarEngine(policies, projection=projection)
    assert whole.decide(question) == narrow.decide(question)


def test_a_template_is_refused() -> None:
    """Nobody links it, so it would decide nothing."""
    with pytest.raises(BadPolicy, match=r"a\.cedar: a template"):
        found({"a.cedar": "permit (principal == ?principal, action, resource);"})


SCHEMA = """
entity Role; entity User in [Role]; entity Tool { name: String };
action "tools/call" appliesTo { principal: User, resource: Tool, context: { args: { destructive?: Bool } } };
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "forbid (principal, action, resource) when { context.args.destructive };",
            "optional attribute `args.destructive`",
        ),
        ('permit (principal in Rolle::"x", action, resource);', "unrecognized entity type `Rolle`"),
    ],
)
def test_policies_are_validated_against_a_schema(text: str, reason: str) -> None:
    """A forbid that could fail, or a type that does not exist, is refused where it is written."""
    with pytest.raises(BadPolicy, match=reason):
        found({"a.cedar": text}, SCHEMA)


def test_valid_policies_pass_the_schema() -> None:
    """Asking first is enough."""
    text = "forbid (principal, action, resource) when { context.args has destructive && context.args.destructive };"

    assert found({"a.cedar": text}, SCHEMA).reads


def test_a_bad_schema_is_refused() -> None:
    """And named as the culprit."""
    with pytest.raises(BadPolicy, match=r"schema\.cedarschema: "):
        found({"a.cedar": PERMIT}, "entity {")


def test_toolhives_words_read_what_its_entities_hold() -> None:
    """All claims and arguments are attributes there."""
    reads = compiled(read_paths({"a.cedar": PERMIT}, vocabulary="toolhive")).reads

    assert reads == {"/user", "/method", "/tool", "/prompt", "/resource", "/server/name"}
