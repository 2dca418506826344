"""Our own workload identity: the SVID, the TLS contexts that show it, and the keys that check other workloads' tokens.

Refuses to start where a private key could only be handed to OpenSSL through a file. SPIFFE Workload API.
"""

import asyncio
import logging
from collections.abc import Callable

from certs.errors import BadCertificate, CertsError, PeerReason, WorkloadApiError, WorkloadReason
from certs.jwt_bundles import JwtBundleSource
from certs.jwt_svid import JwtSvidSource
from certs.jwt_verify import JwtBundles
from certs.spiffe import SpiffeId
from certs.svid import X509Snapshot
from certs.tls import ClientCertificate, MutualClient, MutualServer, require_key_memory
from certs.workload import Selection, X509Source
from sidecar.config import Settings
from sidecar.core.workload import WorkloadTokens
from sidecar.errors import ConfigError

log = logging.getLogger(__name__)


class WorkloadIdentity:
    """`run` in the root TaskGroup. Mutated by what its two sources tell, on the loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        on_refused: Callable[[PeerReason, int | None], None],
        use_tokens: Callable[[WorkloadTokens | None], None],
    ) -> None:
        """*use_tokens* is told what JWT-SVIDs are checked with. Raises ConfigError."""
        try:
            require_key_memory()
            chosen = SpiffeId.parse(settings.spiffe_id) if settings.spiffe_id else None
            selection = Selection(spiffe_id=chosen, hint=settings.spiffe_hint or None)
            self.source = X509Source(settings.spiffe_socket, selection=selection)
            self._own_tokens = JwtSvidSource(settings.spiffe_socket)
            self._keys = JwtBundleSource(settings.spiffe_socket, max_age_s=settings.jwt_bundle_max_age_s)
        except BadCertificate as error:
            raise ConfigError(f"no private key can be used here: {error}") from error
        except CertsError as error:
            raise ConfigError(f"SIDEGATE_SPIFFE_SOCKET or SIDEGATE_SPIFFE_ID: {error}") from error
        # Whether a certificate is required is the bundle's to say.
        self.server = MutualServer(client_certificate=ClientCertificate.OPTIONAL, on_refused=on_refused)
        self.client = MutualClient()
        self._use_tokens = use_tokens
        self._tokens_wanted = asyncio.Event()
        self._tokens: WorkloadTokens | None = None
        for subscriber in (self.server.follow, self.client.follow, self._own_id_changed):
            self.source.subscribe(subscriber)

    async def run(self) -> None:
        """Keep everything current until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.source.run())
            await self._tokens_wanted.wait()
            self._keys.subscribe(self._keys_changed)
            tasks.create_task(self._keys.run())

    async def token(self, audience: str) -> str:
        """Return a JWT-SVID of ours for *audience*. Raises WorkloadApiError: the caller must then send nothing."""
        own = self.own_id
        if own is None:
            raise WorkloadApiError(WorkloadReason.NO_IDENTITY, "no SVID yet, or no more")
        return (await self._own_tokens.fetch(own, audience)).token

    def want_tokens(self) -> None:
        """Fetch the keys of JWT-SVIDs from now on: an attestation more, so only where the profile allows such tokens."""
        self._tokens_wanted.set()

    @property
    def own_id(self) -> SpiffeId | None:
        """Return who we are; None while that is not proven."""
        return None if self.source.current is None else self.source.current.svid.spiffe_id

    def _own_id_changed(self, _: X509Snapshot | None) -> None:
        self._renew(self._keys.current)

    def _keys_changed(self, bundles: JwtBundles | None) -> None:
        if bundles is None or bundles.rejected_domains:
            log.warning("keys of JWT-SVIDs", extra={"detail": self._keys.detail})
        self._renew(bundles)

    def _renew(self, bundles: JwtBundles | None) -> None:
        own, held = self.own_id, self._tokens
        if bundles is None or own is None:
            renewed = None
        elif held is not None and held.bundles is bundles and held.audience == str(own):
            return  # an SVID more: what was verified stays verified
        else:
            renewed = WorkloadTokens(bundles=bundles, audience=str(own))
        if renewed is not held:
            self._tokens = renewed
            self._use_tokens(renewed)
