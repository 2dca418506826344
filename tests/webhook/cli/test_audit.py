"""`sidegate audit`: a real sink's trail, proven whole or not, searched and shown."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import Authority
from certs.statement import sign
from sidecar.shell.audit import Audit
from sidecar.shell.trail import File, Position
from tests.certs.pki import NOW, an_authority
from tests.certs.test_statement import an_svid
from tests.sidecar.exchanges import a_refused_exchange, an_exchange
from webhook.cli.__main__ import main


@pytest.fixture
def authority() -> Authority:
    """Return the CA of a.test."""
    return an_authority()


@pytest.fixture
def trail(tmp_path: Path, authority: Authority) -> Path:
    """Return a trail of two lives of one sidecar, each signed for at its end."""
    path, svid = tmp_path / "audit.jsonl", an_svid(authority)
    for _ in range(2):
        audit = Audit(File(str(path)), sign=lambda claims: sign(claims, svid, now=NOW))
        audit.observe(an_exchange())
        audit.observe(a_refused_exchange())
        audit.close()
    return path


@pytest.fixture
def trusted(tmp_path: Path, authority: Authority) -> tuple[str, ...]:
    """Return the options by which signatures are checked."""
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    return ("--trust-domain", "a.test", "--trust-bundle", str(bundle))


def test_a_whole_trail_is_said_to_be_whole(
    trail: Path, trusted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """With who signed for it, to the end."""
    assert main(["audit", "verify", str(trail), *trusted, "--closed"]) == 0

    said = capsys.readouterr().out.splitlines()
    assert sum("3 lines, 3 of them signed for by spiffe://a.test/ns/pay/sa/api, closed" in line for line in said) == 2
    assert said[-1] == "the trail is whole"


def test_a_changed_line_is_named(trail: Path, trusted: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """By file and number; the status says it to scripts."""
    trail.write_bytes(trail.read_bytes().replace(b'"refused"', b'"allowed"', 1))

    assert main(["audit", "verify", str(trail), *trusted]) == 1
    said = capsys.readouterr().out
    assert f"{trail}:3: chain" in said
    assert "line 2 of it is not as it was written" in said
    assert said.endswith("the trail is NOT whole\n")


def test_rotated_files_are_read_as_one(
    trail: Path, trusted: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oldest first; the newer one alone begins in the middle."""
    lines = trail.read_bytes().splitlines(keepends=True)
    old, new = tmp_path / "audit.jsonl.1", tmp_path / "audit.jsonl.0"
    old.write_bytes(b"".join(lines[:2]))
    new.write_bytes(b"".join(lines[2:]))

    assert main(["audit", "verify", str(old), str(new), *trusted]) == 0
    assert main(["audit", "verify", str(new), *trusted]) == 1
    assert f"{new}:1: chain" in capsys.readouterr().out


def test_an_end_that_is_only_linked_fails_where_it_is_asked_for(
    trail: Path, trusted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A trail that was cut looks like one that goes on: only `--closed` takes that for a fault."""
    trail.write_bytes(b"".join(trail.read_bytes().splitlines(keepends=True)[:-1]))

    assert main(["audit", "verify", str(trail), *trusted]) == 0
    assert "the last 2 only linked" in capsys.readouterr().out
    assert main(["audit", "verify", str(trail), *trusted, "--closed"]) == 1


def test_another_signer_is_not_believed(
    trail: Path, trusted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A workload of the domain may sign for itself only."""
    assert main(["audit", "verify", str(trail), *trusted, "--signer", "spiffe://a.test/ns/shop/sa/*"]) == 1
    assert "spiffe://a.test/ns/pay/sa/api is not spiffe://a.test/ns/shop/sa/*" in capsys.readouterr().out


def test_without_bundle_it_says_what_was_not_checked(trail: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links alone are something, and not everything."""
    assert main(["audit", "verify", str(trail)]) == 0
    assert "signatures were not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--trust-domain", "a.test"), "--trust-bundle and --trust-domain go together"),
        (("--closed",), "need --trust-bundle"),
        (("--trust-domain", "a.test", "--trust-bundle", __file__), "expected certificates in PEM"),
    ],
)
def test_misuse_is_told(
    arguments: tuple[str, ...], expected: str, trail: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what goes together."""
    assert main(["audit", "verify", str(trail), *arguments]) == 1
    assert expected in capsys.readouterr().err


def test_a_file_without_trail_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty file proves nothing, so it must not pass for a whole trail."""
    (tmp_path / "empty").touch()

    assert main(["audit", "verify", str(tmp_path / "empty")]) == 1
    assert "no line of an audit trail" in capsys.readouterr().err


def test_search_shows_who_did_what(trail: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for people; nothing found is status 1."""
    assert main(["audit", "search", str(trail), "--outcome", "allowed", "--tool", "read_schema"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert "allowed" in shown[0]
    assert shown[0].endswith("tools/call read_schema")
    assert main(["audit", "search", str(trail), "--user", "nobody@example.com"]) == 1
    assert main(["audit", "search", str(trail), "--since", "2999"]) == 1


def test_search_gives_whole_records(trail: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they were written."""
    assert main(["audit", "search", str(trail), "--json", "--outcome", "refused"]) == 0
    assert {json.loads(line)["decision"]["outcome"] for line in capsys.readouterr().out.splitlines()} == {"refused"}


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tool's name is the caller's choice."""
    path = tmp_path / "audit.jsonl"
    path.write_text(json.dumps({"schema": "sidegate.audit/v1", "message": {"method": "tools/call", "tool": "\x1b[2J"}}))

    assert main(["audit", "search", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_directory_is_read_from_its_oldest_file_on(
    tmp_path: Path, authority: Authority, trusted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the sidecar rotates them; what it keeps beside them is passed over."""
    directory, svid = tmp_path / "trail", an_svid(authority)
    directory.mkdir()
    file = File(str(directory / "audit.jsonl"), keep_bytes=200_000, is_shipped=True)
    audit = Audit(file, sign=lambda claims: sign(claims, svid, now=NOW))
    for _ in range(50):
        audit.observe(an_exchange())
    file.shipped(Position(number=1, offset=10))
    audit.close()

    assert len(list(directory.glob("audit.jsonl.0*"))) > 2
    assert main(["audit", "verify", str(directory), *trusted, "--closed"]) == 0
    assert "51 lines, 51 of them signed for" in capsys.readouterr().out
    assert main(["audit", "search", str(directory), "--tool", "read_schema"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 50


def test_a_kill_leaves_notes_and_no_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which call was cut off, and that half a line is nobody's forgery."""
    path = tmp_path / "audit.jsonl"
    audit = Audit(File(str(path)))
    audit.begin([an_exchange()])
    with path.open("ab") as file:
        file.write(path.read_bytes()[:100])
    again = Audit(File(str(path)))
    again.observe(an_exchange())

    assert main(["audit", "verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{path}:2: cut short while it was written" in said
    assert "belong to no chain" not in said
    assert "1 calls were begun" not in said  # its end is there: the test's calls have one span

    assert main(["audit", "search", str(path), "--phase", "begin"]) == 0
    assert capsys.readouterr().out.split()[1] == "begun"


@pytest.mark.parametrize(("form", "member"), [("ecs", "ecs"), ("ocsf", "class_uid")])
def test_records_are_exported(trail: Path, form: str, member: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, in the words of the SIEM."""
    assert main(["audit", "export", "--format", form, str(trail)]) == 0

    events = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len(events) == 4
    assert all(member in each for each in events)
