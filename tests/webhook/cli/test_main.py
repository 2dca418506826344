"""`sidegate VERB` as a user meets it: what it prints and its exit status, wrong input first."""

import argparse
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sidecar.core import bundle
from sidecar.core.profile import encode
from sidecar.errors import ConfigError
from tests.parts import part
from webhook.cli import run
from webhook.cli.__main__ import main

ARTICLE = Path(__file__).parents[3] / "examples" / "article"
UPSTREAM = ("--upstream", "http://127.0.0.1:9/mcp")
SIGNED = ("--policy", str(ARTICLE / "bundle.tar.gz"), "--key", str(ARTICLE / "bundle.pub.pem"))
SOCKET = ("--spiffe-socket", "unix:/nowhere/agent.sock")
CEDAR = "permit (principal, action, resource);"
REGO = "package mcp.authz\ndefault allow = false\nallow if input.user"


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
        (("--upstream", "http://h:99999/mcp"), "--upstream http://h:99999/mcp: expected http://HOST:PORT/PATH"),
        (("--upstream", "http://h:0/mcp"), "--upstream http://h:0/mcp: expected http://HOST:PORT/PATH"),
        (("--upstream", "http://h/mcp?a=b"), "expected http://HOST:PORT/PATH"),
        (("--upstream", "http://h/m\u00fc"), "$.server.paths[0]"),
        ((*UPSTREAM, "--listen", "8080"), "--listen 8080: expected ADDRESS:PORT"),
        ((*UPSTREAM, "--listen", "127.0.0.1:99999"), "expected ADDRESS:PORT"),
        ((*UPSTREAM, "--listen", "localhost:8080"), "expected ADDRESS:PORT, such as 127.0.0.1:8080"),
        ((*UPSTREAM, "--health", "[localhost]:0"), "--health [localhost]:0: expected ADDRESS:PORT"),
        ((*UPSTREAM, "--limit", "many"), "--limit many: expected RATE/BURST"),
        ((*UPSTREAM, "--limit", "nan/5"), "--limit nan/5: expected RATE/BURST"),
        ((*UPSTREAM, "--limit", "inf/5"), "--limit inf/5: expected RATE/BURST"),
        ((*UPSTREAM, "--limit", "0/5"), "--limit 0/5: expected RATE/BURST"),
        ((*UPSTREAM, "--limit=-1/5"), "--limit -1/5: expected RATE/BURST"),
        ((*UPSTREAM, "--limit", "5/0"), "a burst from 1"),
        ((*UPSTREAM, "--issuer", "https://id.example"), "--audience is required with --issuer"),
        ((*UPSTREAM, "--audience", "https://me.example"), "--issuer is required with --audience"),
        ((*UPSTREAM, "--issuer", "short", "--audience", "a"), "$.identity.providers[0].issuer"),
        ((*UPSTREAM, "--caller", "https://td/x"), "https://td/x"),
        ((), "either --upstream URL or -- COMMAND"),
        ((*UPSTREAM, "--", "cat"), "either --upstream URL or -- COMMAND"),
        ((*UPSTREAM, "--processes", "shared"), "--processes is for a COMMAND"),
        (("--", "no-such-server", "--flag"), "no-such-server: no such program here or on PATH"),
        ((*UPSTREAM, "--spiffe-socket", "/run/x.sock"), "--spiffe-socket /run/x.sock: expected unix:/path"),
    ],
)
def test_a_bad_option_is_named_with_what_it_may_be(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    """The message names the option, what was given and what is expected."""
    assert expected in refused(capsys, "run", *SIGNED, *SOCKET, *arguments)


def test_strict_mtls_is_not_given_up_for_want_of_a_socket(capsys: pytest.CaptureFixture[str]) -> None:
    """What a signed bundle demands, the command line does not take away."""
    said = refused(capsys, "run", *UPSTREAM, *SIGNED)

    assert "its profile demands mTLS (identity.mtls strict)" in said
    assert "\nhint: --spiffe-socket unix:/" in said


async def enforced(*arguments: str) -> bundle.Bundle:
    """Return what `sidegate run` would enforce."""
    parser = argparse.ArgumentParser()
    run.add_to(parser.add_subparsers())
    options = parser.parse_args(["run", *(() if "--" in arguments else UPSTREAM), *arguments])
    return await run._bundle(options, run._upstream(options))


async def test_a_command_is_a_stdio_server(tmp_path: Path) -> None:
    """Its arguments stay its own; what the profile says besides stays, too."""
    (tmp_path / "p.cedar").write_text(CEDAR)
    first = await enforced("--policy", str(tmp_path), "--processes", "shared", "--", "cat", "--processes", "-v")
    server = first.profile.server
    assert (server.transport, server.processes, server.paths) == ("stdio", "shared", ("/mcp",))

    profile = msgspec.structs.replace(
        first.profile, server=msgspec.structs.replace(server, origins=("https://app.example",), max_body_bytes=2048)
    )
    (tmp_path / bundle.PROFILE).write_bytes(encode(profile))
    again = (await enforced("--policy", str(tmp_path), "--", "cat")).profile.server
    assert (again.processes, again.origins, again.max_body_bytes) == ("shared", ("https://app.example",), 2048)
    http = (await enforced("--policy", str(tmp_path))).profile.server
    assert (http.transport, http.port, http.origins) == ("http", 9, ("https://app.example",))


@pytest.mark.parametrize(
    ("address", "port", "names", "expected"),
    [
        ("127.0.0.1", 8080, [], {"127.0.0.1:8080", "localhost:8080", "[::1]:8080"}),
        ("::1", 0, [], {"127.0.0.1", "localhost", "[::1]"}),
        ("192.0.2.7", 80, ["mcp.example"], {"192.0.2.7:80", "mcp.example"}),
        ("0.0.0.0", 80, [], set()),  # noqa: S104 - nothing is bound
        ("::", 80, ["mcp.example:80"], {"mcp.example:80"}),
    ],
)
def test_callers_name_the_address_that_is_listened_on(
    address: str, port: int, names: list[str], expected: set[str]
) -> None:
    """A page whose name was pointed at this machine is refused."""
    assert set(run._hosts(address, port, names)) == expected


@pytest.mark.parametrize(("mtls", "arguments"), [("strict", SOCKET), ("permissive", SOCKET), ("permissive", ())])
async def test_a_profile_beside_the_policies_keeps_its_mtls(
    tmp_path: Path, mtls: str, arguments: Sequence[str]
) -> None:
    """With or without a socket."""
    (tmp_path / "p.cedar").write_text(CEDAR)
    text = f'{{"server":{{"namespace":"n","workload":"w","name":"w","port":1}},"identity":{{"mtls":"{mtls}"}}}}'
    (tmp_path / "sidegate.json").write_text(text)

    assert (await enforced("--policy", str(tmp_path), *arguments)).profile.identity.mtls == mtls


async def test_policies_alone_are_strict_with_a_socket_and_say_so_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A laptop has no agent; nobody should take it for mutual TLS."""
    (tmp_path / "p.cedar").write_text(CEDAR)

    with_socket = await enforced("--policy", str(tmp_path), *SOCKET)
    assert capsys.readouterr().err == ""
    without = await enforced("--policy", str(tmp_path))

    assert (with_socket.profile.identity.mtls, without.profile.identity.mtls) == ("strict", "permissive")
    assert capsys.readouterr().err == "sidegate: no --spiffe-socket: callers need no SVID and connect without TLS\n"


async def test_tests_of_rego_stay_out_and_cedar_files_never_do(tmp_path: Path) -> None:
    """`_test` is a convention of OPA; a Cedar file of that name may forbid something. The opa is found by its path."""
    for name, text in {
        "p.rego": REGO,
        "p_test.rego": "package p_test\nnonsense",
        "p.cedar": CEDAR,
        "smoke_test.cedar": CEDAR,
    }.items():
        (tmp_path / name).write_text(text)

    made = await enforced("--policy", str(tmp_path), "--opa", str(part("opa")))

    assert sorted(made.files) == [
        "cedar/p.cedar",
        "cedar/smoke_test.cedar",
        "policy.wasm",
        "policy/p.rego",
        "sidegate.json",
    ]


async def test_opa_is_found_on_the_path_and_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell finds it, though it runs in another directory and without environment."""
    (tmp_path / "p.rego").write_text(REGO)
    opa = part("opa")

    monkeypatch.setenv("PATH", str(opa.parent))
    assert bundle.WASM in (await enforced("--policy", str(tmp_path))).files
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(opa.parent)
    assert bundle.WASM in (await enforced("--policy", str(tmp_path), "--opa", f"./{opa.name}")).files


def test_a_missing_opa_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With a hint how to get it or name it."""
    (tmp_path / "p.rego").write_text(REGO)

    said = refused(capsys, "run", *UPSTREAM, *SOCKET, "--policy", str(tmp_path), "--opa", "no-such-opa")

    assert "no program no-such-opa, which compiles Rego" in said
    assert "\nhint: install opa" in said


def test_a_policy_that_is_not_utf_8_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The message names the file."""
    (tmp_path / "p.cedar").write_bytes(b"\xff")

    assert "p.cedar: not UTF-8" in refused(capsys, "run", *UPSTREAM, *SOCKET, "--policy", str(tmp_path))


@pytest.mark.parametrize("option", ["--listen", "--health"])
def test_a_used_port_is_told_without_traceback(tmp_path: Path, option: str) -> None:
    """The port is found used inside the process's task group; the user meets a line."""
    (tmp_path / "p.cedar").write_text(CEDAR)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = {"--listen": "--health", "--health": "--listen"}[option]
        done = transcript(
            "run", *UPSTREAM, "--policy", str(tmp_path), option, address, other, "127.0.0.1:0", "--log-level", "error"
        )

    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "address already in use" in done.stderr.splitlines()[-1].lower()
    assert done.stderr.splitlines()[-1].startswith("sidegate: error: ")
    assert address.rpartition(":")[2] in done.stderr.splitlines()[-1]


def test_a_defect_is_not_told_as_somebody_elses_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with anything unforeseen in it keeps its traceback."""

    def fail(_: object) -> int:
        raise ExceptionGroup("tasks", [OSError("used"), ZeroDivisionError()])

    monkeypatch.setattr(run, "perform", fail)

    with pytest.raises(ExceptionGroup):
        main(["run", *UPSTREAM, *SIGNED])


def test_demo_without_the_repository_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is started."""
    monkeypatch.setattr("webhook.cli.demonstration.BUNDLE", tmp_path / "bundle.tar.gz")

    said = refused(capsys, "demo", "--once")

    assert "bundle.tar.gz is missing\nhint: " in said


def transcript(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    command = (sys.executable, "-m", "webhook.cli", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own program


async def test_a_command_is_told_nothing_of_the_user(tmp_path: Path) -> None:
    """A profile that says otherwise is refused: a pipe has no headers."""
    (tmp_path / "p.cedar").write_text(CEDAR)
    first = (await enforced("--policy", str(tmp_path))).profile
    identity = msgspec.structs.replace(first.identity, upstream="header")
    (tmp_path / bundle.PROFILE).write_bytes(encode(msgspec.structs.replace(first, identity=identity)))

    with pytest.raises(ConfigError, match="a pipe has no headers"):
        await enforced("--policy", str(tmp_path), "--", "cat")
