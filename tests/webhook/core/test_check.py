"""webhook/core/check.py: what opa's output and Cedar's trees say is wrong; the rest is tried through `sidegate policy check`."""

import json
from typing import Any

import pytest

from webhook.core import check
from webhook.core.check import Finding

NULL, TEXT = {"type": "null"}, {"type": "string"}


def said(**error: Any) -> list[Finding]:
    """Return the findings of opa's output with one error."""
    return check.rego(json.dumps({"errors": [error]}).encode())


def test_an_error_of_opa_keeps_its_place() -> None:
    """File, line and column, and the fields that there are."""
    (found,) = said(
        message="undefined ref: input.x",
        location={"file": "policy/a.rego", "row": 3, "col": 7},
        details={"oneOf": ["y", "z"]},
    )

    assert str(found) == "a.rego:3:7: error: undefined ref: input.x\n  hint: one of y, z"


def test_a_comparison_with_null_is_no_error() -> None:
    """The schema that OPA sees does not say that null may be."""
    assert said(message="match error", details={"a": TEXT, "b": NULL}) == []
    assert said(message="match error", details={"a": TEXT, "b": {"type": "number"}}) != []


@pytest.mark.parametrize("output", [b"", b"nonsense", b"{}", b"[]", b'{"errors": [1]}'])
def test_output_without_errors_says_nothing(output: bytes) -> None:
    """Whatever else opa prints."""
    assert check.rego(output) == []


def test_a_finding_without_place_names_its_file() -> None:
    """No made-up line."""
    assert str(Finding(file="a", message="m")) == "a: error: m"


@pytest.mark.parametrize(
    ("condition", "record"),
    [
        ("context.args.a == 1", '{"a"?: Long}'),
        ("1 != context.args.a", '{"a"?: Long}'),
        ("context.args.a.b.c", '{"a"?: {"b"?: {"c"?: Bool}}}'),
        ('context.args.a like "x*"', '{"a"?: String}'),
        ("-context.args.a < 3", '{"a"?: Long}'),
        ("context.args.a.contains(1)", '{"a"?: Set<Long>}'),
        ('["x"].contains(context.args.a)', '{"a"?: String}'),
        ('context.args.a.containsAny(["x"])', '{"a"?: Set<String>}'),
        ("[1].containsAll(context.args.a)", '{"a"?: Set<Long>}'),
        ("context.args.a == [1]", '{"a"?: Set<Long>}'),
        ('if context.args.a then context.args.b else context.args.c == "x"', '{"a"?: Bool, "b"?: Bool, "c"?: String}'),
        ("context.args has a", '{"a"?: String}'),
        ("context.args has a && context.args.a has b", '{"a"?: {"b"?: String}}'),
        ('ip(context.args.a).isInRange(ip("10.0.0.0/8"))', '{"a"?: String}'),
        ('!context.args["odd name"]', '{"odd name"?: Bool}'),
        ("context.args.a == context.args.b", '{"a"?: String, "b"?: String}'),
        ("principal == resource", "{}"),
    ],
)
def test_arguments_get_the_types_that_they_are_taken_for(condition: str, record: str) -> None:
    """What the contract leaves open, the policies say themselves."""
    tree = json.loads(
        check.cedarpy.policies_to_json_str(f"permit (principal, action, resource) when {{ {condition} }};")
    )

    assert f"context: {{args: {record}, claims: {{}}," in check.cedar_schema(list(tree["staticPolicies"].values()))


def test_a_policy_in_toolhives_words_is_not_validated() -> None:
    """Our schema knows none of them; what never matches is found all the same."""
    text = 'permit (principal == Client::"x", action == Action::"call_tool", resource) when { 1 == 2 };'

    assert [each.message for each in check.cedar({"a.cedar": text}, vocabulary="toolhive")] == [
        "never matches: 1 is not 2"
    ]


def test_a_policys_place_is_behind_comments_and_braces() -> None:
    """A semicolon in a text or a record ends no policy."""
    first = 'permit (principal, action, resource) when { "a;b" == {x: 1}["x"] };'
    text = f"// ;\n{first}\n\n  forbid (principal, action, resource) when {{ false }};"

    assert [(each.line, each.column) for each in check.cedar({"a.cedar": text}, vocabulary="toolhive")] == [(4, 3)]
