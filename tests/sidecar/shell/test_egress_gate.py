"""Requirements on the server's own connections: what goes out, where to, what is refused, and that all is recorded."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import orjson
import pytest
from msgspec import UNSET, UnsetType

from sidecar.core.hosts import Why
from sidecar.core.profile import EgressRules, NamedHosts, Network, Profile
from sidecar.errors import Reason
from sidecar.exchange import Exchange
from sidecar.record import line
from sidecar.shell import egress_gate
from sidecar.shell.egress_gate import EgressGate, Outside
from sidecar.shell.egress_listener import Address
from sidecar.shell.serving import Serving
from sidecar.shell.tunnel import Streams
from tests.builders import a_snapshot
from tests.fakes import Client, FakeObserver, eventually

HOSTS = EgressRules(
    hosts=(NamedHosts(hosts=("api.example.com", "*.example.org"), ports=(443, 80)),),
    networks=(Network(cidr="198.51.100.0/24"),),
)
NAMES = {
    "api.example.com.": ["192.0.2.7"],
    "moved.example.org.": ["192.0.2.66", "192.0.2.7"],
    "inner.example.org.": ["10.0.0.1", "127.0.0.1"],
}


class FakeOutside(Outside):
    """Everybody dialled *dialled*; addresses lead to ports of this machine, and what has none refuses."""

    def __init__(self, dialled: Address | None, ports: Mapping[str, int]) -> None:
        self.dialled = dialled
        self.ports = ports
        self.asked: list[str] = []

    def original(self, sock: socket.socket) -> Address | None:
        """As was said."""
        del sock
        return self.dialled

    async def resolve(self, host: str, port: int) -> list[str]:
        """From the table."""
        del port
        self.asked.append(host)
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return NAMES[host]

    async def dial(self, address: str, port: int) -> Streams:
        """To this machine."""
        if address not in self.ports:
            raise ConnectionRefusedError("Connection refused")
        del port
        return await asyncio.open_connection("127.0.0.1", self.ports[address])


@dataclass
class Gate:
    """A gate with a server behind it."""

    gate: EgressGate
    serving: Serving
    observer: FakeObserver
    outside: FakeOutside
    heard: list[bytes]

    @property
    def exchanges(self) -> list[Exchange]:
        """What was recorded."""
        return self.observer.exchanges

    async def dial(self) -> Client:
        """As the server does."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.gate.port))

    async def answered(self, data: bytes) -> bytes:
        """What comes back for *data*, to the end."""
        client = await self.dial()
        await client.say(data)
        client.writer.write_eof()
        try:
            return await client.rest()
        except ConnectionResetError:  # what it said was not read
            return b""
        finally:
            await client.close()


@asynccontextmanager
async def a_gate(
    rules: EgressRules | UnsetType = HOSTS,
    *,
    dialled: Address | None = ("192.0.2.7", 443),
    ready: bool = True,
    recordable: bool = True,
) -> AsyncIterator[Gate]:
    """Run a gate; what is reached answers with the upper case of what it heard."""
    observer, heard = FakeObserver(), []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.read()
        heard.append(said)
        writer.write(said.upper())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    outside = FakeOutside(dialled, {"192.0.2.7": port, "198.51.100.9": port})
    async with asyncio.TaskGroup() as tasks:
        serving = Serving(
            upstream=None, observers=[observer], spawn=tasks.create_task, resolve=None, why_not_ready=lambda: None  # type: ignore[arg-type]
        )  # fmt: skip
        snapshot = a_snapshot()
        if ready:
            serving.snapshot = replace(snapshot, profile=Profile(server=snapshot.profile.server, egress=rules))
        gate = EgressGate(serving, port=0, max_connections=16, is_recordable=lambda: recordable, outside=outside)
        accepting = tasks.create_task(gate.run())
        try:
            yield Gate(gate, serving, observer, outside, heard)
        finally:
            accepting.cancel()
    server.close()
    await server.wait_closed()
    assert serving.in_flight == 0


def request(host: str, path: str = "/") -> bytes:
    """A plain request for *host*."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def a_hello(name: str | None) -> bytes:
    """What a TLS client says first."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("first", [a_hello("api.example.com"), request("api.example.com")], ids=["tls", "http"])
async def test_a_named_host_is_reached_byte_for_byte(first: bytes) -> None:
    """With half-closes, to the address that the name has, and on record: who was reached, and where."""
    async with a_gate() as out:
        assert await out.answered(first) == first.upper()
    (seen,) = out.exchanges
    kept = orjson.loads(line(seen))

    assert out.heard == [first]
    assert out.outside.asked == ["api.example.com."]  # with its dot: no search domain has a say
    assert kept["destination"] == {
        "host": "api.example.com", "port": 443, "expected": "", "workload": None, "address": "192.0.2.7",
    }  # fmt: skip
    assert (kept["direction"], kept["outcome"]) == ("outbound", "success")
    assert out.gate.outcomes == {("name",): 1}


async def test_the_name_decides_where_a_connection_goes_and_never_the_address() -> None:
    """An allowed name with a foreign address ends at the name's own; the next address is tried when one is dead."""
    async with a_gate(dialled=("203.0.113.66", 443)) as out:
        assert await out.answered(a_hello("moved.example.org"))

    assert [each.outbound and each.outbound.address for each in out.exchanges] == ["192.0.2.7"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (a_hello("evil.example"), Why.NOT_ALLOWED),
        (a_hello(None), Why.UNNAMED),
        (request("evil.example"), Why.NOT_ALLOWED),
        (request("api.example.com:8443"), Why.MISMATCH),
        (a_hello("inner.example.org"), Why.ADDRESS),
        (a_hello("nobody.example.org"), Why.UNRESOLVED),
        (request("api.example.com") + request("evil.example"), Why.MISMATCH),
        (b"SSH-2.0-x\r\n", Why.UNREADABLE),
        (b"", Why.UNNAMED),
    ],
)
async def test_what_the_profile_does_not_name_is_refused(data: bytes, why: Why) -> None:
    """Nothing of it goes out; the reason is on record and counted."""
    async with a_gate() as out:
        said = await out.answered(data)
    kept = orjson.loads(line(out.exchanges[0]))

    assert out.heard == []
    assert kept["decision"]["reason"] == Reason.EGRESS
    assert kept["decision"]["detail"].startswith(f"{why}: ")
    assert (kept["outcome"], kept["destination"]["address"]) == ("refused", None)
    assert out.gate.outcomes == {(why,): 1}
    if data[:1] == b"\x16":
        assert said[-2:] == b"\x02\x31"
    elif data.startswith(b"GET"):
        assert said.startswith(b"HTTP/1.1 403 ")


async def test_a_host_that_does_not_answer_is_a_refusal_that_says_so() -> None:
    """It was allowed, and nothing was sent."""
    async with a_gate() as out:
        out.outside.ports = {}
        await out.answered(a_hello("moved.example.org"))

    assert (
        "unreachable: moved.example.org: Connection refused"
        in orjson.loads(line(out.exchanges[0]))["decision"]["detail"]
    )


async def test_a_later_request_for_another_host_ends_the_connection() -> None:
    """Its head does not arrive whole; the refusal is a record of its own."""
    async with a_gate(dialled=("192.0.2.7", 80)) as out:
        client = await out.dial()
        await client.say(request("api.example.com"))
        await eventually(lambda: out.exchanges, what="the connection to be let out")
        await client.say(request("evil.example", "/secret"))
        assert await client.rest() == b""
        await client.close()
        await eventually(lambda: out.heard, what="the end of the other half")

    assert out.heard == [request("api.example.com")]
    assert [each.refusal and each.refusal.reason for each in out.exchanges] == [None, Reason.EGRESS]


async def test_a_declared_address_is_reached_whatever_is_said() -> None:
    """As it would be past the sidecar; protocols in which the server speaks first work, too."""
    async with a_gate(dialled=("198.51.100.9", 5432)) as out:
        assert await out.answered(b"\x00\x00\x00\x08startup") == b"\x00\x00\x00\x08STARTUP"

    assert out.gate.outcomes == {("address",): 1}
    assert out.outside.asked == []


@pytest.mark.parametrize("why", ["no bundle", "no record can be kept"])
async def test_nothing_goes_out_before_it_can_be_judged_and_recorded(why: str) -> None:
    """Not even to a declared address."""
    async with a_gate(ready=why != "no bundle", recordable=why == "no bundle", dialled=("198.51.100.9", 1)) as out:
        assert await out.answered(b"x") == b""

    assert out.heard == []
    assert [(each.refusal and each.refusal.reason, each.refusal and each.refusal.detail) for each in out.exchanges] == [
        (Reason.NOT_READY, why)
    ]


async def test_a_profile_that_declares_nothing_lets_nothing_out() -> None:
    """Its pod was made when it did."""
    async with a_gate(UNSET) as out:
        await out.answered(a_hello("api.example.com"))

    assert out.gate.outcomes == {(Why.NOT_ALLOWED,): 1}


async def test_who_was_not_redirected_is_turned_away() -> None:
    """The gate is no proxy for whoever knows its port."""
    async with a_gate(dialled=None) as out:
        assert await out.answered(b"") == b""

    assert out.exchanges == []


async def test_silence_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that says nothing, or never all of its head, gives its place back."""
    monkeypatch.setattr(egress_gate, "OPENING_S", 0.05)
    async with a_gate() as out:
        client = await out.dial()
        await client.say(b"GET / HTT")
        assert (await client.rest()).startswith(b"HTTP/1.1 403")
        await client.close()

    assert "unnamed: no host named within 0.05 s, 9 bytes" in orjson.loads(line(out.exchanges[0]))["decision"]["detail"]


async def test_a_client_that_goes_before_it_names_a_host_is_on_record() -> None:
    """Nothing went out, and that is why."""
    async with a_gate() as out:
        client = await out.dial()
        await client.say(b"GET / HTT")
        await eventually(lambda: out.serving.in_flight, what="the connection")
        linger = struct.pack("ii", 1, 0)
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.writer.transport.abort()
        await eventually(lambda: out.exchanges, what="the record")
    kept = orjson.loads(line(out.exchanges[0]))

    assert (kept["outcome"], kept["destination"]["address"]) == ("refused", None)
    assert kept["aborted"].startswith("the server closed the connection")
    assert out.gate.outcomes == {("aborted",): 1}


async def test_a_reader_that_is_slow_holds_the_other_side_back() -> None:
    """What is under way is bounded; it all arrives in the end."""
    size = 8 * 2**20
    async with a_gate(dialled=("198.51.100.9", 1)) as out:
        client = await out.dial()
        client.writer.write(b"x" * size)
        client.writer.write_eof()
        assert len(await client.rest()) == size
        await client.close()


async def test_lookups_that_nobody_answers_leave_threads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gave up waiting has not ended the lookup: without a bound a server could keep its sidecar from all names."""
    monkeypatch.setattr(egress_gate, "RESOLVE_S", 0.05)
    asked, answer = [], asyncio.Event()

    async def silent(host: str, port: int, **kind: object) -> list[tuple[object, ...]]:
        del port, kind
        asked.append(host)
        await answer.wait()
        return [(0, 0, 0, "", ("192.0.2.7", 443))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", silent)
    outside = Outside()
    found = await asyncio.gather(*(outside.resolve(f"{n}.", 443) for n in range(20)), return_exceptions=True)
    assert all(isinstance(each, TimeoutError) for each in found)
    assert len(asked) == egress_gate.MAX_LOOKUPS

    answer.set()
    assert await outside.resolve("later.", 443) == ["192.0.2.7"]


async def test_a_connection_asks_whether_the_other_end_is_still_there() -> None:
    """The server's own keep-alive ends at the sidecar."""
    listener = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with listener:
        _, writer = await Outside().dial("127.0.0.1", listener.sockets[0].getsockname()[1])
        sock = writer.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        writer.transport.abort()
