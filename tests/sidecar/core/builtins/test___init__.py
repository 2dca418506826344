"""sidecar/core/builtins: every function that is announced is there, and answers values of any type."""

from typing import Any

import pytest

from sidecar.core import builtins
from sidecar.core.builtins import Undefined
from sidecar.core.builtins.values import Set


@pytest.mark.parametrize("name", sorted(builtins.PURE))
@pytest.mark.parametrize("wrong", [None, True, Set(), {}])
def test_values_of_another_type_have_no_answer(name: str, wrong: Any) -> None:
    """As in OPA, an argument of the wrong type makes the call undefined; `is_valid` says no."""
    function = builtins.find(name)
    arity = next(count for count in range(1, 5) if _takes(function, count))
    try:
        answer = function(*[wrong] * arity)
    except Undefined:
        return
    assert answer is False or name in ("object.subset", "urlquery.encode_object", "net.cidr_merge", "graph.reachable_paths",
                                       "net.cidr_contains_matches", "strings.any_prefix_match", "strings.any_suffix_match")  # fmt: skip


def _takes(function: Any, count: int) -> bool:
    try:
        function(*[None] * count)
    except TypeError:
        return False
    except Undefined:
        return True
    return True
