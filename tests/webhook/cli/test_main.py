"""`sidegate VERB` as a user meets it: what it prints and its exit status, wrong input first."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from webhook.cli.__main__ import main

ARTICLE = Path(__file__).parents[3] / "examples" / "article"
UPSTREAM = ("--upstream", "http://127.0.0.1:9/mcp")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, expect a refusal on standard error and nothing on standard output; return the refusal."""
    status = main(arguments)
    said = capsys.readouterr()

    assert status == 1
    assert said.out == ""
    assert said.err.startswith("sidegate: error: ")
    return said.err


def test_no_verb_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and the usage."""
    with pytest.raises(SystemExit) as stopped:
        main([])

    assert stopped.value.code == 2
    assert "usage: sidegate" in capsys.readouterr().err


def test_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Help fits a screen and shows how."""
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])

    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "example: sidegate run" in said
    assert len(said.splitlines()) < 60


def test_an_empty_policy_directory_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing would be allowed, so the user must mean something else."""
    said = refused(capsys, "run", *UPSTREAM, "--policy", str(tmp_path))

    assert "holds no .cedar and no .rego file" in said


def test_a_bundle_without_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing unsigned is enforced."""
    said = refused(capsys, "run", *UPSTREAM, "--policy", str(ARTICLE / "bundle.tar.gz"))

    assert "--key is required" in said


def test_a_bundle_of_another_key_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The refusal names the signature."""
    key = tmp_path / "key.pem"
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    said = refused(capsys, "run", *UPSTREAM, "--policy", str(ARTICLE / "bundle.tar.gz"), "--key", str(key))

    assert ".signatures.json" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--upstream", "https://127.0.0.1/mcp"), "expected http://HOST:PORT/PATH"),
        ((*UPSTREAM, "--listen", "8080"), "--listen 8080: expected HOST:PORT"),
        ((*UPSTREAM, "--listen", "127.0.0.1:99999"), "expected HOST:PORT"),
        ((*UPSTREAM, "--limit", "many"), "--limit many: expected RATE/BURST"),
        ((*UPSTREAM, "--issuer", "https://id.example"), "--audience is required with --issuer"),
        ((*UPSTREAM, "--caller", "https://td/x"), "https://td/x"),
    ],
)
def test_a_bad_option_is_named_with_what_it_may_be(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    """The message names the option, what was given and what is expected."""
    bundle = ("--policy", str(ARTICLE / "bundle.tar.gz"), "--key", str(ARTICLE / "bundle.pub.pem"))

    assert expected in refused(capsys, "run", *bundle, *arguments)
