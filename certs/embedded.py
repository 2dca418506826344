"""A SPIFFE Workload API server with a CA in memory, for laptops and tests. Development only.

Whoever can open its socket (mode 0600) gets the identities it was told to give.
There is no attestation, hence it refuses to run in a cluster.
It also sends, when told to, what a real agent never would, so that the client's refusals can be tested.
Source: SPIFFE Workload API, sections 4 and 5.
"""

import asyncio
import base64
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from certs.authority import Authority, make_key
from certs.errors import CertsError
from certs.messages import METADATA, METHODS, messages
from certs.spiffe import SpiffeId, TrustDomain

__all__ = ["EmbeddedDomain", "EmbeddedWorkloadApi", "Identity"]

CA_LIFETIME = timedelta(days=1)  # a development session


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One SVID that callers of the socket get."""

    spiffe_id: SpiffeId
    hint: str = ""


class EmbeddedDomain:
    """A trust domain whose CA lives in this process."""

    def __init__(
        self,
        trust_domain: TrustDomain,
        *,
        svid_lifetime: timedelta = timedelta(minutes=5),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.trust_domain = trust_domain
        self._svid_lifetime = svid_lifetime
        self._now = now
        self._authorities: tuple[Authority, ...] = ()
        self.rotate_authority()
        self.rotate_token_key()

    @property
    def bundle_der(self) -> bytes:
        """The CA certificates in use, newest last, as the Workload API sends them."""
        return b"".join(authority.certificate.public_bytes(Encoding.DER) for authority in self._authorities)

    def rotate_authority(self) -> None:
        """Sign with a new CA from now on; the one before stays trusted, older ones do not."""
        made = Authority.make(
            name=f"sidegate development CA of {self.trust_domain}",
            key=make_key(),
            now=self._now(),
            lifetime=CA_LIFETIME,
            serial=x509.random_serial_number(),
            trust_domain=self.trust_domain,
        )
        self._authorities = (*self._authorities[-1:], made)

    def rotate_token_key(self) -> None:
        """Sign tokens with a new key from now on; the one before is believed no longer."""
        self._token_key = make_key()
        self._token_kid = f"{x509.random_serial_number():x}"

    def issue(self, spiffe_id: SpiffeId, *, hint: str = "") -> Any:
        """Return a fresh X509SVID message for *spiffe_id*; foreign IDs are signed as well, for tests of forgery."""
        key = make_key()
        leaf = self._authorities[-1].sign_svid(
            spiffe_id,
            key.public_key(),
            now=self._now(),
            lifetime=self._svid_lifetime,
            serial=x509.random_serial_number(),
        )
        return messages.X509SVID(
            spiffe_id=str(spiffe_id),
            x509_svid=leaf.public_bytes(Encoding.DER),
            x509_svid_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            bundle=self.bundle_der,
            hint=hint,
        )

    def issue_token(self, spiffe_id: SpiffeId, audience: Sequence[str]) -> str:
        """Return a fresh JWT-SVID (ES256) of *spiffe_id* for *audience*."""
        now = int(self._now().timestamp())
        expires = now + int(self._svid_lifetime.total_seconds())
        header = {"alg": "ES256", "kid": self._token_kid, "typ": "JWT"}
        claims = {"sub": str(spiffe_id), "aud": list(audience), "iat": now, "exp": expires}
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        r, s = decode_dss_signature(self._token_key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return (signed + b"." + _base64url(r.to_bytes(32) + s.to_bytes(32))).decode()

    @property
    def token_bundle(self) -> bytes:
        """The keys that check this domain's JWT-SVIDs: a JWK set."""
        point = self._token_key.public_key().public_numbers()
        key = {
            "kty": "EC",
            "crv": "P-256",
            "use": "jwt-svid",
            "kid": self._token_kid,
            "x": _base64url(point.x.to_bytes(32)).decode(),
            "y": _base64url(point.y.to_bytes(32)).decode(),
        }
        return json.dumps({"keys": [key]}).encode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class _Stream(Protocol):
    metadata: Any

    async def recv_message(self) -> Any: ...
    async def send_message(self, message: Any) -> None: ...
    async def cancel(self) -> None: ...


class EmbeddedWorkloadApi:
    """The Workload API on a unix socket. Mutated by its own methods, on the loop that runs it."""

    def __init__(
        self,
        socket: Path,
        domain: EmbeddedDomain,
        *,
        identities: Sequence[Identity],
        in_cluster: bool,
        federated: Sequence[EmbeddedDomain] = (),
        rotation_s: float = 60.0,
    ) -> None:
        if in_cluster:
            raise CertsError("the embedded Workload API attests nobody: in a cluster, use SPIRE")
        self.address = f"unix:{socket}"
        self.started = asyncio.Event()
        self._socket = socket
        self._domain = domain
        self._identities = tuple(identities)
        self._federated = tuple(federated)
        self._rotation_s = rotation_s
        self._denied = False
        self._stopping = False
        self._changed = asyncio.Event()  # of the present state; replaced at each change
        self._response = self._issue()

    async def run(self) -> None:
        """Serve and rotate until cancelled. Belongs into the process's TaskGroup."""
        server = Server([self])
        before = os.umask(0o177)  # the socket must never be open to others, not even for a moment
        try:
            await server.start(path=str(self._socket))
        finally:
            os.umask(before)
        self.started.set()
        try:
            while True:
                await asyncio.sleep(self._rotation_s)
                self.rotate()
        finally:
            self._stopping = True
            server.close()
            self._socket.unlink(missing_ok=True)

    def rotate(self) -> None:
        """Issue every SVID afresh and tell all callers."""
        self.push(self._issue())

    def drop(self) -> None:
        """Take every identity away, as deleting the registration entry does."""
        self._denied = True
        self._notify()

    def restore(self) -> None:
        """Give the identities back."""
        self._denied = False
        self.rotate()

    def push(self, response: Any) -> None:
        """Send *response* (an X509SVIDResponse, good or not) to every caller, later ones too, until the next change."""
        self._response = response
        self._notify()

    def _issue(self) -> Any:
        return messages.X509SVIDResponse(
            svids=[self._domain.issue(identity.spiffe_id, hint=identity.hint) for identity in self._identities],
            federated_bundles={f"spiffe://{domain.trust_domain}": domain.bundle_der for domain in self._federated},
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _fetch_x509_svid(self, stream: _Stream) -> None:
        """Serve one FetchX509SVID stream: the state now, and again at every change."""
        _require_header(stream)
        await stream.recv_message()
        await self._tell(stream, lambda: self._response)

    async def _tell(self, stream: _Stream, state: Callable[[], Any]) -> None:
        """Send the *state* now and again at every change, until there is none to be told."""
        while not self._denied:
            changed = self._changed
            await stream.send_message(state())
            try:
                await changed.wait()
            except asyncio.CancelledError:
                # Either the caller is gone, or we stop: then it must hear of it, as from a process that ends.
                if self._stopping:
                    await stream.cancel()
                raise
        raise GRPCError(Status.PERMISSION_DENIED, "no identity issued")

    async def _fetch_jwt_svid(self, stream: _Stream) -> None:
        """Serve one FetchJWTSVID call."""
        _require_header(stream)
        request = await stream.recv_message()
        if not request.audience:
            raise GRPCError(Status.INVALID_ARGUMENT, "audience must be specified")
        given = [identity for identity in self._identities if request.spiffe_id in ("", str(identity.spiffe_id))]
        if self._denied or not given:
            raise GRPCError(Status.PERMISSION_DENIED, "no identity issued")
        svids = [
            messages.JWTSVID(
                spiffe_id=str(identity.spiffe_id),
                svid=self._domain.issue_token(identity.spiffe_id, request.audience),
                hint=identity.hint,
            )
            for identity in given
        ]
        await stream.send_message(messages.JWTSVIDResponse(svids=svids))

    async def _fetch_jwt_bundles(self, stream: _Stream) -> None:
        """Serve one FetchJWTBundles stream: the keys now, and again at every change."""
        _require_header(stream)
        await stream.recv_message()
        await self._tell(stream, self._token_bundles)

    def _token_bundles(self) -> Any:
        return messages.JWTBundlesResponse(
            bundles={
                f"spiffe://{domain.trust_domain}": domain.token_bundle for domain in (self._domain, *self._federated)
            }
        )

    def __mapping__(self) -> dict[str, Handler]:
        """Return the methods served, as grpclib asks for them."""
        return {
            f"{METHODS}FetchX509SVID": Handler(
                self._fetch_x509_svid,
                Cardinality.UNARY_STREAM,
                messages.X509SVIDRequest,
                messages.X509SVIDResponse,
            ),
            f"{METHODS}FetchJWTSVID": Handler(
                self._fetch_jwt_svid, Cardinality.UNARY_UNARY, messages.JWTSVIDRequest, messages.JWTSVIDResponse
            ),
            f"{METHODS}FetchJWTBundles": Handler(
                self._fetch_jwt_bundles,
                Cardinality.UNARY_STREAM,
                messages.JWTBundlesRequest,
                messages.JWTBundlesResponse,
            ),
        }


def _require_header(stream: _Stream) -> None:
    for name, value in METADATA.items():
        if stream.metadata.get(name) != value:
            raise GRPCError(Status.INVALID_ARGUMENT, "security header missing from request")
