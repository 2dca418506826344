"""sidecar/core/bundle.py: what a bundle may hold, who may have signed it, and that OPA's own tools agree."""

import functools
import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sidecar.core import bundle, profile
from sidecar.core.bundle import Limits, Stamp
from sidecar.core.keyring import TYPE, announce, key_id, sign
from sidecar.errors import BundleError
from tests.parts import part
from tests.sidecar.questions import SERVER

KEY = ec.derive_private_key(1234567, ec.SECP256R1())
PUBLIC = KEY.public_key()
OTHER = ec.derive_private_key(7654321, ec.SECP256R1())
FILES: Mapping[str, bytes] = {
    "sidegate.json": profile.encode(profile.Profile(server=SERVER, policies=(profile.PolicySet(cedar=True),))),
    "cedar/a.cedar": b"permit (principal, action, resource);",
    "cedar/schema.cedarschema": b"entity User;",
    "policy/deep/a.rego": b"package mcp.authz\n",
    "data.json": b'{"b": 1.50, "a": [1e3, -0, 12345678901234567890, "\\u2028\\u00e9<\\b\\u0001"]}',
}


def pem(key: Any) -> str:
    """Return the public key of *key* as PEM."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, form).decode())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return *key* as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def archive(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    """Return a gzipped tar of *members* exactly as given."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    """Return what is in a bundle, signatures included."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def repacked(change: Callable[[dict[str, bytes]], Any]) -> bytes:
    """Return a good bundle whose members *change* was let loose on, the signature kept."""
    content = members(bundle.encode(FILES, KEY))
    change(content)
    return archive(*content.items())


def signed(payload: Any, key: Any = KEY) -> bytes:
    """Return a .signatures.json over *payload*."""
    return json.dumps({"signatures": [jwt.PyJWS().encode(json.dumps(payload).encode(), key, "ES256")]}).encode()


def test_a_bundle_is_read_as_it_was_written() -> None:
    """decode(encode(files)) holds the same files, their revision and the profile."""
    read = bundle.decode(bundle.encode(FILES, KEY), [PUBLIC])

    assert dict(FILES) == read.files
    assert bundle.revision(FILES) == read.revision
    assert read.profile.server == SERVER
    assert read.cedar() == {"cedar/a.cedar": "permit (principal, action, resource);"}


def test_policies_are_texts() -> None:
    """Signed or not, what is not UTF-8 is no policy."""
    read = bundle.decode(bundle.encode({**FILES, "cedar/a.cedar": b"\xff"}, KEY), [PUBLIC])

    with pytest.raises(BundleError, match=r"cedar/a\.cedar: not UTF-8"):
        read.cedar()


@given(st.permutations(list(FILES)))
def test_the_bytes_do_not_depend_on_the_order_of_files(order: list[str]) -> None:
    """The same content makes the same bytes, signature included."""
    assert expected_bytes() == bundle.encode({name: FILES[name] for name in order}, KEY)


@functools.cache
def expected_bytes() -> bytes:
    """Return the bundle of FILES."""
    return bundle.encode(FILES, KEY)


STAMP = Stamp(term=7, sequence=2**53)


def test_stamp_says_which_bundle_is_newer_and_is_no_content() -> None:
    """The same content keeps its revision, whenever and by whomever it was signed."""
    stamped = bundle.encode(FILES, KEY, stamp=STAMP)
    read, plain = bundle.decode(stamped, [PUBLIC]), bundle.decode(bundle.encode(FILES, KEY), [PUBLIC])

    assert read.stamp == STAMP
    assert read.keyring.term == 7
    assert plain.stamp == Stamp()
    assert read.revision == plain.revision
    assert Stamp(term=1, sequence=9) < Stamp(term=2, sequence=1) < Stamp(term=2, sequence=2)


def test_bundle_is_signed_again_with_another_stamp() -> None:
    """By another key, with the same content; what policy.wasm offers stays."""
    files = {**FILES, "policy.wasm": b"w"}
    files["sidegate.json"] = profile.encode(
        profile.Profile(server=SERVER, policies=(profile.PolicySet(cedar=True, rego=True),))
    )
    first = bundle.encode(files, KEY, entrypoints=(bundle.ALLOW, bundle.REASONS))
    again = bundle.renew(first, OTHER, STAMP)

    assert again == bundle.encode(files, OTHER, entrypoints=(bundle.ALLOW, bundle.REASONS), stamp=STAMP)
    assert bundle.decode(again, [OTHER.public_key()]).files == files


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@given(JSON_VALUES, st.booleans(), st.booleans(), st.sampled_from([None, (",", ":")]))
@example("".join(map(chr, range(0x2030))), False, True, (",", ":"))
def test_data_that_is_taken_for_canonical_is(value: Any, is_ascii: bool, is_sorted: bool, separators: Any) -> None:
    """What saves the time to hash megabytes must never hash anything else than OPA does."""
    data = json.dumps(value, ensure_ascii=is_ascii, sort_keys=is_sorted, separators=separators).encode()
    assume(bundle._is_canonical(data))

    assert bundle._canonical(bundle._json("data.json", data)).encode() == data


def test_announced_key_signs_the_bundle_that_announces_it() -> None:
    """Who was away while keys changed verifies the next bundle all the same."""
    told = Stamp(term=3, sequence=1, announcements=(announce([OTHER.public_key()], 3, KEY),))
    read = bundle.decode(bundle.encode(FILES, OTHER, stamp=told), [PUBLIC])

    assert str(read.keyring) == key_id(OTHER.public_key())
    assert read.stamp.announcements == told.announcements
    with pytest.raises(BundleError, match="not signed by a key that is trusted here"):
        bundle.decode(bundle.encode(FILES, KEY, stamp=told), [PUBLIC])  # its own announcement took the key away


def test_announcement_is_no_signature_of_a_bundle() -> None:
    """What is signed for one purpose does not serve another."""
    payload = json.dumps({"files": []}).encode()
    token = json.dumps({"signatures": [sign(payload, KEY, typ=TYPE)]}).encode()

    with pytest.raises(BundleError, match="not signed by a key"):
        bundle.decode(repacked(lambda held: held.update({"/.signatures.json": token})), [PUBLIC])


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ({"term": -1, "sequence": 1, "announcements": []}, "whole numbers"),
        ({"term": 1, "sequence": 1.5, "announcements": []}, "whole numbers"),
        ({"term": 1, "sequence": 2**53 + 1, "announcements": []}, "whole numbers"),
        ({"term": 1, "sequence": 10**4000, "announcements": []}, "whole numbers"),
        ({"term": 1, "announcements": []}, "expected term, sequence and announcements"),
        ({"term": "1", "sequence": 1, "announcements": []}, "expected term, sequence and announcements"),
        ({"term": 1, "sequence": 1, "announcements": ["x"] * 17}, "at most 16 texts"),
        ({"term": 1, "sequence": 1, "announcements": [1]}, "at most 16 texts"),
        ([], "expected term, sequence and announcements"),
    ],
)
def test_stamp_that_cannot_be_read_is_refused(ours: Any, why: str) -> None:
    """To take it for none would let an older bundle pass."""
    manifest = json.dumps({"revision": "r", "metadata": {"sidegate": ours}}).encode()

    with pytest.raises(BundleError, match=why):
        bundle.decode(repacked(lambda held: held.update({"/.manifest": manifest})), [PUBLIC])


def test_foreign_metadata_says_nothing() -> None:
    """OPA leaves the member to its users; theirs is not ours."""
    manifest = {"revision": "r", "metadata": {"team": "payments"}}

    def sign_again(held: dict[str, bytes]) -> None:
        held["/.manifest"] = json.dumps(manifest).encode()
        names = {name.removeprefix("/"): content for name, content in held.items() if name != "/.signatures.json"}
        entries = [
            {"name": name, "algorithm": "SHA-256", "hash": bundle.hash_of(name, content)}
            for name, content in names.items()
        ]
        held["/.signatures.json"] = signed({"files": entries})

    assert bundle.decode(repacked(sign_again), [PUBLIC]).stamp == Stamp()


def test_another_content_has_another_revision() -> None:
    """Moving bytes from one file to the next, or renaming one, is another revision."""
    revisions = {
        bundle.revision({"data.json": b"ab", "x.rego": b"c"}),
        bundle.revision({"data.json": b"a", "x.rego": b"bc"}),
        bundle.revision({"data.json": b"ab", "y.rego": b"c"}),
    }

    assert len(revisions) == 3


def test_any_of_the_trusted_keys_may_have_signed() -> None:
    """Keys overlap while they are rotated."""
    assert bundle.decode(bundle.encode(FILES, KEY), [OTHER.public_key(), PUBLIC])


def test_another_key_is_refused() -> None:
    """A signature by a key that is not trusted proves nothing."""
    with pytest.raises(BundleError, match="not signed by a key that is trusted here"):
        bundle.decode(bundle.encode(FILES, OTHER), [PUBLIC])


def test_no_key_trusts_nothing() -> None:
    """Without keys every bundle is refused."""
    with pytest.raises(BundleError, match="not signed by a key that is trusted here"):
        bundle.decode(bundle.encode(FILES, KEY), [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda files: files.pop("/.signatures.json"), r"\.signatures\.json: missing"),
        (lambda files: files.update({"/cedar/a.cedar": b"permit (principal, action, resource) "}), "cedar/a.cedar: is not what was signed"),
        (lambda files: files.update({"/data.json": b'{"b": 1.5}'}), "data.json: is not what was signed"),
        (lambda files: files.update({"/data.json": b"{"}), "data.json: not JSON"),
        (lambda files: files.update({"/data.json": b'"\\ud800"'}), "data.json: not JSON in UTF-8"),
        (lambda files: files.update({"/z.rego": b""}), "z.rego: not covered by the signature"),
        (lambda files: files.pop("/policy/deep/a.rego"), "policy/deep/a.rego: signed, but missing"),
        (lambda files: files.update({"data.json": b"{}"}), "data.json: given twice"),
        (lambda files: files.update({"../data.json": b"{}"}), "not a path inside the bundle"),
        (lambda files: files.update({"cedar/../../x.rego": b"{}"}), "not a path inside the bundle"),
        (lambda files: files.update({"//etc/x.rego": b"{}"}), "not a path inside the bundle"),
        (lambda files: files.update({"a\nb.rego": b"{}"}), "not a path inside the bundle"),
        (lambda files: files.update({"notes.txt": b""}), "notes.txt: no such file in a bundle"),
        (lambda files: files.update({"/.signatures.json": b"{}"}), "exactly one JWT"),
        (lambda files: files.update({"/.signatures.json": b'{"signatures": ["a", "b"]}'}), "exactly one JWT"),
        (lambda files: files.update({"/.signatures.json": b"["}), r"\.signatures\.json: not JSON"),
        (lambda files: files.update({"/.signatures.json": signed({})}), "the JWT lists no files"),
        (lambda files: files.update({"/.signatures.json": signed({"files": [{"name": "a"}]})}), "an entry needs a name"),
        (
            lambda files: files.update(
                {"/.signatures.json": signed({"files": [{"name": "data.json", "algorithm": "MD5", "hash": "00"}] * 2})}
            ),
            "an entry needs a name of its own",
        ),
        (
            lambda files: files.update(
                {"/.signatures.json": signed({"files": [{"name": n[1:], "algorithm": "MD5", "hash": ""} for n in files]})}
            ),
            "is not what was signed",
        ),
    ],
)  # fmt: skip
def test_a_changed_bundle_is_refused(change: Callable[[dict[str, bytes]], Any], reason: str) -> None:
    """Whatever was changed after signing is refused, and the reason names the file."""
    with pytest.raises(BundleError, match=reason):
        bundle.decode(repacked(change), [PUBLIC])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_what_is_no_plain_file_is_refused(kind: bytes) -> None:
    """Links and devices have no business in a bundle."""
    member = tarfile.TarInfo("data.json")
    member.type, member.linkname = kind, "/etc/passwd"

    with pytest.raises(BundleError, match=r"data\.json: only plain files"):
        bundle.decode(archive((member, b"")), [PUBLIC])


def test_directories_are_passed_over() -> None:
    """A bundle that `tar` made of a directory has entries for directories and names with ./ in front."""
    folder = tarfile.TarInfo("./cedar")
    folder.type = tarfile.DIRTYPE
    content = members(bundle.encode(FILES, KEY))
    packed = archive((folder, b""), *((f".{name}", data) for name, data in content.items()))

    assert dict(FILES) == bundle.decode(packed, [PUBLIC]).files


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(packed_bytes=100), "larger than 100 bytes"),
        (Limits(total_bytes=1000), "unpacks to more than 1000 bytes"),
        (Limits(file_bytes=40), "larger than 40 bytes"),
        (Limits(files=2), "more than 2 files"),
    ],
)
def test_a_bundle_that_costs_too_much_is_refused(limits: Limits, reason: str) -> None:
    """Sizes are bounded before anything is believed."""
    with pytest.raises(BundleError, match=reason):
        bundle.decode(bundle.encode(FILES, KEY), [PUBLIC], limits)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"no gzip", "not gzip"),
        (expected_bytes()[:-9], "truncated"),
        (expected_bytes() + b"x", "data after its end"),
        (gzip.compress(b"x" * 600), "not a tar archive"),
        (gzip.compress(b""), "not a tar archive"),
    ],
)
def test_what_is_no_archive_is_refused(data: bytes, reason: str) -> None:
    """Truncated and foreign bytes are refused."""
    with pytest.raises(BundleError, match=reason):
        bundle.decode(data, [PUBLIC])


def test_a_manifest_without_revision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision must be able to say which bundle made it."""
    monkeypatch.setattr(bundle, "revision", lambda _: "")

    with pytest.raises(BundleError, match=r"\.manifest: revision is missing"):
        bundle.decode(bundle.encode(FILES, KEY), [PUBLIC])


def test_a_bundle_without_profile_is_refused() -> None:
    """A bundle of OPA's own tools is not enough: the sidecar must know whom to let in."""
    with pytest.raises(BundleError, match=r"sidegate\.json: missing"):
        bundle.decode(bundle.encode({"a.rego": b""}, KEY), [PUBLIC])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cedar/a.cedar": None}, "policies: cedar of the root is announced: True, there: False"),
        ({"sets/cluster/x/cedar/a.cedar": b""}, "policies: cedar of sets/cluster/x/ is announced: False, there: True"),
        ({"sets/namespace/x/policy.wasm": b""}, "policies: rego of sets/namespace/x/ is announced: False, there: True"),
        ({"sets/elsewhere/x/policy.wasm": b""}, "no such file in a bundle"),
        ({"sets/cluster/x/sidegate.json": b""}, "no such file in a bundle"),
        ({"policy.wasm": b"\0asm"}, "policies: rego of the root is announced: False, there: True"),
    ],
)
def test_a_policy_that_is_not_announced_is_refused(changes: dict[str, bytes | None], reason: str) -> None:
    """A policy that is carried but not enforced, or enforced but missing, would go unnoticed."""
    files = {name: data for name, data in {**FILES, **changes}.items() if data is not None}

    with pytest.raises(BundleError, match=reason):
        bundle.decode(bundle.encode(files, KEY), [PUBLIC])


def test_a_name_that_no_bundle_may_hold_is_not_written() -> None:
    """The writer refuses what the reader would."""
    with pytest.raises(BundleError, match="no such file in a bundle"):
        bundle.encode({"cedar/deep/a.cedar": b""}, KEY)


@given(st.data())
def test_reading_is_total(data: st.DataObject) -> None:
    """Any bytes are a bundle or refused with BundleError; a changed one is refused."""
    good = expected_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    mutated = good[:at] + data.draw(st.binary(max_size=4)) + good[at + 1 :]

    if mutated != good:
        try:
            read = bundle.decode(mutated, [PUBLIC])
        except BundleError:
            return
        assert dict(FILES) == read.files  # gzip's header holds bytes that mean nothing


@given(st.data())
def test_reading_the_archive_is_total(data: st.DataObject) -> None:
    """The same of the tar inside, where gzip's checksum does not help."""
    good = gzip.decompress(expected_bytes())
    at = data.draw(st.integers(0, len(good) - 1))
    mutated = good[:at] + data.draw(st.binary(min_size=1, max_size=600)) + good[at + 1 :]

    try:
        read = bundle.decode(gzip.compress(mutated), [PUBLIC])
    except BundleError:
        return
    assert dict(FILES) == read.files  # a header's owner, mode or time means nothing


@given(st.binary(max_size=300))
def test_reading_headers_is_total(block: bytes) -> None:
    """A tar header of arbitrary bytes with a right checksum does not get through either."""
    header = bytearray(block.ljust(512, b"\0")[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)

    with pytest.raises(BundleError):
        bundle.decode(gzip.compress(bytes(header) + bytes(1024)), [PUBLIC])


def test_several_keys_are_read_from_one_text() -> None:
    """Keys stand one after the other."""
    assert len(bundle.public_keys(pem(KEY) + "\n" + pem(OTHER))) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no PEM block"),
        (pem(rsa.generate_private_key(65537, 2048)), "only P-256"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "only P-256"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "not a public key in PEM"),
    ],
)
def test_what_is_no_key_is_refused(text: str, reason: str) -> None:
    """Only P-256 keys sign bundles."""
    with pytest.raises(BundleError, match=reason):
        bundle.public_keys(text)


def opa(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the real opa."""
    return subprocess.run([part("opa"), *arguments], cwd=directory, capture_output=True, text=True, check=False)  # noqa: S603 - the tests' own


def test_opa_accepts_our_bundle(tmp_path: Path) -> None:
    """OPA's own verification agrees with the signature and every hash."""
    (tmp_path / "bundle.tar.gz").write_bytes(bundle.encode(FILES, KEY))
    (tmp_path / "key.pem").write_text(pem(KEY))
    (tmp_path / "other.pem").write_text(pem(OTHER))
    build = ("build", "--bundle", "bundle.tar.gz", "--signing-alg=ES256", "--output=out.tar.gz")

    accepted = opa(tmp_path, *build, "--verification-key=key.pem")
    refused = opa(tmp_path, *build, "--verification-key=other.pem")

    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert "failed to verify JWT signature" in refused.stdout


def test_we_accept_a_bundle_that_opa_signed(tmp_path: Path) -> None:
    """The signature of `opa sign` over the same files verifies here: both hash alike."""
    manifest = {"revision": "by-hand", "roots": [""], "rego_version": 1}
    files = {**FILES, ".manifest": json.dumps(manifest, indent=4).encode()}
    for name, data in files.items():
        path = tmp_path / "content" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "key.pem").write_bytes(private_pem(KEY))

    sign = ("sign", f"--signing-key={tmp_path / 'key.pem'}", "--signing-alg=ES256", f"--output-file-path={tmp_path}")
    done = opa(tmp_path / "content", *sign, "--bundle", ".")
    assert done.stderr == ""
    signatures = (tmp_path / ".signatures.json").read_bytes()

    read = bundle.decode(archive(*files.items(), (".signatures.json", signatures)), [PUBLIC])
    assert read.revision == "by-hand"
