"""Writes and reads a policy bundle: OPA's format, signed, the same bytes for the same content.

Refuses a bundle whose signature, file list, names or sizes do not hold; one byte of doubt refuses it whole, and the
last good one stays. Decides nothing about policies. What OPA's format leaves to its users (`metadata` of the manifest)
says which of two bundles is the newer, and which keys sign the next ones.
Source: OPA documentation, "Bundles" and "Bundle signature".
"""

import base64
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.core import profile as profiles
from sidecar.core.keyring import MAX_ANNOUNCEMENTS, MAX_TERM, TYPE, Keyring, public_keys, sign
from sidecar.errors import BundleError

MANIFEST: Final = ".manifest"
SIGNATURES: Final = ".signatures.json"
DATA: Final = "data.json"
PROFILE: Final = "sidegate.json"
WASM: Final = "policy.wasm"
SCHEMA: Final = "cedar/schema.cedarschema"
CEDAR: Final = re.compile(r"cedar/[^/]+\.cedar")
_CEDAR_FILE: Final = re.compile(r"cedar/[^/]+\.cedar\Z")
SET: Final = re.compile(r"sets/(?:namespace|cluster)/[a-z0-9.-]{1,253}/")
REGO: Final = re.compile(r"(?:[^/]+/)*[^/]+\.rego")
ALLOW: Final = "mcp/authz/allow"
REASONS: Final = "mcp/authz/reasons"

METADATA: Final = "sidegate"  # the member of the manifest's metadata that is ours
__all__ = ["Bundle", "Limits", "Stamp", "decode", "encode", "foreign", "hash_of", "public_keys", "renew", "revision"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a bundle may cost before it is believed; a policy.wasm of 50 rules has 0.2 MiB, its data rarely 10."""

    packed_bytes: int = 16 * 2**20
    total_bytes: int = 64 * 2**20
    file_bytes: int = 32 * 2**20
    files: int = 1024


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Stamp:
    """Which of two bundles is the newer: the later *term* of signing keys, then the higher *sequence*.

    *sequence* is what the control plane had seen of the cluster when it made the bundle (webhook/core/sequence.py).
    """

    term: int = 0
    sequence: int = 0
    announcements: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle: *files* without manifest and signatures, by their path from the bundle's root.

    *keyring* is believed from now on, if this bundle is.
    """

    revision: str
    files: Mapping[str, bytes]
    profile: profiles.Profile
    stamp: Stamp = Stamp()
    keyring: Keyring = Keyring(keys=())

    def cedar(self, path: str = "") -> dict[str, str]:
        """Return the Cedar policies of the set at *path* by file name; raises BundleError for what is not UTF-8."""
        names = (name for name in self.files if name.startswith(path) and CEDAR.fullmatch(name[len(path) :]))
        return {name[len(path) :]: _text(name, self.files[name]) for name in names}


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{name}: not UTF-8: {error}") from error


def revision(files: Mapping[str, bytes]) -> str:
    """Return the name of this content: 16 hexadecimal digits of a hash over every name and content."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def encode(
    files: Mapping[str, bytes],
    key: ec.EllipticCurvePrivateKey,
    *,
    entrypoints: Sequence[str] = (ALLOW,),
    stamp: Stamp = Stamp(),
    hashes: Mapping[str, str] | None = None,
) -> bytes:
    """Return the bundle of *files*, signed with *key*; order of *files* and time do not matter.

    *entrypoints* are those of policy.wasm, *hashes* what `hash_of` says of files, as far as it was asked. Every replica
    of the control plane makes the same bytes for the same *stamp*, and the same revision for any. Raises BundleError for
    a name that no bundle may hold.
    """
    for name in files:
        _check_name(name)
    wasm = [{"entrypoint": entrypoint, "module": "/" + WASM} for entrypoint in entrypoints] if WASM in files else []
    manifest = {"revision": revision(files), "roots": [""], "rego_version": 1, "wasm": wasm}
    return _sealed(files, manifest, key, stamp, hashes or {})


def renew(data: bytes, key: ec.EllipticCurvePrivateKey, stamp: Stamp) -> bytes:
    """Return the bundle *data*, which we made ourselves, with another *stamp* and a signature by *key*."""
    files = dict(_unpack(data, Limits()))
    manifest = json.loads(files.pop(MANIFEST))
    _, payload, _ = json.loads(files.pop(SIGNATURES))["signatures"][0].split(".")
    signed = json.loads(base64.urlsafe_b64decode(payload + "=="))["files"]
    known = {each["name"]: each["hash"] for each in signed if each["name"] != MANIFEST}
    return _sealed(files, manifest, key, stamp, known)


def _sealed(
    files: Mapping[str, bytes],
    manifest: dict[str, Any],
    key: ec.EllipticCurvePrivateKey,
    stamp: Stamp,
    known: Mapping[str, str],
) -> bytes:
    if stamp != Stamp() or stamp.announcements:
        ours = {"term": stamp.term, "sequence": stamp.sequence, "announcements": stamp.announcements}
        manifest = {**manifest, "metadata": {METADATA: ours}}
    signed = {**files, MANIFEST: json.dumps(manifest, sort_keys=True).encode()}
    hashed = [
        {"name": name, "hash": known.get(name) or hash_of(name, signed[name]), "algorithm": "SHA-256"}
        for name in sorted(signed)
    ]
    token = sign(json.dumps({"files": hashed}, sort_keys=True).encode(), key)
    return _pack({**signed, SIGNATURES: json.dumps({"signatures": [token]}).encode()})


def decode(data: bytes, keys: Sequence[ec.EllipticCurvePublicKey] | Keyring, limits: Limits = Limits()) -> Bundle:
    """Return the bundle in *data* when one of *keys* signed it, or one that these announced.

    Raises BundleError naming the file or field.
    """
    files = dict(_unpack(data, limits))
    manifest = _json(MANIFEST, files.get(MANIFEST, b"{}"))
    if not isinstance(manifest, dict):
        raise BundleError(f"{MANIFEST}: not an object")
    stamp = _stamp(manifest)  # not believed yet; the announcements in it prove themselves
    keyring = keys if isinstance(keys, Keyring) else Keyring(keys=tuple(keys))
    keyring = keyring.follow(stamp.announcements)
    _verify(files, keyring)
    keyring = replace(keyring, term=max(keyring.term, stamp.term))
    files.pop(MANIFEST, None)
    if not isinstance(manifest.get("revision"), str) or not manifest["revision"]:
        raise BundleError(f"{MANIFEST}: revision is missing")
    if PROFILE not in files:
        raise BundleError(f"{PROFILE}: missing")
    profile = profiles.decode(files[PROFILE])
    _check_announced(profile, files)
    return Bundle(revision=manifest["revision"], files=files, profile=profile, stamp=stamp, keyring=keyring)


def _stamp(manifest: Mapping[str, Any]) -> Stamp:
    """Return what the manifest says of the bundle's place among others; that of a foreign bundle says nothing."""
    match manifest.get("metadata"):
        case {"sidegate": {"term": _Number() as term, "sequence": _Number() as sequence, "announcements": [*tokens]}}:
            pass
        case {"sidegate": _}:
            raise BundleError(f"{MANIFEST}: metadata.{METADATA}: expected term, sequence and announcements")
        case _:
            return Stamp()
    if not (_is_count(term) and _is_count(sequence)):
        raise BundleError(f"{MANIFEST}: metadata.{METADATA}: term and sequence must be whole numbers up to {MAX_TERM}")
    if len(tokens) > MAX_ANNOUNCEMENTS or not all(type(token) is str for token in tokens):
        raise BundleError(f"{MANIFEST}: metadata.{METADATA}: announcements: at most {MAX_ANNOUNCEMENTS} texts")
    return Stamp(term=int(term), sequence=int(sequence), announcements=tuple(tokens))


def _is_count(number: str) -> bool:
    return number.isdecimal() and len(number) <= len(str(MAX_TERM)) and int(number) <= MAX_TERM


def foreign(data: bytes, keyring: Keyring, limits: Limits = Limits()) -> dict[str, bytes]:
    """Return the Rego modules, data and manifest of a bundle that is none of ours; raises BundleError."""
    files = dict(_unpack(data, limits, _check_foreign_name))
    _verify(files, keyring)
    return files


def _check_foreign_name(name: str) -> None:
    _check_path(name)
    if not (REGO.fullmatch(name) or name.rpartition("/")[2] == DATA):
        raise BundleError(f"{name}: only *.rego and {DATA} are taken from an external bundle")


def _check_announced(profile: profiles.Profile, files: Mapping[str, bytes]) -> None:
    """Refuse a policy that is there but not announced: it would not be enforced, and nobody would notice."""
    present = {(name[: -len(WASM)], "rego") for name in files if name == WASM or name.endswith("/" + WASM)}
    present |= {(name[: found.start()], "cedar") for name in files if (found := _CEDAR_FILE.search(name))}
    announced = [(each.path, kind) for each in profile.policies for kind in ("rego", "cedar") if getattr(each, kind)]
    if len(announced) != len(set(announced)):
        raise BundleError(f"{PROFILE}: policies: two sets have the same path")
    for path, kind in sorted(present ^ set(announced)):
        is_there = (path, kind) in present
        raise BundleError(
            f"{PROFILE}: policies: {kind} of {path or 'the root'} is announced: {not is_there}, there: {is_there}"
        )


def _pack(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    # GzipFile, not gzip.compress: the latter's header differs between Python versions.
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,  # as USTAR, where names fit
    ):
        for name in sorted(files):
            member = tarfile.TarInfo("/" + name)  # as OPA writes them
            member.size, member.mode = len(files[name]), 0o644
            archive.addfile(member, io.BytesIO(files[name]))
    return packed.getvalue()


def _unpack(data: bytes, limits: Limits, check: Callable[[str], None] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file, never more than *limits* allow, with names that pass *check*."""
    archive = _inflate(data, limits)
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            for member in members:
                if member.isdir():
                    continue
                name = _member_name(member, limits, check or _check_name)
                if name in seen:
                    raise BundleError(f"{name}: given twice")
                seen.add(name)
                if len(seen) > limits.files:
                    raise BundleError(f"bundle: more than {limits.files} files")
                content = members.extractfile(member)
                yield name, b"" if content is None else content.read()
    # What tarfile raises on odd headers; RecursionError: a chain of extension headers.
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, OSError) as error:
        raise BundleError(f"bundle: not a tar archive: {error}") from error


def _inflate(data: bytes, limits: Limits) -> bytes:
    if len(data) > limits.packed_bytes:
        raise BundleError(f"bundle: larger than {limits.packed_bytes} bytes")
    stream = zlib.decompressobj(wbits=31)  # gzip, one member
    try:
        archive = stream.decompress(data, limits.total_bytes + 1)
    except zlib.error as error:
        raise BundleError(f"bundle: not gzip: {error}") from error
    if len(archive) > limits.total_bytes:
        raise BundleError(f"bundle: unpacks to more than {limits.total_bytes} bytes")
    if not stream.eof:
        raise BundleError("bundle: truncated")
    if stream.unused_data:
        raise BundleError("bundle: data after its end")
    return archive


def _member_name(member: tarfile.TarInfo, limits: Limits, check: Callable[[str], None]) -> str:
    """Return the member's path from the bundle's root. OPA writes `/data.json`, tar `./data.json`."""
    name = member.name.removeprefix("./").removeprefix("/")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise BundleError(f"{name}: only plain files are accepted")
    if member.size > limits.file_bytes:
        raise BundleError(f"{name}: larger than {limits.file_bytes} bytes")
    if name not in (MANIFEST, SIGNATURES):
        check(name)
    return name


def _check_path(name: str) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable():
        raise BundleError(f"{name!r}: not a path inside the bundle")


def _check_name(name: str) -> None:
    _check_path(name)
    if name == PROFILE or REGO.fullmatch(name):
        return
    within = SET.match(name)
    inner = name[within.end() :] if within else name
    if inner in (DATA, WASM, SCHEMA) or CEDAR.fullmatch(inner):
        return
    raise BundleError(
        f"{name}: no such file in a bundle; there are *.rego, {WASM}, {DATA}, cedar/*.cedar, {SCHEMA}, {PROFILE}, "
        "and all but the last also below sets/namespace/<name>/ and sets/cluster/<name>/"
    )


def _verify(files: dict[str, bytes], keyring: Keyring) -> None:
    """Check that *files* are what a key of *keyring* signed, and take the signature out of them."""
    if SIGNATURES not in files:
        raise BundleError(f"{SIGNATURES}: missing")
    signed = _signed(_json(SIGNATURES, files.pop(SIGNATURES)), keyring)
    for name in sorted(files.keys() | signed.keys()):
        if name not in signed:
            raise BundleError(f"{name}: not covered by the signature")
        if name not in files:
            raise BundleError(f"{name}: signed, but missing")
        if signed[name] != ("SHA-256", hash_of(name, files[name])):
            raise BundleError(f"{name}: is not what was signed")


def _signed(signatures: Any, keyring: Keyring) -> dict[str, tuple[str, str]]:
    """Return algorithm and hash of each signed file."""
    match signatures:
        case {"signatures": [str(token)]}:
            pass
        case _:
            raise BundleError(f"{SIGNATURES}: signatures must hold exactly one JWT")
    found = keyring.verify(token)
    if found is None or found[1] == TYPE:
        raise BundleError(f"{SIGNATURES}: not signed by a key that is trusted here ({keyring})")
    match _json(SIGNATURES, found[0]):
        case {"files": [*entries]}:
            pass
        case _:
            raise BundleError(f"{SIGNATURES}: the JWT lists no files")
    signed: dict[str, tuple[str, str]] = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "algorithm": str(algorithm), "hash": str(digest)} if name not in signed:
                signed[name] = (algorithm, digest)
            case _:
                raise BundleError(f"{SIGNATURES}: an entry needs a name of its own, algorithm and hash")
    return signed


def hash_of(name: str, data: bytes) -> str:
    """Return the hash that OPA signs: of the bytes, but of JSON's canonical form where OPA reads JSON."""
    if name.rpartition("/")[2] in (MANIFEST, DATA) and not _is_canonical(data):
        try:
            data = _canonical(_json(name, data)).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise BundleError(f"{name}: not JSON in UTF-8: {error}") from error
    return hashlib.sha256(data).hexdigest()


def _is_canonical(data: bytes) -> bool:
    """Say whether *data* is for certain in the canonical form already: a tenth of the time that it takes to make it.

    What comes out of another parser and writer, which sort and leave out what can be left out, as it went in.
    """
    if b"\xe2\x80\xa8" in data or b"\xe2\x80\xa9" in data:  # which Go writes as \\u2028 and \\u2029
        return False
    try:
        return msgspec.json.encode(msgspec.json.decode(data), order="sorted") == data
    except (ValueError, RecursionError):
        return False


class _Number(str):
    """A number as it was written: OPA hashes 1.50 and 1.5 differently."""

    __slots__ = ()


def _json(name: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_int=_Number, parse_float=_Number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: not JSON: {error}") from error


def _canonical(value: Any) -> str:
    """Return JSON with sorted keys, no white space, numbers as written and strings as Go's encoder writes them."""
    match value:
        case dict():
            return "{" + ",".join(f"{_canonical(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
        case list():
            return "[" + ",".join(map(_canonical, value)) + "]"
        case _Number():
            return str(value)
        case _:
            text = json.dumps(value, ensure_ascii=False)
            return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
