"""Puts together what leaves the sidecar as telemetry: spans, metrics and log lines, each with its way to a receiver.

Decides nothing of its own; which receiver, which sampler and how often is what the `OTEL_*` variables and the profile say.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

import aiohttp

from sidecar.config import Settings
from sidecar.core.conventions import DROPPED
from sidecar.core.otel import SIGNALS, Otel, Signal
from sidecar.core.profile import Profile
from sidecar.shell.logs import OtlpHandler, RequestLog
from sidecar.shell.metrics import Gauges, Metrics, Publisher, Reading
from sidecar.shell.otlp import Exporter
from sidecar.shell.tracing import Tracing

log = logging.getLogger(__name__)

NOTHING_SAID: Final[tuple[Otel, Sequence[str]]] = (Otel(), ())


class Telemetry:
    """Owned by sidecar/shell/app.py. *otel* is what the variables say, and what cannot be honoured; raises ConfigError.

    Attributes:
        observers: who must be told of every exchange.
        tracing: which says what the server gets as `traceparent`.
        metrics: what the health listener shows.
    """

    def __init__(
        self, settings: Settings, session: aiohttp.ClientSession, otel: tuple[Otel, Sequence[str]] = NOTHING_SAID
    ) -> None:
        variables, warnings = otel
        self._exporters: dict[Signal, Exporter] = {
            signal: Exporter(session, signal, variables, endpoint=settings.otlp_endpoint, pod=settings.pod)
            for signal in SIGNALS
        }
        self.tracing = Tracing(self._exporters["traces"], sampler=variables.sampler, host=settings.upstream_host)
        self.metrics = Metrics(self.tracing.names if variables.exemplars else None)
        self.metrics.watch(DROPPED, self._dropped)
        self._lines = RequestLog(settings.request_log, settings.log_level, self._exporters["logs"])
        self.observers = (self.metrics, self.tracing, self._lines)
        self._publisher = Publisher(self.metrics, self._exporters["metrics"], every_s=variables.metrics_every_s)
        self._handler = OtlpHandler(self._exporters["logs"])
        logging.getLogger().addHandler(self._handler)
        for warning in warnings:
            log.warning("variable not honoured", extra={"detail": warning})

    def watch(self, gauges: Gauges) -> None:
        """Show these, too, with the metrics."""
        for instrument, read in gauges:
            self.metrics.watch(instrument, read)

    def use(self, profile: Profile) -> None:
        """Send as *profile* says from now on."""
        for exporter in self._exporters.values():
            exporter.use(profile.server, profile.telemetry.otlp_endpoint)
        self.tracing.use(profile.telemetry)

    async def run(self) -> None:
        """Send what comes; never returns."""
        await asyncio.gather(*(each.run() for each in (*self._queues, self._publisher)))

    async def flush(self) -> None:
        """Send and write what is left, once and without patience."""
        logging.getLogger().removeHandler(self._handler)
        self._lines.close()
        await asyncio.gather(*(each.flush() for each in (*self._queues, self._publisher)))

    @property
    def _queues(self) -> tuple[Exporter, Exporter]:
        return self._exporters["traces"], self._exporters["logs"]

    def _dropped(self) -> Reading:
        """Return what was dropped of each signal; lines of stderr count as logs."""
        dropped = {(signal,): exporter.dropped for signal, exporter in self._exporters.items()}
        dropped["logs",] += self._lines.dropped
        return dropped
