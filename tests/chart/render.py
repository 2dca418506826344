"""Renders the chart by the real helm, without a cluster. `python -m tests.chart.render` writes the golden files anew."""

import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.parts import part

HERE = Path(__file__).parent
CHART = HERE.parent.parent / "charts" / "sidegate"
VALUES = sorted((HERE / "values").glob("*.yaml"))
NAMESPACE = "sidegate-system"


def helm(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm to its end; whether it succeeded is the caller's to judge."""
    command = [str(part("helm")), verb, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@functools.cache
def rendered(values: Path) -> str:
    """Return the manifests for a file of values."""
    done = helm("template", "sidegate", CHART, "--namespace", NAMESPACE, "--values", values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(values: Path) -> list[dict[str, Any]]:
    """Return the same, parsed."""
    return list(yaml.safe_load_all(rendered(values)))


def golden(values: Path) -> Path:
    """Return where the reviewed rendering of a file of values is kept."""
    return HERE / "golden" / values.name


if __name__ == "__main__":
    for each in VALUES:
        golden(each).write_text(rendered(each))
