"""The child process in which Cedar policies are read: a question on standard input, the answer on standard output.

Imports little: who changes a policy waits for its start. Refuses nothing; what does not parse is an answer.
"""

import dataclasses
import json
import sys

from webhook.core import cedar
from webhook.errors import BadPolicy


def main() -> None:
    """Answer the question on standard input."""
    asked = json.load(sys.stdin)
    answer: dict[str, object]
    try:
        reads = cedar.read_paths(asked["policies"], asked["schema"], vocabulary=asked["vocabulary"])
        findings = _findings(asked["policies"], asked["vocabulary"]) if asked["check"] else []
    except BadPolicy as error:
        answer = {"file": error.file, "message": error.message, "line": error.line, "column": error.column}
    else:
        answer = {"reads": None if reads is None else sorted(reads), "findings": findings}
    json.dump(answer, sys.stdout)


def _findings(policies: dict[str, str], vocabulary: str) -> list[dict[str, object]]:
    from webhook.core import check  # noqa: PLC0415 - as long to import as all the rest, and seldom needed

    return [dataclasses.asdict(each) for each in check.cedar(policies, vocabulary=vocabulary)]


if __name__ == "__main__":
    main()
