"""Writes and reads a policy bundle: OPA's format, signed, the same bytes for the same content.

Refuses a bundle whose signature, file list, names or sizes do not hold; one byte of doubt refuses it whole, and the
last good one stays. Decides nothing about policies. Source: OPA documentation, "Bundles" and "Bundle signature".
"""

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from jwt.utils import der_to_raw_signature

from sidecar.core import profile as profiles
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

ALGORITHM: Final = "ES256"
_PEM: Final = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a bundle may cost before it is believed; a policy.wasm of 50 rules has 0.2 MiB, its data rarely 10."""

    packed_bytes: int = 16 * 2**20
    total_bytes: int = 64 * 2**20
    file_bytes: int = 32 * 2**20
    files: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle: *files* without manifest and signatures, by their path from the bundle's root."""

    revision: str
    files: Mapping[str, bytes]
    profile: profiles.Profile

    def cedar(self, path: str = "") -> dict[str, str]:
        """Return the Cedar policies of the set at *path* by file name; raises BundleError for what is not UTF-8."""
        names = (name for name in self.files if name.startswith(path) and CEDAR.fullmatch(name[len(path) :]))
        return {name[len(path) :]: _text(name, self.files[name]) for name in names}


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{name}: not UTF-8: {error}") from error


def public_keys(pem: str) -> tuple[ec.EllipticCurvePublicKey, ...]:
    """Return the keys in *pem*, one block after the other; raises BundleError, also when there is none."""
    keys: list[ec.EllipticCurvePublicKey] = []
    for block in _PEM.findall(pem):
        try:
            key = serialization.load_pem_public_key(block.encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BundleError(f"bundle key: not a public key in PEM: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise BundleError("bundle key: only P-256 keys (ES256) are accepted")
        keys.append(key)
    if not keys:
        raise BundleError("bundle key: no PEM block 'PUBLIC KEY' found")
    return tuple(keys)


def revision(files: Mapping[str, bytes]) -> str:
    """Return the name of this content: 16 hexadecimal digits of a hash over every name and content."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def encode(
    files: Mapping[str, bytes], key: ec.EllipticCurvePrivateKey, *, entrypoints: Sequence[str] = (ALLOW,)
) -> bytes:
    """Return the bundle of *files*, signed with *key*; order of *files* and time do not matter.

    *entrypoints* are those of policy.wasm. Every replica of the control plane makes the same bytes, so that a sidecar
    that asks another one next time is told "not modified". Raises BundleError for a name that no bundle may hold.
    """
    for name in files:
        _check_name(name)
    wasm = [{"entrypoint": entrypoint, "module": "/" + WASM} for entrypoint in entrypoints] if WASM in files else []
    manifest = {"revision": revision(files), "roots": [""], "rego_version": 1, "wasm": wasm}
    signed = {**files, MANIFEST: json.dumps(manifest, sort_keys=True).encode()}
    hashed = [{"name": name, "hash": _hash(name, signed[name]), "algorithm": "SHA-256"} for name in sorted(signed)]
    token = _SIGNER.encode(json.dumps({"files": hashed}, sort_keys=True).encode(), key, ALGORITHM)
    return _pack({**signed, SIGNATURES: json.dumps({"signatures": [token]}).encode()})


def decode(data: bytes, keys: Sequence[ec.EllipticCurvePublicKey], limits: Limits = Limits()) -> Bundle:
    """Return the bundle in *data* when one of *keys* signed it; raises BundleError naming the file or field."""
    files = dict(_unpack(data, limits))
    _verify(files, keys)
    manifest = _json(MANIFEST, files.pop(MANIFEST, b"{}"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("revision"), str) or not manifest["revision"]:
        raise BundleError(f"{MANIFEST}: revision is missing")
    if PROFILE not in files:
        raise BundleError(f"{PROFILE}: missing")
    profile = profiles.decode(files[PROFILE])
    _check_announced(profile, files)
    return Bundle(revision=manifest["revision"], files=files, profile=profile)


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


class _Deterministic(ECAlgorithm):
    """ES256 with the nonce of RFC 6979: no randomness to get wrong, and one signature for one content."""

    def sign(self, msg: bytes, key: Any) -> bytes:
        der = key.sign(msg, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        return der_to_raw_signature(der, key.curve)


_SIGNER: Final = jwt.PyJWS(algorithms=[])
_SIGNER.register_algorithm(ALGORITHM, _Deterministic(ECAlgorithm.SHA256))


def _pack(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    # GzipFile, not gzip.compress: the latter's header differs between Python versions.
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in sorted(files):
            member = tarfile.TarInfo("/" + name)  # as OPA writes them
            member.size, member.mode = len(files[name]), 0o644
            archive.addfile(member, io.BytesIO(files[name]))
    return packed.getvalue()


def _unpack(data: bytes, limits: Limits) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file, never more than *limits* allow."""
    archive = _inflate(data, limits)
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            for member in members:
                if member.isdir():
                    continue
                name = _member_name(member, limits)
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


def _member_name(member: tarfile.TarInfo, limits: Limits) -> str:
    """Return the member's path from the bundle's root. OPA writes `/data.json`, tar `./data.json`."""
    name = member.name.removeprefix("./").removeprefix("/")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise BundleError(f"{name}: only plain files are accepted")
    if member.size > limits.file_bytes:
        raise BundleError(f"{name}: larger than {limits.file_bytes} bytes")
    if name not in (MANIFEST, SIGNATURES):
        _check_name(name)
    return name


def _check_name(name: str) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable():
        raise BundleError(f"{name!r}: not a path inside the bundle")
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


def _verify(files: dict[str, bytes], keys: Sequence[ec.EllipticCurvePublicKey]) -> None:
    """Check that *files* are what one of *keys* signed, and take the signature out of them."""
    if SIGNATURES not in files:
        raise BundleError(f"{SIGNATURES}: missing")
    signed = _signed(_json(SIGNATURES, files.pop(SIGNATURES)), keys)
    for name in sorted(files.keys() | signed.keys()):
        if name not in signed:
            raise BundleError(f"{name}: not covered by the signature")
        if name not in files:
            raise BundleError(f"{name}: signed, but missing")
        if signed[name] != ("SHA-256", _hash(name, files[name])):
            raise BundleError(f"{name}: is not what was signed")


def _signed(signatures: Any, keys: Sequence[ec.EllipticCurvePublicKey]) -> dict[str, tuple[str, str]]:
    """Return algorithm and hash of each signed file."""
    match signatures:
        case {"signatures": [str(token)]}:
            pass
        case _:
            raise BundleError(f"{SIGNATURES}: signatures must hold exactly one JWT")
    payload = None
    for key in keys:
        try:
            payload = jwt.PyJWS().decode(token, key, algorithms=[ALGORITHM])
        except jwt.PyJWTError:
            continue  # another key may fit: keys overlap while they are rotated
        break
    if payload is None:
        raise BundleError(f"{SIGNATURES}: not signed by a key that is trusted here")
    match _json(SIGNATURES, payload):
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


def _hash(name: str, data: bytes) -> str:
    """Return the hash that OPA signs: of the bytes, but of JSON's canonical form where OPA reads JSON."""
    if name.rpartition("/")[2] in (MANIFEST, DATA):
        try:
            data = _canonical(_json(name, data)).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise BundleError(f"{name}: not JSON in UTF-8: {error}") from error
    return hashlib.sha256(data).hexdigest()


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
