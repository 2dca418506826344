"""Pulls the workload's policy bundle from the control plane, and keeps the last good one on disk.

Refuses a bundle that does not verify, does not load, is older than the one before or was made for another workload: the
one before stays in force. The control plane must show its own SVID, and this pod's SVID decides which bundle it gets.
OPA documentation, "Bundles": ETag, long polling.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import aiohttp

from certs.errors import CertsError
from certs.spiffe import SpiffeId, SpiffePattern
from certs.tls import MutualClient
from sidecar.config import Settings
from sidecar.core.bundle import Bundle, Limits, Stamp, decode
from sidecar.core.keyring import Keyring
from sidecar.errors import BundleError, ConfigError

log = logging.getLogger(__name__)

POLL_S: Final = 30  # how long the control plane may hold a request while nothing changes
ANSWER_S: Final = 15.0  # beyond that, for the answer itself
RETRY_S: Final = (0.5, 30.0)  # first and longest wait after a failure
NO_IDENTITY_S: Final = 0.5  # between looks for our own SVID, which costs nobody anything
MAX_REPORT_S: Final = 30.0  # the longest that the control plane may let us wait before we report a new bundle
REFUSED_S: Final = 300.0  # after that a refused bundle is tried again: the compiler may have had no time
HELD_S: Final = 1.0  # a server that says "not modified" sooner does not hold requests, and is asked every POLL_S
LAST_GOOD: Final = "bundle.tar.gz"
MAX_TEXT_BYTES: Final = 256  # of an error that the control plane answers with, and of one that it is told
REVISION_HEADER: Final = "Sidegate-Bundle-Revision"  # of each question: what is in force
WITHIN_HEADER: Final = "Sidegate-Report-Within"  # of an answer: seconds over which reports are to be spread
ERROR_HEADER: Final = "Sidegate-Bundle-Error"  # why the last bundle offered is not


class PullError(Exception):
    """The control plane gave no bundle; the message says why, *retry_after_s* when it asks to be asked again."""

    def __init__(self, why: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class _OlderError(BundleError):
    """The bundle is older than the one before: whoever offered it knows less of the cluster than we have heard."""


class _NoIdentityError(PullError):
    """There is no SVID yet to ask with."""


class BundleSource:
    """The way from the control plane to `activate`. `run` in the root TaskGroup."""

    def __init__(
        self,
        settings: Settings,
        session: aiohttp.ClientSession,
        client: MutualClient,
        activate: Callable[[Bundle], Awaitable[None]],
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*activate* puts a bundle in force, or raises BundleError. Raises ConfigError when a setting is missing.

        *wall* is Unix time, *clock* a monotonic one, both in seconds.
        """
        wanted = ("namespace", "pod", "workload", "control_plane", "control_plane_id", "bundle_keys")
        absent = [f"SIDEGATE_{name.upper()}" for name in wanted if not getattr(settings, name)]
        if absent:
            raise ConfigError(f"needed to pull a bundle, and not set: {', '.join(absent)}")
        try:
            self._keyring = Keyring.parse(settings.bundle_keys)
            self._expected = SpiffePattern.exactly(SpiffeId.parse(settings.control_plane_id))
        except (BundleError, CertsError) as error:
            raise ConfigError(str(error)) from error
        self._settings = settings
        self._session = session
        self._client = client
        self._activate = activate
        self._url = f"{settings.control_plane.rstrip('/')}/v1/bundles/{settings.pod}"
        self._path = Path(settings.bundle_dir) / LAST_GOOD if settings.bundle_dir else None
        self._etag: str | None = None
        self._digest: bytes | None = None  # of the last bundle that was judged
        self._revision = ""  # in force
        self._refused = ""  # why the last one offered was not put in force
        self._refused_at_s = 0.0  # monotonic
        self._stamp = Stamp()  # the highest that was believed
        self._must_reconnect = False  # the next question should reach another replica
        self._confirmed_at_s: float | None = None  # monotonic
        self._wall, self._clock = wall, clock
        self._report_within_s = 0.0
        self.refusals = 0
        self.detail = "not asked yet"

    @property
    def age_s(self) -> float | None:
        """Return the seconds since the control plane last confirmed the bundle in force; None before any.

        Whoever sets the clock of the machine does not change it: wall time counts only while there was no process.
        """
        return None if self._confirmed_at_s is None else max(0.0, self._clock() - self._confirmed_at_s)

    @property
    def is_stale(self) -> bool:
        """Say whether the bundle in force is too old to be enforced any longer."""
        limit_s, age_s = self._settings.bundle_max_age_s, self.age_s
        return bool(limit_s) and age_s is not None and age_s > limit_s

    async def run(self) -> None:
        """Start from disk, then ask for ever; returns only by cancellation."""
        await self._start_from_disk()
        failures = 0
        while True:
            asked_s = self._clock()
            try:
                changed = await self._pull()
            except _NoIdentityError as error:
                self.detail = str(error)
                await asyncio.sleep(NO_IDENTITY_S)
                continue
            except PullError as error:
                if self.detail != str(error):
                    log.warning("no bundle from the control plane", extra={"error": str(error)})
                self.detail = str(error)
                failures += 1
                wait_s = RETRY_S[0] * 2 ** min(failures, 10) if error.retry_after_s is None else error.retry_after_s
                await _pause(min(RETRY_S[1], max(RETRY_S[0], wait_s)))
                continue
            failures = 0
            self.detail = f"bundle refused: {self._refused}" if self._refused else "confirmed"
            if changed:
                await _pause(self._report_within_s)
            elif self._clock() - asked_s < HELD_S:
                await _pause(POLL_S)

    async def _pull(self) -> bool:
        """Ask once; return whether there was a new bundle, put in force or refused. Raises PullError."""
        headers = self._headers()
        try:
            context = self._client.context(self._expected)
        except CertsError as error:
            raise _NoIdentityError(f"no SVID to ask with: {error}") from error
        try:
            async with (
                asyncio.timeout(POLL_S + ANSWER_S),
                self._session.get(self._url, ssl=context, headers=headers, allow_redirects=False) as response,
            ):
                status, answered = response.status, response.headers
                data = await _read(response, Limits().packed_bytes if status == 200 else MAX_TEXT_BYTES)
        except BundleError as error:
            self._etag, self._digest = answered.get("ETag"), None
            self._refuse(error)
            raise PullError(f"bundle refused: {error}") from error
        except (aiohttp.ClientError, OSError, TimeoutError, CertsError) as error:
            raise PullError(f"{self._url}: {str(error) or type(error).__name__}") from error
        if status == 200:
            self._etag = answered.get("ETag")
            self._report_within_s = _seconds(answered.get(WITHIN_HEADER, ""))
            return await self._take(data)
        if status != 304:
            wait = answered.get("Retry-After", "")
            raise PullError(
                f"{self._url}: HTTP {status}: {data.decode(errors='replace').strip()}",
                retry_after_s=float(wait) if wait.isdecimal() else None,
            )
        if not self._refused:
            self._confirm()
        return False

    def _headers(self) -> dict[str, str]:
        """Return what the next question says."""
        if self._refused and self._clock() - self._refused_at_s > REFUSED_S:
            self._etag = self._digest = None
        headers = {"Prefer": f"modes=snapshot;wait={POLL_S}", "Accept-Encoding": "identity"}
        if self._etag is not None:
            headers["If-None-Match"] = self._etag
        if self._revision:
            headers[REVISION_HEADER] = _header_text(self._revision)
        if self._refused:
            headers[ERROR_HEADER] = _header_text(self._refused)
        if self._must_reconnect:
            headers["Connection"] = "close"
        return headers

    async def _take(self, data: bytes) -> bool:
        """Put the bundle in *data* in force unless it was judged already; return whether it was not."""
        digest = sha256(data).digest()
        is_new = digest != self._digest  # not so after a start from disk, or from a server without ETags
        if is_new:
            self._digest = digest
            try:
                await self._put_in_force(await asyncio.to_thread(self._decoded, data))  # a second a MB of data
            except BundleError as error:
                self._refuse(error)
                return True
            self._refused, self._must_reconnect = "", False
            self._keep(data)
        if not self._refused:
            self._confirm()
        return is_new

    def _refuse(self, error: BundleError) -> None:
        """Count and say why what was offered is not put in force. Raises PullError when another replica may help."""
        if self._refused != str(error):
            log.error("bundle refused", extra={"error": str(error), "etag": self._etag})
        self.refusals += 1
        self._refused, self._refused_at_s = str(error), self._clock()
        self._must_reconnect = isinstance(error, _OlderError)
        if self._must_reconnect:
            self._etag = self._digest = None  # what this replica offers next may be as new as what we have
            raise PullError(f"bundle refused: {error}") from error

    def _decoded(self, data: bytes) -> Bundle:
        """Return the bundle in *data* if it may be believed and was made for us. Raises BundleError."""
        bundle = decode(data, self._keyring)
        server, settings = bundle.profile.server, self._settings
        if (server.namespace, server.workload) != (settings.namespace, settings.workload):
            raise BundleError(f"sidegate.json: made for {server.namespace}/{server.workload}")
        return bundle

    async def _put_in_force(self, bundle: Bundle) -> None:
        """Enforce *bundle* from now on. Raises BundleError: the one before stays."""
        if bundle.revision != self._revision:
            if bundle.stamp < self._stamp:
                raise _OlderError(f"older than the one before: {_place(bundle.stamp)}, after {_place(self._stamp)}")
            await self._activate(bundle)
        self._revision, self._keyring = bundle.revision, bundle.keyring
        self._stamp = max(self._stamp, bundle.stamp)

    async def _start_from_disk(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            data = self._path.read_bytes()
            bundle = await asyncio.to_thread(self._decoded, data)
            self._keyring, self._stamp = bundle.keyring, bundle.stamp  # known, also if it does not load any more
            await self._put_in_force(bundle)
            age_s = max(0.0, self._wall() - self._path.stat().st_mtime)
        except (OSError, BundleError) as error:
            log.warning("the kept bundle is of no use", extra={"error": str(error)})
            return
        self._confirmed_at_s = self._clock() - age_s
        self._digest = sha256(data).digest()
        self.detail = "kept from an earlier run, not confirmed yet"

    def _confirm(self) -> None:
        self._confirmed_at_s = self._clock()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.utime(self._path, (self._wall(), self._wall()))

    def _keep(self, data: bytes) -> None:
        """Write the bundle so that a crash leaves the old or the new one, never half."""
        if self._path is None:
            return
        half = self._path.with_suffix(".new")
        try:
            with half.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            half.replace(self._path)
        except OSError as error:
            log.warning("the bundle could not be kept", extra={"error": str(error)})


def _place(stamp: Stamp) -> str:
    return f"term {stamp.term}, sequence {stamp.sequence}"


async def _pause(longest_s: float) -> None:
    """Wait at most *longest_s*; sidecars that started together must not ask together."""
    await asyncio.sleep(random.uniform(longest_s / 2, longest_s))  # noqa: S311 - not a secret


def _seconds(text: str) -> float:
    """Return the seconds in *text*, at most MAX_REPORT_S; 0 when it says none."""
    try:
        return min(MAX_REPORT_S, max(0.0, float(text)))
    except ValueError:
        return 0.0


def _header_text(text: str) -> str:
    """Return *text* as a header field can carry it: short, printable, ASCII."""
    return "".join(each if " " <= each <= "~" else "?" for each in text[:MAX_TEXT_BYTES])


async def _read(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Return the body; raises BundleError beyond *limit_bytes* of a bundle, cuts a text there."""
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > limit_bytes:
            if response.status == 200:
                raise BundleError(f"bundle: larger than {limit_bytes} bytes")
            break
    return bytes(data[:limit_bytes])
