"""docs/how-to/write-policies.md: every example is checked, and answers its cases."""

import re
from pathlib import Path

import pytest

from tests.parts import part
from webhook.cli.__main__ import main

GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "write-policies.md"
SECTION = re.compile(r"^### (?P<number>\d+)\. (?P<title>.+)$", re.MULTILINE)
BLOCK = re.compile(
    r"^```(?P<language>cedar|rego|toml)(?P<option> toolhive)?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def examples() -> dict[str, str]:
    """Return the text of each numbered section by its title."""
    text = GUIDE.read_text().partition("## What Rego cannot call")[0]
    found = list(SECTION.finditer(text))
    ends = [each.start() for each in found[1:]] + [len(text)]
    return {each["title"]: text[each.end() : end] for each, end in zip(found, ends, strict=True)}


def test_there_are_ten() -> None:
    """As the page says."""
    assert len(examples()) == 10


@pytest.mark.parametrize("title", examples())
def test_an_example_is_clean_and_answers_its_cases(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sidegate policy check` and `test`, for each language by itself and for both."""
    blocks = {found["language"]: found for found in BLOCK.finditer(examples()[title])}
    options = ["--opa", str(part("opa"))]
    if any(found["option"] for found in blocks.values()):
        options += ["--vocabulary", "toolhive"]
    languages = [language for language in ("cedar", "rego") if language in blocks]
    for chosen in {tuple(languages), *((each,) for each in languages)}:
        directory = tmp_path / "+".join(chosen)
        directory.mkdir()
        for language in chosen:
            (directory / f"example.{language}").write_text(blocks[language]["text"])
        (directory / "example_test.toml").write_text(blocks["toml"]["text"])

        assert main(["policy", "check", str(directory), *options]) == 0, capsys.readouterr()
        assert main(["policy", "test", str(directory), *options]) == 0, capsys.readouterr()
