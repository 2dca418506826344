"""Rego's built-in functions that policy.wasm does not bring along, in Python: what is not here cannot be called.

A function takes and returns JSON values and raises Undefined where OPA's answer would be undefined. Impure ones get
their world from the question, never from the machine. Source: OPA documentation, "Policy Reference".
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final


class Undefined(Exception):  # noqa: N818 - Rego's word
    """The function has no value for these arguments."""


# At most three digits of width: more would be an attack on memory.
_VERB: Final = re.compile(r"%(?P<options>[-+# 0]{0,5}\d{0,3}(?:\.\d{0,3})?)(?P<verb>.)", re.DOTALL)


def sprintf(template: Any, values: Any) -> str:
    """Return *template* with Go's verbs %s %v %d %x %f %t %q %% filled in; anything else is undefined, not guessed."""
    if not isinstance(template, str) or not isinstance(values, list):
        raise Undefined
    rest = iter(values)

    def fill(found: re.Match[str]) -> str:
        if found["verb"] == "%":
            return "%"
        try:
            return _filled(found["options"], found["verb"], next(rest))
        except StopIteration:
            raise Undefined from None

    text = _VERB.sub(fill, template)
    if next(rest, rest) is not rest:
        raise Undefined  # Go appends %!(EXTRA ...); a policy that relies on it is a mistake
    return text


def _filled(options: str, verb: str, value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if verb in "sv":
        return f"%{options}s" % (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if verb == "t" and isinstance(value, bool):
        return f"%{options}s" % str(value).lower()
    if verb == "q" and isinstance(value, str):
        return f"%{options}s" % json.dumps(value, ensure_ascii=False)
    if (verb == "f" and is_number) or (verb in "dx" and is_number and isinstance(value, int)):
        return str(f"%{options}{verb}" % value)
    raise Undefined


PURE: Final[Mapping[str, Callable[..., Any]]] = {"sprintf": sprintf}
# Verdicts of policies that call these are never remembered. The time is the question's: one decision sees one time.
IMPURE: Final = frozenset({"time.now_ns"})
