"""webhook.core.relay: a command is wrapped and comes off again, whatever it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook.core import relay
from webhook.core.annotations import Overrides
from webhook.core.pod import read
from webhook.errors import Denial, DenyCode

COMMAND = st.lists(st.text(max_size=20), min_size=1, max_size=5)
MOUNT = st.fixed_dictionaries({"name": st.sampled_from(["data", "token"]), "mountPath": st.sampled_from(["/a", "/b"])})


@given(COMMAND, st.lists(MOUNT, min_size=1, max_size=3) | st.none(), st.lists(st.text(), max_size=2) | st.none())
def test_what_is_wrapped_comes_off_again(command: list[str], mounts: list[Any] | None, args: list[str] | None) -> None:
    """Also a command that is the relay itself; all else stays."""
    each: dict[str, Any] = {"name": "app", "command": command, "x-unknown": 1}
    each |= ({"volumeMounts": mounts} if mounts else {}) | ({} if args is None else {"args": args})
    wrapped = relay.wrapped(each, command, port=15010, max_processes=64)

    assert relay.unwrapped(wrapped) == each
    assert wrapped["command"] == [relay.PROGRAM, "15010", "128", *command]
    assert wrapped["volumeMounts"] == [relay.MOUNT, *(mounts or ())]


def test_the_relay_is_not_told_more_than_it_takes() -> None:
    """Its own most is less than twice the largest setting."""
    wrapped = relay.wrapped({"name": "app"}, ["x"], port=1, max_processes=1000)

    assert wrapped["command"][2] == str(relay.MOST)


@pytest.mark.parametrize(
    "each", [{"name": "a"}, {"name": "a", "command": []}, {"name": "a", "command": ["sh", "-c", "x"]}]
)
def test_what_is_not_wrapped_is_left_alone(each: dict[str, Any]) -> None:
    """It is the very same."""
    assert relay.unwrapped(each) is each


@pytest.mark.parametrize(
    ("containers", "asked", "code"),
    [
        ([{"name": "a"}], None, DenyCode.COMMAND_UNKNOWN),
        ([{"name": "a", "command": []}], None, DenyCode.COMMAND_UNKNOWN),
        ([{"name": "a", "command": ["x"]}, {"name": "b"}], None, DenyCode.CONTAINER_UNKNOWN),
        ([{"name": "a", "command": ["x"]}, {"name": "b"}], "b", DenyCode.COMMAND_UNKNOWN),
        ([{"name": "a", "command": ["x"]}], "c", DenyCode.CONTAINER_UNKNOWN),
        ([], None, DenyCode.CONTAINER_UNKNOWN),
    ],
)
def test_a_server_that_cannot_be_found_or_started_is_refused(
    containers: list[dict[str, Any]], asked: str | None, code: DenyCode
) -> None:
    """Nothing is guessed."""
    with pytest.raises(Denial) as denied:
        relay.find_server(read({"spec": {"containers": containers}}), Overrides(container=asked))

    assert denied.value.code is code
