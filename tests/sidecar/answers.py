"""What the real opa and our engine answer to the same Rego expressions."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sidecar.core.builtins import values
from sidecar.core.rego import FUEL, MEMORY_BYTES, _compiled, _Instance
from tests.parts import part
from tests.sidecar.questions import policy_wasm

UNDEFINED = "undefined"  # no expression here has this string for its value


@dataclass(frozen=True, slots=True)
class Answers:
    """By expression."""

    theirs: dict[str, Any]
    ours: dict[str, Any]

    @classmethod
    def to(cls, lines: Sequence[str]) -> "Answers":
        """Ask both."""
        module = "package mcp.authz\n" + "\n".join(f"allow[{n}] := x if x := {each}" for n, each in enumerate(lines))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "p.rego")
            path.write_text(module)
            command = [part("opa"), "eval", "--format=json", f"--data={path}", "data.mcp.authz.allow"]
            said = subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - the opa of the tests
        theirs = json.loads(said.stdout, parse_float=Decimal)["result"][0]["expressions"][0]["value"]
        instance = _Instance(_compiled(policy_wasm(module)), b"{}", FUEL * 100, MEMORY_BYTES)
        ours = json.loads(instance.evaluate_raw("mcp/authz/allow", b"{}", 0), parse_float=Decimal)[0]["result"]
        instance.close()
        return cls(
            {line: theirs.get(str(number), UNDEFINED) for number, line in enumerate(lines)},
            {line: ours.get(str(number), UNDEFINED) for number, line in enumerate(lines)},
        )


def is_same(expression: str, ours: Any, theirs: Any) -> bool:
    """Return whether the two answers are the same value; a set comes as an array, in no order."""
    if expression.startswith(("net.cidr_", "graph.")) and isinstance(theirs, list) and isinstance(ours, list):
        ours, theirs = values.ordered(ours), values.ordered(theirs)
    return values.is_equal(ours, theirs)
