"""The sidecar's process: builds the parts, runs them in one TaskGroup, says whether it is ready and why not, drains.

Nothing decides here. Refuses to start on unusable settings; every other trouble (no agent, no bundle, no provider) is
told by readiness and met by refusing calls, never by exiting: a restart heals none of it.
"""

import asyncio
import gc
import logging
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop
from aiohttp import web

from certs.errors import PeerReason, WorkloadApiError, WorkloadReason
from certs.statement import sign
from sidecar.config import Capture, Role, Settings, WayOut
from sidecar.core import conventions
from sidecar.core.bundle import Bundle
from sidecar.core.connection import Connection
from sidecar.core.identity import UnknownToken, Unresolved
from sidecar.core.limits import Counts
from sidecar.core.otel import Otel
from sidecar.core.store import read_address
from sidecar.errors import ConfigError, Reason, Refusal
from sidecar.shell import logs
from sidecar.shell.audit import Audit
from sidecar.shell.bundles import BundleSource
from sidecar.shell.credentials import Credentials, Signer
from sidecar.shell.egress import Egress
from sidecar.shell.egress_gate import EgressGate
from sidecar.shell.egress_listener import EgressListener
from sidecar.shell.health import Health
from sidecar.shell.lifetimes import Lifetimes
from sidecar.shell.listener import Listener
from sidecar.shell.metrics import Gauges, Reading
from sidecar.shell.oauth import OAuthClient
from sidecar.shell.probes import decode as decode_probes
from sidecar.shell.providers import Providers
from sidecar.shell.secrecy import forbid_dumps
from sidecar.shell.serving import Serving
from sidecar.shell.shipping import Shipping, opened
from sidecar.shell.snapshot import Snapshots
from sidecar.shell.stdio import Stdio
from sidecar.shell.svid import WorkloadIdentity
from sidecar.shell.telemetry import NOTHING_SAID, Telemetry
from sidecar.shell.trail import File, Output
from sidecar.shell.upstream import Upstream
from sidecar.shell.ways import Ways

if TYPE_CHECKING:
    from sidecar.shell.quota import Store

log = logging.getLogger(__name__)


class App:
    """One sidecar. *bundle* is given outside a pod; inside, it is pulled from the control plane.

    *command* starts a process of a stdio server; without one, the relay in the server's container does. *otel* is what
    the `OTEL_*` variables say, and what cannot be honoured of them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        otel: tuple[Otel, Sequence[str]] = NOTHING_SAID,
        bundle: Bundle | None = None,
        command: Sequence[str] = (),
    ) -> None:
        is_captured = settings.role is Role.SERVER and settings.capture is Capture.REDIRECT
        if settings.egress is WayOut.HOSTS and not is_captured:
            raise ConfigError("SIDEGATE_EGRESS hosts needs SIDEGATE_ROLE server and SIDEGATE_CAPTURE redirect")
        self._settings = settings
        self._otel = otel
        self._bundle = bundle
        self._command = command
        self._probes = decode_probes(settings.probes)
        self._shipping: tuple[Shipping, ...] = ()  # at most one

    def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        logs.configure(self._settings.log_level)
        forbid_dumps()
        uvloop.run(self.serve())

    async def serve(self, listening: "asyncio.Future[tuple[int, int]] | None" = None) -> None:
        """Serve until a signal; *listening* is told the inbound and the health port once both are bound."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        trail = self._open_trail()
        async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession(auto_decompress=False) as session:
            telemetry = self._telemetry = Telemetry(settings, session, self._otel)
            self._providers = Providers(session, self._keys_changed)
            self._oauth = OAuthClient(session, self._svid_token if settings.spiffe_socket else None)
            self._signer = Signer()
            self._store = self._limits_store()
            upstream = Upstream(settings.upstream_host, tasks.create_task)
            stdio = Stdio(
                settings.upstream_host,
                tasks.create_task,
                command=self._command,
                max_processes=int(settings.max_processes),
                idle_s=settings.process_idle_s,
            )
            self._serving = Serving(
                upstream=Ways(http=upstream, stdio=stdio),
                observers=(self._audit, *telemetry.observers),
                spawn=tasks.create_task,
                resolve=self._resolve,
                why_not_ready=self._why_not_ready,
                credentials=Credentials(self._oauth, self._signer),
                context=telemetry.tracing.context,
                store=self._store,
                announce=self._audit.begin,
            )
            hosts = frozenset(each.strip().lower() for each in settings.hosts.split(",") if each.strip())
            self._snapshots = Snapshots(self._serving, hosts=hosts, work_dir=settings.bundle_dir or None)
            lifetimes = Lifetimes(
                self._serving, max_age_s=settings.connection_max_age_s, grace_s=settings.connection_grace_s
            )
            background = [tasks.create_task(each.run()) for each in (telemetry, self._providers, lifetimes)]
            if self._store is not None:
                background.append(tasks.create_task(self._store.run()))
            identity = self._identity = self._own_identity()
            self._bundles: BundleSource | None = None
            if identity is not None:
                identity.source.subscribe(lifetimes.follow)
                background.append(tasks.create_task(identity.run()))
                if self._bundle is None:
                    self._bundles = BundleSource(settings, session, identity.client, self._activate)
                    background.append(tasks.create_task(self._bundles.run()))
            background += [
                *(tasks.create_task(each.run()) for each in self._ship(trail, identity)),
                *self._let_out(tasks),
            ]
            if self._bundle is not None:
                await self._activate(self._bundle)
            listener = self._listener(tasks)
            accepting = tasks.create_task(listener.run())
            telemetry.watch(self._gauges())
            health = await self._serve_health()
            health_port = health.addresses[0][1]
            log.info("listening", extra={"port": listener.port, "health_port": health_port})
            if listening is not None:
                listening.set_result((listener.port, health_port))
            gc.collect()
            gc.freeze()  # a later full collection would stop every call for 15 ms
            await stop.wait()
            await self._drain(accepting)
            upstream.close()
            await stdio.close()
            await telemetry.flush()
            for task in background:
                task.cancel()
            await health.cleanup()
        await self._close_trail()

    # readiness

    def conditions(self) -> Mapping[str, str]:
        """Return what is not well, by name; empty means ready."""
        found: dict[str, str] = {}
        if self._serving.draining:
            found["draining"] = "shutting down"
        if self._identity is not None and not self._identity.source.is_ready:
            found["identity"] = f"{self._identity.source.state}: {self._identity.source.detail}"
        if self._serving.snapshot is None:
            found["bundle"] = "none yet" if self._bundles is None else self._bundles.detail
        elif self._bundles is not None and self._bundles.is_stale:
            found["bundle"] = f"stale: {self._bundles.detail}"
        missing = self._providers.missing
        if missing and not self._providers.keys_held and self._is_user_required:
            found["providers"] = "; ".join(f"{name}: {why}" for name, why in missing.items())
        if self._audit.failed:
            found["audit"] = "calls cannot be recorded: the sink fails, or is full"
        return found

    @property
    def _is_user_required(self) -> bool:
        snapshot = self._serving.snapshot
        return snapshot is not None and snapshot.profile.identity.user == "required"

    def _why_not_ready(self) -> str | None:
        """Return why no call may be judged; None when one may."""
        if self._identity is not None and self._identity.source.current is None:
            return f"identity: {self._identity.source.state}"
        if self._bundles is not None and self._bundles.is_stale:
            return "bundle: stale"
        return None

    # what the parts tell

    def _own_identity(self) -> WorkloadIdentity | None:
        if not self._settings.spiffe_socket:
            return None
        return WorkloadIdentity(
            self._settings, on_refused=self._handshake_refused, use_tokens=self._snapshots.use_tokens
        )

    def _open_trail(self) -> File | None:
        trail = opened(self._settings)
        self._audit = Audit(trail or Output(), sign=self._sign)
        return trail

    def _ship(self, trail: File | None, identity: WorkloadIdentity | None) -> tuple[Shipping, ...]:
        if trail is not None and self._settings.audit_ship:
            self._shipping = (Shipping(self._settings, trail, None if identity is None else identity.client),)
        return self._shipping

    def _limits_store(self) -> "Store | None":
        settings = self._settings
        if not settings.limits_store:
            return None
        from sidecar.shell.quota import Login, Store  # noqa: PLC0415 - the client takes 10 MB that few sidecars need

        login = Login(
            user=settings.limits_store_user, password=settings.limits_store_password, ca_pem=settings.limits_store_ca
        )
        return Store(
            read_address(settings.limits_store),
            login=login,
            replica=secrets.token_urlsafe(9),
            timeout_s=settings.limits_store_timeout_s,
        )

    async def _close_trail(self) -> None:
        self._audit.close()
        for each in self._shipping:
            await each.flush()

    async def _activate(self, bundle: Bundle) -> None:
        await self._snapshots.activate(bundle)
        self._telemetry.use(bundle.profile)
        self._providers.use(bundle.profile.identity.providers)  # which flushes what the providers before had said
        if bundle.profile.identity.jwt_svid == "allowed" and self._identity is not None:
            self._identity.want_tokens()

    async def _resolve(self, missing: Unresolved) -> Refusal | None:
        """Ask the provider; return the refusal to give when it does not answer."""
        if isinstance(missing, UnknownToken):
            return await self._oauth.introspect(missing)
        await self._providers.find(missing)
        return None

    async def _svid_token(self, audience: str) -> str:
        if self._identity is None:
            raise WorkloadApiError(WorkloadReason.NO_IDENTITY, "there is no workload identity here")
        return await self._identity.token(audience)

    def _keys_changed(self) -> None:
        self._oauth.flush()  # a key that was withdrawn may have signed what was exchanged
        self._snapshots.use_keys(self._providers.keys)

    def _handshake_refused(self, reason: PeerReason, serial: int | None) -> None:
        """Record a caller that was turned away before it could say anything."""
        self._telemetry.metrics.handshake_refused(reason)
        detail = f"{reason}; serial {serial}" if serial is not None else str(reason)
        self._record_at_the_door(Refusal(Reason.UNAUTHENTICATED, "TLS handshake refused", detail=detail), client="")

    def _port_refused(self, client: str, port: int) -> None:
        refusal = Refusal(Reason.NOT_FOUND, "not the MCP port", detail=f"port {port}")
        self._record_at_the_door(refusal, client=client)

    def _sign(self, claims: Mapping[str, Any]) -> str | None:
        """Return the JWS by which our SVID stands for *claims*; None while there is no SVID."""
        current = None if self._identity is None else self._identity.source.current
        return None if current is None else sign(claims, current.svid, now=datetime.now(UTC))

    def _record_at_the_door(self, refusal: Refusal, *, client: str) -> None:
        connection = Connection(peer=None, client=client, method="", path="", query="", headers=(), body=b"")
        exchange = self._serving.begin(connection)
        exchange.refusal = refusal
        self._serving.observe(exchange)

    # listeners and the end

    def _listener(self, tasks: asyncio.TaskGroup) -> Listener | EgressListener:
        """Return what accepts calls: others' of the server beside us, or the agent's own."""
        settings, identity = self._settings, self._identity
        if settings.role is Role.SERVER:
            return Listener(
                self._serving,
                host=settings.listen_host,
                port=settings.listen_port,
                capture=settings.capture,
                tls=None if identity is None else identity.server.context,
                max_connections=int(settings.max_connections),
                refused_port=self._port_refused,
            )
        if identity is None:
            raise ConfigError("SIDEGATE_ROLE agent needs SIDEGATE_SPIFFE_SOCKET: an agent calls with its own identity")
        egress = Egress(
            self._serving,
            identity.client,
            own_id=lambda: identity.own_id,
            spawn=tasks.create_task,
            grace_s=settings.connection_grace_s,
        )
        identity.source.subscribe(egress.follow)
        return EgressListener(
            egress,
            port=settings.egress_port,
            is_redirected=settings.capture is Capture.REDIRECT,
            max_connections=int(settings.max_connections),
        )

    def _let_out(self, tasks: asyncio.TaskGroup) -> list["asyncio.Task[None]"]:
        """Start what the server's own connections pass, if they do. It goes on while calls drain."""
        settings = self._settings
        if settings.egress is WayOut.DIRECT:
            return []
        gate = EgressGate(
            self._serving,
            port=settings.egress_port,
            max_connections=int(settings.max_connections),
            is_recordable=lambda: not self._audit.failed,
        )
        self._telemetry.watch(((conventions.CROSSINGS, lambda: gate.outcomes),))
        return [tasks.create_task(gate.run())]

    async def _serve_health(self) -> web.AppRunner:
        health = Health(
            upstream_host=self._settings.upstream_host,
            probes=self._probes,
            conditions=self.conditions,
            render_metrics=self._telemetry.metrics.render,
            jwks=self._jwks,
        )
        runner = web.AppRunner(health.application(), access_log=None)
        await runner.setup()
        host = None if self._settings.health_host == "::" else self._settings.health_host
        await web.TCPSite(runner, host, self._settings.health_port).start()
        return runner

    def _jwks(self) -> Mapping[str, Any] | None:
        """Return the key of our identity headers, where the profile has any."""
        snapshot = self._serving.snapshot
        is_used = snapshot is not None and snapshot.profile.identity.upstream == "header"
        return self._signer.jwks if is_used else None

    def _gauges(self) -> Gauges:
        """Return what is not counted by exchanges, and how it is read."""
        return (
            (conventions.IN_FLIGHT, lambda: self._serving.in_flight),
            (conventions.READY, lambda: 0 if self.conditions() else 1),
            (conventions.BUNDLE_INFO, self._revision),
            (conventions.BUNDLE_AGE, lambda: None if self._bundles is None else self._bundles.age_s),
            (conventions.BUNDLE_REFUSALS, lambda: None if self._bundles is None else self._bundles.refusals),
            (conventions.SVID_EXPIRY, self._svid_expiry_s),
            (conventions.SVID_LIFETIME, self._svid_lifetime_s),
            (conventions.AUDIT_FAILURES, lambda: self._audit.failures),
            (conventions.AUDIT_LOST, lambda: self._audit.lost),
            *(gauge for each in self._shipping for gauge in each.gauges()),
            (conventions.QUESTIONS, lambda: self._oauth.asked),
            (conventions.LIMITED, lambda: self._of_limits(lambda counts: counts.refused)),
            (conventions.OVER, lambda: self._of_limits(lambda counts: counts.over)),
            (conventions.FALLBACKS, lambda: self._of_limits(lambda counts: counts.fallback)),
            (conventions.WARNINGS, self._limit_warnings),
            (conventions.STORE_UNANSWERED, lambda: None if self._store is None else self._store.unanswered),
        )

    def _of_limits(self, read: Callable[[Counts], int]) -> Reading:
        return {(name,): read(rule.counts) for name, rule in self._serving.memory.ledger.rules.items()}

    def _limit_warnings(self) -> Reading:
        rules = self._serving.memory.ledger.rules
        return {
            (name, str(percent)): count
            for name, rule in rules.items()
            for percent, count in rule.counts.warnings.items()
        }

    def _revision(self) -> Reading | None:
        snapshot = self._serving.snapshot
        return {(snapshot.revision,): 1} if snapshot is not None and snapshot.revision else None

    def _svid_expiry_s(self) -> float | None:
        current = None if self._identity is None else self._identity.source.current
        return None if current is None else current.svid.not_after.timestamp()

    def _svid_lifetime_s(self) -> float | None:
        current = None if self._identity is None else self._identity.source.current
        return None if current is None else (current.svid.not_after - current.svid.not_before).total_seconds()

    async def _drain(self, accepting: "asyncio.Task[None]") -> None:
        """Stop accepting, let calls finish and streams end; log how long it took, and how many connections were cut."""
        began_s = time.monotonic()
        accepting.cancel()
        cut = await self._serving.drain(self._settings.drain_s)
        log.info("drained", extra={"seconds": round(time.monotonic() - began_s, 3), "cut": cut})
