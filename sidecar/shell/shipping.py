"""Sends the lines of the audit file on: in order, each until it is taken, from where it stood before a restart.

The file itself is the queue, so there is one copy of a line, bounded as the file is (sidecar/shell/trail.py), and nothing
in memory. A line may arrive twice, after a restart or a lost answer; `chain.id` and `chain.seq` tell. What a receiver
refuses for good by itself is counted and passed over: it must not hold up what follows, and it stays in the file. Everything
else is tried again for ever, with pauses. OTLP/HTTP 1.x; or a POST of the lines, application/x-ndjson.
"""

import asyncio
import contextlib
import gzip
import logging
import os
import random
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp

from certs.errors import CertsError
from certs.spiffe import SpiffePattern
from certs.tls import MutualClient
from sidecar.config import Settings, ShipFormat
from sidecar.core import batch, conventions
from sidecar.core.batch import Batch
from sidecar.errors import ConfigError
from sidecar.shell.metrics import Gauges
from sidecar.shell.otlp import asked_wait_s
from sidecar.shell.trail import STDOUT, File, Position

log = logging.getLogger(__name__)

READ_BYTES: Final = 512 * 1024  # at a time; gzip makes a tenth of it, and receivers take 1 MB at least
LONGEST_LINE_BYTES: Final = 4 * 2**20  # a record with both contents at their largest, escaped
LINGER_S: Final = 1.0  # between looks for new lines: what comes within it shares a request
POST_S: Final = 10.0  # deadline of one POST, as OTEL_EXPORTER_OTLP_TIMEOUT
FLUSH_S: Final = 5.0  # for what is left, on shutdown
BACKOFF_S: Final = (0.5, 30.0)  # first and longest pause, before jitter
NEVER: Final = frozenset({400, 413, 422})  # refused for what it is, whoever asks and whenever
FAILURES: Final = (aiohttp.ClientError, CertsError, OSError, TimeoutError, ValueError)  # ValueError: no URL, no token
LEVEL: Final = 1  # of gzip: a third more bytes for a quarter of the time


class NotTakenError(aiohttp.ClientError):
    """The receiver answered that it does not take the lines now; they are sent again after *wait_s* at the soonest."""

    def __init__(self, status: int, wait_s: float) -> None:
        super().__init__(f"HTTP {status}")
        self.wait_s = wait_s


class Shipping:
    """From *file* to one receiver. `run` in the root TaskGroup; mutated by it.

    Attributes:
        shipped: lines that the receiver took.
        rejected: lines that it refused for good, or that were cut short.
        failures: requests that failed and were made again.
    """

    def __init__(self, settings: Settings, file: File, client: MutualClient | None) -> None:
        """Send as *settings* say; *client* shows our SVID. Raises ConfigError."""
        self._file = file
        self._client = client
        self._format = settings.audit_ship_format
        base = settings.audit_ship.rstrip("/")
        self._url = f"{base}/v1/logs" if self._format is ShipFormat.OTLP else settings.audit_ship
        self._token_file = Path(settings.audit_ship_token_file) if settings.audit_ship_token_file else None
        self._expected = self._tls = None
        try:
            if settings.audit_ship_id:
                self._expected = SpiffePattern.parse(settings.audit_ship_id)
            if settings.audit_ship_ca_file:
                self._tls = ssl.create_default_context(cafile=settings.audit_ship_ca_file)
        except (CertsError, OSError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"SIDEGATE_AUDIT_SHIP_ID or SIDEGATE_AUDIT_SHIP_CA_FILE: {error}") from error
        if self._expected is not None and client is None:
            raise ConfigError("SIDEGATE_AUDIT_SHIP_ID needs SIDEGATE_SPIFFE_SOCKET: we show our own SVID")
        self._resource = {
            "service.name": settings.workload or "sidegate",
            "service.namespace": settings.namespace,
            "k8s.namespace.name": settings.namespace,
            "k8s.pod.name": settings.pod,
        }
        self.shipped = 0
        self.rejected = 0
        self.failures = 0

    def gauges(self) -> Gauges:
        """Return what is told of the way to the receiver."""
        return (
            (conventions.AUDIT_SHIPPED, lambda: {("taken",): self.shipped, ("refused",): self.rejected}),
            (conventions.AUDIT_RETRIES, lambda: self.failures),
            (conventions.AUDIT_WAITING, lambda: self._file.waiting_bytes),
        )

    async def run(self) -> None:
        """Ship what there is and what comes; never returns."""
        failures = 0
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    failed, pause_s = None, 0.0 if await self._ship(session) else LINGER_S
                except FAILURES as error:
                    failed = error
                if failed is None:
                    failures = 0
                else:
                    self.failures += 1
                    failures += 1
                    pause_s = _pause_s(failures, failed)
                    if failures == 1:
                        log.warning("audit records are not taken", extra={"url": self._url, "error": _said(failed)})
                await asyncio.sleep(pause_s)

    async def flush(self) -> None:
        """Ship what is left, once and without patience; the rest waits in the file."""
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(FLUSH_S), aiohttp.ClientSession() as session:
                while await self._ship(session):
                    pass

    async def _ship(self, session: aiohttp.ClientSession) -> bool:
        """Send the next batch; return whether there was anything. Raises what stands in its way."""
        position = self._file.position or Position(number=1, offset=0)
        descriptor = self._file.open_at(position)
        if descriptor is None:  # deleted to make room
            self._file.shipped(Position(number=self._file.next_file(position.number), offset=0))
            return True
        is_last = position.number != self._file.number  # of the lines of this file
        try:
            if os.fstat(descriptor).st_size < position.offset:  # somebody has cut it, as `copytruncate` does
                log.error("audit file cut: what was not shipped of it will not be", extra={"file": position.number})
                position = Position(number=position.number, offset=0)
            taken = await asyncio.to_thread(_read, descriptor, position.offset, is_last=is_last)
        finally:
            os.close(descriptor)
        if not taken.size_bytes:
            if is_last:
                self._file.shipped(Position(number=self._file.next_file(position.number), offset=0))
            return is_last
        while taken.lines and (status := await self._post(session, taken)) in NEVER:
            if len(taken.lines) == 1:
                self.rejected += 1
                uid = taken.documents[0]["chain"]
                log.error("an audit record is refused by its receiver", extra={"status": status, "chain": uid})
                break
            taken = taken.half()
        else:
            self.shipped += len(taken.lines)
        self.rejected += taken.torn
        offset = position.offset + taken.size_bytes
        await asyncio.to_thread(self._file.shipped, Position(number=position.number, offset=offset))
        return True

    async def _post(self, session: aiohttp.ClientSession, taken: Batch) -> int:
        """Return the HTTP status that decides over *taken*; raises when it must be sent again."""
        body = await asyncio.to_thread(self._body, taken)
        url, headers = self._url, await asyncio.to_thread(self._headers)
        async with (
            asyncio.timeout(POST_S),
            session.post(url, data=body, headers=headers, allow_redirects=False, ssl=self._context()) as response,
        ):
            if response.status < 300:
                answer = await response.content.read(READ_BYTES)
                refused = batch.rejected(answer) if self._format is ShipFormat.OTLP else 0
                self.rejected += refused
                self.shipped -= refused
            elif response.status not in NEVER:
                raise NotTakenError(response.status, asked_wait_s(response.headers.get("retry-after")))
            return response.status

    def _body(self, taken: Batch) -> bytes:
        plain = batch.otlp(taken, self._resource) if self._format is ShipFormat.OTLP else b"".join(taken.lines)
        return gzip.compress(plain, compresslevel=LEVEL)

    def _headers(self) -> Mapping[str, str]:
        kind = "application/json" if self._format is ShipFormat.OTLP else "application/x-ndjson"
        headers = {"content-type": kind, "content-encoding": "gzip"}
        if self._token_file is not None:
            headers["authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        return headers

    def _context(self) -> ssl.SSLContext | bool:
        if self._expected is not None and self._client is not None:
            return self._client.context(self._expected)
        return True if self._tls is None else self._tls


def opened(settings: Settings) -> File | None:
    """Return the audit file of *settings*; None: standard output. Raises ConfigError, and OSError."""
    is_shipped = bool(settings.audit_ship)
    if settings.audit_sink == STDOUT:
        if is_shipped or settings.audit_keep_bytes or settings.audit_file_age_s:
            raise ConfigError(
                "SIDEGATE_AUDIT_SHIP, SIDEGATE_AUDIT_KEEP_BYTES and SIDEGATE_AUDIT_FILE_AGE_S: only where "
                "SIDEGATE_AUDIT_SINK is the path of a file, in which lines can wait"
            )
        return None
    if is_shipped and not settings.audit_keep_bytes:
        raise ConfigError(
            "SIDEGATE_AUDIT_SHIP needs SIDEGATE_AUDIT_KEEP_BYTES: how much may wait for a receiver that is away"
        )
    return File(
        settings.audit_sink,
        keep_bytes=int(settings.audit_keep_bytes),
        age_s=settings.audit_file_age_s,
        is_shipped=is_shipped,
    )


def _pause_s(failures: int, last: Exception) -> float:
    """Return the seconds before the next attempt after so many *failures*: longer each time, and as the receiver asks."""
    own_s = float(min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(failures - 1, 10))) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
    return max(own_s, last.wait_s) if isinstance(last, NotTakenError) else own_s


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _read(descriptor: int, offset: int, *, is_last: bool) -> Batch:
    """Return the next lines behind *offset*; in a file that is not added to, also what was cut short at its end."""
    size_bytes = READ_BYTES
    while True:
        data = os.pread(descriptor, size_bytes, offset)
        taken = batch.read(data, is_last=is_last and len(data) < size_bytes)
        if taken.size_bytes or len(data) < size_bytes or size_bytes >= LONGEST_LINE_BYTES:
            return taken
        size_bytes *= 2
