"""Turns the rounds into the tables that are printed and the file that is kept."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.measure import Measured, Rounds
    from bench.targets import Target

BESIDE = ("direct", "nginx", "Envoy")  # what every figure is divided by


def tables(measured: Measured) -> str:
    """Return all tables as text."""
    machine = measured.machine
    heading = (
        f"{machine['cores']} shared virtual cores, Linux {machine['kernel']}; {machine['rounds']} rounds "
        f"of {machine['seconds']} s, medians; load average {machine['load_before']} before, "
        f"{machine['load_after']} after.\n"
        "CPU: microseconds of the proxy's processes for each request, 8 connections kept busy. Read the ratios."
    )
    parts = [
        heading,
        *(_cpu_table(body, measured) for body in measured.bodies),
        _latency_table(measured),
        _memory_table(measured),
    ]
    if measured.skipped:
        parts.append("\n".join(f"skipped: {name}: {why}" for name, why in measured.skipped.items()))
    return "\n\n".join(parts)


def record(measured: Measured) -> str:
    """Return everything measured, each round of it, as JSON."""
    document: dict[str, Any] = {
        "machine": measured.machine,
        "targets": {
            each.name: {
                "version": each.version,
                "reads_bodies": each.enforces,
                "mutual_tls": each.keys is not None,
                "idle_rss_bytes": measured.idle_rss_bytes[each.name],
                "loaded_rss_bytes": measured.loaded_rss_bytes[each.name],
            }
            for each in measured.targets
        },
        "load": {f"{name} | {body}": _rounds(rounds) for (name, body), rounds in measured.load.items()},
        "single": {f"{name} | {body}": _rounds(rounds) for (name, body), rounds in measured.single.items()},
        "skipped": dict(measured.skipped),
    }
    return json.dumps(document, indent=2)


def _rounds(rounds: Rounds) -> dict[str, Any]:
    return {
        "cpu_us": [round(value, 2) for value in rounds.cpu_us],
        "requests_per_s": [round(value) for value in rounds.requests_per_s],
        "p50_us": rounds.p50_us,
        "p99_us": rounds.p99_us,
    }


def _cpu_table(body: str, measured: Measured) -> str:
    cpu_us = {each.name: median(measured.load[each.name, body].cpu_us) for each in measured.targets}
    rows = []
    for each in measured.targets:
        rounds = measured.load[each.name, body]
        beside = [_ratio(cpu_us[each.name], cpu_us.get(_rival(each, rival))) for rival in BESIDE]
        row = [each.name, f"{cpu_us[each.name]:.1f}", f"{min(rounds.cpu_us):.1f}-{max(rounds.cpu_us):.1f}", *beside]
        rows.append([*row, f"{median(rounds.requests_per_s):.0f}", _reads(each)])
    head = [body, "CPU us", "min-max", *(f"/{rival}" for rival in BESIDE), "req/s", "reads bodies"]
    return _table(head, rows)


def _rival(target: Target, rival: str) -> str:
    """Return the name of what *target* is set beside: under TLS, the rivals under TLS."""
    return rival if target.keys is None or rival == "direct" else f"{rival} mTLS"


def _ratio(cpu_us: float, other_us: float | None) -> str:
    return "-" if other_us is None else f"{cpu_us / other_us:.2f}"


def _reads(target: Target) -> str:
    return "yes, and enforces" if target.enforces else "no"


def _latency_table(measured: Measured) -> str:
    rows = []
    for each in measured.targets:
        row = [each.name]
        for body in measured.single_bodies:
            rounds, base = measured.single[each.name, body], measured.single["direct", body]
            row += [f"{median(rounds.p50_us):.0f}", _added(rounds.p50_us, base.p50_us, each)]
            row += [f"{median(rounds.p99_us):.0f}", f"{median(rounds.cpu_us):.1f}"]
        rows.append(row)
    columns = [text for body in measured.single_bodies for text in (f"{body} p50", "added", "p99", "CPU us")]
    return "One connection, one request at a time; microseconds\n" + _table(["", *columns], rows)


def _added(own_us: Sequence[float], base_us: Sequence[float], target: Target) -> str:
    return "-" if target.name == "direct" else f"+{median(own_us) - median(base_us):.0f}"


def _memory_table(measured: Measured) -> str:
    rows = [
        [each.name, _mib(measured.idle_rss_bytes, each), _mib(measured.loaded_rss_bytes, each), each.version]
        for each in measured.targets
    ]
    return "Resident memory, MiB\n" + _table(["", "idle", "after load", "version"], rows)


def _mib(sizes_bytes: Mapping[str, int], target: Target) -> str:
    return f"{sizes_bytes[target.name] / 2**20:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the columns aligned: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
