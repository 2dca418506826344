"""Requirements on the locks: each image finds what it imports, and nothing of the other plane."""

import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("certs", "sidecar", "webhook")

STARTED = {
    "sidecar": ("sidecar.__main__", "sidecar.shell.net", "sidecar.shell.precompile"),
    "webhook": ("webhook.__main__", "webhook.shell.removal", "webhook.shell.cedar"),
}
"""What the containers of each image run."""


def locked(plane: str) -> set[str]:
    """The distributions in a plane's lock."""
    text = (ROOT / "requirements" / f"{plane}.txt").read_text()
    return set(re.findall(r"^([a-z0-9.-]+)==", text, re.MULTILINE))


def imported(plane: str) -> set[str]:
    """The third-party packages that a plane's programs import, directly or by way of ours, also inside functions."""
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    reached = set().union(*({start, *graph.find_upstream_modules(start)} for start in STARTED[plane]))
    return {name.partition(".")[0] for name in reached} - set(PACKAGES) - sys.stdlib_module_names


@pytest.mark.parametrize("plane", STARTED)
def test_an_image_holds_what_its_programs_import(plane: str) -> None:
    """Missing would be noticed only by the container that does not start."""
    owners = packages_distributions()
    missing = {
        name
        for name in imported(plane)
        if not {owner.lower().replace("_", "-") for owner in owners.get(name, ())} & locked(plane)
    }

    assert missing == set()


@pytest.mark.parametrize("plane", STARTED)
def test_every_image_agrees_with_what_is_tested(plane: str) -> None:
    """A version in an image is the version in the development lock."""
    pins = {
        name: set(
            re.findall(r"^[a-z0-9.-]+==[^ ;]+", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE)
        )
        for name in (plane, "dev")
    }

    assert pins[plane] <= pins["dev"]


def test_the_sidecar_carries_none_of_the_control_planes_weight() -> None:
    """Every governed pod pulls it."""
    assert not locked("sidecar") & {"kubernetes", "prometheus-client", "grpcio", "requests", "pydantic"}


@pytest.mark.parametrize("plane", ["sidecar", "webhook", "dev"])
def test_a_lock_names_no_host_and_hashes_everything(plane: str) -> None:
    """Each machine uses its own index, and none can slip another file in."""
    lines = (ROOT / "requirements" / f"{plane}.txt").read_text().splitlines()

    assert not [line for line in lines if "://" in line]
    assert all(line.endswith("\\") for line in lines if "==" in line)
