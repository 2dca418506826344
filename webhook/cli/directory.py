"""A directory of policies, as authors keep it: .cedar and .rego files, their tests beside them, a data.json and a profile."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.core.authorise import Engine
from sidecar.core.bundle import PROFILE, Bundle, revision
from sidecar.core.engines import engines
from sidecar.core.profile import Profile, Server
from sidecar.core.profile import decode as decode_profile
from sidecar.errors import ConfigError
from webhook.core.cases import Case
from webhook.core.cases import read as read_cases
from webhook.core.compile import NO_DATA, Data, Policies
from webhook.shell.opa import Opa, files

EXAMPLE: Final = Server(namespace="default", workload="server", name="server", port=8000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """What was found in one."""

    path: Path
    policies: Policies
    profile: Profile | None = None  # None: there was none
    cases: Mapping[str, tuple[Case, ...]] = field(default_factory=dict)  # by file
    rego_tests: Mapping[str, str] = field(default_factory=dict)


def read(path: Path, *, vocabulary: str = "sidegate") -> Directory:
    """Return what is in *path* and, one level down, in cedar/ and rego/; raises ConfigError, BadPolicy."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory")
    found = {each.name: each for folder in (path, path / "cedar", path / "rego") for each in sorted(folder.glob("*"))}
    texts = {name: _text(each) for name, each in found.items() if each.suffix in (".cedar", ".rego", ".toml")}
    rego = {name: text for name, text in texts.items() if name.endswith(".rego")}
    tests = {name: text for name, text in rego.items() if name.endswith("_test.rego")}
    policies = Policies(
        cedar={name: text for name, text in texts.items() if name.endswith(".cedar")},
        rego={name: text for name, text in rego.items() if name not in tests},
        data=_data(found.get("data.json")),
        vocabulary="toolhive" if vocabulary == "toolhive" else "sidegate",
    )
    if not policies.cedar and not policies.rego:
        raise ConfigError(f"{path}: holds no .cedar and no .rego file\nhint: without a rule nothing is allowed")
    return Directory(
        path=path,
        policies=policies,
        profile=decode_profile(found[PROFILE].read_bytes()) if PROFILE in found else None,
        cases={name: tuple(read_cases(name, text)) for name, text in texts.items() if name.endswith("_test.toml")},
        rego_tests=tests,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error


def _data(path: Path | None) -> Data:
    if path is None:
        return NO_DATA
    try:
        data = json.loads(_text(path))
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected an object")
        return Data(data)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


async def compiled(directory: Directory, opa: Opa, profile: Profile | None = None) -> Bundle:
    """Return the directory as a bundle with *profile*, by default its own; raises BadPolicy."""
    content = await files([directory.policies], profile or directory.profile or Profile(server=EXAMPLE), opa)
    return Bundle(revision=revision(content), files=content, profile=decode_profile(content[PROFILE]))


def bundle_of(directory: Directory, opa: Opa) -> Bundle:
    """Return the directory as a bundle, compiled here and now; raises BadPolicy."""
    return asyncio.run(compiled(directory, opa))


def engines_of(directory: Directory, opa: Opa) -> tuple[Engine, ...]:
    """Return the engines that the sidecar would run, each asked afresh; raises BadPolicy, BundleError."""
    return engines(bundle_of(directory, opa)).enforced
