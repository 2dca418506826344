"""What a message costs under a limit, in units: one, its tool's weight, or as much as an argument asks for.

An argument that is absent, negative, no number or too large costs the stated maximum: nobody pays less by writing
nonsense. Lists count by their length.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sidecar.core.message import Message, Tool
from sidecar.core.profile import ArgumentWeight, Weight


def weighing(weight: Weight) -> Callable[[Message], int] | None:
    """Return what weighs messages by *weight*; None where each costs one unit."""
    if weight == Weight():
        return None
    tools, default = dict(weight.tools), weight.default
    arguments = {each.tool: each for each in weight.arguments}

    def cost(message: Message) -> int:
        target = message.target
        if not isinstance(target, Tool):
            return default
        units = tools.get(target.name, default)
        argument = arguments.get(target.name)
        return units if argument is None else max(units, asked(argument, target.arguments))

    return cost


def asked(argument: ArgumentWeight, arguments: Mapping[str, Any]) -> int:
    """Return for how many units *arguments* ask, between one and the maximum."""
    value: Any = arguments
    for name in argument.path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return argument.maximum
        value = value[name]
    if isinstance(value, list):
        value = len(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= argument.maximum * argument.per
    ):
        return argument.maximum  # NaN compares as false
    return max(1, min(argument.maximum, math.ceil(value / argument.per)))
