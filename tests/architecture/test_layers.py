"""What may import what, who may make what, and that every module has its test."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from importlinter.api import read_configuration
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

import sidecar.config
import webhook.config
from sidecar.config import PREFIX

ROOT = Path(__file__).parents[2]
PACKAGES = ("certs", "sidecar", "webhook")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Modules without a mirror, each for its reason. The list may only shrink.
WITHOUT_MIRROR = {
    "certs/errors.py": "names only",
    "sidecar/__main__.py": "starts the process; tests/wire and tests/e2e run it",
    "sidecar/errors.py": "names only",
    "sidecar/exchange.py": "a record; its one rule is tried in tests/sidecar/test_pipeline.py",
    "sidecar/shell/app.py": "puts the parts together; tests/wire and tests/e2e run it",
    "sidecar/shell/precompile.py": "one call of the compiler, in a process of its own",
    "sidecar/shell/snapshot.py": "tried with app.py",
    "webhook/__main__.py": "starts the process; tests/e2e runs it",
    "webhook/cli/__main__.py": "tried as tests/webhook/cli/test_main.py",
    "webhook/cli/demo.py": "tried as tests/wire/test_demo.py",
    "webhook/cli/demonstration.py": "tried as tests/wire/test_demo.py",
    "webhook/cli/issuer.py": "tried with the demo",
    "webhook/cli/directory.py": "tried with policy.py",
    "webhook/cli/run.py": "tried as tests/wire/test_demo.py",
    "webhook/errors.py": "names only",
    "webhook/shell/metrics.py": "tried with what counts, in tests/webhook/shell",
}
# Entry points beside __main__ that hand the environment on to programs they start.
READ_THE_ENVIRONMENT = {"webhook/cli/demonstration.py"}


def calls(path: Path) -> Iterator[str]:
    """Yield the names of what *path* calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    yield name


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts of pyproject.toml; `lint-imports` says which import breaks one."""
    monkeypatch.chdir(ROOT)
    configure()
    contracts = read_configuration(config_filename="pyproject.toml")["contracts_options"]

    assert len(contracts) >= 6
    assert lint_imports(config_filename="pyproject.toml", cache_dir=None)


@pytest.mark.parametrize(
    ("proof", "maker"),
    [("Permit", "sidecar/core/authorise.py"), ("Admission", "sidecar/core/limits.py"), ("Peer", "certs/verify.py")],
)
def test_a_proof_is_made_in_one_place(proof: str, maker: str) -> None:
    """The type proves that the check happened only as long as nothing else makes it."""
    package = maker.partition("/")[0]  # the webhook has an Admission of its own, which is something else
    makers = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py") if proof in calls(path)}

    assert makers == {maker}


def test_only_main_reads_the_environment() -> None:
    """Everything else is told by Settings."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    }

    assert {name for name in readers if Path(name).name != "__main__.py"} <= READ_THE_ENVIRONMENT


def test_no_task_is_made_outside_a_group() -> None:
    """An error in such a task would be lost."""
    makers = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("create_task", "ensure_future")
        and ast.unparse(node.value) in ("asyncio", "loop", "self._loop", "asyncio.get_running_loop()")
    }

    assert makers == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_has_its_test(path: Path) -> None:
    """At the same place under tests; an exception has its reason above."""
    name = path.relative_to(ROOT)
    mirror = ROOT / "tests" / name.parent / f"test_{name.name}"
    is_empty = path.name == "__init__.py" and len(path.read_text().splitlines()) <= 3

    assert is_empty or mirror.exists() or name.as_posix() in WITHOUT_MIRROR


def test_every_module_says_what_it_is() -> None:
    """Its first line is a docstring."""
    silent = [
        path.relative_to(ROOT).as_posix() for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))
    ]

    assert silent == []


def test_the_chart_names_no_setting_that_does_not_exist() -> None:
    """A misspelt variable would be refused by the sidecar at its start, in every pod."""
    known = {
        PREFIX + each.name.upper()
        for settings in (sidecar.config.Settings, webhook.config.Settings)
        for each in fields(settings)
    }
    templates = [path for path in (ROOT / "charts").rglob("*") if path.suffix in (".yaml", ".tpl")]
    named = {name for path in templates for name in re.findall(rf"{PREFIX}[A-Z0-9_]+", path.read_text())}

    assert named - known == set()
