"""Requirements on the redirect rules, with real packets between a caller's and a pod's network namespace."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.config import USER_ID
from tests.parts import part

pytestmark = pytest.mark.e2e

POD = {4: "10.77.0.2", 6: "fd77::2"}
CALLER = {4: "10.77.0.1", 6: "fd77::1"}
PUBLIC = {4: "203.0.113.9", 6: "2001:db8::9"}  # the caller's, too; to the pod it is the world

# Answers every connection on a port with "<port>", on 15443 with "<port> <original port>".
SERVER = """
import selectors, socket, struct, sys
selector = selectors.DefaultSelector()
for port in (8080, 15020, 15443):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    selector.register(listener, selectors.EVENT_READ, port)
print("listening", flush=True)
while True:
    for key, _ in selector.select():
        connection, peer = key.fileobj.accept()
        answer = str(key.data)
        if key.data == 15443:
            mapped = peer[0].startswith("::ffff:")
            level, size = (socket.IPPROTO_IP, 16) if mapped else (socket.IPPROTO_IPV6, 28)
            answer += " %d" % struct.unpack_from("!H", connection.getsockopt(level, 80, size), 2)[0]
        connection.sendall(answer.encode())
        connection.close()
"""

# The sidecar's own code says where each connection was going.
EGRESS = """
import selectors, socket
from sidecar.shell.egress_listener import bind, original_address
selector = selectors.DefaultSelector()
for listener in bind(15001):
    selector.register(listener, selectors.EVENT_READ)
print("listening", flush=True)
while True:
    for key, _ in selector.select():
        connection, _ = key.fileobj.accept()
        connection.sendall(f"15001 {original_address(connection)}".encode())
        connection.close()
"""

CLIENT = """
import encodings.idna, os, socket, sys  # the first before the user changes: it is loaded late
if len(sys.argv) > 3:
    os.setuid(int(sys.argv[3]))
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as connection:
        print(connection.recv(100).decode())
except OSError as error:
    print(type(error).__name__)
"""


# The sidecar's own gate, as its user, with the pod's resolver; says of each connection where it went, or why not.
GATE = """
import asyncio, encodings.idna, json, os
from dataclasses import replace
import uvloop
from sidecar.core.profile import EgressRules, NamedHosts, Profile
from sidecar.record import line
from sidecar.shell.egress_gate import EgressGate
from sidecar.shell.serving import Serving
from tests.builders import a_snapshot

class Observer:
    def observe(self, exchange):
        record = json.loads(line(exchange))
        print(json.dumps([record["destination"]["host"], record["destination"]["address"], record["decision"]["detail"]]), flush=True)

async def main():
    async with asyncio.TaskGroup() as tasks:
        serving = Serving(upstream=None, observers=[Observer()], spawn=tasks.create_task, resolve=None, why_not_ready=lambda: None)
        snapshot = a_snapshot()
        rules = EgressRules(hosts=(NamedHosts(hosts=("api.example.com", "inner.example.com"), ports=(8080,)),))
        serving.snapshot = replace(snapshot, profile=Profile(server=snapshot.profile.server, egress=rules))
        gate = EgressGate(serving, port=15001, max_connections=16, is_recordable=lambda: True)
        print("listening", flush=True)
        await gate.run()

os.setuid(15100)
uvloop.run(main())
"""

# A name server: api.example.com is the world, inner.example.com the caller's private addresses, and nothing else is.
NAMES = """
import socket, sys
zone = {"api.example.com": sys.argv[2:4], "inner.example.com": sys.argv[4:6]}
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
print("listening", flush=True)
while True:
    asked, client = server.recvfrom(512)
    labels, at = [], 12
    while asked[at]:
        labels.append(asked[at + 1 : at + 1 + asked[at]].decode())
        at += 1 + asked[at]
    kind = int.from_bytes(asked[at + 1 : at + 3])
    found = zone.get(".".join(labels))
    answers = b""
    if found and kind in (1, 28):
        data = socket.inet_pton(socket.AF_INET if kind == 1 else socket.AF_INET6, found[kind == 28])
        answers = b"\\xc0\\x0c" + kind.to_bytes(2) + b"\\0\\1\\0\\0\\0\\5" + len(data).to_bytes(2) + data
    code = b"\\x81\\x80" if found else b"\\x81\\x83"
    counts = b"\\0\\1" + (b"\\0\\1" if answers else b"\\0\\0") + b"\\0\\0\\0\\0"
    server.sendto(asked[:2] + code + counts + asked[12 : at + 5] + answers, client)
"""

# Asks for a host at an address, as a user; says how the answer begins.
REQUEST = """
import encodings.idna, os, socket, sys
os.setuid(1000)
try:
    with socket.create_connection((sys.argv[1], 8080), timeout=8) as connection:
        connection.sendall(f"GET / HTTP/1.1\\r\\nHost: {sys.argv[2]}\\r\\n\\r\\n".encode())
        print(connection.recv(100).decode().partition("\\r")[0])
except OSError as error:
    print(type(error).__name__)
"""

# Says whether a datagram from here, as a user, goes out, arrives there and is answered.
DATAGRAM = """
import encodings.idna, os, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
os.setuid(int(sys.argv[3]))
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sender:
    try:
        sender.sendto(b"x", (host, port))
    except OSError as error:
        print(type(error).__name__)
    else:
        print("sent")
"""


def ip(*arguments: str) -> None:
    """Run iproute2's program."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Wire:
    """Two network namespaces, `pod` and `caller`."""

    def __init__(self, name: str) -> None:
        self.pod, self.caller = f"{name}-p", f"{name}-c"

    def run(self, space: str, *command: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run to the end inside a namespace."""
        inside = ["ip", "netns", "exec", space, *map(str, command)]
        return subprocess.run(inside, input=text, capture_output=True, text=True, check=False, timeout=30)

    def ask(self, space: str, host: str, port: int, *user: int) -> str:
        """What a connection from *space*, as *user*, is answered."""
        return self.run(space, sys.executable, "-c", CLIENT, host, str(port), *map(str, user)).stdout.strip()


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The pod's side has a server on 8080 (the application), 15020 and 15443."""
    made = Wire(f"sg{os.getpid()}")
    ends = ((made.pod, f"p{os.getpid()}", POD), (made.caller, f"c{os.getpid()}", CALLER))
    with contextlib.ExitStack() as stack:
        for space, _, _ in ends:
            ip("netns", "add", space)
            stack.callback(ip, "netns", "delete", space)
        ip(
            "link",
            "add",
            ends[0][1],
            "netns",
            made.pod,
            "type",
            "veth",
            "peer",
            "name",
            ends[1][1],
            "netns",
            made.caller,
        )
        for space, device, addresses in ends:
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "address", "add", f"{addresses[4]}/24", "dev", device)
            ip("-n", space, "address", "add", f"{addresses[6]}/64", "dev", device, "nodad")
            ip("-n", space, "link", "set", device, "up")
        ip("-n", made.caller, "address", "add", f"{PUBLIC[4]}/32", "dev", "lo")
        ip("-n", made.caller, "address", "add", f"{PUBLIC[6]}/128", "dev", "lo", "nodad")
        ip("-n", made.pod, "route", "add", "default", "via", CALLER[4])
        ip("-n", made.pod, "route", "add", "default", "via", CALLER[6])
        for space in (made.pod, made.caller):
            command = ["ip", "netns", "exec", space, sys.executable, "-u", "-c", SERVER]
            server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(server.kill)
            assert server.stdout is not None
            assert server.stdout.readline() == b"listening\n"
        yield made


@pytest.fixture
def nft() -> Path:
    """The real nft."""
    return part("node-tools") / "nft"


def load_in(wire: Wire, nft: Path, chosen: str = "net.RULES") -> None:
    """Load the rules as the init container does, in the pod's namespace."""
    program = f"import pathlib; from sidecar.shell import net; net.load(pathlib.Path({str(nft)!r}), chosen={chosen})"
    done = wire.run(wire.pod, sys.executable, "-c", program)
    assert not done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("family", [4, 6])
def test_every_inbound_port_arrives_at_the_sidecar(wire: Wire, nft: Path, family: int) -> None:
    """The sidecar gets what was meant for the application, and can tell its port; health stays itself."""
    assert wire.ask(wire.caller, POD[family], 8080) == "8080"

    load_in(wire, nft)

    assert wire.ask(wire.caller, POD[family], 8080) == "15443 8080"
    assert wire.ask(wire.caller, POD[family], 1) == "15443 1"
    assert wire.ask(wire.caller, POD[family], 15020) == "15020"


@pytest.mark.parametrize("family", [4, 6])
def test_the_sidecar_reaches_the_application_and_the_application_the_world(wire: Wire, nft: Path, family: int) -> None:
    """Loopback inside the pod and connections that the pod opens are not redirected."""
    load_in(wire, nft)

    assert wire.ask(wire.pod, {4: "127.0.0.1", 6: "::1"}[family], 8080) == "8080"
    assert wire.ask(wire.pod, CALLER[family], 8080) == "8080"


def test_a_connection_that_escapes_redirection_is_dropped(wire: Wire, nft: Path) -> None:
    """Without the redirect, here taken away on purpose, nothing reaches the application either."""
    load_in(wire, nft)
    wire.run(wire.pod, nft, "flush", "chain", "inet", "sidegate", "inbound")

    assert wire.ask(wire.caller, POD[4], 8080) == "TimeoutError"


def test_loading_twice_leaves_one_set_of_rules(wire: Wire, nft: Path) -> None:
    """A restarted init container does not pile up rules."""
    load_in(wire, nft)
    once = wire.run(wire.pod, nft, "list", "ruleset").stdout

    load_in(wire, nft)

    assert wire.run(wire.pod, nft, "list", "ruleset").stdout == once
    assert once.count("redirect") == 1


@pytest.mark.parametrize("family", [4, 6])
def test_an_agents_calls_to_the_named_ports_arrive_at_its_sidecar(wire: Wire, nft: Path, family: int) -> None:
    """With their address; not the sidecar's own, no other port, nothing on loopback, and nothing inbound."""
    load_in(wire, nft, "net.outbound([8080])")
    command = ["ip", "netns", "exec", wire.pod, sys.executable, "-u", "-c", EGRESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as egress:
        try:
            assert egress.stdout is not None
            assert egress.stdout.readline() == b"listening\n"
            loopback = {4: "127.0.0.1", 6: "::1"}[family]

            assert wire.ask(wire.pod, CALLER[family], 8080) == f"15001 ('{CALLER[family]}', 8080)"
            assert wire.ask(wire.pod, CALLER[family], 8080, 1000) == f"15001 ('{CALLER[family]}', 8080)"
            assert wire.ask(wire.pod, CALLER[family], 8080, USER_ID) == "8080"
            assert wire.ask(wire.pod, CALLER[family], 15020) == "15020"
            assert wire.ask(wire.pod, loopback, 8080) == "8080"
            assert wire.ask(wire.pod, loopback, 15001) == "15001 None"
            assert wire.ask(wire.caller, POD[family], 8080) == "8080"
        finally:
            egress.kill()


@pytest.mark.parametrize("family", [4, 6])
def test_a_server_let_out_by_name_reaches_nothing_public_but_through_its_sidecar(
    wire: Wire, nft: Path, family: int
) -> None:
    """Every TCP port, with its address; not the sidecar's own, nothing private, nothing inbound; no datagrams but DNS."""
    load_in(wire, nft, "net.BY_NAME")
    command = ["ip", "netns", "exec", wire.pod, sys.executable, "-u", "-c", EGRESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as egress:
        try:
            assert egress.stdout is not None
            assert egress.stdout.readline() == b"listening\n"

            assert wire.ask(wire.pod, PUBLIC[family], 8080) == f"15001 ('{PUBLIC[family]}', 8080)"
            assert wire.ask(wire.pod, PUBLIC[family], 53, 1000) == f"15001 ('{PUBLIC[family]}', 53)"
            assert wire.ask(wire.pod, PUBLIC[family], 8080, USER_ID) == "8080"
            assert wire.ask(wire.pod, CALLER[family], 8080) == "8080"
            assert wire.ask(wire.pod, {4: "127.0.0.1", 6: "::1"}[family], 8080) == "8080"
            assert wire.ask(wire.caller, POD[family], 8080) == "15443 8080"
            for host, port, user, said in (
                (PUBLIC[family], 443, 1000, "PermissionError"),
                (PUBLIC[family], 53, 1000, "sent"),
                (PUBLIC[family], 443, USER_ID, "sent"),
                (CALLER[family], 443, 1000, "sent"),
            ):
                asked = wire.run(wire.pod, sys.executable, "-c", DATAGRAM, host, str(port), str(user))
                assert asked.stdout.strip() == said, (host, port, user)
        finally:
            egress.kill()


@pytest.mark.parametrize("family", [4, 6])
def test_a_public_connection_that_escapes_redirection_is_dropped(wire: Wire, nft: Path, family: int) -> None:
    """Without the redirect, here taken away on purpose, nothing public is reached either; by the sidecar it is."""
    load_in(wire, nft, "net.BY_NAME")
    wire.run(wire.pod, nft, "flush", "chain", "inet", "sidegate", "outbound")

    assert wire.ask(wire.pod, PUBLIC[family], 8080, 1000) == "TimeoutError"
    assert wire.ask(wire.pod, PUBLIC[family], 8080, USER_ID) == "8080"


@pytest.mark.parametrize("family", [4, 6])
def test_a_host_is_reached_by_its_name_in_either_family(wire: Wire, nft: Path, tmp_path: Path, family: int) -> None:
    """The real gate behind the real rules and a real resolver: at its own address, whatever was dialled; others not."""
    load_in(wire, nft, "net.BY_NAME")
    resolver, files = tmp_path / "resolv.conf", tmp_path / "nsswitch.conf"
    resolver.write_text(f"nameserver {CALLER[4]}\nsearch example.org\n")
    files.write_text("hosts: files dns\n")
    # What `ip netns exec` runs has mounts of its own.
    mounts = f"mount --bind {resolver} /etc/resolv.conf && mount --bind {files} /etc/nsswitch.conf && exec "
    names = [PUBLIC[4], PUBLIC[6], CALLER[4], CALLER[6]]
    foreign = {4: "203.0.113.66", 6: "2001:db8::66"}[family]
    with contextlib.ExitStack() as stack:
        started = []
        for space, command in (
            (wire.caller, [sys.executable, "-u", "-c", NAMES, CALLER[4], *names]),
            (wire.pod, ["sh", "-c", mounts + '"$0" "$@"', sys.executable, "-u", "-c", GATE]),
        ):
            process = subprocess.Popen(["ip", "netns", "exec", space, *command], stdout=subprocess.PIPE, text=True)
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"

        said = [
            wire.run(wire.pod, sys.executable, "-c", REQUEST, address, f"{host}:8080").stdout.strip()
            for address, host in (
                (PUBLIC[family], "api.example.com"),
                (foreign, "api.example.com"),
                (PUBLIC[family], "other.example.com"),
                (PUBLIC[family], "inner.example.com"),
            )
        ]
        started[1].kill()
        kept = [json.loads(line) for line in started[1].communicate()[0].splitlines()]

    assert said == ["8080", "8080", "HTTP/1.1 403 Forbidden", "HTTP/1.1 403 Forbidden"]
    assert [each[:2] for each in kept] == [
        ["api.example.com", PUBLIC[family]],
        ["api.example.com", PUBLIC[family]],
        ["other.example.com", None],
        ["inner.example.com", None],
    ]
    assert kept[2][2] == "not_allowed: other.example.com on port 8080"
    assert kept[3][2].startswith("address: inner.example.com is ")
