"""Loads the rules that leave no way to the application but through the sidecar: the init container `sidegate-net`.

One nftables table for IPv4 and IPv6: every inbound TCP port is redirected to the sidecar, which reads the original one
from the accepted socket (SO_ORIGINAL_DST). Refuses to end well unless the kernel lists the very rules that were loaded.
UDP and what the application opens itself are not touched. Source: nft(8), address families, NAT statements.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

from sidecar.config import HEALTH_PORT, INBOUND_PORT
from sidecar.errors import NetError

NFT: Final = Path("/usr/sbin/nft")
TABLE: Final = "sidegate"
DEADLINE_S: Final = 20  # nft takes milliseconds; a node under load some seconds
HINT: Final = "hint: it needs root, NET_ADMIN and nf_tables; where those are forbidden, use capture mode `remap`"
_OURS: Final = f"{{ {HEALTH_PORT}, {INBOUND_PORT} }}"  # in ascending order, as the kernel lists them

# Written as nft lists them, because `load` compares.
RULES: Final = {
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


def ruleset() -> str:
    """Return the text for `nft -f -`; loaded twice it leaves the same rules, and no moment without them."""
    chains = "".join(
        f"\tchain {name} {{\n" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n" for name, rules in RULES.items()
    )
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{chains}}}\n"


def load(nft: Path = NFT) -> None:
    """Load the rules and read them back. Raises NetError."""
    _run(nft, "-f", "-", text=ruleset())
    listed = {" ".join(line.split()) for line in _run(nft, "list", "table", "inet", TABLE).splitlines()}
    missing = [rule for rules in RULES.values() for rule in rules if rule not in listed]
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


def main() -> int:
    """Load the rules; return 0, or 1 after saying why not."""
    try:
        load()
    except NetError as error:
        # An init container speaks through its log.
        print(f"sidegate-net: error: {error}", file=sys.stderr)  # noqa: T201
        print(HINT, file=sys.stderr)  # noqa: T201
        return 1
    print(f"sidegate-net: inbound TCP goes to port {INBOUND_PORT}, but for port {HEALTH_PORT}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
