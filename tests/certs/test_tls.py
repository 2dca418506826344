"""TLS contexts: what a handshake between two of them ends in. Both ends run here, over memory."""

import os
import ssl
import sys
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs import tls
from certs.authority import Authority, make_key
from certs.errors import BadCertificate, Expired, PeerReason, WorkloadApiError
from certs.spiffe import SpiffePattern
from certs.svid import X509Snapshot
from certs.tls import (
    ClientCertificate,
    MutualClient,
    MutualServer,
    ServingServer,
    require_key_memory,
    web_client_context,
)
from certs.verify import Peer
from tests.certs.pki import API, B_TEST, CA_LIFETIME, LIFETIME, NOW, a_leaf, an_authority, der, key_der

CLIENT_ID = "spiffe://a.test/ns/agents/sa/bot"
ANY_OF_A = SpiffePattern.parse("spiffe://a.test/**")


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> datetime:
        """Tell the time."""
        return self.time


class Refusals:
    """What on_refused was told."""

    def __init__(self) -> None:
        self.told: list[tuple[PeerReason, int | None]] = []

    def __call__(self, reason: PeerReason, serial: int | None) -> None:
        """Take note."""
        self.told.append((reason, serial))

    @property
    def reasons(self) -> list[PeerReason]:
        """The reasons alone."""
        return [reason for reason, _ in self.told]


A = an_authority()
B = an_authority(B_TEST)


def a_snapshot(
    spiffe_id: str = str(API),
    *,
    issuer: Authority = A,
    not_after: datetime = NOW + LIFETIME,
    federated: dict[str, bytes] | None = None,
    leaf: Callable[..., bytes] = a_leaf,
) -> X509Snapshot:
    """A snapshot of one SVID of *issuer*, whose certificate is its bundle."""
    key = make_key()
    chain = leaf(issuer, uris=[spiffe_id], key=key, not_after=not_after)
    return X509Snapshot.parse((spiffe_id, chain, key_der(key), der(issuer)), federated or {}, now=NOW)


def connect(
    client: ssl.SSLContext, server: ssl.SSLContext, *, session: ssl.SSLSession | None = None, name: str | None = "x"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands over memory and exchange a byte each way. Raises the first error of either end."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name, session=session),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    waiting = [end.do_handshake for end in ends]
    for _ in range(10):
        for step in tuple(waiting):
            try:
                step()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(step)
        if not waiting:
            break
    assert not waiting
    for sender, receiver in (ends, ends[::-1]):
        sender.write(b"x")
        assert receiver.read(1) == b"x"
    return ends


def peer(end: ssl.SSLObject) -> Peer | None:
    """The peer that *end* has proven."""
    proven: Peer | None = end.peer  # type: ignore[attr-defined]
    return proven


class Pair:
    """A server and a client of a.test with a clock and refusals in common."""

    def __init__(self, *, client_certificate: ClientCertificate = ClientCertificate.REQUIRED) -> None:
        self.clock = Clock()
        self.refusals = Refusals()
        self.server = MutualServer(client_certificate=client_certificate, now=self.clock, on_refused=self.refusals)
        self.client = MutualClient(now=self.clock, on_refused=self.refusals)
        self.server.follow(a_snapshot())
        self.client.follow(a_snapshot(CLIENT_ID))

    def connect(self, expected: SpiffePattern = ANY_OF_A) -> tuple[ssl.SSLObject, ssl.SSLObject]:
        """Connect the two."""
        return connect(self.client.context(expected), self.server.context)

    def refused(self, expected: SpiffePattern = ANY_OF_A) -> list[PeerReason]:
        """Connect the two, which must fail, and return the reasons noted."""
        with pytest.raises(ssl.SSLError):
            self.connect(expected)
        return self.refusals.reasons


def test_both_ends_prove_who_they_are() -> None:
    """A handshake gives each end the other's ID, over TLS 1.3 and HTTP/1.1 only."""
    client_end, server_end = Pair().connect()

    proven = (peer(client_end), peer(server_end))
    assert [str(API), CLIENT_ID] == [str(each.spiffe_id) for each in proven if each]
    assert (client_end.version(), client_end.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")


def test_a_server_with_another_id_is_refused() -> None:
    """The route says who must answer; the host name says nothing."""
    assert Pair().refused(SpiffePattern.parse("spiffe://a.test/ns/pay/sa/other")) == [PeerReason.UNAUTHORISED]


def test_our_id_signed_by_a_federated_authority_is_refused_by_the_server() -> None:
    """OpenSSL's merged store accepts the chain; the trust domain's own anchors do not."""
    pair = Pair()
    pair.server.follow(a_snapshot(federated={"spiffe://b.test": der(B)}))
    forged = a_snapshot(CLIENT_ID, issuer=B)  # to the forger, b's CA is the bundle of a.test
    pair.client.use(forged.svid, a_snapshot().bundles)

    assert pair.refused() == [PeerReason.UNTRUSTED_CHAIN]
    assert pair.refusals.told[0][1] == forged.svid.serial


def test_our_id_signed_by_a_federated_authority_is_refused_by_the_client() -> None:
    """The same forgery by a server."""
    pair = Pair()
    pair.client.follow(a_snapshot(CLIENT_ID, federated={"spiffe://b.test": der(B)}))
    pair.server.use(a_snapshot(issuer=B).svid, a_snapshot().bundles)

    assert pair.refused() == [PeerReason.UNTRUSTED_CHAIN]


def test_forgery_is_refused_right_after_a_rotation_too() -> None:
    """The rules move with the context."""
    pair = Pair()
    pair.connect()
    pair.server.follow(a_snapshot(federated={"spiffe://b.test": der(B)}))
    pair.client.use(a_snapshot(CLIENT_ID, issuer=B).svid, a_snapshot().bundles)

    assert pair.refused() == [PeerReason.UNTRUSTED_CHAIN]


def test_a_removed_bundle_is_trusted_no_more() -> None:
    """Trust is replaced with each update, never merged."""
    pair = Pair()
    pair.server.follow(a_snapshot(federated={"spiffe://b.test": der(B)}))
    pair.client.use(a_snapshot("spiffe://b.test/x", issuer=B).svid, a_snapshot().bundles)
    pair.connect()

    pair.server.follow(a_snapshot())

    assert pair.refused() == [PeerReason.UNTRUSTED_CHAIN]


def test_new_handshakes_see_a_rotated_svid() -> None:
    """The listener's context stays, what it shows changes."""
    pair = Pair()
    pair.connect()
    fresh = a_snapshot()
    pair.server.follow(fresh)

    proven = peer(pair.connect()[0])

    assert proven
    assert proven.serial == fresh.svid.serial


def test_a_listener_without_svid_refuses_every_handshake() -> None:
    """A server can bind before its first SVID, and serves nobody until then."""
    pair = Pair()
    pair.server.withdraw()

    assert pair.refused() == [PeerReason.OWN_SVID_MISSING]


def test_a_withdrawn_svid_ends_handshakes_at_once() -> None:
    """None from the source means stop."""
    pair = Pair()
    pair.connect()
    pair.server.follow(None)

    assert pair.refused() == [PeerReason.OWN_SVID_MISSING]


def test_an_expired_svid_of_ours_is_not_shown() -> None:
    """Our own clock decides; the agent would go on."""
    pair = Pair()
    client = pair.client.context(ANY_OF_A)
    pair.clock.time = NOW + 2 * LIFETIME

    with pytest.raises(ssl.SSLError):
        connect(client, pair.server.context)
    assert pair.refusals.reasons == [PeerReason.OWN_SVID_EXPIRED]


def test_a_context_kept_beyond_the_svids_life_connects_no_more() -> None:
    """A connection pool may hold a client context for long."""
    pair = Pair()
    pair.server.follow(a_snapshot(not_after=NOW + CA_LIFETIME))
    kept = pair.client.context(ANY_OF_A)
    pair.clock.time = NOW + LIFETIME + timedelta(seconds=1)

    with pytest.raises(ssl.SSLError):
        connect(kept, pair.server.context)
    assert PeerReason.OWN_SVID_EXPIRED in pair.refusals.reasons


def test_a_peer_that_expires_between_two_handshakes_is_refused_at_the_second() -> None:
    """Each handshake is judged by the clock of its own moment."""
    pair = Pair()
    client = pair.client.context(ANY_OF_A)
    server = MutualServer(now=lambda: NOW + LIFETIME + timedelta(seconds=1), on_refused=pair.refusals)
    server.follow(a_snapshot(not_after=NOW + CA_LIFETIME))

    connect(client, pair.server.context)
    with pytest.raises(ssl.SSLError):
        connect(client, server.context)
    assert pair.refusals.reasons == [PeerReason.EXPIRED]


@pytest.fixture
def anonymous() -> ssl.SSLContext:
    """A client without certificate that believes every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_an_anonymous_client_is_refused_where_a_certificate_is_required(anonymous: ssl.SSLContext) -> None:
    """The default."""
    pair = Pair()
    with pytest.raises(ssl.SSLError):
        connect(anonymous, pair.server.context)

    assert pair.refusals.reasons == [PeerReason.NO_CERTIFICATE]


def test_an_anonymous_client_is_nobody_where_a_certificate_is_optional(anonymous: ssl.SSLContext) -> None:
    """Permissive listeners let it in without an identity."""
    pair = Pair(client_certificate=ClientCertificate.OPTIONAL)

    assert peer(connect(anonymous, pair.server.context)[1]) is None


def test_a_good_certificate_counts_where_it_is_optional() -> None:
    """Optional does not mean ignored."""
    proven = peer(Pair(client_certificate=ClientCertificate.OPTIONAL).connect()[1])

    assert proven
    assert str(proven.spiffe_id) == CLIENT_ID


def test_a_bad_certificate_is_refused_where_it_is_optional() -> None:
    """Nobody is better than a liar."""
    pair = Pair(client_certificate=ClientCertificate.OPTIONAL)
    pair.client.use(a_snapshot(CLIENT_ID, issuer=B).svid, a_snapshot().bundles)

    assert pair.refused() == [PeerReason.UNTRUSTED_CHAIN]


def test_the_hook_refuses_an_anonymous_client_even_if_openssl_would_not(anonymous: ssl.SSLContext) -> None:
    """OpenSSL takes verify_mode from the listener's base; the second lock does not depend on it."""
    pair = Pair()
    pair.server.context.verify_mode = ssl.CERT_NONE

    with pytest.raises(ssl.SSLCertVerificationError, match="no-certificate"):
        connect(anonymous, pair.server.context)


@pytest.mark.parametrize("name", ["verify_mode", "verify_flags", "minimum_version", "num_tickets"])
def test_a_base_context_unlike_the_one_swapped_in_is_refused(name: str) -> None:
    """What OpenSSL would silently keep from the base is compared at each swap."""
    server = MutualServer(now=Clock())
    weaker = {
        "verify_mode": ssl.CERT_OPTIONAL,
        "verify_flags": ssl.VERIFY_DEFAULT,
        "minimum_version": ssl.TLSVersion.TLSv1_2,
        "num_tickets": 2,
    }
    setattr(server.context, name, weaker[name])

    with pytest.raises(BadCertificate, match=name):
        server.follow(a_snapshot())


def test_tls_1_2_is_refused() -> None:
    """Its session resumption cannot be turned off from Python."""
    pair = Pair()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(ssl.SSLError):
        connect(old, pair.server.context)
    assert pair.refusals.reasons == [PeerReason.TLS]


def test_no_session_can_be_resumed() -> None:
    """The server issues no tickets, so a client that saves its session has nothing to resume."""
    pair = Pair()
    context = pair.client.context(ANY_OF_A)
    first, _ = connect(context, pair.server.context)
    _, second = connect(context, pair.server.context, session=first.session)

    assert not second.session_reused
    assert peer(second)


def test_a_resumed_session_is_refused() -> None:
    """Were a ticket ever issued, a resumed session would still not pass: it carries no certificate."""
    pair = Pair()
    context = pair.client.context(ANY_OF_A)
    server = pair.server
    server.context.options &= ~ssl.OP_NO_TICKET
    server.context.num_tickets = 2
    assert server._current
    server._current[0].options &= ~ssl.OP_NO_TICKET
    server._current[0].num_tickets = 2
    context.options &= ~ssl.OP_NO_TICKET
    first, _ = connect(context, server.context)

    with pytest.raises(ssl.SSLCertVerificationError, match="session-resumed"):
        connect(context, server.context, session=first.session)


def test_blocking_sockets_are_refused() -> None:
    """SSLSocket would skip the SPIFFE check."""
    with pytest.raises(NotImplementedError, match="asyncio"):
        Pair().server.context.wrap_socket(None)  # type: ignore[arg-type]


def test_a_client_without_svid_gets_no_context() -> None:
    """Egress fails before it starts."""
    client = MutualClient(now=Clock())
    with pytest.raises(WorkloadApiError, match="no SVID"):
        client.context(ANY_OF_A)
    client.follow(a_snapshot())
    client.follow(None)
    with pytest.raises(WorkloadApiError, match="no SVID"):
        client.context(ANY_OF_A)


def test_a_client_with_an_expired_svid_gets_no_context() -> None:
    """Nor does it then."""
    pair = Pair()
    pair.clock.time = NOW + 2 * LIFETIME

    with pytest.raises(Expired) as caught:
        pair.client.context(ANY_OF_A)
    assert caught.value.reason is PeerReason.OWN_SVID_EXPIRED


def test_client_contexts_are_kept_until_the_svid_changes() -> None:
    """Connection pools are keyed by the context."""
    client = MutualClient(now=Clock())
    client.follow(a_snapshot())
    first = client.context(ANY_OF_A)

    assert client.context(ANY_OF_A) is first
    assert client.context(SpiffePattern.exactly(API)) is not first
    client.follow(a_snapshot())
    assert client.context(ANY_OF_A) is not first


def test_client_contexts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many routes drop the context used longest ago, not memory limits."""
    monkeypatch.setattr(tls, "MAX_CLIENT_CONTEXTS", 2)
    client = MutualClient(now=Clock())
    client.follow(a_snapshot())
    patterns = [SpiffePattern.parse(f"spiffe://a.test/{name}") for name in "xyz"]
    x, y = (client.context(pattern) for pattern in patterns[:2])
    client.context(patterns[0])
    client.context(patterns[2])

    assert client.context(patterns[0]) is x
    assert client.context(patterns[1]) is not y


def test_an_svid_that_openssl_refuses_leaves_the_old_one() -> None:
    """A failed swap changes nothing."""
    pair = Pair()
    good = a_snapshot()
    mixed = X509Snapshot.parse((str(API), good.svid.chain_der[0], good.svid.key_der, der(A)), {}, now=NOW)
    object.__setattr__(mixed.svid, "key_der", key_der(make_key()))

    with pytest.raises(BadCertificate, match="KEY_VALUES_MISMATCH"):
        pair.server.follow(mixed)
    pair.connect()


# --- keys -----------------------------------------------------------------------------------------------------------


def open_descriptors() -> set[str]:
    """The targets of all open descriptors."""
    targets = set()
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - links, not paths
        try:
            targets.add(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - same
        except FileNotFoundError:
            continue
    return targets


def test_keys_never_touch_a_file_system() -> None:
    """Python opens no file for writing while contexts are built, and the anonymous memory is gone afterwards."""
    written: list[object] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open" and (arguments[1] is None or set(str(arguments[1])) & set("wax+")):
            written.append(arguments[0])

    sys.addaudithook(watch)  # stays for the life of the process, hence the flag
    server, client = MutualServer(now=Clock()), MutualClient(now=Clock())
    for _ in range(3):
        server.follow(a_snapshot())
        client.follow(a_snapshot())
        client.context(ANY_OF_A)
    watching = False

    assert all(isinstance(target, int) for target in written), written
    assert len(written) == 6
    assert not [target for target in open_descriptors() if "memfd" in target]


def test_without_anonymous_memory_a_key_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no silent way to a disk."""

    def fail(_name: str, _flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(BadCertificate, match="no anonymous memory"):
        MutualServer(now=Clock()).follow(a_snapshot())
    with pytest.raises(BadCertificate, match="no anonymous memory"):
        require_key_memory()


def test_without_proc_a_key_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL reaches the memory through /proc only."""

    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", fail)
    with pytest.raises(BadCertificate, match="cannot be loaded from memory"):
        MutualServer(now=Clock()).follow(a_snapshot())


def test_memory_for_keys_is_tried_before_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can refuse to start, instead of finding out with its first SVID."""
    require_key_memory()

    def fail(_: object) -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(tls.Path, "read_bytes", fail)
    with pytest.raises(BadCertificate, match="cannot be loaded from memory"):
        require_key_memory()
    assert not [target for target in open_descriptors() if "memfd" in target]


# --- ordinary HTTPS -------------------------------------------------------------------------------------------------


def a_serving_pair(authority: Authority, name: str = "webhook.test", *, serial: int = 1) -> tuple[bytes, bytes]:
    """Certificate and key for *name*, PEM."""
    key = make_key()
    leaf = authority.sign_serving([name], key.public_key(), now=NOW, lifetime=LIFETIME, serial=serial)
    return leaf.public_bytes(Encoding.PEM), Authority(certificate=leaf, key=key).key_pem


def test_the_webhooks_certificate_is_replaced_while_serving() -> None:
    """New handshakes see the new certificate on the same listener context."""
    authority = an_authority()
    serving = ServingServer()
    client = web_client_context(anchors_pem=authority.certificate_pem)
    serials = []
    for serial in (11, 12):
        key = make_key()
        leaf = authority.sign_serving(
            ["webhook.test"], key.public_key(), now=tls.utc_now(), lifetime=LIFETIME, serial=serial
        )
        serving.use(leaf.public_bytes(Encoding.PEM), Authority(certificate=leaf, key=key).key_pem)
        client_end, _ = connect(client, serving.context, name="webhook.test")
        shown = client_end.getpeercert(binary_form=True)
        assert shown
        serials.append(x509.load_der_x509_certificate(shown).serial_number)

    assert serials == [11, 12]


def test_the_webhook_serves_nobody_without_certificate() -> None:
    """It can bind before its first certificate."""
    with pytest.raises(ssl.SSLError):
        connect(web_client_context(), ServingServer().context, name="webhook.test")


def test_an_https_client_checks_the_name() -> None:
    """An ordinary client trusts names, and only the authorities it was given."""
    authority = an_authority()
    serving = ServingServer()
    serving.use(*a_serving_pair(authority))

    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(web_client_context(anchors_pem=authority.certificate_pem), serving.context, name="other.test")
    with pytest.raises(ssl.SSLCertVerificationError, match="issuer"):
        connect(web_client_context(anchors_pem=A.certificate_pem), serving.context, name="webhook.test")


@pytest.mark.parametrize(
    ("now", "why"),
    [(NOW - timedelta(days=1), "valid from"), (NOW + timedelta(days=2), "valid from")],
)
def test_a_serving_certificate_outside_its_validity_is_refused(now: datetime, why: str) -> None:
    """A stale Secret is told apart from a good one before it is served."""
    with pytest.raises(BadCertificate, match=why):
        ServingServer(now=lambda: now).use(*a_serving_pair(A))


def test_damaged_serving_material_is_refused() -> None:
    """Each fault has its words, and the one in use stays."""
    chain, key = a_serving_pair(A)
    serving = ServingServer(now=Clock())

    with pytest.raises(BadCertificate, match="unreadable PEM"):
        serving.use(b"", key)
    with pytest.raises(BadCertificate, match="certificate and key"):
        serving.use(chain, a_serving_pair(A)[1])
    with pytest.raises(BadCertificate, match="certificate and key"):
        serving.use(chain, b"")


@pytest.mark.parametrize("anchors", [b"", b" \n", b"nonsense", b"\xff"])
def test_unreadable_authorities_are_refused(anchors: bytes) -> None:
    """An empty file must not mean the system's authorities."""
    with pytest.raises(BadCertificate, match="trust anchors"):
        web_client_context(anchors_pem=anchors)


def test_only_a_spiffe_connection_has_a_peer() -> None:
    """Plain text and ordinary TLS prove nobody."""

    class Transport:
        """A transport that knows its TLS object."""

        def __init__(self, tls_object: object) -> None:
            self._tls_object = tls_object

        def get_extra_info(self, _name: str) -> object:
            return self._tls_object

    _, server_end = Pair().connect()

    proven = tls.peer_of(Transport(server_end))  # type: ignore[arg-type]
    assert proven
    assert str(proven.spiffe_id) == CLIENT_ID
    assert tls.peer_of(Transport(None)) is None  # type: ignore[arg-type]
