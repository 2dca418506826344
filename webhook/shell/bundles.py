"""The bundle endpoint: each sidecar gets the bundle of its own pod, told by its SVID, as soon as there is a new one.

Refuses callers of another trust domain, namespace or service account, and an SVID that has run out since the handshake.
Bundles are kept in memory only; they can be made again at any time from what the API server holds. One that is asked
for is signed again first, when the signing key has changed or more of the cluster was seen since (webhook/core/sequence.py).
Source: Open Policy Agent documentation, bundle service API (ETag, If-None-Match, Prefer: wait).
"""

import asyncio
import functools
import hashlib
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Final, TypeVar

from aiohttp import HttpVersion11, web
from prometheus_client import Counter

from certs.spiffe import TrustDomain
from certs.tls import peer_of
from sidecar.core import bundle
from sidecar.core.bundle import Stamp
from sidecar.core.keyring import PrivateKey
from webhook.core.reports import ERROR_HEADER, REVISION_HEADER, Reports
from webhook.core.signing import SigningKeys
from webhook.shell.metrics import Metrics

MEDIA_TYPE: Final = "application/vnd.openpolicyagent.bundles"
MAX_WAIT_S: Final = 60.0  # below the idle limits of proxies and NATs on the way
DELIVERIES_PER_S: Final = 10_000.0  # of one core; as long as these take, handlers whose response is sent rest
AT_ONCE: Final = 64  # of these go on at a stretch
REPORTS_PER_S: Final = 2000.0  # so many sidecars may report a new bundle in a second; small clusters do at once
WITHIN_HEADER: Final = "Sidegate-Report-Within"
RETRY_AFTER_S: Final = "1"
_WAIT: Final = re.compile(r"(?:^|[;,\s])wait=([0-9]{1,4})(?:$|[;,\s])", re.ASCII)

MAX_HASHES: Final = 1024  # that are remembered, of large data
SMALL_BYTES: Final = 32 * 1024  # are signed where they are asked for, within a millisecond or two

Result = TypeVar("Result")
PodKey = tuple[str, str]
"""Namespace and name."""


@dataclass(slots=True)
class Published:
    """A bundle as it was signed last; pods of one workload share it. Mutated by Bundles alone."""

    data: bytes = field(repr=False)
    revision: str
    stamp: Stamp = Stamp()
    size_bytes: int = 0  # of its files, unpacked
    wanted: "Seal | None" = None  # the newest that anybody waits for
    response: "Response | None" = None  # as it was handed out last


@dataclass(frozen=True, slots=True)
class Response:
    """A whole HTTP response with *data* in it, of the second *at_s* (Unix time)."""

    etag: str
    at_s: int
    data: bytes = field(repr=False)
    wire: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """By what a bundle is signed, and what the signature says of its age."""

    key: PrivateKey = field(repr=False)
    stamp: Stamp

    def put_on(self, published: Published) -> None:
        """Sign *published* again, if it is older."""
        if published.stamp < self.stamp:
            published.data = bundle.renew(published.data, self.key, self.stamp)
            published.stamp = self.stamp  # last: who sees it on another thread finds the data


class Waiting:
    """A caller that waits for another bundle than it has. Mutated by Bundles alone.

    *known*: the ETag that it has. *transport*: where the response may be written at once, None where the HTTP server has
    to do it. *is_sent*: it was.
    """

    __slots__ = ("_transport", "done", "is_sent", "known")

    def __init__(self, known: str, transport: asyncio.Transport | None) -> None:
        self.known = known
        self._transport = transport
        self.done: asyncio.Future[None] | None = None
        self.is_sent = False

    def send(self, wire: bytes) -> bool:
        """Write the response *wire*; return whether that was possible."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        transport.write(wire)
        self.is_sent = True
        return True

    def wake(self) -> None:
        """Let the handler go on."""
        if self.done is not None and not self.done.done():
            self.done.set_result(None)


class Entry:
    """What one pod may have. Mutated by Bundles alone, *waiting* also by who waits."""

    __slots__ = ("problem", "published", "sequence", "service_account", "waiting")

    def __init__(self, service_account: str) -> None:
        self.service_account = service_account
        self.published: Published | None = None
        self.problem = "not compiled yet"
        self.sequence = 0
        self.waiting: list[Waiting] = []

    async def change(self, waiting: Waiting) -> None:
        """Return when something has changed, or the response of *waiting* is sent."""
        waiting.done = asyncio.get_running_loop().create_future()
        self.waiting.append(waiting)
        try:
            await waiting.done
        finally:
            if waiting in self.waiting:
                self.waiting.remove(waiting)

    def taken(self) -> list[Waiting]:
        """Return who waited until now."""
        taken, self.waiting = self.waiting, []
        return taken


class Bundles:
    """The bundles of all pods; as many as there are injected pods, with the bytes shared among replicas of a workload."""

    def __init__(self) -> None:
        self._entries: dict[PodKey, Entry] = {}
        self.keys: SigningKeys | None = None
        self._signer = ThreadPoolExecutor(1, "signer")  # large ones, one at a time: each is unpacked for it
        self._hashes: OrderedDict[bytes, str] = OrderedDict()
        self._resting: deque[Waiting] = deque()  # whose response is sent
        self.is_stopping = False  # responses say `Connection: close`, which the HTTP server sees to
        self.floor = 0  # all bundles without a problem reflect the cluster up to this resource version

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, pod: PodKey) -> Entry | None:
        """Return the entry of *pod*."""
        return self._entries.get(pod)

    def track(self, pod: PodKey, service_account: str) -> None:
        """Let *pod*, which runs as *service_account*, ask; a pod of another account is another pod."""
        entry = self._entries.get(pod)
        if entry is None or entry.service_account != service_account:
            self.forget(pod)
            self._entries[pod] = Entry(service_account)

    def forget(self, pod: PodKey) -> None:
        """Answer nothing for *pod* any more."""
        entry = self._entries.pop(pod, None)
        for each in entry.taken() if entry else ():
            each.wake()

    async def sign(self, files: Mapping[str, bytes], sequence: int) -> Published:
        """Return the bundle of *files*, for `publish`. The keys must be there."""
        assert self.keys is not None  # noqa: S101 - nothing is compiled before
        make = functools.partial(self._signed, files, Seal(key=self.keys.current, stamp=self.keys.stamp(sequence)))
        return make() if _size_bytes(files) <= SMALL_BYTES else await self._beside(make)

    def etag(self, published: Published) -> str:
        """Return what tells *published* from others: what is in it, and the keys that it announces."""
        return f"{published.revision}.{self.keys.term:x}" if self.keys else published.revision

    def _signed(self, files: Mapping[str, bytes], seal: Seal) -> Published:
        large = {
            name: self._hash_of(content)
            for name, content in files.items()
            if name.endswith(bundle.DATA) and len(content) > SMALL_BYTES
        }
        data = bundle.encode(files, seal.key, stamp=seal.stamp, hashes=large)
        return Published(data, bundle.revision(files), seal.stamp, _size_bytes(files))

    def _hash_of(self, data: bytes) -> str:
        """Return the hash of large *data*, which many workloads may have; on the signer's thread alone."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._hashes:
            self._hashes[digest] = bundle.hash_of(bundle.DATA, data)
        self._hashes.move_to_end(digest)
        while len(self._hashes) > MAX_HASHES:
            self._hashes.popitem(last=False)
        return self._hashes[digest]

    async def signed(self, entry: Entry, published: Published) -> bytes:
        """Return *published* as its signature should be now, or newer: pods that share it may have seen more."""
        stamp = self._stamp(entry)
        if self.keys is not None and published.stamp < stamp:
            await self._renew(published, Seal(key=self.keys.current, stamp=stamp))
        return published.data

    def _stamp(self, entry: Entry) -> Stamp:
        """Return how new the bundle is that *entry* should have."""
        if self.keys is None:
            return Stamp()
        return self.keys.stamp(entry.sequence if entry.problem else max(entry.sequence, self.floor))

    async def _renew(self, published: Published, seal: Seal) -> None:
        if published.size_bytes <= SMALL_BYTES:
            seal.put_on(published)
            return
        if published.wanted is None or published.wanted.stamp < seal.stamp:
            published.wanted = seal
        # Who waits in the queue may find that the one before has done it; what has begun is kept if nobody waits any more.
        await self._beside(lambda: (published.wanted or seal).put_on(published))

    async def _beside(self, work: Callable[[], Result]) -> Result:
        """Return what *work* returns, done on the signer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._signer, work)

    def publish(self, pod: PodKey, published: Published, sequence: int = 0) -> None:
        """Hand out *published*, which reflects the cluster up to *sequence*, to *pod* from now on."""
        entry = self._entries.get(pod)
        if entry:
            entry.problem, entry.sequence = "", max(entry.sequence, sequence)
            if entry.published is None or entry.published.revision != published.revision:
                entry.published = published
                self._hand_out(entry, published)

    def _hand_out(self, entry: Entry, published: Published) -> None:
        """Give *published* to who waits for it: ten thousand get it first, and what follows is looked after then."""
        waiting = entry.taken()
        response = self._response(entry, published) if waiting else None
        for each in waiting:
            if response is None or response.etag == each.known or not each.send(response.wire):
                each.wake()
                continue
            self._resting.append(each)
            if len(self._resting) == 1:
                asyncio.get_running_loop().call_later(len(self._entries) / DELIVERIES_PER_S, self._resume)

    def _resume(self) -> None:
        """Let handlers go on whose response was sent, a few at a time: then they take up their callers' next questions."""
        for _ in range(min(AT_ONCE, len(self._resting))):
            self._resting.popleft().wake()
        if self._resting:
            asyncio.get_running_loop().call_soon(self._resume)

    def _response(self, entry: Entry, published: Published) -> Response | None:
        """Return *published* as the HTTP server would send it; None when it has to be signed first, or by a thread."""
        if self.is_stopping or published.stamp < self._stamp(entry):
            return None
        data = published.data  # once: the signer's thread may put a newer one in its place meanwhile
        if len(data) > SMALL_BYTES:
            return None
        etag, held, now_s = self.etag(published), published.response, int(time.time())
        if held is None or (held.etag, held.at_s) != (etag, now_s) or held.data is not data:
            fields = {"ETag": f'"{etag}"', WITHIN_HEADER: self.within(), "Content-Type": MEDIA_TYPE}
            fields |= {"Content-Length": str(len(data)), "Date": formatdate(now_s, usegmt=True)}
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            wire = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + data
            held = published.response = Response(etag, now_s, data, wire)
        return held

    def within(self) -> str:
        """Return over how many seconds reports are to be spread."""
        return f"{len(self._entries) / REPORTS_PER_S:.2f}"

    def fail(self, pod: PodKey, problem: str) -> None:
        """Say *problem* while *pod* has no bundle; the last good one stays."""
        entry = self._entries.get(pod)
        if entry:
            entry.problem = problem


def _size_bytes(files: Mapping[str, bytes]) -> int:
    return sum(map(len, files.values()))


def utc_now() -> datetime:
    """Return the wall clock, aware."""
    return datetime.now(UTC)


class BundleEndpoint:
    """The handler of `/v1/bundles/{pod}`."""

    def __init__(
        self,
        bundles: Bundles,
        trust_domain: TrustDomain,
        metrics: Metrics,
        now: Callable[[], datetime] = utc_now,
        *,
        reports: Reports | None = None,
    ) -> None:
        """*reports* takes in what pods say of the bundles they have."""
        self._bundles = bundles
        self._reports = Reports() if reports is None else reports
        self._trust_domain = trust_domain
        self._metrics = metrics
        self._counters: dict[int, Counter] = {}
        self._now = now

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Return the bundle, or why there is none."""
        try:
            response = await self._answer(request)
        except web.HTTPException as error:
            self._count(error.status)
            raise
        self._count(response.status)
        return response

    def _count(self, status: int) -> None:
        counter = self._counters.get(status)
        if counter is None:  # looked up once: it takes as long as to find the bundle
            counter = self._counters[status] = self._metrics.bundle_requests.labels(str(status))
        counter.inc()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        pod, service_account = self._caller(request)
        wait_s = _wait_s(request.headers.get("Prefer", ""))
        known = request.headers.get("If-None-Match", "").strip().strip('"')
        self._entry(pod, service_account)  # who may not ask has nothing to report
        self._reports.note(
            pod,
            request.headers.get(REVISION_HEADER, ""),
            request.headers.get(ERROR_HEADER, ""),
            self._now().timestamp(),
        )
        waiting = _waiting(request, known)
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    entry = self._entry(pod, service_account)
                    if entry.published and self._bundles.etag(entry.published) != known:
                        break
                    await entry.change(waiting)
                    if waiting.is_sent:
                        return Sent()
        except TimeoutError:
            if waiting.is_sent:
                return Sent()
            entry = self._entry(pod, service_account)
        if entry.published is None:
            raise web.HTTPServiceUnavailable(
                text=f"pod {'/'.join(pod)}: {entry.problem}", headers={"Retry-After": RETRY_AFTER_S}
            )
        published = entry.published
        etag = self._bundles.etag(published)
        headers = {"ETag": f'"{etag}"'}
        if etag == known:
            return web.Response(status=304, headers=headers)
        headers[WITHIN_HEADER] = self._bundles.within()
        data = await self._bundles.signed(entry, published)
        return web.Response(body=data, content_type=MEDIA_TYPE, headers=headers)

    def _caller(self, request: web.Request) -> tuple[PodKey, str]:
        """Return which pod is asked for, and as which service account. Raises HTTPForbidden."""
        peer = peer_of(request.transport) if request.transport else None
        if peer is None:
            raise web.HTTPForbidden(text="no SVID was shown")
        if self._now() > peer.not_after:
            raise web.HTTPForbidden(text="the SVID of this connection has expired; connect again", headers=_CLOSE)
        caller = peer.spiffe_id
        if caller.trust_domain != self._trust_domain:
            raise web.HTTPForbidden(text=f"{caller}: only workloads of {self._trust_domain} have bundles here")
        if caller.namespace is None or caller.service_account is None:
            raise web.HTTPForbidden(text=f"{caller}: not of the form /ns/<namespace>/sa/<service account>")
        return (caller.namespace, request.match_info["pod"]), caller.service_account

    def _entry(self, pod: PodKey, service_account: str) -> Entry:
        entry = self._bundles.find(pod)
        if entry is None:
            raise web.HTTPNotFound(
                text=f"no injected pod {'/'.join(pod)} is known", headers={"Retry-After": RETRY_AFTER_S}
            )
        if entry.service_account != service_account:
            raise web.HTTPForbidden(text=f"pod {'/'.join(pod)} does not run as service account {service_account}")
        return entry


class Sent(web.StreamResponse):
    """A response whose last byte was written before the HTTP server was asked to; the connection stays open."""

    @property
    def keep_alive(self) -> bool:
        """Return whether there may be another request."""
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write no head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write no body."""


def _waiting(request: web.Request, known: str) -> Waiting:
    """Return the caller of *request*, for whom the response is simply the next bytes on the connection, if it is plain."""
    is_plain = request.method == "GET" and request.keep_alive and request.version == HttpVersion11
    return Waiting(known, request.transport if is_plain and not request.body_exists else None)


_CLOSE: Final = {"Connection": "close"}


def _wait_s(prefer: str) -> float:
    """Return the seconds that the caller prefers to wait for a change, 0 when it says nothing."""
    found = _WAIT.search(prefer)
    return min(float(found[1]), MAX_WAIT_S) if found else 0.0
