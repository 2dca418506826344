"""Lets connections that the MCP server opens itself out to the hosts that its profile names, and to no others.

Netfilter sends here what goes to a public address. What is declared by address passes as it is; of all else the host is
read that it asks for, judged, resolved here, and connected to. Every connection leaves a record, and none is made without:
refused ones, too. Bounded in time and size until the host is known. Refuses while there is no bundle. Listens on loopback
only; who comes here without having been redirected is turned away.
"""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import UNSET

from sidecar.core.connection import Connection
from sidecar.core.hosts import Barred, Why, check_name, is_by_address, usable
from sidecar.core.profile import EgressRules
from sidecar.errors import Reason, Refusal
from sidecar.exchange import Exchange, Outbound
from sidecar.shell.accepting import Accepting
from sidecar.shell.egress_listener import Address, bind, original_address
from sidecar.shell.openings import Opening, opening
from sidecar.shell.serving import Serving
from sidecar.shell.tunnel import PIECE_BYTES, Streams, carry, dial

OPENING_S: Final = 10.0
RESOLVE_S: Final = 5.0
CONNECT_S: Final = 5.0  # for each address
MAX_ADDRESSES: Final = 4
MAX_LOOKUPS: Final = 2  # at a time: each holds one of the loop's four threads while DNS is silent; we need some, too
_NOTHING_DECLARED: Final = EgressRules()


class Outside:
    """What is asked of the network."""

    def __init__(self) -> None:
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)

    def original(self, sock: socket.socket) -> Address | None:
        """Return where the server dialled; None when nothing was redirected."""
        return original_address(sock)

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses of *host*. Raises OSError, TimeoutError."""
        async with asyncio.timeout(RESOLVE_S):
            await self._lookups.acquire()
            return await asyncio.shield(self._look_up(host, port))  # its thread goes on when nobody waits any more

    async def _look_up(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        finally:
            self._lookups.release()
        return [str(each[4][0]) for each in found]

    async def dial(self, address: str, port: int) -> Streams:
        """Return a connection. Raises OSError, TimeoutError."""
        return await dial(address, port, timeout_s=CONNECT_S)


class EgressGate:
    """The server's own way out. `run` in a task; cancel it once the server is gone.

    Attributes:
        outcomes: how many connections went out by `name` or by `address`, or were refused, by the reason.
    """

    def __init__(
        self,
        serving: Serving,
        *,
        port: int,
        max_connections: int,
        is_recordable: Callable[[], bool],
        outside: Outside | None = None,
    ) -> None:
        """Bind at once, so that `port` is known."""
        self._serving = serving
        self._is_recordable = is_recordable
        self.outside = outside or Outside()
        sockets = bind(port)
        self.port: int = sockets[0].getsockname()[1]
        self.outcomes: Counter[tuple[str, ...]] = Counter()
        self._accepting = Accepting(sockets, self._serve, max_connections=max_connections)

    async def run(self) -> None:
        """Accept until cancelled, which also ends what is open."""
        await self._accepting.run()

    async def _serve(self, sock: socket.socket, client: str) -> bool:
        """Serve *sock* until it is closed by both sides; nobody else closes it."""
        address = self.outside.original(sock)
        if address is not None:
            await _Crossing(self, sock, client, address).run()
        return False

    def rules(self) -> EgressRules:
        """Return what holds now. Raises Refusal(NOT_READY)."""
        snapshot = self._serving.snapshot
        if snapshot is None or not self._is_recordable():
            detail = "no bundle" if snapshot is None else "no record can be kept"
            raise Refusal(Reason.NOT_READY, "where this server may connect to is not known yet", detail=detail)
        return _NOTHING_DECLARED if snapshot.profile.egress is UNSET else snapshot.profile.egress

    def begin(self, client: str, outbound: Outbound) -> Exchange:
        """Return the record of a connection of *client*."""
        connection = Connection(peer=None, client=client, method="", path="", query="", headers=(), body=b"")
        exchange = self._serving.begin(connection)
        exchange.outbound = outbound
        return exchange

    def conclude(self, exchange: Exchange, outcome: str) -> None:
        """Count and record that *exchange* is decided."""
        self.outcomes[outcome,] += 1
        exchange.judged_s = exchange.total_s = self._serving.clock() - exchange.clock_s
        self._serving.observe(exchange)


class _Crossing:
    """One connection."""

    def __init__(self, gate: EgressGate, sock: socket.socket, client: str, address: Address) -> None:
        self._gate = gate
        self._sock = sock
        self._client = client
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._opening: Opening | None = None
        self._seen = bytearray()

    async def run(self) -> None:
        """Open the other half and carry bytes, or refuse."""
        host, port = self._address
        outbound = Outbound(host=host, port=port, expected="")
        exchange = self._gate.begin(self._client, outbound)
        outcome = "aborted"
        try:
            streams, outcome = await self._open(outbound)
        except Refusal as refusal:
            exchange.refusal = refusal
            outcome = refusal.why if isinstance(refusal, Barred) else refusal.reason
            await self._turn_away(refusal)
            return
        except OSError as error:
            exchange.aborted = f"the server closed the connection: {error}"
            raise
        finally:
            self._gate.conclude(exchange, outcome)
        inspect = None if self._opening is None else self._opening.feed
        try:
            await carry(self._sock, streams, first=bytes(self._seen), inspect=inspect)
        except Barred as refusal:  # a later request of the same connection
            exchange = self._gate.begin(self._client, Outbound(host=outbound.host, port=port, expected=""))
            exchange.refusal = refusal
            self._gate.conclude(exchange, refusal.why)

    async def _open(self, outbound: Outbound) -> tuple[Streams, str]:
        """Return the other half, and by what it was found. Raises Refusal."""
        dialled, port = self._address
        rules = self._gate.rules()
        if is_by_address(rules, dialled, port):
            return await self._connect(outbound, [dialled]), "address"
        outbound.host = await self._host()
        check_name(rules, outbound.host, port)
        addresses = usable(rules, outbound.host, await self._resolved(outbound.host), port, dialled=dialled)
        return await self._connect(outbound, addresses), "name"

    async def _host(self) -> str:
        """Return the host that the first bytes ask for. Raises Barred."""
        try:
            async with asyncio.timeout(OPENING_S):
                while piece := await self._loop.sock_recv(self._sock, PIECE_BYTES):
                    self._seen += piece
                    if self._opening is None:
                        self._opening = opening(piece[0], self._address[1])
                    if (host := self._opening.feed(piece)) is not None:
                        return host
        except TimeoutError:
            raise Barred(Why.UNNAMED, f"no host named within {OPENING_S:g} s, {len(self._seen)} bytes") from None
        raise Barred(Why.UNNAMED, f"no host named in {len(self._seen)} bytes")

    async def _resolved(self, host: str) -> list[str]:
        """Return the addresses of *host*, which is looked for in no other domain. Raises Barred."""
        try:
            return await self._gate.outside.resolve(f"{host}.", self._address[1])
        except OSError as error:  # TimeoutError is one
            raise Barred(Why.UNRESOLVED, f"{host}: {str(error) or 'timed out'}") from error

    async def _connect(self, outbound: Outbound, addresses: Sequence[str]) -> Streams:
        """Return a connection to the first of *addresses* that answers. Raises Barred."""
        problem: OSError | None = None
        for address in addresses[:MAX_ADDRESSES]:
            try:
                streams = await self._gate.outside.dial(address, outbound.port)
            except OSError as error:  # TimeoutError is one
                problem = error
            else:
                outbound.address = address
                return streams
        raise Barred(Why.UNREACHABLE, f"{outbound.host}: {str(problem) or 'timed out'}")

    async def _turn_away(self, refusal: Refusal) -> None:
        """Tell the server, in what it speaks."""
        if self._opening is None or not isinstance(refusal, Barred):
            return
        with contextlib.suppress(OSError):
            async with asyncio.timeout(CONNECT_S):
                await self._loop.sock_sendall(self._sock, self._opening.refusal(refusal))
            self._sock.shutdown(socket.SHUT_WR)
