"""The operations from one object to another."""

from typing import Any

import jsonpatch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from webhook.core import patch

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "a", "b/~c"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "a", "b/c", "~", ""]), inner, max_size=4)
        | st.lists(st.fixed_dictionaries({"name": st.sampled_from("abc")}, optional={"v": inner}), max_size=4)
    ),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES, max_size=3)


def exact(value: Any) -> Any:
    """Return *value* with what Python holds equal and JSON does not told apart."""
    if isinstance(value, dict):
        return {key: exact(each) for key, each in value.items()}
    if isinstance(value, list):
        return [exact(each) for each in value]
    return (type(value).__name__, value)


@given(OBJECTS, OBJECTS)
@settings(max_examples=300, deadline=None)
def test_patch_makes_the_new_object_of_the_old(old: Any, new: Any) -> None:
    """Applied by a library of others, the operations lead from old to new, types included."""
    assert exact(jsonpatch.apply_patch(old, patch.diff(old, new))) == exact(new)


@given(OBJECTS)
@settings(deadline=None)
def test_equal_objects_need_no_operation(value: Any) -> None:
    """Nothing to do, nothing done."""
    assert patch.diff(value, value) == []


def test_container_put_in_front_is_one_operation() -> None:
    """Containers behind the new one are not touched, even when one of them changes."""
    old = {"c": [{"name": "a", "x": 1}, {"name": "b", "x": 1}]}
    new = {"c": [{"name": "new"}, {"name": "a", "x": 1}, {"name": "b", "x": 2}]}

    assert patch.diff(old, new) == [
        {"op": "add", "path": "/c/0", "value": {"name": "new"}},
        {"op": "replace", "path": "/c/2/x", "value": 2},
    ]


def test_path_escapes_slash_and_tilde() -> None:
    """Keys of labels and annotations hold slashes (RFC 6901)."""
    assert patch.diff({}, {"a/b~c": 1}) == [{"op": "add", "path": "/a~1b~0c", "value": 1}]


def test_true_is_not_one() -> None:
    """Python holds them equal, in lists too; a typed API does not."""
    assert patch.diff({"a": 1}, {"a": True}) == [{"op": "replace", "path": "/a", "value": True}]
    assert patch.diff({"a": [[0]]}, {"a": [[False]]}) == [{"op": "replace", "path": "/a", "value": [[False]]}]


def test_pod_without_anything_of_ours_is_its_own_restoration() -> None:
    """Nothing is copied where there is nothing to take out."""
    pod = {"spec": {"containers": []}, "metadata": {"annotations": {"sidegate.dev/status": "no JSON"}}}

    assert patch.restore(pod) is pod


@pytest.mark.parametrize("status", [
    "no JSON", "[]", '{"moved": {"port": 1}}', '{"moved": {"port": "x"}}',
    '{"moved": {"container": "app", "port": 1e999, "name": "x"}}',
])  # fmt: skip
def test_unreadable_status_is_an_error(status: str) -> None:
    """What stood in place of a moved port is not guessed."""
    pod = {
        "metadata": {"annotations": {"sidegate.dev/status": status}},
        "spec": {"initContainers": [{"name": "sidegate"}], "containers": []},
    }
    with pytest.raises(ValueError, match=r"."):
        patch.restore(pod)
