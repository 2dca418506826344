"""Loads the rules that bring traffic into the sidecar: the init container `sidegate-net`.

One nftables table for IPv4 and IPv6. Before a server, every inbound TCP port is redirected to the sidecar, and nothing
that the application opens itself is touched, unless it is let out by host name: then every TCP connection of its own to a
public address is redirected, too, and anything else to one is dropped but DNS, whose way is NetworkPolicy's to judge. With
an agent it is the other way round: what its containers open to the ports given as argument is redirected, and nothing
inbound. The sidecar reads the original address from the accepted
socket (SO_ORIGINAL_DST). Refuses to end well unless the kernel lists the very rules that were loaded; UDP is not
touched. Source: nft(8), address families, NAT statements.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from sidecar.config import EGRESS_PORT, HEALTH_PORT, INBOUND_PORT, PUBLIC_RANGES, USER_ID, WayOut
from sidecar.errors import NetError

NFT: Final = Path("/usr/sbin/nft")
TABLE: Final = "sidegate"
DEADLINE_S: Final = 20  # nft takes milliseconds; a node under load some seconds
HINT: Final = "hint: it needs root, NET_ADMIN and nf_tables; where those are forbidden, use capture mode `remap`"
_OURS: Final = f"{{ {HEALTH_PORT}, {INBOUND_PORT} }}"  # in ascending order, as the kernel lists them

Rules = Mapping[str, tuple[str, ...]]

# Written as nft lists them, because `load` compares.
RULES: Final[Rules] = {
    "inbound": (
        "type nat hook prerouting priority dstnat; policy accept;",
        'iifname "lo" accept',
        f"tcp dport {_OURS} accept",
        f"meta l4proto tcp redirect to :{INBOUND_PORT}",
    ),
    # Connection tracking leaves a malformed segment unredirected, and some of those still open a connection.
    "guard": (
        "type filter hook input priority filter; policy accept;",
        'iifname "lo" accept',
        "ct direction reply accept",
        f"tcp dport != {_OURS} drop",
    ),
}


def _left_alone() -> tuple[str, ...]:
    """Return the rules that accept whatever is not public: NetworkPolicies judge that."""
    rules = []
    for whole, excluded in PUBLIC_RANGES.items():
        field = "ip6 daddr" if ":" in whole else "ip daddr"
        rules += [] if whole == "0.0.0.0/0" else [f"{field} != {whole} accept"]
        rules.append(f"{field} {{ {', '.join(excluded)} }} accept")
    return tuple(rules)


BY_NAME: Final[Rules] = {
    **RULES,
    "outbound": (
        "type nat hook output priority -100; policy accept;",
        'oifname "lo" accept',
        f"meta skuid {USER_ID} accept",
        *_left_alone(),
        f"meta l4proto tcp redirect to :{EGRESS_PORT}",
    ),
    # What was not redirected, for whatever reason, and what is not TCP.
    "outbound_guard": (
        "type filter hook output priority filter; policy accept;",
        'oifname "lo" accept',
        f"meta skuid {USER_ID} accept",
        "ct state established,related accept",
        *_left_alone(),
        "udp dport 53 accept",
        "drop",
    ),
}


def outbound(ports: Sequence[int]) -> Rules:
    """Return the rules for an agent that calls MCP servers on *ports*; its sidecar's own calls go through."""
    wanted = sorted(set(ports))
    listed = f"{{ {', '.join(map(str, wanted))} }}" if len(wanted) > 1 else str(wanted[0])
    return {
        "outbound": (
            "type nat hook output priority -100; policy accept;",
            'oifname "lo" accept',
            f"meta skuid {USER_ID} accept",
            f"tcp dport {listed} redirect to :{EGRESS_PORT}",
        )
    }


def ruleset(chosen: Rules = RULES) -> str:
    """Return the text for `nft -f -`; loaded twice it leaves the same rules, and no moment without them."""
    chains = "".join(
        f"\tchain {name} {{\n" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n" for name, rules in chosen.items()
    )
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{chains}}}\n"


def load(nft: Path = NFT, *, chosen: Rules = RULES) -> None:
    """Load the rules and read them back. Raises NetError."""
    _run(nft, "-f", "-", text=ruleset(chosen))
    listed = {" ".join(line.split()) for line in _run(nft, "list", "table", "inet", TABLE).splitlines()}
    missing = [rule for rules in chosen.values() for rule in rules if rule not in listed]
    if missing:
        raise NetError(f"nft accepted the rules, but the kernel does not list: {'; '.join(missing)}")


def _run(nft: Path, *arguments: str, text: str = "") -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program with fixed arguments
            [nft, *arguments], input=text, capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
    except OSError as error:
        raise NetError(f"cannot run {nft}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise NetError(f"{nft} did not end within {DEADLINE_S} s") from error
    if done.returncode != 0:
        raise NetError(f"{nft} {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def main(arguments: Sequence[str] = ()) -> int:
    """Load the rules, an agent's if *arguments* name ports; return 0, or 1 after saying why not."""
    is_by_name = list(arguments) == [WayOut.HOSTS]
    try:
        ports = [int(port) for port in arguments[0].split(",")] if arguments and not is_by_name else []
        load(chosen=BY_NAME if is_by_name else outbound(ports) if ports else RULES)
    except ValueError:
        expected = f"expected {WayOut.HOSTS}, or ports, separated by commas"
        print(f"sidegate-net: error: {arguments[0]}: {expected}", file=sys.stderr)  # noqa: T201
        return 1
    except NetError as error:
        # An init container speaks through its log.
        print(f"sidegate-net: error: {error}", file=sys.stderr)  # noqa: T201
        print(HINT, file=sys.stderr)  # noqa: T201
        return 1
    if ports:
        print(f"sidegate-net: outbound TCP to {arguments[0]} goes to port {EGRESS_PORT}")  # noqa: T201
    else:
        print(f"sidegate-net: inbound TCP goes to port {INBOUND_PORT}, but for port {HEALTH_PORT}")  # noqa: T201
    if is_by_name:
        print(f"sidegate-net: outbound TCP to public addresses goes to port {EGRESS_PORT}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
