"""Reads a bundle of an external OPA bundle server: whose it is, and the Rego and data in it, for our own compiler.

Refuses what is not signed by the key that the policy names, what is no plain Rego or JSON, and what would leave the
bundle or its limits. Compiled modules in it are refused as well: what this cluster enforces is compiled here, with the
built-in functions that sidecars have. Source: OPA documentation, "Bundles" and "Bundle signature".
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.core.bundle import DATA, MANIFEST, foreign
from sidecar.core.keyring import Keyring
from sidecar.errors import BundleError
from webhook.core.compile import NO_DATA, Data
from webhook.core.resources import BundleSpec

SEPARATOR: Final = "__"  # for the slashes in a module's path: they are compiled in one directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What an external bundle holds: module name -> text, and all data."""

    rego: Mapping[str, str]
    data: Data = NO_DATA


def read(packed: bytes, spec: BundleSpec) -> Fetched:
    """Return what is in the bundle *packed*; raises BundleError."""
    files = foreign(packed, Keyring.parse(spec.keys))
    files.pop(MANIFEST, None)
    rego: dict[str, str] = {}
    data: dict[str, Any] = {}
    for path, content in sorted(files.items(), key=lambda each: (each[0].count("/"), each[0])):  # the root's data first
        try:
            if path.endswith(".rego"):
                rego[path.replace("/", SEPARATOR)] = content.decode()
            else:
                _merge(data, path.split("/")[:-1], json.loads(content))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path}: cannot be read: {error}") from error
    if not any(not name.endswith("_test.rego") for name in rego):
        raise BundleError("bundle: holds no Rego module")
    try:
        held = Data(data)
    except (ValueError, RecursionError) as error:  # 1e999; half of a surrogate pair
        raise BundleError(f"{DATA}: cannot be written: {error}") from error
    return Fetched(rego={name: text for name, text in rego.items() if not name.endswith("_test.rego")}, data=held)


def _merge(data: dict[str, Any], path: list[str], content: Any) -> None:
    """Put *content* of a data.json where its directory says. Raises ValueError when something is there already."""
    if not isinstance(content, dict):
        raise ValueError(f"{DATA} must hold an object")  # noqa: TRY004 - of a file, not of our code
    for name in path:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ValueError(f"{name} is a value in another {DATA}")  # noqa: TRY004 - same
    for name, value in content.items():
        if name in data:
            raise ValueError(f"{name} is in another {DATA} too")
        data[name] = value


def is_allowed(url: str, prefixes: Iterable[str]) -> bool:
    """Say whether the operator lets the control plane fetch *url*: it can reach what the policy's author may not."""
    # White space and controls: parsers of URLs leave some out, and what is left may say "/..".
    is_plain = url.isprintable() and " " not in url and not any(each in url for each in ("/.", "%", "\\", "@"))
    return is_plain and any(url.startswith(prefix) for prefix in prefixes)
