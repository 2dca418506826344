"""Asks the store of global limits, Valkey or Redis: many calls in one script call, one at a time on one connection.

Decides nothing. Nobody waits for it longer than `timeout_s`: whoever has no answer by then gets None, which means that
the limit's `whenUnavailable` holds. Once it failed to answer it is away, and nobody waits at all until it has answered
again. A connection that was closed is opened anew while calls wait, within the same bound. An answer that comes
too late is given back.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoScriptError, RedisError

from sidecar.core import tally
from sidecar.core.limits import Charge, Judgement
from sidecar.core.store import StoreAddress

log = logging.getLogger(__name__)

CONNECT_S: Final = 1.0  # for a connection with TLS and login; no call waits for it longer than its own bound
SOON_S: Final = 0.002
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
MAX_CLAIMS: Final = 32  # in one script call: below a millisecond of the server's time
MAX_CHANGES: Final = 128
MAX_WAITING: Final = 1024  # calls; more are judged as if the store were away
MAX_OWED: Final = (
    10_000  # changes to be sent; beyond it the oldest is dropped: units stay counted, leases end by themselves
)


@dataclass(slots=True, eq=False)
class _Question:
    claim: tally.Claim
    answer: "asyncio.Future[tuple[Judgement, ...] | None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """How we prove to the store who we are, and by which authorities it proves it to us (PEM; empty: the system's)."""

    user: str = ""
    password: str = ""
    ca_pem: str = ""


class Store:
    """The store, as one sidecar sees it. Owned by sidecar/shell/app.py, which runs `run` in its TaskGroup."""

    def __init__(self, address: StoreAddress, *, login: Login, replica: str, timeout_s: float) -> None:
        """*replica* is unique among all that share the store: it begins the names of leases."""
        self._address = address
        self._login = login
        self._timeout_s = timeout_s
        self._leases: Iterator[str] = (f"{replica}:{number}" for number in count())
        self._waiting: deque[_Question] = deque()
        self._owed: deque[tally.Change] = deque(maxlen=MAX_OWED)
        self._held: dict[str, tuple[Charge, str]] = {}  # charges that hold a lease, with their namespace
        self._work = asyncio.Event()
        self.is_up = False
        self.failures = 0  # times that it was lost
        self.unanswered = 0  # calls that got no answer in time

    async def ask(self, charges: Sequence[Charge], namespace: str) -> tuple[Judgement, ...] | None:
        """Return what the store says of *charges*, one body's; None when it does not within the bound."""
        if not self.is_up or len(self._waiting) >= MAX_WAITING:
            return None
        asked = tally.claim(charges, namespace, self._leases)
        question = _Question(asked, asyncio.get_running_loop().create_future())
        self._waiting.append(question)
        self._work.set()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await question.answer
        except TimeoutError:
            # It may have come in the very moment.
            answer = question.answer.result() if not question.answer.cancelled() else None
        if answer is None:
            self.unanswered += 1
            return None
        for charge, judgement in zip(charges, answer, strict=True):
            if charge.lease and judgement.marks:
                self._held[charge.lease] = (charge, namespace)
        return answer

    def give_back(self, charges: Iterable[Charge], namespace: str) -> None:
        """Return what the store took for *charges*: their messages are not sent."""
        for charge in charges:
            self._held.pop(charge.lease, None)
            self._owe(tally.returned(charge, charge.marks, namespace))

    def end(self, charges: Iterable[Charge]) -> None:
        """Know that the messages of *charges* are no longer under way; a second time changes nothing."""
        for charge in charges:
            held = self._held.pop(charge.lease, None) if charge.lease else None
            if held is not None:
                self._owe(tally.ended((charge,), held[1]))

    async def run(self) -> None:
        """Keep the connection, ask and change, until cancelled."""
        backoff_s = 0.0
        while True:
            await asyncio.sleep(backoff_s)
            client, *others = self._clients()
            try:
                async with asyncio.timeout(self._timeout_s if self.is_up else CONNECT_S):
                    await _load(client)
                backoff_s = 0.0
                self._found()
                await self._serve(client)
            except Disconnected as error:
                if self.is_up and not backoff_s:  # what waits may still be answered by a new connection
                    backoff_s = SOON_S
                    continue
                self._lost(error)
                backoff_s = self._longer(backoff_s)
            except (RedisError, OSError, TimeoutError) as error:
                self._lost(error)
                backoff_s = self._longer(backoff_s)
            finally:
                for each in (client, *others):
                    with suppress(RedisError, OSError, TimeoutError):
                        async with asyncio.timeout(CONNECT_S):
                            await each.aclose()

    async def _serve(self, client: Any) -> None:
        """Send what there is to send, until that fails."""
        async with asyncio.timeout(None) as patience:
            loop = asyncio.get_running_loop()
            renew_at_s = loop.time() + tally.RENEW_S
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(renew_at_s):
                        await self._work.wait()
                if loop.time() >= renew_at_s:
                    renew_at_s = loop.time() + tally.RENEW_S
                    for charge, namespace in self._held.values():
                        self._owe(tally.renewed((charge,), namespace))
                self._work.clear()
                while self._waiting or self._owed:
                    patience.reschedule(loop.time() + self._timeout_s)
                    await self._change(client)  # first: what has ended makes room for what is asked
                    await self._ask(client)
                patience.reschedule(None)

    async def _ask(self, client: Any) -> None:
        while self._waiting and self._waiting[0].answer.done():  # nobody waits any more
            self._waiting.popleft()
        asked = [each for each in list(self._waiting)[:MAX_CLAIMS] if not each.answer.done()]
        if not asked:
            return
        keys = [key for each in asked for key in each.claim.keys]
        arguments = [argument for each in asked for argument in each.claim.arguments]
        numbers = await _run(client, tally.CLAIM_SHA, keys, arguments)
        for each in asked:
            self._waiting.remove(each)
            mine, numbers = numbers[: 3 * len(each.claim.keys)], numbers[3 * len(each.claim.keys) :]
            answer = tally.read_answer(each.claim, mine)
            if not each.answer.done():
                each.answer.set_result(answer)
                continue
            for charge, judgement in zip(each.claim.charges, answer, strict=True):  # too late
                self._owe(tally.returned(charge, judgement.marks, each.claim.namespace))

    async def _change(self, client: Any) -> None:
        changes = [self._owed.popleft() for _ in range(min(MAX_CHANGES, len(self._owed)))]
        if changes:
            arguments = [argument for each in changes for argument in each.arguments]
            await _run(client, tally.SETTLE_SHA, [each.key for each in changes], arguments)

    def _owe(self, changes: Iterable[tally.Change]) -> None:
        self._owed.extend(changes)
        self._work.set()

    def _found(self) -> None:
        if not self.is_up:
            self.is_up = True
            log.info("limits store found", extra={"hosts": _hosts(self._address)})
        self._work.set()

    def _lost(self, error: BaseException) -> None:
        if self.is_up:
            self.failures += 1
            detail = str(error) or f"no answer in {self._timeout_s} s"
            log.warning("limits store lost", extra={"hosts": _hosts(self._address), "error": detail})
        self.is_up = False
        while self._waiting:
            question = self._waiting.popleft()
            if not question.answer.done():
                question.answer.set_result(None)

    @staticmethod
    def _longer(backoff_s: float) -> float:
        # Not all replicas at once.
        return min(MAX_BACKOFF_S, max(FIRST_BACKOFF_S, 2 * backoff_s)) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret

    def _clients(self) -> list[Any]:
        """Return the client to ask, and those that it asks itself."""
        address, login = self._address, self._login
        once: dict[str, Any] = {
            "username": login.user or None,
            "password": login.password or None,
            "retry": Retry(NoBackoff(), 0),
            # Our own bound holds; the client's would swallow cancellations (asyncio.wait_for before Python 3.12).
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_S,
            "driver_info": None,
        }
        if address.is_tls:
            once |= {"ssl": True, "ssl_ca_data": login.ca_pem or None, "ssl_check_hostname": True}
        match address.kind:
            case "cluster":
                nodes = [ClusterNode(host, port) for host, port in address.nodes]
                return [RedisCluster(startup_nodes=nodes, **once)]
            case "sentinel":
                tls = {key: value for key, value in once.items() if key.startswith("ssl")}
                known = {"socket_connect_timeout": CONNECT_S, **tls}
                sentinel: Any = Sentinel(list(address.nodes), sentinel_kwargs=known)  # type: ignore[no-untyped-call]
                return [sentinel.master_for(address.master, db=address.database, **once), *sentinel.sentinels]
            case _:
                host, port = address.nodes[0]
                return [Redis(host=host, port=port, db=address.database, single_connection_client=True, **once)]


async def _load(client: Any) -> None:
    for script in (tally.CLAIM, tally.SETTLE):
        await client.script_load(script)


async def _run(client: Any, sha: str, keys: Sequence[str], arguments: Sequence[str]) -> list[int]:
    """Return what the script says; a server that has forgotten it is told it again."""
    try:
        answer = await client.evalsha(sha, len(keys), *keys, *arguments)
    except NoScriptError:
        await _load(client)
        answer = await client.evalsha(sha, len(keys), *keys, *arguments)
    return answer if isinstance(answer, list) else []


def _hosts(address: StoreAddress) -> str:
    return ",".join(f"{host}:{port}" for host, port in address.nodes)
