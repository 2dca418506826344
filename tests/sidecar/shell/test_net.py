"""Requirements on the redirect rules: their text, and what is said when they cannot be loaded."""

from pathlib import Path

import pytest

from sidecar.errors import NetError
from sidecar.shell import net

GOLDEN = """\
add table inet sidegate
delete table inet sidegate
table inet sidegate {
	chain inbound {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "lo" accept
		tcp dport { 15020, 15443 } accept
		meta l4proto tcp redirect to :15443
	}
	chain guard {
		type filter hook input priority filter; policy accept;
		iifname "lo" accept
		ct direction reply accept
		tcp dport != { 15020, 15443 } drop
	}
}
"""


GOLDEN_AGENT = """\
add table inet sidegate
delete table inet sidegate
table inet sidegate {
	chain outbound {
		type nat hook output priority -100; policy accept;
		oifname "lo" accept
		meta skuid 15100 accept
		tcp dport { 443, 8000 } redirect to :15001
	}
}
"""


NOT_PUBLIC = """\
		ip daddr { 0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, \
172.16.0.0/12, 192.0.0.0/24, 192.168.0.0/16, 198.18.0.0/15, 224.0.0.0/3 } accept
		ip6 daddr != 2000::/3 accept
		ip6 daddr { 2001::/32, 2002::/16 } accept
"""
GOLDEN_BY_NAME = f"""\
{GOLDEN[:-2]}	chain outbound {{
		type nat hook output priority -100; policy accept;
		oifname "lo" accept
		meta skuid 15100 accept
{NOT_PUBLIC}		meta l4proto tcp redirect to :15001
	}}
	chain outbound_guard {{
		type filter hook output priority filter; policy accept;
		oifname "lo" accept
		meta skuid 15100 accept
		ct state established,related accept
{NOT_PUBLIC}		udp dport 53 accept
		drop
	}}
}}
"""


def a_program(path: Path, script: str) -> Path:
    """An executable shell script in the place of nft."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_ruleset_is_the_reviewed_one() -> None:
    """A change of the rules is a change of what is enforced, and shows as one."""
    assert net.ruleset() == GOLDEN


def test_an_agents_ruleset_is_the_reviewed_one() -> None:
    """Only the named ports, once each and in order, as the kernel lists them; never the sidecar's own calls."""
    assert net.ruleset(net.outbound([8000, 443, 8000])) == GOLDEN_AGENT
    assert "tcp dport 8000 redirect to :15001" in net.ruleset(net.outbound([8000]))


def test_the_ruleset_of_a_server_that_is_let_out_by_name_is_the_reviewed_one() -> None:
    """Nothing public but through the sidecar, in either family; the rest, and DNS, as ever."""
    assert net.ruleset(net.BY_NAME) == GOLDEN_BY_NAME


def test_missing_nft_is_named(tmp_path: Path) -> None:
    """An image without nft says so instead of starting the pod unguarded."""
    with pytest.raises(NetError, match=r"cannot run .*/nft: No such file or directory"):
        net.load(tmp_path / "nft")


def test_what_nft_said_reaches_the_operator(tmp_path: Path) -> None:
    """A kernel or a Pod Security level that refuses the rules is told with its own words."""
    nft = a_program(tmp_path / "nft", "cat >/dev/null; echo 'Operation not permitted' >&2; exit 1")

    with pytest.raises(NetError, match="exit 1: Operation not permitted"):
        net.load(nft)


def test_rules_that_the_kernel_does_not_list_are_a_failure(tmp_path: Path) -> None:
    """The word of nft is not enough: what is in force is read back."""
    listing = GOLDEN.replace("\t\tmeta l4proto tcp redirect to :15443\n", "")
    nft = a_program(tmp_path / "nft", f"cat >/dev/null\ncat <<'END'\n{listing}END")

    with pytest.raises(NetError, match=r"does not list: meta l4proto tcp redirect to :15443$"):
        net.load(nft)


def test_nft_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod's start fails within a bound."""
    monkeypatch.setattr(net, "DEADLINE_S", 0.05)

    with pytest.raises(NetError, match="did not end within"):
        net.load(a_program(tmp_path / "nft", "exec sleep 60"))


def test_failure_is_told_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The init container's last words say what went wrong and what to do; its exit code holds the pod back."""
    monkeypatch.setattr(net.load, "__defaults__", (tmp_path / "nft",))

    assert net.main() == 1
    told = capsys.readouterr().err
    assert told.startswith("sidegate-net: error: cannot run ")
    assert "\nhint: " in told


def test_success_says_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log of the init container states which ports are open."""
    nft = a_program(tmp_path / "nft", f"cat >/dev/null\ncat <<'END'\n{GOLDEN}END")
    monkeypatch.setattr(net.load, "__defaults__", (nft,))

    assert net.main() == 0
    assert capsys.readouterr().out == "sidegate-net: inbound TCP goes to port 15443, but for port 15020\n"


def test_an_agents_ports_come_as_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And are said in the log; anything else than ports stops the pod."""
    nft = a_program(tmp_path / "nft", f"cat >/dev/null\ncat <<'END'\n{GOLDEN_AGENT}END")
    monkeypatch.setattr(net.load, "__defaults__", (nft,))

    assert net.main(["443,8000"]) == 0
    assert capsys.readouterr().out == "sidegate-net: outbound TCP to 443,8000 goes to port 15001\n"
    assert net.main(["http"]) == 1
    assert "expected hosts, or ports" in capsys.readouterr().err


def test_a_server_that_is_let_out_by_name_comes_as_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both directions are said in the log."""
    nft = a_program(tmp_path / "nft", f"cat >/dev/null\ncat <<'END'\n{GOLDEN_BY_NAME}END")
    monkeypatch.setattr(net.load, "__defaults__", (nft,))

    assert net.main(["hosts"]) == 0
    assert capsys.readouterr().out.endswith("\nsidegate-net: outbound TCP to public addresses goes to port 15001\n")
