"""Runs the real `opa` on Rego: check, test, compile to policy.wasm. Decides nothing; its errors come back as BadPolicy.

Each run sees a directory of its own, no network that it would use and no environment, and ends at its deadline.
Source: OPA documentation, "CLI", version 1.22.
"""

import asyncio
import io
import json
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

from sidecar.core import profile as profiles
from sidecar.core.bundle import WASM
from webhook.core import check as findings
from webhook.core import compile as compiler
from webhook.core import contract
from webhook.core.check import Finding
from webhook.errors import BadPolicy
from webhook.shell import cedar

MAX_REMEMBERED: Final = 512  # policies; a few KB each, some 100 KB with Rego


@dataclass(frozen=True, slots=True)
class Opa:
    """The opa program at *path*, or of that name on the PATH; *deadline_s* bounds each of its runs."""

    path: Path | str
    deadline_s: float = 10.0

    async def compile(self, policies: compiler.Policies) -> compiler.Compiled:
        """Return policy.wasm and what it reads; raises BadPolicy with file, line and column."""
        with tempfile.TemporaryDirectory(prefix="sidegate-opa-") as name:
            directory = Path(name)
            await self._write(directory, policies)
            await self._run(directory, "check", "--strict", "--format=json", *_LIMITED, *_inputs(directory))
            modules = [
                json.loads(await self._run(directory, "parse", "--format=json", path)) for path in _rego(directory)
            ]
            entrypoints = [f"--entrypoint={each}" for each in compiler.entrypoints(modules)]
            built = "bundle.tar.gz"
            await self._run(
                directory, "build", "--target=wasm", *entrypoints, *_LIMITED, f"--output={built}", *_inputs(directory)
            )
            wasm = await asyncio.to_thread(_extract, directory / built)
        return compiler.Compiled(reads=compiler.rego_reads(modules), is_pure=compiler.is_pure(modules), wasm=wasm)

    async def check(self, policies: compiler.Policies) -> list[Finding]:
        """Return what is wrong with Rego that compiles, by the contract's schema; raises BadPolicy for what does not."""
        with tempfile.TemporaryDirectory(prefix="sidegate-opa-") as name:
            directory = Path(name)
            await self._write(directory, policies)
            await self._run(directory, "check", "--strict", "--format=json", *_LIMITED, *_inputs(directory))
            (directory / "schema.json").write_text(json.dumps(contract.json_schema(nulls=False)))
            typed = ("check", "--strict", "--format=json", "--schema=schema.json", *_LIMITED, *_inputs(directory))
            found = findings.rego(await self._run(directory, *typed, accept=(0, 1)))
            modules = [
                (
                    Path(path).name,
                    json.loads(await self._run(directory, "parse", "--format=json", "--json-include=locations", path)),
                )
                for path in _rego(directory)
            ]
        return [*found, *findings.unused_rules(modules, compiler.entrypoints([tree for _, tree in modules]))]

    async def test(self, policies: compiler.Policies, tests: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return one record per rule `test_…` in *tests* (file name -> text), as `opa test --format json` has it."""
        with tempfile.TemporaryDirectory(prefix="sidegate-opa-") as name:
            directory = Path(name)
            await self._write(directory, policies)
            for file, text in tests.items():
                (directory / "policy" / file).write_text(text)
            output = await self._run(directory, "test", "--format=json", *_LIMITED, *_inputs(directory), accept=(0, 2))
        results: list[dict[str, Any]] = json.loads(output) or []
        return results

    async def _write(self, directory: Path, policies: compiler.Policies) -> None:
        (directory / "policy").mkdir()
        for name, content in policies.rego_files().items():
            (directory / name).write_bytes(content)
        current = await self._run(directory, "capabilities", "--current")
        (directory / "capabilities.json").write_bytes(compiler.capabilities(current))

    def _program(self) -> Path:
        """Return where it is now: a run has another directory, and no PATH. Raises FileNotFoundError."""
        found = shutil.which(self.path)
        if found is None:
            raise FileNotFoundError(
                f"no program {self.path}, which compiles Rego\n"
                "hint: install opa (openpolicyagent.org), or say where it is with --opa or SIDEGATE_OPA"
            )
        return Path(found).absolute()

    async def _run(self, directory: Path, *arguments: str, accept: tuple[int, ...] = (0,)) -> bytes:
        process = await asyncio.create_subprocess_exec(
            self._program(),
            *arguments,
            cwd=directory,
            env={},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self.deadline_s):
                output, errors = await process.communicate()
        except TimeoutError:
            raise BadPolicy("rego", f"opa {arguments[0]} took longer than {self.deadline_s:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode not in accept:
            raise compiler.opa_error(errors or output)
        return output or errors


async def files(policies: Sequence[compiler.Policies], profile: profiles.Profile, opa: Opa) -> dict[str, bytes]:
    """Return the files of the bundle that holds *policies* and *profile*; raises BadPolicy."""
    return compiler.files(policies, profile, [await compiled(each, opa) for each in policies])


async def compiled(policies: compiler.Policies, opa: Opa) -> list[compiler.Compiled]:
    """Return what the compilers find of *policies*; raises BadPolicy."""
    found: list[compiler.Compiled] = []
    if policies.rego:
        found.append(await opa.compile(policies))
    if policies.cedar:
        found.append(await cedar.compile(policies))
    return found


async def check(policies: compiler.Policies, opa: Opa) -> list[Finding]:
    """Return what is wrong with policies that compile: errors do not do what they say. Raises BadPolicy."""
    found = await opa.check(policies) if policies.rego else []
    return [*found, *(await cedar.check(policies) if policies.cedar else ())]


class Remembering:
    """`files`, with what was compiled remembered: one policy may select a thousand workloads."""

    def __init__(self, opa: Opa) -> None:
        self._opa = opa
        self._known: OrderedDict[bytes, list[compiler.Compiled]] = OrderedDict()

    async def files(self, policies: Sequence[compiler.Policies], profile: profiles.Profile) -> dict[str, bytes]:
        """Return the files of the bundle that holds *policies* and *profile*; raises BadPolicy."""
        return compiler.files(policies, profile, [await self._compiled(each) for each in policies])

    async def _compiled(self, policies: compiler.Policies) -> list[compiler.Compiled]:
        digest = compiler.key_of(policies.rego, policies.data, policies.cedar, policies.schema, policies.vocabulary)
        if digest not in self._known:
            self._known[digest] = await compiled(policies, self._opa)
        self._known.move_to_end(digest)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return self._known[digest]


_LIMITED = ("--capabilities=capabilities.json",)


def _rego(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in (directory / "policy").iterdir())


def _inputs(directory: Path) -> list[str]:
    return ["policy", *(["data.json"] if (directory / "data.json").exists() else [])]


def _extract(bundle: Path) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(bundle.read_bytes()), mode="r:gz") as archive:
        return cast("IO[bytes]", archive.extractfile(f"/{WASM}")).read()
