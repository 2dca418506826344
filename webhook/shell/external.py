"""Fetches the bundles of external OPA bundle servers that policies name; the last good one of each stays.

The control plane fetches, verifies, compiles and signs again, so that sidecars have one source and one key to trust.
Refuses addresses outside the operator's list: a policy's author must not make the control plane ask what only it can
reach. A bundle that has not been fetched yet, or not for longer than its policy says, makes the policy unusable until it
has; pods keep what they enforce. Source: OPA documentation, bundle service API (ETag).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

import aiohttp

from certs.errors import CertsError
from certs.spiffe import SpiffeId, SpiffePattern
from certs.tls import MutualClient
from sidecar.core.bundle import Limits
from sidecar.errors import BundleError
from webhook.core.external import Fetched, is_allowed, read
from webhook.core.resources import BundleSpec
from webhook.errors import BadResource

log = logging.getLogger(__name__)

ANSWER_S: Final = 15.0
LOOK_S: Final = 1.0  # how soon a newly named bundle is fetched
RETRY_S: Final = 10.0  # after a failure, or as often as it is polled anyway
MAX_SOURCES: Final = 256
AT_ONCE: Final = 8  # whose contents are taken in: a hundred MB each, when they are as large as may be


class Source:
    """One external bundle. Mutated by External alone."""

    __slots__ = ("confirmed_s", "due_s", "etag", "fetched", "problem")

    def __init__(self) -> None:
        self.fetched: Fetched | None = None
        self.etag = ""
        self.problem = "not fetched yet"
        self.confirmed_s = 0.0
        self.due_s = 0.0


class External:
    """All external bundles. `run` in the root TaskGroup; mutated by it and by `use`."""

    def __init__(
        self,
        client: MutualClient,
        allowed: Iterable[str],
        changed: Callable[[BundleSpec], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*changed* is told of each bundle with another content; *allowed* are prefixes of URLs."""
        self._client = client
        self._allowed = tuple(allowed)
        self._changed = changed
        self._clock = clock
        self._sources: dict[BundleSpec, Source] = {}
        self._taking = asyncio.Semaphore(AT_ONCE)

    def use(self, wanted: Iterable[BundleSpec]) -> None:
        """Keep the bundles *wanted*, and forget all others."""
        kept = list(dict.fromkeys(wanted))[:MAX_SOURCES]
        self._sources = {spec: self._sources.get(spec) or Source() for spec in kept}

    def __call__(self, spec: BundleSpec) -> Fetched:
        """Return what the bundle holds. Raises BadResource while it cannot be used."""
        source = self._sources.get(spec)
        if not is_allowed(spec.url, self._allowed):
            hint = "the operator lists addresses in SIDEGATE_EXTERNAL_BUNDLES"
            raise BadResource("spec.bundle", f"{spec.url}: not an address that is allowed; {hint}")
        if source is None:
            raise BadResource("spec.bundle", f"{spec.url}: there are {MAX_SOURCES} others already")
        if source.fetched is None:
            raise BadResource("spec.bundle", f"{spec.url}: {source.problem}")
        if spec.max_age_seconds and self._clock() - source.confirmed_s > spec.max_age_seconds:
            raise BadResource("spec.bundle", f"{spec.url}: stale: {source.problem or 'not confirmed'}")
        return source.fetched

    async def run(self) -> None:
        """Poll for ever."""
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            while True:
                await self.poll(session)
                await asyncio.sleep(LOOK_S)

    async def poll(self, session: aiohttp.ClientSession) -> None:
        """Ask for each bundle that is due."""
        due = [
            (spec, source)
            for spec, source in self._sources.items()
            if self._clock() >= source.due_s and is_allowed(spec.url, self._allowed)
        ]
        async with asyncio.TaskGroup() as tasks:
            for spec, source in due:
                tasks.create_task(self._refresh(session, spec, source))

    async def _refresh(self, session: aiohttp.ClientSession, spec: BundleSpec, source: Source) -> None:
        before = source.fetched
        try:
            await self._fetch(session, spec, source)
        except (aiohttp.ClientError, OSError, TimeoutError, CertsError, BundleError, ValueError) as error:
            problem = str(error) or type(error).__name__
            if source.problem != problem:
                log.error("external bundle not renewed", extra={"url": spec.url, "error": problem})  # noqa: TRY400 - the text says it all
            is_news = before is None and source.problem != problem
            source.problem, source.due_s = problem, self._clock() + min(RETRY_S, spec.poll_seconds)
            if is_news:
                self._changed(spec)
            return
        is_back = bool(source.problem) and self._was_stale(spec, source)
        source.problem, source.confirmed_s = "", self._clock()
        source.due_s = self._clock() + spec.poll_seconds
        if source.fetched != before or is_back:
            log.info("external bundle fetched", extra={"url": spec.url})
            self._changed(spec)

    def _was_stale(self, spec: BundleSpec, source: Source) -> bool:
        return bool(spec.max_age_seconds) and self._clock() - source.confirmed_s > spec.max_age_seconds

    async def _fetch(self, session: aiohttp.ClientSession, spec: BundleSpec, source: Source) -> None:
        """Ask once, and take in what is new. Raises what the libraries raise, BundleError for what does not hold."""
        context = (
            self._client.context(SpiffePattern.exactly(SpiffeId.parse(spec.spiffe_id))) if spec.spiffe_id else True
        )
        headers = {"Prefer": "modes=snapshot", "Accept-Encoding": "identity"}
        if source.etag:
            headers["If-None-Match"] = source.etag
        async with (
            asyncio.timeout(ANSWER_S) as deadline,
            session.get(spec.url, ssl=context, headers=headers, allow_redirects=False) as response,
        ):
            if response.status == 304 and source.fetched is not None:
                return
            if response.status != 200:
                raise BundleError(f"HTTP {response.status}")
            deadline.reschedule(None)  # to wait for others is no fault of this server
            async with self._taking:
                deadline.reschedule(asyncio.get_running_loop().time() + ANSWER_S)
                packed = await _body(response, Limits().packed_bytes)
                deadline.reschedule(None)
                # On a thread: a second a MB of data, in which admission is to be served.
                source.fetched = await asyncio.to_thread(read, packed, spec)
            source.etag = response.headers.get("ETag", "")


async def _body(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Return the body. Raises BundleError beyond *limit_bytes*."""
    packed = bytearray()
    async for piece in response.content.iter_any():
        packed += piece
        if len(packed) > limit_bytes:
            raise BundleError(f"bundle: larger than {limit_bytes} bytes")
    return bytes(packed)
