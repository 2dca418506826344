"""What is taken from a bundle of an external server, and what is not."""

import json
import subprocess
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.core import bundle
from sidecar.core.keyring import pem_of
from sidecar.errors import BundleError
from tests.parts import part
from tests.sidecar.core.test_bundle import archive, private_pem
from webhook.core.compile import Data
from webhook.core.external import Fetched, is_allowed, read
from webhook.core.resources import BundleSpec

KEY = ec.derive_private_key(77, ec.SECP256R1())
SPEC = BundleSpec(url="https://opa.test/b.tar.gz", keys=pem_of([KEY.public_key()]))
REGO = b"package mcp.authz\n\ndefault allow := false\n\nallow if input.tool.name in data.corp.tools\n"


def signed(files: dict[str, bytes], key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """Return a bundle of *files*, signed as OPA does."""
    entries = [{"name": n, "algorithm": "SHA-256", "hash": bundle.hash_of(n, c)} for n, c in files.items()]
    token = jwt.PyJWS().encode(json.dumps({"files": entries}).encode(), key, "ES256")
    return archive(*files.items(), (".signatures.json", json.dumps({"signatures": [token]}).encode()))


def test_bundle_that_opa_built_is_read(tmp_path: Path) -> None:
    """`opa build --signing-key`, with modules and data in directories; OPA's own tests are left out."""
    (tmp_path / "src/corp").mkdir(parents=True)
    (tmp_path / "src/rules.rego").write_bytes(REGO)
    (tmp_path / "src/rules_test.rego").write_bytes(b"package mcp.authz_test\n\ntest_x if true\n")
    (tmp_path / "src/corp/data.json").write_text('{"tools": ["ping"], "weight": 1.50}')
    (tmp_path / "key.pem").write_bytes(private_pem(KEY))
    command = (part("opa"), "build", "-b", "src", "--signing-key", "key.pem", "--signing-alg", "ES256")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)  # noqa: S603 - our own words
    found = read((tmp_path / "bundle.tar.gz").read_bytes(), SPEC)

    assert json.loads(found.data.text) == {"corp": {"tools": ["ping"], "weight": 1.5}}
    (module,) = found.rego.values()
    assert "data.corp.tools" in module


def test_data_of_several_directories_is_one_document() -> None:
    """Each file where its directory says."""
    files = {
        "a/rules.rego": REGO,
        "data.json": b'{"x": 1}',
        "corp/data.json": b'{"tools": []}',
        "corp/eu/data.json": b'{"y": 2}',
    }

    assert read(signed(files), SPEC) == Fetched(
        rego={"a__rules.rego": REGO.decode()}, data=Data({"x": 1, "corp": {"tools": [], "eu": {"y": 2}}})
    )


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"p.rego": REGO, "policy.wasm": b"w"}, r"only \*\.rego and data\.json"),
        ({"p.rego": REGO, "data.yaml": b"x: 1"}, r"only \*\.rego and data\.json"),
        ({"../p.rego": REGO}, "not a path inside the bundle"),
        ({"data.json": b"{}"}, "holds no Rego module"),
        ({"p_test.rego": REGO}, "holds no Rego module"),
        ({"p.rego": b"\xff"}, r"p\.rego: cannot be read"),
        ({"p.rego": REGO, "data.json": b'{"a": "\\ud800"}'}, "not JSON in UTF-8"),
        ({"p.rego": REGO, "data.json": b'{"a": 1e999}'}, "cannot be written"),
        ({"p.rego": REGO, "data.json": b"[]"}, "must hold an object"),
        ({"p.rego": REGO, "data.json": b'{"a": 1}', "a/data.json": b"{}"}, "a is a value in another"),
        ({"p.rego": REGO, "data.json": b'{"a": {"b": 1}}', "a/data.json": b'{"b": 2}'}, "b is in another"),
    ],
)
def test_other_content_is_refused(files: dict[str, bytes], why: str) -> None:
    """Signed or not: what is enforced is compiled here, from text."""
    with pytest.raises(BundleError, match=why):
        read(signed(files), SPEC)


def test_bundle_of_another_signer_is_refused() -> None:
    """The policy says whose it must be."""
    other = ec.derive_private_key(78, ec.SECP256R1())

    with pytest.raises(BundleError, match="not signed by a key that is trusted here"):
        read(signed({"p.rego": REGO}, other), SPEC)
    with pytest.raises(BundleError, match=r"\.signatures\.json: missing"):
        read(archive(("p.rego", REGO)), SPEC)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://opa.test/mcp/b.tar.gz", True),
        ("https://opa.test/other/b.tar.gz", False),
        ("https://opa.test.evil/mcp/b.tar.gz", False),
        ("https://opa.test/mcp/../other", False),
        ("https://opa.test/mcp/%2e%2e/other", False),
        ("https://opa.test/mcp/@evil/x", False),
        ("https://opa.test/mcp/\t../other", False),
        ("https://opa.test/mcp/\n../other", False),
        ("https://opa.test/mcp/ ../other", False),
        ("http://opa.test/mcp/b.tar.gz", False),
    ],
)
def test_operator_says_what_may_be_fetched(url: str, *, expected: bool) -> None:
    """By the beginning of the address, which no later part of it can leave."""
    assert is_allowed(url, ["https://opa.test/mcp/"]) is expected
    assert not is_allowed(url, [])
