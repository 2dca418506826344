# ruff: noqa: INP001 - a script, no part of a package
"""Builds bundle.tar.gz from the policies beside it: `python examples/article/build.py OPA`, the path of an opa program.

The same policies make the same bytes. The key is for development only: it is published here, so it proves nothing.
"""

import asyncio
import sys
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.core import bundle, profile
from webhook.core.compile import Policies
from webhook.shell.opa import Opa, files

HERE = Path(__file__).parent


def policies() -> Policies:
    """Return the example's policies, without their tests."""
    rego = {path.name: path.read_text() for path in (HERE / "rego").glob("*.rego") if not path.stem.endswith("_test")}
    return Policies(rego=rego, cedar={path.name: path.read_text() for path in (HERE / "cedar").glob("*.cedar")})


async def build(opa: str) -> bytes:
    """Return the signed bundle."""
    content = await files([policies()], profile.decode((HERE / "sidegate.json").read_bytes()), Opa(opa))
    key = serialization.load_pem_private_key((HERE / "development-only.key.pem").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("development-only.key.pem: expected a P-256 key")
    return bundle.encode(content, key)


if __name__ == "__main__":
    (HERE / "bundle.tar.gz").write_bytes(asyncio.run(build(sys.argv[1])))
