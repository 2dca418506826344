"""A real one-node Kubernetes cluster for one test session: kubelet, containerd, NetworkPolicy and DNS, in a sandbox.

Refuses, with one line that says what is missing, a machine where this cannot run (not Linux, not root, no unshare).
Several clusters can run side by side: they share nothing but the kernel, and a cgroup named after the run directory is
the only thing made outside the sandbox.
Source: the Kubernetes components' reference pages; unshare(1), nsenter(1).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.cluster import cgroups, images, pki
from tests.cluster.node import NodePlan
from tests.parts import ENVIRONMENT, part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType, TracebackType

MANIFESTS = Path(__file__).parent / "manifests"
_REPOSITORY = Path(__file__).parents[2]
_HOST_TOOLS = ("unshare", "nsenter", "setpriv", "mount", "ip", "hostname", "apt-get", "dpkg-deb")
_START_S = 300  # 10 s when idle; the rest is for a machine that is busy compiling


class ClusterError(Exception):
    """The cluster cannot run here, or did not come up."""


class CommandError(Exception):
    """A command in the cluster failed; the text holds it and what it said."""


class Cluster:
    """A running cluster. Use as a context manager; leaving the block ends it, however the block is left."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.logs_dir = self.run_dir / "logs"
        self._cgroup = f"sidegate-{hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:10]}"
        self._sandbox: subprocess.Popen[bytes] | None = None
        self._init_pid = 0
        self._former_handler: Any = None

    @classmethod
    def attach(cls, run_dir: Path) -> Self:
        """A cluster that another process keeps running (`python -m tests.cluster`). Not to be entered as a context."""
        cluster = cls(run_dir)
        cluster._init_pid = int((cluster.run_dir / "init.pid").read_text())
        return cluster

    def __enter__(self) -> Self:
        """Start the cluster and wait until pods can run and names resolve."""
        _check_machine()
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            self._start()
            self.apply((MANIFESTS / "dns.yaml").read_text())
            self.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=180s")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process of the cluster and remove what it made, the logs excepted."""
        self._stop()

    def _start(self) -> None:
        self.logs_dir.mkdir(parents=True)
        pki.write(self.run_dir / "pki")
        NodePlan(
            run_dir=str(self.run_dir),
            cgroup=self._cgroup,
            cni_bin_dir=str(part("cni-plugins")),
            runc=str(part("node-tools") / "runc"),
            images=[str(make().archive) for make in (images.pause, images.base, images.coredns)],
        ).write()
        cgroups.create(self._cgroup)
        namespaces = ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        # Should this process die without a word, the kernel ends the sandbox with it.
        command = (
            "setpriv",
            "--pdeathsig",
            "KILL",
            *namespaces,
            sys.executable,
            "-m",
            "tests.cluster.node",
            self.run_dir,
        )
        with (self.logs_dir / "init").open("wb") as log:
            self._sandbox = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_REPOSITORY,
                env=self._environment(),
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _START_S
        children = Path(f"/proc/{self._sandbox.pid}/task/{self._sandbox.pid}/children")
        while not (self.run_dir / "ready").exists():
            if self._sandbox.poll() is not None or time.monotonic() > deadline_s:
                raise ClusterError(f"the node did not come up: {self._why()}")
            if not self._init_pid and (pids := children.read_text().split()):
                self._init_pid = int(pids[0])
                (self.run_dir / "init.pid").write_text(pids[0])
            time.sleep(0.05)

    def _why(self) -> str:
        failed = self.run_dir / "failed"
        if failed.exists():
            return failed.read_text()
        node, init = (self.logs_dir / name for name in ("node", "init"))
        last = [path.read_text().splitlines()[-1:] for path in (node, init) if path.exists()]
        return "; ".join(line for lines in last for line in lines) or "no word from it"

    def _stop(self) -> None:
        if self._sandbox is not None:
            if self._sandbox.poll() is None:
                # Process 1 of the sandbox: the kernel ends all the others, and unshare returns after the last.
                os.kill(self._init_pid or self._sandbox.pid, signal.SIGKILL)
            self._sandbox.wait(timeout=60)
        cgroups.remove(self._cgroup)
        for path in self.run_dir.iterdir():
            if path == self.logs_dir:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)

    def _environment(self) -> dict[str, str]:
        directories = [part(name) for name in ("kubernetes", "containerd", "node-tools")]
        directories += [part(name).parent for name in ("etcd", "kubectl")]
        path = ":".join([*map(str, directories), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
        home = str(self.run_dir)  # helm and kubectl keep their caches there
        return {**ENVIRONMENT, "PATH": path, "HOME": home, "KUBECONFIG": str(self.run_dir / "pki" / "admin.conf")}

    def command(self, *arguments: str | Path) -> list[str]:
        """An argument list for subprocess that runs a program of this machine inside the node's namespaces."""
        environment = [
            f"{name}={value}" for name, value in self._environment().items() if name in {"PATH", "HOME", "KUBECONFIG"}
        ]
        enter = ["nsenter", "--target", str(self._init_pid), "--mount", "--pid", "--net", "--uts", f"--wd={Path.cwd()}"]
        return [*enter, "env", *environment, *map(str, arguments)]

    def exec(self, *arguments: str | Path, input: str | None = None, timeout_s: float = 200) -> str:  # noqa: A002 - subprocess' word
        """Standard output of a program run inside the node. Raises CommandError."""
        done = subprocess.run(
            self.command(*arguments), input=input, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip()
            raise CommandError(f"{' '.join(map(str, arguments))}: exit {done.returncode}: {said}")
        return done.stdout

    def kubectl(self, *arguments: str | Path, input: str | None = None, timeout_s: float = 200) -> str:  # noqa: A002
        """Standard output of kubectl, run as cluster administrator. Raises CommandError."""
        return self.exec("kubectl", *arguments, input=input, timeout_s=timeout_s)

    def helm(self, *arguments: str | Path) -> str:
        """Standard output of helm. Raises CommandError."""
        return self.exec("helm", *arguments, timeout_s=300)

    def get(self, *arguments: str) -> Any:
        """What `kubectl get ... --output json` says, decoded."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *manifests: str | Mapping[str, Any]) -> str:
        """Apply manifests: YAML text, or objects."""
        texts = [manifest if isinstance(manifest, str) else json.dumps(manifest) for manifest in manifests]
        return self.kubectl("apply", "--filename=-", input="\n---\n".join(texts))

    def make_namespace(self, name: str, **labels: str) -> None:
        """A new namespace in which pods can be created at once; waits for an old one of that name to be gone."""
        self.kubectl("wait", "--for=delete", f"namespace/{name}", "--timeout=180s")
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        # Pods are refused until the controller manager has made the service account.
        self.kubectl("--namespace", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")

    def load_image(self, image: images.Image) -> None:
        """Make an image known to the node, under its reference; pods use it with pull policy IfNotPresent or Never."""
        self.exec("ctr", "--namespace", "k8s.io", "images", "import", "--local", image.archive)

    def wait_until(self, claim: str, check: Callable[[], bool], *, timeout_s: float = 60, every_s: float = 0.2) -> None:
        """Ask until *check* says yes; a failing command counts as no. Raises TimeoutError with the claim."""
        deadline_s = time.monotonic() + timeout_s
        reason = ""
        while True:
            try:
                if check():
                    return
            except CommandError as error:
                reason = f" ({error})"
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not true within {timeout_s:.0f} s: {claim}{reason}")
            time.sleep(every_s)

    def dump(self, directory: Path) -> None:
        """Write what a failed test's reader needs: objects, events, the logs of every container. Skips what fails."""
        directory.mkdir(parents=True, exist_ok=True)
        questions: Sequence[tuple[str, tuple[str, ...]]] = (
            ("pods.txt", ("get", "pods", "--all-namespaces", "--output=wide")),
            ("pods.yaml", ("get", "pods", "--all-namespaces", "--output=yaml")),
            ("events.txt", ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp")),
        )
        for name, arguments in questions:
            with contextlib.suppress(CommandError, subprocess.TimeoutExpired):
                (directory / name).write_text(self.kubectl(*arguments, timeout_s=20))
        logs = self._node_path("/var/log/pods")
        if logs.is_dir():
            shutil.copytree(logs, directory / "pods", dirs_exist_ok=True, ignore_dangling_symlinks=True)

    def _node_path(self, path: str) -> Path:
        """Where a file below the node's /run, /var/lib or /var/log lies on this machine."""
        return self.run_dir / "root" / path.lstrip("/")


def _check_machine() -> None:
    """Raises ClusterError with what this machine lacks."""
    if not sys.platform.startswith("linux"):
        raise ClusterError("the end-to-end cluster needs Linux")
    if os.geteuid() != 0:
        raise ClusterError("the end-to-end cluster needs root: it makes namespaces, mounts and cgroups")
    if missing := [tool for tool in _HOST_TOOLS if shutil.which(tool) is None]:
        raise ClusterError(f"the end-to-end cluster needs these programs on PATH: {', '.join(missing)}")
    if subprocess.run(
        ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "true"), capture_output=True, check=False
    ).returncode:
        raise ClusterError(
            "the end-to-end cluster needs unshare(2), which this machine refuses (a container without privileges?)"
        )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # unwinds the context managers and ends pytest, which SIGTERM's default action does not
