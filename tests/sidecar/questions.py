"""Builders for tests of the policy engines: a question naming only what matters, and Rego compiled by the real opa."""

import functools
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certs.spiffe import SpiffeId
from sidecar.core.authorise import Agent, Question
from sidecar.core.claims import User
from sidecar.core.identity import Principal
from sidecar.core.message import Message, Prompt, Resource, Shape, Tool
from sidecar.core.profile import Server
from tests.parts import part

WORKLOAD = SpiffeId.parse("spiffe://demo.test/ns/agents/sa/planner")
SERVER = Server(namespace="demo", workload="database", name="database", port=8000)
METHODS = {Tool: "tools/call", Prompt: "prompts/get", Resource: "resources/read"}


def a_user(role: str | None = "analyst", **changes: Any) -> User:
    """Return a user with *role*."""
    fields: dict[str, Any] = {
        "provider": "corporate",
        "issuer": "https://id.test",
        "id": "u-1",
        "email": None,
        "role": role,
        "roles": (),
        "groups": (),
        "claims": {},
        "expires_at_s": 2e9,
    }
    return User(**{**fields, **changes})


def a_question(
    target: str | Tool | Prompt | Resource = "read_schema",
    arguments: Mapping[str, Any] | None = None,
    *,
    role: str | None = "analyst",
    user: User | None = None,
    workload: SpiffeId | None = WORKLOAD,
    nobody: bool = False,
    time_ns: int = 1_795_350_000_000_000_000,
) -> Question:
    """Return the question whether a user with *role* may use *target*: a tool's name, or any target."""
    if isinstance(target, str):
        target = Tool(name=target, arguments=arguments or {})
    message = Message(shape=Shape.REQUEST, method=METHODS[type(target)], id=1, target=target, params={})
    principal = Principal(workload=workload, user=None if nobody else user or a_user(role), expires_at_s=2e9)
    return Question(principal=principal, message=message, server=SERVER, agent=Agent(session="s-1"), time_ns=time_ns)


@functools.cache
def policy_wasm(rego: str, *entrypoints: str) -> bytes:
    """Return policy.wasm for *rego*, by default with the entrypoint that decides."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "p.rego").write_text(rego)
        wanted = [f"--entrypoint={each}" for each in entrypoints or ("mcp/authz/allow",)]
        command = [part("opa"), "build", "--target=wasm", *wanted, "--output=out.tar.gz", "p.rego"]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)  # noqa: S603 - the opa of the tests
        with tarfile.open(fileobj=io.BytesIO((directory / "out.tar.gz").read_bytes())) as archive:
            member = archive.extractfile("/policy.wasm")
            assert member is not None
            return member.read()
