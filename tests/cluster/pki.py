"""Makes the cluster's certificates: one CA, a leaf for each component, a kubeconfig for each client.

Source: Kubernetes, "PKI certificates and requirements". Valid for a day: a cluster here lives for minutes.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.cluster.addresses import API_SERVICE_IP, NODE_IP, NODE_NAME

if TYPE_CHECKING:
    from pathlib import Path

_CA = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-cluster-ca")])
_CLIENTS = {  # file name: (user, group)
    "admin": ("admin", "system:masters"),
    "apiserver-kubelet": ("apiserver-kubelet", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", None),
    "scheduler": ("system:kube-scheduler", None),
    "proxy": ("system:kube-proxy", None),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "front-proxy": ("front-proxy", None),
}
_API_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "localhost",
)
_SERVERS = {  # file name: subject alternative names
    "apiserver": (*_API_NAMES, "127.0.0.1", API_SERVICE_IP, NODE_IP),
    "kubelet-server": (NODE_NAME, NODE_IP),
}


def write(directory: Path) -> None:
    """Fill *directory* with NAME.crt, NAME.key, NAME.conf of clients, and sa.key, sa.pub for service-account tokens."""
    directory.mkdir(parents=True)
    ca_key = _write_key(directory / "ca.key")
    ca = _builder(_CA, ca_key).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    _write(ca, ca_key, directory / "ca.crt")
    for name, (user, group) in _CLIENTS.items():
        leaf = _leaf(_write_key(directory / f"{name}.key"), user, group, ())
        _write(leaf, ca_key, directory / f"{name}.crt")
        (directory / f"{name}.conf").write_text(_kubeconfig(directory, name))
    for name, names in _SERVERS.items():
        leaf = _leaf(_write_key(directory / f"{name}.key"), f"kube-{name}", None, names)
        _write(leaf, ca_key, directory / f"{name}.crt")
    account_key = _write_key(directory / "sa.key").public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (directory / "sa.pub").write_bytes(account_key.public_bytes(serialization.Encoding.PEM, form))


def _write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.TraditionalOpenSSL
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return key


def _builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=_CA, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
    )


def _leaf(
    key: ec.EllipticCurvePrivateKey, user: str, group: str | None, names: tuple[str, ...]
) -> x509.CertificateBuilder:
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    subject = x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, user)])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    leaf = _builder(subject, key).add_extension(usage, critical=False)
    if not names:
        return leaf
    return leaf.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)


def _write(builder: x509.CertificateBuilder, ca_key: ec.EllipticCurvePrivateKey, path: Path) -> None:
    path.write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _kubeconfig(directory: Path, name: str) -> str:
    return f"""\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "https://{NODE_IP}:6443", certificate-authority: {directory}/ca.crt}}}}]
users: [{{name: {name}, user: {{client-certificate: {directory}/{name}.crt, client-key: {directory}/{name}.key}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {name}}}}}]
current-context: test
"""
