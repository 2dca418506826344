"""A real Kubernetes API server on loopback, with etcd and nothing else: up in seconds, and no root is needed.

What it decides is real: schemas, defaults, admission (webhooks by URL, policies, Pod Security, ServiceAccount), RBAC,
watches. Nothing acts on it: no pod is scheduled, no controller makes a service account (`make_namespace` does).

    with ApiServer(run_dir) as api:                   # ~6 s; both programs are tests/parts
        api.make_namespace("team", **{"pod-security.kubernetes.io/enforce": "restricted"})
        api.kubeconfig                                # a file: the administrator, for kubectl, helm, webhook.shell.kube.Kube
        api.kubectl("get", "pods", "-A")              # standard output; raises CommandError
        api.apply(manifest, ...)                      # YAML texts or objects
        answer = api.create_pod("team", pod)          # a dry run: Answer(status, body, warnings); answer.refusal is the reason
        api.call("PATCH", path, body, user="jane", groups=("tenants",), content_type=...)    # as somebody else

The session's shared one is the fixture `api_server` of tests/conftest.py (marker `real_apiserver`): make namespaces of
your own there, delete cluster-scoped objects after you.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

from tests.cluster import pki
from tests.cluster.addresses import NODE_IP, SERVICE_CIDR
from tests.cluster.cluster import ClusterError, CommandError
from tests.parts import ENVIRONMENT, part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

START_S = 120  # 6 s when idle
JSON = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the API server said to one request."""

    status: int
    body: JSON
    warnings: tuple[str, ...] = ()

    @property
    def refusal(self) -> str:
        """The message of an error; "" when there is none."""
        return str(self.body.get("message")) if self.status >= 400 else ""


class ApiServer:
    """etcd and kube-apiserver. Use as a context manager; leaving the block ends both."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.kubeconfig = self.run_dir / "admin.conf"
        self._pki = self.run_dir / "pki"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = 0

    def __enter__(self) -> Self:
        """Start both and wait until the API server is ready."""
        pki.write(self._pki)
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End both; the logs stay."""
        self._stop()

    def _start(self) -> None:
        etcd_port, peer_port, self._port = _free_ports(3)
        etcd, peer = (f"http://127.0.0.1:{port}" for port in (etcd_port, peer_port))
        self._run(
            "etcd",
            part("etcd"),
            f"--data-dir={self.run_dir / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--log-level=warn",
        )
        self._run("kube-apiserver", part("kube-apiserver"), f"--etcd-servers={etcd}", *self._arguments())
        text = (self._pki / "admin.conf").read_text()
        self.kubeconfig.write_text(text.replace(f"https://{NODE_IP}:6443", f"https://127.0.0.1:{self._port}"))
        deadline_s = time.monotonic() + START_S
        while not self._is_ready():
            for process in self._processes:
                if process.poll() is not None:
                    raise ClusterError(f"a process exited {process.returncode}; see the logs in {self.run_dir}")
            if time.monotonic() > deadline_s:
                raise ClusterError(f"no API server within {START_S} s; see the logs in {self.run_dir}")
            time.sleep(0.1)

    def start_controllers(self, *names: str) -> None:
        """Start kube-controller-manager with these controllers alone, such as the one that checks types of policies."""
        access = [f"--{kind}kubeconfig={self.kubeconfig}" for kind in ("", "authentication-", "authorization-")]
        limits = (f"--controllers={','.join(names)}", "--leader-elect=false", "--secure-port=0")
        self._run("kube-controller-manager", part("kubernetes") / "kube-controller-manager", *access, *limits)

    def _arguments(self) -> list[str]:
        return [
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--endpoint-reconciler-type=none",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            "--allow-privileged=true",
            "--authorization-mode=RBAC",
            f"--client-ca-file={self._pki}/ca.crt",
            f"--tls-cert-file={self._pki}/apiserver.crt",
            f"--tls-private-key-file={self._pki}/apiserver.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self._pki}/sa.pub",
            f"--service-account-signing-key-file={self._pki}/sa.key",
        ]

    def _run(self, name: str, *command: str | Path) -> None:
        with (self.run_dir / f"{name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _is_ready(self) -> bool:
        try:
            return self.call("GET", "/readyz").status == 200
        except OSError:
            return False

    def _stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait(timeout=60)

    def kubectl(self, *arguments: str | Path, text: str | None = None) -> str:
        """Standard output of kubectl as administrator. Raises CommandError."""
        environment = {**ENVIRONMENT, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.run_dir)}
        done = subprocess.run(
            [part("kubectl"), *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip()
            raise CommandError(f"kubectl {' '.join(map(str, arguments))}: exit {done.returncode}: {said}")
        return done.stdout

    def apply(self, *manifests: str | Mapping[str, Any]) -> str:
        """Apply manifests: YAML texts, or objects."""
        texts = [manifest if isinstance(manifest, str) else json.dumps(manifest) for manifest in manifests]
        return self.kubectl("apply", "--server-side", "--filename=-", text="\n---\n".join(texts))

    def make_namespace(self, name: str, **labels: str) -> None:
        """A new namespace with its service account, in which pods can be created."""
        self.call("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        self.make_service_account(name, "default")

    def make_service_account(self, namespace: str, name: str) -> None:
        """One that pods can name."""
        self.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})

    def create_pod(self, namespace: str, pod: Mapping[str, Any], *, dry_run: bool = True) -> Answer:
        """Have a pod created, by default without storing it."""
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        return self.call("POST", f"/api/v1/namespaces/{namespace}/pods{query}", pod)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        user: str | None = None,
        groups: Sequence[str] = (),
        content_type: str = "application/json",
    ) -> Answer:
        """The answer to one request, as administrator or, impersonated, as *user*."""
        context = ssl.create_default_context(cafile=self._pki / "ca.crt")
        context.load_cert_chain(self._pki / "admin.crt", self._pki / "admin.key")
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, context=context, timeout=30)
        try:
            connection.putrequest(method, path)
            content = b"" if body is None else json.dumps(body).encode()
            for name, value in (
                ("Content-Type", content_type),
                ("Accept", "application/json"),
                ("Content-Length", str(len(content))),
                *((("Impersonate-User", user),) if user else ()),
                *(("Impersonate-Group", group) for group in groups),
            ):
                connection.putheader(name, value)
            connection.endheaders(content)
            response = connection.getresponse()
            text = response.read()
            warnings = tuple(_warning(each) for each in response.headers.get_all("Warning") or ())
        finally:
            connection.close()
        decoded = json.loads(text) if text.startswith(b"{") else {"message": text.decode()}
        return Answer(status=response.status, body=decoded, warnings=warnings)


def _warning(header: str) -> str:
    """The text of an RFC 7234 warning: `299 - "text"`."""
    return str(json.loads(header.split(" ", 2)[2]))


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: neither program can say which one it was given."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
