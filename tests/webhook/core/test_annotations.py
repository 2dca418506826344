"""The annotations of a pod."""

from dataclasses import fields

import pytest

from webhook.core.annotations import TABLE, Overrides, read
from webhook.errors import Denial, DenyCode


def test_every_line_of_the_table_has_a_field_and_a_good_example() -> None:
    """The reference page is made of the table, so its examples must work."""
    for line in TABLE:
        overrides = read({f"sidegate.dev/{line.name}": line.example})

        assert getattr(overrides, line.field) is not None
    assert {line.field for line in TABLE} == {each.name for each in fields(Overrides)}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("port", "0", "a port from 1 to 65535"),
        ("port", "65536", "a port from 1 to 65535"),
        ("port", "080", "a port from 1 to 65535"),
        ("port", "\u0668\u0660", "a port from 1 to 65535"),
        ("path", "mcp", "begin with /"),
        ("path", "/a b", "begin with /"),
        ("path", "/mcp,", "begin with /"),
        ("capture", "listen", "redirect or remap"),
        ("transport", "websocket", "one of "),
        ("container", "Not A Name", "the name of a container"),
        ("container", "", "the name of a container"),
        ("server", "true", "it is a label"),
        ("servr", "true", "known are sidegate.dev/port"),
        ("log-level", "loud", "one of debug, info, warning, error"),
        ("memory", "96M", "Ki, Mi or Gi"),
    ],
)
def test_wrong_value_is_refused_with_what_is_allowed(name: str, value: str, said: str) -> None:
    """The message names key, value and what would do."""
    with pytest.raises(Denial, match=said) as refused:
        read({f"sidegate.dev/{name}": value})

    assert refused.value.code is DenyCode.ANNOTATION_INVALID
    assert f"sidegate.dev/{name}" in str(refused.value)


def test_annotations_of_others_are_none_of_our_business() -> None:
    """Other groups' annotations, and the status that we write back, ask for nothing."""
    assert read({"prometheus.io/port": "x", "sidegate.dev/status": "x"}) == Overrides()
