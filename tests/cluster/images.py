"""Makes container images without a registry or an engine: from files and Debian packages, or by buildah.

An archive is an OCI layout in a tar, importable by containerd and by buildah, kept in the cache under a key of its
contents. Source: OCI image specification 1.1, image-layout; containerd reads the full reference from the annotation
io.containerd.image.name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from tests.parts import PipPackages, cache_dir, locked, made, part, run


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link in an image."""

    target: str


Layer: TypeAlias = Mapping[str, "Path | bytes | Link"]
"""Where in the image: a file or directory of this machine, a file's content, a link. Everything belongs to root."""

_Stream: TypeAlias = io.BufferedIOBase
_MEDIA_TYPE = "application/vnd.oci.image."
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CA_FILE = "etc/ssl/certs/ca-certificates.crt"
_LAYOUT = 2  # part of an archive's key; to be raised with what `_write_archive` writes
_UNUSED_S = 3600  # longer than any session between making an archive and loading it
_PIP = "pip==26.3"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image and the archive that holds it."""

    reference: str
    archive: Path


def image(
    reference: str,
    *layers: Layer,
    entrypoint: Sequence[str] = (),
    environment: Sequence[str] = (),
    user: str = "",
) -> Image:
    """The image made of *layers*, later ones over earlier ones."""
    config = {"Env": [_PATH, *environment], "Entrypoint": list(entrypoint) or None, "User": user}
    key = hashlib.sha256(
        json.dumps([_LAYOUT, reference, config, [_fingerprint(layer) for layer in layers]]).encode()
    ).hexdigest()[:12]
    name = reference.rpartition("/")[2].replace(":", "-")
    archive = cache_dir() / "images" / f"{name}-{key}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
            _write_archive(Path(scratch, "image.tar"), reference, config, layers).rename(archive)
    _keep(archive)
    return Image(reference=reference, archive=archive)


def _keep(archive: Path) -> None:
    """Mark an archive as used now, and remove those of the same image that nobody has used for an hour."""
    archive.touch()
    for other in archive.parent.glob(f"{archive.stem.rpartition('-')[0]}-{'[0-9a-f]' * 12}.tar"):
        with contextlib.suppress(FileNotFoundError):  # somebody else's clearing up
            if time.time() - other.stat().st_mtime > _UNUSED_S:
                other.unlink()


def _fingerprint(layer: Layer) -> list[str]:
    # Trees of the cache carry a key of their contents in their name; single files are read.
    return [f"{place} {_source_fingerprint(source)}" for place, source in sorted(layer.items())]


def _source_fingerprint(source: Path | bytes | Link) -> str:
    if isinstance(source, Link):
        return f"-> {source.target}"
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if source.is_relative_to(cache_dir()):
        return str(source)
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def _write_archive(path: Path, reference: str, config: Mapping[str, object], layers: Sequence[Layer]) -> Path:
    with contextlib.ExitStack() as stack, tarfile.open(path, "w") as archive:

        def add(stream: _Stream, kind: str) -> dict[str, object]:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            _add_file(archive, f"blobs/sha256/{digest}", stream, size)
            return {"mediaType": f"{_MEDIA_TYPE}{kind}", "digest": f"sha256:{digest}", "size": size}

        blobs = [add(stack.enter_context(_layer_tar(layer, path.parent)), "layer.v1.tar") for layer in layers]
        described = {
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [blob["digest"] for blob in blobs]},
            "history": [{"created_by": "tests.cluster.images"} for _ in blobs],  # buildah counts them on top of a base
        }
        config_blob = add(io.BytesIO(json.dumps(described).encode()), "config.v1+json")
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA_TYPE}manifest.v1+json",
            "config": config_blob,
            "layers": blobs,
        }
        entry = add(io.BytesIO(json.dumps(manifest).encode()), "manifest.v1+json")
        entry["platform"] = {"architecture": "amd64", "os": "linux"}
        entry["annotations"] = {
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
        }
        for name, content in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", {"schemaVersion": 2, "manifests": [entry]}),
        ):
            text = json.dumps(content).encode()
            _add_file(archive, name, io.BytesIO(text), len(text))
    return path


def _layer_tar(layer: Layer, scratch: Path) -> _Stream:
    """An open, rewound tar of the layer, without times and owners so that its digest depends on the files alone."""
    stream = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - the caller closes it

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = "root"
        return info

    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for place, source in layer.items():
            if isinstance(source, bytes):
                info = tarfile.TarInfo(place)
                info.mode, info.size = 0o755, len(source)
                tar.addfile(plain(info), io.BytesIO(source))
            elif isinstance(source, Link):
                info = tarfile.TarInfo(place)
                info.type, info.linkname = tarfile.SYMTYPE, source.target
                tar.addfile(plain(info))
            elif source.is_dir():
                for child in sorted(source.iterdir()):
                    tar.add(child, f"{place}/{child.name}".lstrip("/"), filter=plain)
            else:
                tar.add(source.resolve(), place, filter=plain)
    stream.seek(0)
    return stream


def _add_file(archive: tarfile.TarFile, name: str, stream: _Stream, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    archive.addfile(info, stream)


def pause() -> Image:
    """What holds a pod's namespaces: it has only to sleep."""
    return image(
        "localhost/pause:1",
        {"busybox": part("busybox-root") / "bin/busybox"},
        entrypoint=("/busybox", "sleep", "2147483647"),
    )


def base() -> Image:
    """A shell with its usual tools, iptables and nft."""
    return image("localhost/base:1", *_base_layers())


def spire() -> Image:
    """SPIRE's server and agent, the controller manager, the CSI driver and its registrar."""
    controller_manager = part("spire-controller-manager") / "spire-controller-manager"
    programs = (*part("spire").iterdir(), controller_manager, part("spiffe-csi-driver"), part("registrar"))
    return image("localhost/spire:1", *_base_layers(), {f"opt/{path.name}": path for path in programs})


def coredns() -> Image:
    """The cluster's DNS server."""
    return image("localhost/coredns:1", {"coredns": part("coredns")}, entrypoint=("/coredns",))


def collector() -> Image:
    """An OpenTelemetry Collector, with a shell to read what it wrote."""
    return image("localhost/otelcol:1", *_base_layers(), {"opt/otelcol": part("otelcol")}, entrypoint=("/opt/otelcol",))


def opa() -> Image:
    """Nothing but /opa: the product's Dockerfile copies it (build argument OPA_IMAGE)."""
    return image("localhost/opa:1.22.2", {"opa": part("opa")}, entrypoint=("/opa",))


def compiler() -> Image:
    """GCC with a static C library (build argument COMPILER_IMAGE)."""
    root = part("gcc-root")
    return image("localhost/gcc:1", {"": root}, _machine_files(root))


def python(reference: str = "localhost/python:3.11", *requirements: str, layers: Sequence[Layer] = ()) -> Image:
    """Python 3.11 with pip, nft and iptables (build argument PYTHON_IMAGE), *requirements* from PyPI and *layers*."""
    root = part("python-root")
    pip = made(PipPackages(requirements=(_PIP,)), "pip")
    own: dict[str, Path | bytes | Link] = {
        **_machine_files(root),
        "usr/lib/python3.11/.wh.EXTERNALLY-MANAGED": b"",  # a whiteout: pip may install here
        "usr/lib/python3/dist-packages": pip,
        "usr/local/bin/pip": b'#!/bin/sh\nexec /usr/bin/python3 -m pip "$@"\n',
        "usr/local/bin/python": Link("/usr/bin/python3"),
    }
    if requirements:
        own["opt/packages"] = made(
            PipPackages(requirements=requirements), reference.rpartition("/")[2].partition(":")[0]
        )
    return image(reference, {"": root}, own, *layers, environment=("PYTHONPATH=/opt/packages",) if requirements else ())


def node(reference: str, package: str, *, layers: Sequence[Layer] = ()) -> Image:
    """Node with the npm packages of the part *package* in /opt/node_modules."""
    root = part("node-root")
    own: Layer = {**_machine_files(root), "usr/local/bin/node": part("node"), "opt": part(package)}
    return image(reference, {"": root}, own, *layers)


def kubernetes_mcp_server() -> Image:
    """A Kubernetes MCP server as its users run it: one Go program, shipped by npm."""
    program = next(part("kubernetes-mcp-server").glob("node_modules/kubernetes-mcp-server-linux-amd64/bin/*"))
    return image("localhost/kubernetes-mcp-server:1", *_base_layers(), {"opt/kubernetes-mcp-server": program})


def _base_layers() -> tuple[Layer, ...]:
    root = part("busybox-root")
    applets = run(root / "bin/busybox", "--list").split()
    return (
        {f"bin/{applet}": Link("busybox") for applet in applets if applet != "busybox"},
        {"": root},
        _machine_files(root),
    )


def _machine_files(root: Path) -> Layer:
    """What Debian's installation scripts would have made in *root*."""
    names = [f"{family}{verb}" for family in ("iptables", "ip6tables") for verb in ("", "-save", "-restore")]
    links = {
        f"usr/sbin/{name}": Link("xtables-nft-multi")
        for name in names
        if (root / "usr/sbin/xtables-nft-multi").exists()
    }
    authorities = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    return {
        **links,
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
        "etc/nsswitch.conf": b"hosts: files dns\n",
        **({_CA_FILE: b"".join(path.read_bytes() for path in authorities)} if authorities else {}),
    }


def build(
    dockerfile: Path, context: Path, *, tag: str, target: str = "", arguments: Mapping[str, str | Image] | None = None
) -> Image:
    """The image of a Dockerfile's *target*; an argument that is an Image names a local base for a FROM line.

    RUN steps reach PyPI with this machine's pip settings, which are mounted while building and are not in the image.
    One build at a time: what a build leaves in the store is removed after it.
    """
    archives = cache_dir() / "images"
    archives.mkdir(parents=True, exist_ok=True)
    store = _Store()
    with locked(store.path / "lock"), tempfile.TemporaryDirectory(dir=archives) as scratch:
        options = [f"--target={target}"] if target else []
        for name, value in (arguments or {}).items():
            options.append(f"--build-arg={name}={store.name_of(value) if isinstance(value, Image) else value}")
        options += [f"--volume={file}:{place}:ro" for place, file in _pip_settings(Path(scratch)).items()]
        options += ["--isolation=chroot", f"--signature-policy={store.policy}"]
        store.buildah("bud", *options, f"--tag={tag}", "--file", dockerfile, context)
        identity = store.buildah("images", "--quiet", "--no-trunc", tag).strip().removeprefix("sha256:")[:12]
        archive = archives / f"{tag.rpartition('/')[2].replace(':', '-')}-{identity}.tar"
        if not archive.exists():
            written = Path(scratch, "image.tar")
            push = ("push", "--quiet", f"--signature-policy={store.policy}", tag)
            store.buildah(*push, f"docker-archive:{written}:{tag}")
            written.rename(archive)
        _keep(archive)
        store.buildah("rm", "--all")
        store.buildah("rmi", "--prune")
    return Image(reference=tag, archive=archive)


class _Store:
    """Where buildah keeps base images, apart from any store of this machine's own."""

    def __init__(self) -> None:
        self.path = cache_dir() / "buildah"
        self.path.mkdir(parents=True, exist_ok=True)
        self.policy = self.path / "policy.json"
        self.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def buildah(self, *arguments: str | Path) -> str:
        storage = ("--storage-driver=vfs", f"--root={self.path}/root", f"--runroot={self.path}/run")
        return run(part("buildah"), *storage, *arguments)

    def name_of(self, base: Image) -> str:
        """The name of a base in this store, brought in first when it is not there."""
        name = f"localhost/{base.archive.stem}"  # the stem carries a key, so a changed base is another name
        if name not in self.buildah("images", "--format", "{{.Name}}").split():
            pull = ("pull", "--quiet", f"--signature-policy={self.policy}", f"oci-archive:{base.archive}")
            self.buildah("tag", self.buildah(*pull).split()[-1], name)
        return name


def _pip_settings(scratch: Path) -> dict[str, Path]:
    """What to mount where, so that pip in a build finds the same index and trusts the same authorities as pip here."""
    mounts = {}
    lines = ["[global]"]
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        setting, text = name.rpartition(".")[2], value.strip("'\"")
        if setting in {"index-url", "extra-index-url", "trusted-host", "default-timeout", "timeout"}:
            lines.append(f"{setting} = {text}")
        elif setting == "cert":
            lines.append(f"cert = /{_CA_FILE}")
            mounts[f"/{_CA_FILE}"] = Path(text)
    mounts["/etc/pip.conf"] = scratch / "pip.conf"
    mounts["/etc/pip.conf"].write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return mounts
