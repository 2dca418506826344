"""Build every ssl.SSLContext of the product: mutual TLS between SPIFFE IDs, the webhook's HTTPS, plain HTTPS clients.

A SPIFFE handshake counts only once `verify_peer` has accepted the chain, before the application sees a byte.
Refuses handshakes while no valid SVID is there, resumed sessions, TLS below 1.3, and blocking sockets,
which would go round the check.
Private keys reach OpenSSL through a memfd: they never touch a file system.
Source: X509-SVID section 5; RFC 8446; why each line stands where it does is said beside it.
"""

import asyncio
import base64
import os
import ssl
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.errors import BadCertificate, Expired, PeerReason, UntrustedChain, WorkloadApiError, WorkloadReason
from certs.spiffe import SpiffePattern
from certs.svid import Svid, X509Snapshot
from certs.verify import Peer, TrustBundles, Usage, verify_peer

__all__ = [
    "ClientCertificate",
    "MutualClient",
    "MutualServer",
    "ServingServer",
    "peer_of",
    "require_key_memory",
    "web_client_context",
]

Clock = Callable[[], datetime]
OnRefused = Callable[[PeerReason, int | None], None]
"""Told each refused handshake: why, and the leaf's serial unless OpenSSL refused before the leaf could be read."""

ALPN = ["http/1.1"]
_X509_V_ERR_CERT_HAS_EXPIRED = 10  # openssl/x509_vfy.h; ssl has no name for it
_ENCODING_DER = 2  # _ssl.ENCODING_DER, private as the call that needs it
MAX_CLIENT_CONTEXTS = 64  # one per expected server; about 100 KiB each, so a wrong caller costs 6 MiB at most


class ClientCertificate(Enum):
    """Whether a listener accepts clients without certificate (as nobody: their peer is None)."""

    REQUIRED = ssl.CERT_REQUIRED
    OPTIONAL = ssl.CERT_OPTIONAL


def utc_now() -> datetime:
    """Return the wall clock, aware."""
    return datetime.now(UTC)


def _count_nothing(_reason: PeerReason, _serial: int | None) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What the hook of one context judges by."""

    usage: Usage
    required: bool
    strict_eku: bool
    now: Clock
    on_refused: OnRefused
    own_not_after: datetime | None = None
    bundles: TrustBundles | None = None
    expected: SpiffePattern | None = None


class _SpiffeContext(ssl.SSLContext):
    """A context whose connections are judged by `rules`."""

    rules: _Rules

    def wrap_socket(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: SSLSocket knows nothing of SPIFFE and would let any certificate of the merged store in."""
        raise NotImplementedError("SPIFFE contexts serve asyncio transports only")


class _SpiffeConnection(ssl.SSLObject):
    """A TLS connection that is up only when its peer's SPIFFE ID is proven."""

    peer: Peer | None = None

    def do_handshake(self) -> None:
        """Complete the handshake and judge the peer; every refusal is an ssl.SSLError, as event loops expect."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            _rules(self).on_refused(_reason(error, _rules(self)), None)
            raise
        # After sni_callback these are the rules of the current snapshot, not those of the listener's base.
        rules = _rules(self)
        try:
            self.peer = _judge(self, rules)
        except UntrustedChain as error:
            rules.on_refused(error.reason, error.serial)
            raise ssl.SSLCertVerificationError(f"{error.reason}: {error}") from error


_SpiffeContext.sslobject_class = _SpiffeConnection


def _rules(connection: ssl.SSLObject) -> _Rules:
    context = connection.context
    if not isinstance(
        context, _SpiffeContext
    ):  # pragma: no cover - only _spiffe_context makes connections of this class
        raise ssl.SSLError("not a SPIFFE context")
    return context.rules


def _reason(error: ssl.SSLError, rules: _Rules) -> PeerReason:
    """Return why OpenSSL gave up; it tells no more than its own code, and no serial."""
    if error.reason == "CALLBACK_FAILED":  # the alert of _choose
        return PeerReason.OWN_SVID_MISSING if rules.own_not_after is None else PeerReason.OWN_SVID_EXPIRED
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return PeerReason.NO_CERTIFICATE
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerReason.EXPIRED if error.verify_code == _X509_V_ERR_CERT_HAS_EXPIRED else PeerReason.UNTRUSTED_CHAIN
    return PeerReason.TLS


def _judge(connection: ssl.SSLObject, rules: _Rules) -> Peer | None:
    """Return the proven peer, None for an allowed anonymous client. Raises UntrustedChain."""
    if rules.bundles is None or rules.own_not_after is None:
        raise UntrustedChain(PeerReason.OWN_SVID_MISSING, "no SVID of our own")
    now = rules.now()
    if now > rules.own_not_after:
        raise UntrustedChain(PeerReason.OWN_SVID_EXPIRED, f"own SVID expired {rules.own_not_after}")
    if connection.session_reused:
        raise UntrustedChain(PeerReason.SESSION_RESUMED, "a resumed session carries no certificate to check")
    if connection.getpeercert(binary_form=True) is None:
        # Independent of OpenSSL's verify_mode, which a swapped context cannot tighten.
        if rules.required:
            raise UntrustedChain(PeerReason.NO_CERTIFICATE, "no certificate was presented")
        return None
    peer = verify_peer(_sent_chain(connection), rules.bundles, now=now, usage=rules.usage, strict_eku=rules.strict_eku)
    if rules.expected is not None and not rules.expected.matches(peer.spiffe_id):
        raise UntrustedChain(
            PeerReason.UNAUTHORISED, f"{peer.spiffe_id} where {rules.expected} was expected", serial=peer.serial
        )
    return peer


class _UnverifiedChain(Protocol):
    def get_unverified_chain(self) -> list[Any] | None: ...


def _sent_chain(connection: Any) -> list[bytes]:
    """Return the certificates as the peer sent them, DER, leaf first."""
    if sys.version_info >= (3, 13):
        return list(connection.get_unverified_chain())
    # Public only since 3.13; before, the same call on the C object behind, giving certificate objects.
    raw: _UnverifiedChain = connection._sslobj  # noqa: SLF001 - see above
    return [certificate.public_bytes(_ENCODING_DER) for certificate in raw.get_unverified_chain() or ()]


def _harden(context: ssl.SSLContext, verify_mode: ssl.VerifyMode) -> None:
    """Set what must be the same in a listener's base context and in the one swapped in: OpenSSL keeps the base's."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # SPIFFE peers have IDs, not names
    context.verify_mode = verify_mode
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT  # anchors may be intermediates
    # A resumed session would skip the check, and outlive even a change of the CA.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if context.protocol is ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.set_alpn_protocols(ALPN)


def _require_parity(base: ssl.SSLContext, swapped: ssl.SSLContext) -> None:
    """Raise BadCertificate unless what OpenSSL keeps from the base is the same in both."""
    for name in ("verify_mode", "verify_flags", "minimum_version", "options", "num_tickets"):
        if getattr(base, name) != getattr(swapped, name):
            raise BadCertificate(f"TLS contexts differ in {name}: the listener's own would win")


def _spiffe_context(protocol: int, verify_mode: ssl.VerifyMode, rules: _Rules) -> _SpiffeContext:
    context = _SpiffeContext(protocol)
    context.rules = rules
    _harden(context, verify_mode)
    return context


def _load(context: ssl.SSLContext, svid: Svid, bundles: TrustBundles) -> None:
    """Give *context* our SVID and every anchor. Raises BadCertificate."""
    anchors = b"".join(
        anchor.public_bytes(Encoding.DER) for domain in sorted(bundles.domains) for anchor in bundles.anchors(domain)
    )
    try:
        # Merged here, as OpenSSL knows no trust domains; _judge then looks at the one domain that counts.
        context.load_verify_locations(cadata=anchors)
    except ssl.SSLError as error:
        raise BadCertificate(f"trust anchors: {error.reason}") from error
    _load_key(context, [_pem("PRIVATE KEY", svid.key_der), *(_pem("CERTIFICATE", der) for der in svid.chain_der)])


def _pem(label: str, der: bytes) -> bytearray:
    return bytearray(
        b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label.encode(), base64.encodebytes(der), label.encode())
    )


def require_key_memory() -> None:
    """Raise BadCertificate where private keys cannot be loaded through anonymous memory."""
    try:
        descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    except OSError as error:
        raise BadCertificate(f"private key: no anonymous memory to load it from: {error}") from error
    try:
        Path(f"/proc/self/fd/{descriptor}").read_bytes()
    except OSError as error:
        raise BadCertificate(f"private key: cannot be loaded from memory: {error}") from error
    finally:
        os.close(descriptor)


def _load_key(context: ssl.SSLContext, parts: Iterable[bytes | bytearray]) -> None:
    """Load key and chain from PEM *parts* through anonymous memory. Raises BadCertificate.

    There is no other way in: where memfd or /proc do not work, we refuse rather than write a key to a disk.
    """
    pem = bytearray().join(parts)
    try:
        descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    except OSError as error:
        raise BadCertificate(f"private key: no anonymous memory to load it from: {error}") from error
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(pem)
        # password: OpenSSL must never ask a terminal.
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=b"")
    except ssl.SSLError as error:
        raise BadCertificate(f"certificate and key: {error.reason}") from error
    except OSError as error:
        raise BadCertificate(f"private key: cannot be loaded from memory: {error}") from error
    finally:
        os.close(descriptor)
        pem[:] = bytes(len(pem))  # best effort: OpenSSL keeps a copy of its own


class _Swapping:
    """A listener's base context, without key, and the context that new handshakes are moved to. Mutated by itself."""

    def __init__(self, base: ssl.SSLContext, now: Clock) -> None:
        self._base = base
        self._now = now
        self._current: tuple[ssl.SSLContext, datetime] | None = None
        base.sni_callback = self._choose

    @property
    def context(self) -> ssl.SSLContext:
        """The listener's context for its whole life; while there is no valid certificate, handshakes get an alert."""
        return self._base

    def withdraw(self) -> None:
        """Answer new handshakes with an alert."""
        self._current = None

    def _swap(self, context: ssl.SSLContext, not_after: datetime) -> None:
        _require_parity(self._base, context)
        self._current = (context, not_after)

    # Called for every handshake, server name or not; an exception in it also ends the handshake.
    def _choose(self, connection: Any, _server_name: str | None, _base: ssl.SSLContext) -> int | None:
        if self._current is None:
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        connection.context, not_after = self._current
        # The agent goes on serving expired SVIDs when its server is down: our own clock decides.
        return None if self._now() <= not_after else ssl.ALERT_DESCRIPTION_INTERNAL_ERROR


class MutualServer(_Swapping):
    """The SPIFFE side of a listener. `follow` belongs into X509Source.subscribe."""

    def __init__(
        self,
        *,
        client_certificate: ClientCertificate = ClientCertificate.REQUIRED,
        strict_eku: bool = True,
        now: Clock = utc_now,
        on_refused: OnRefused = _count_nothing,
    ) -> None:
        self._verify_mode = ssl.VerifyMode(client_certificate.value)
        self._strict_eku = strict_eku
        self._now = now
        self._on_refused = on_refused
        super().__init__(_spiffe_context(ssl.PROTOCOL_TLS_SERVER, self._verify_mode, self._rules()), now)

    def use(self, svid: Svid, bundles: TrustBundles) -> None:
        """Serve *svid* and trust *bundles* from the next handshake on. Raises BadCertificate; the old stay."""
        rules = self._rules(svid, bundles)
        context = _spiffe_context(ssl.PROTOCOL_TLS_SERVER, self._verify_mode, rules)
        _load(context, svid, bundles)
        self._swap(context, svid.not_after)

    def follow(self, snapshot: X509Snapshot | None) -> None:
        """Use *snapshot*, or withdraw when there is none."""
        if snapshot is None:
            self.withdraw()
        else:
            self.use(snapshot.svid, snapshot.bundles)

    def _rules(self, svid: Svid | None = None, bundles: TrustBundles | None = None) -> _Rules:
        return _Rules(
            usage=Usage.CLIENT,
            required=self._verify_mode is ssl.CERT_REQUIRED,
            strict_eku=self._strict_eku,
            now=self._now,
            on_refused=self._on_refused,
            own_not_after=svid.not_after if svid else None,
            bundles=bundles,
        )


class MutualClient:
    """The SPIFFE side of outgoing connections. `follow` belongs into X509Source.subscribe."""

    def __init__(
        self, *, strict_eku: bool = True, now: Clock = utc_now, on_refused: OnRefused = _count_nothing
    ) -> None:
        self._strict_eku = strict_eku
        self._now = now
        self._on_refused = on_refused
        self._identity: tuple[Svid, TrustBundles] | None = None
        self._contexts: OrderedDict[SpiffePattern, ssl.SSLContext] = OrderedDict()

    def use(self, svid: Svid, bundles: TrustBundles) -> None:
        """Present *svid* and trust *bundles* in contexts handed out from now on."""
        self._identity = (svid, bundles)
        self._contexts.clear()

    def withdraw(self) -> None:
        """Hand out no contexts."""
        self._identity = None
        self._contexts.clear()

    def follow(self, snapshot: X509Snapshot | None) -> None:
        """Use *snapshot*, or withdraw when there is none."""
        if snapshot is None:
            self.withdraw()
        else:
            self.use(snapshot.svid, snapshot.bundles)

    def context(self, expected: SpiffePattern) -> ssl.SSLContext:
        """Return the context for a connection to a server whose ID must match *expected*, whatever its host name.

        Ask for each request: the same object comes back until the SVID changes, so that pools keyed by it work.
        Raises WorkloadApiError without SVID, Expired when it has run out, BadCertificate when OpenSSL refuses it.
        """
        if self._identity is None:
            raise WorkloadApiError(WorkloadReason.NO_IDENTITY, "no SVID to connect with")
        svid, bundles = self._identity
        if self._now() > svid.not_after:
            raise Expired(PeerReason.OWN_SVID_EXPIRED, f"own SVID expired {svid.not_after}", serial=svid.serial)
        if expected in self._contexts:
            self._contexts.move_to_end(expected)
            return self._contexts[expected]
        rules = _Rules(
            usage=Usage.SERVER,
            required=True,
            strict_eku=self._strict_eku,
            now=self._now,
            on_refused=self._on_refused,
            own_not_after=svid.not_after,
            bundles=bundles,
            expected=expected,
        )
        context = _spiffe_context(ssl.PROTOCOL_TLS_CLIENT, ssl.CERT_REQUIRED, rules)
        _load(context, svid, bundles)
        self._contexts[expected] = context
        while len(self._contexts) > MAX_CLIENT_CONTEXTS:
            self._contexts.popitem(last=False)
        return context


class ServingServer(_Swapping):
    """Plain HTTPS (the webhook's) with a certificate that is replaced while serving. Clients stay anonymous."""

    def __init__(self, *, now: Clock = utc_now) -> None:
        super().__init__(self._make(), now)

    def use(self, chain_pem: bytes, key_pem: bytes) -> None:
        """Serve this chain (leaf first) from the next handshake on. Raises BadCertificate; the old one then stays."""
        try:
            leaf = x509.load_pem_x509_certificate(chain_pem)
        except ValueError as error:
            raise BadCertificate(f"serving certificate: unreadable PEM: {error}") from error
        if not leaf.not_valid_before_utc <= self._now() <= leaf.not_valid_after_utc:
            raise BadCertificate(
                f"serving certificate: valid from {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc} only"
            )
        context = self._make()
        _load_key(context, [key_pem, b"\n", chain_pem])
        self._swap(context, leaf.not_valid_after_utc)

    @staticmethod
    def _make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # kube-apiserver may be told to go that low, no lower
        context.set_alpn_protocols(ALPN)
        return context


def web_client_context(*, anchors_pem: bytes | None = None) -> ssl.SSLContext:
    """Return the context of an ordinary HTTPS client (identity provider, Kubernetes API): names are checked.

    With *anchors_pem* only those authorities are trusted, else the system's. Raises BadCertificate.
    """
    try:
        # An empty cadata would quietly mean the system's authorities.
        if anchors_pem is not None and not anchors_pem.strip():
            raise BadCertificate("trust anchors: empty")
        context = ssl.create_default_context(cadata=anchors_pem.decode("ascii") if anchors_pem is not None else None)
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise BadCertificate(f"trust anchors: unreadable PEM: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(ALPN)
    return context


def peer_of(transport: asyncio.BaseTransport) -> Peer | None:
    """Return who is at the other end of *transport*; None for anonymous clients and for anything but SPIFFE TLS."""
    connection = transport.get_extra_info("ssl_object")
    return connection.peer if isinstance(connection, _SpiffeConnection) else None
