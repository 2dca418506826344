"""Wrap the command of a stdio server's container in the relay, and unwrap it.

The relay gives the server a port on loopback (relay/relay.c); it comes out of the sidecar's image by way of a volume, so
that the server's image needs nothing. Refuses a container without a command of its own: at admission nobody sees what
its image would run. Arguments, environment, probes, `stdin` and `tty` stay as they are.
"""

from typing import Final

from webhook.core.annotations import GROUP, Overrides
from webhook.core.pod import JSON, Pod
from webhook.errors import Denial, DenyCode

VOLUME: Final = "sidegate-relay"
DIRECTORY: Final = "/.sidegate"
PROGRAM: Final = f"{DIRECTORY}/relay"
SOURCE: Final = "/usr/local/bin/sidegate-relay"  # in the sidecar's image
MOUNT: Final = {"name": VOLUME, "mountPath": DIRECTORY, "readOnly": True}
MOST: Final = 1024  # as relay/relay.c


def find_server(bare: Pod, asked: Overrides) -> tuple[str, list[str]]:
    """Return name and command of the container that speaks MCP on its standard input and output. Raises Denial."""
    named = {each.name: each for each in bare.spec.containers}
    known = ", ".join(named)
    if asked.container is None and len(named) > 1:
        raise Denial(
            DenyCode.CONTAINER_UNKNOWN,
            f"which container is the stdio server? There are {known}. Set annotation {GROUP}/container",
        )
    name = asked.container or next(iter(named), "")
    if name not in named:
        raise Denial(
            DenyCode.CONTAINER_UNKNOWN, f"annotation {GROUP}/container: no container is named {name}; there are {known}"
        )
    command = named[name].command
    if not command:
        raise Denial(
            DenyCode.COMMAND_UNKNOWN,
            f"container {name}: a stdio server needs its command written out, for its image's own is not seen at admission; "
            "write the image's ENTRYPOINT as command and, where there are no args, its CMD as args",
        )
    return name, command


def wrapped(each: JSON, command: list[str], *, port: int, max_processes: int) -> JSON:
    """Return container *each*, whose command is *command*, with the relay in front of it."""
    most = min(MOST, 2 * max_processes)  # those that are ending hold a place, too
    mounts = [MOUNT, *(each.get("volumeMounts") or ())]
    return each | {"command": [PROGRAM, str(port), str(most), *command], "volumeMounts": mounts}


def unwrapped(each: JSON) -> JSON:
    """Return container *each* without the relay; one without it as it is."""
    command = each.get("command")
    if not isinstance(command, list) or command[:1] != [PROGRAM]:
        return each
    mounts = [mount for mount in each.get("volumeMounts") or () if mount != MOUNT]
    rest = {key: value for key, value in each.items() if key != "volumeMounts"}
    return rest | {"command": command[3:]} | ({"volumeMounts": mounts} if mounts else {})
