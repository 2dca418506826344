"""sidecar.core.agreement: headers that repeat the body say the same."""

from typing import Any

import msgspec
import pytest

from sidecar.core import agreement
from sidecar.core.agreement import ParamHeader, ParamHeaders


def an_item(schema: Any, name: str = "t") -> tuple[str, msgspec.Raw]:
    """A tool as tools/list has it."""
    return name, msgspec.Raw(msgspec.json.encode({"name": name, "inputSchema": schema}))


def test_annotations_are_learned_at_any_depth() -> None:
    """By their exact path of properties."""
    headers = ParamHeaders()
    inner = {"type": "object", "properties": {"id": {"type": "string", "x-mcp-header": "Tenant-Id"}}}
    schema = {"properties": {"region": {"x-mcp-header": "Region"}, "tenant": inner, "plain": {"type": "string"}}}
    headers.learn([an_item(schema)])

    assert set(headers.known["t"]) == {
        ParamHeader(header=b"mcp-param-region", path=("region",)),
        ParamHeader(header=b"mcp-param-tenant-id", path=("tenant", "id")),
    }


@pytest.mark.parametrize(
    "schema",
    [
        None,
        [],
        {"properties": []},
        {"properties": {"a": 7}},
        {"x-mcp-header": "a"},
        {"properties": {"a": {"x-mcp-header": 7}}},
    ],
)
def test_odd_schemas_annotate_nothing(schema: Any) -> None:
    """What the server wrote there is not ours to refuse."""
    headers = ParamHeaders()
    headers.learn([an_item(schema)])

    assert headers.known == {}


def test_an_item_that_cannot_be_read_annotates_nothing() -> None:
    """The filter has refused it before."""
    headers = ParamHeaders()
    headers.learn([("t", msgspec.Raw(b'{"x-mcp-header"')), ("u", msgspec.Raw(b'["x-mcp-header"]'))])

    assert headers.known == {}


def test_a_tool_that_changes_is_learned_anew() -> None:
    """Also when it has no annotation any more."""
    headers = ParamHeaders()
    headers.learn([an_item({"properties": {"a": {"x-mcp-header": "A"}}})])
    headers.learn([an_item({"properties": {"a": {}}})])

    assert headers.known == {}


def test_the_tool_listed_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is bounded."""
    monkeypatch.setattr(agreement, "MAX_TOOLS", 2)
    headers = ParamHeaders()
    schema = {"properties": {"a": {"x-mcp-header": "A"}}}
    headers.learn([an_item(schema, name) for name in ("a", "b", "a", "c")])

    assert list(headers.known) == ["a", "c"]
