"""Rego's built-in functions that policy.wasm does not bring along, in Python: what is not here cannot be called.

A function takes and returns Rego's values (values.py), raises Undefined where OPA's answer is undefined, and Unknown
where we do not know OPA's answer: then the decision is a denial, because a guess, or undefined, could allow. Each passes
all of OPA's published cases for it (`make policy-conformance`). Impure ones get their world from the question, never
from the machine. A family is loaded when a policy needs it. Source: OPA documentation, "Policy Reference".
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from sidecar.core.builtins.values import Undefined, Unknown

__all__ = ["IMPURE", "PURE", "Undefined", "Unknown", "find"]

_FAMILIES: Final[Mapping[str, str]] = {
    "amounts": "units.parse units.parse_bytes semver.compare semver.is_valid numbers.range_step",
    "codes": """
        base64url.encode_no_pad hex.decode hex.encode
        urlquery.decode urlquery.decode_object urlquery.encode urlquery.encode_object uuid.parse
        crypto.md5 crypto.sha1 crypto.sha256 crypto.hmac.equal
        crypto.hmac.md5 crypto.hmac.sha1 crypto.hmac.sha256 crypto.hmac.sha512
        """,
    "documents": "json.patch object.subset graph.reachable_paths",
    "formatting": "sprintf",
    "moments": """
        time.add_date time.clock time.date time.diff time.format time.parse_duration_ns time.parse_ns
        time.parse_rfc3339_ns time.weekday
        """,
    "networks": "net.cidr_contains_matches net.cidr_expand net.cidr_is_valid net.cidr_merge",
    "patterns": "regex.find_n regex.replace regex.split regex.template_match",
    "strings": """
        glob.quote_meta indexof_n strings.any_prefix_match strings.any_suffix_match strings.count strings.split_n
        """,
    "uris": "uri.parse uri.is_valid",
}
_FAMILY_OF: Final = {name: family for family, names in _FAMILIES.items() for name in names.split()}

PURE: Final = frozenset(_FAMILY_OF)
# Verdicts of policies that call these are never remembered. The time is the question's: one decision sees one time.
IMPURE: Final = frozenset({"time.now_ns"})


def find(name: str) -> Callable[..., Any]:
    """Return the function *name*, one of PURE."""
    family = importlib.import_module(f"{__name__}.{_FAMILY_OF[name]}")
    function: Callable[..., Any] = family.FUNCTIONS[name]
    return function
