"""webhook/shell/cedar_parser.py: the child's side of a question."""

import io
import json
import os
import subprocess
import sys

import pytest

from webhook.core.compile import CEDAR_ENTITIES
from webhook.shell import cedar_parser

PERMIT = "permit (principal, action, resource)"
ENTITIES = sorted(path.strip("/").split("/") for path in CEDAR_ENTITIES)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (PERMIT + ";", {"reads": ENTITIES, "findings": []}),
        (PERMIT + " when { context == {} };", {"reads": None, "findings": []}),
        (PERMIT, {"file": "a.cedar", "message": "unexpected end of input", "line": 1, "column": 37}),
    ],
)
def test_the_child_answers_in_json(
    text: str, answer: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The question on standard input, the answer on standard output."""
    asked = {"policies": {"a.cedar": text}, "schema": None, "vocabulary": "sidegate", "check": False}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
    cedar_parser.main()

    assert json.loads(capsys.readouterr().out) == answer


def test_the_child_finds_what_is_wrong_with_what_parses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only when it is asked to."""
    text = 'permit (principal in Server::"x", action, resource);'
    asked = {"policies": {"a.cedar": text}, "schema": None, "vocabulary": "sidegate", "check": True}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
    cedar_parser.main()

    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {each["file"] for each in findings} == {"a.cedar"}


def test_the_child_starts_with_little() -> None:
    """Who changes a policy, and ten thousand sidecars, wait for its start: not for a third of a second of imports."""
    dear = ("asyncio", "cryptography", "jwt", "msgspec", "sidecar")
    asked = f"import sys, webhook.shell.cedar_parser; print(*set({dear}) & set(sys.modules))"
    loaded = subprocess.run(  # noqa: S603 - our own words
        (sys.executable, "-S", "-c", asked),
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )

    assert loaded.stdout.split() == []
