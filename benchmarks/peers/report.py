"""Results as plain data, and that as Markdown tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.turns import Result

DIGITS = 4
"""Significant digits of every figure. The machine does not give more."""

FILES = "*.json"


def as_data(result: Result) -> dict[str, Any]:
    """Figures of each contender, how many times better the first is than each other, and every turn."""
    first, *others = result.contenders
    return {
        "subject": result.subject,
        "commands": {name: list(commands) for name, commands in result.commands.items()},
        "rounds": 1 + max(turn.round for turn in result.turns),
        "figures": {name: _rounded(_figures(result, name)) for name in result.contenders},
        "times_better": {other: _rounded(_finite(result.ratios(first, other))) for other in others},
        "turns": [
            {
                "contender": turn.contender,
                "round": turn.round,
                "values": _rounded(turn.values),
                "samples": {name: len(pool) for name, pool in turn.measured.pools.items()},
                "read_gb_per_second": {
                    str(threads): _round(speed / 1e9) for threads, speed in turn.bandwidth.items()
                },
            }
            for turn in result.turns
        ],
    }


def _figures(result: Result, contender: str) -> dict[str, float]:
    figures = result.medians(contender)
    if "bytes_per_second" in figures:
        figures["gb_per_second"] = figures.pop("bytes_per_second") / 1e9
    beside = statistics.median(max(turn.bandwidth.values()) for turn in result.of(contender))
    return {**figures, "read_gb_per_second": beside / 1e9}


def write(folder: Path, experiment: str, data: dict[str, Any]) -> None:
    """Write the experiment's file, and ``README.md`` anew with the tables of all files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{experiment}.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob(FILES))]
    (folder / "README.md").write_text("\n".join(_page(runs)))


def _page(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["# CrossPool beside its peers", ""]
    for run in runs:
        machine, peers = run["machine"], run["peers"]
        versions = [f"CrossPool {machine['crosspool']} at {run['commit']}"]
        versions += [f"{name} {version}" for name, version in peers.items()]
        place = f"{machine['cores']} cores of {machine['cpu']}"
        lines += [f"## {run['experiment']}: {run['what']}", ""]
        lines += [f"{run['time']}, {place}; {', '.join(versions)}. `{machine['command']}`", ""]
        for result in run["results"]:
            lines += [*table(result), ""]
    return lines


def table(result: dict[str, Any]) -> list[str]:
    """One result in Markdown: a row for each figure, a column for each contender and each comparison."""
    figures, better = result["figures"], result["times_better"]
    first = next(iter(figures))
    rows = [
        [
            f"{result['subject']}, {result['rounds']} rounds",
            *figures,
            *(f"{first} better than {other}" for other in better),
        ]
    ]
    for name in figures[first]:
        times = [f"{ratios[name]:g} x" if name in ratios else "" for ratios in better.values()]
        rows.append([name, *(f"{one[name]:g}" if name in one else "" for one in figures.values()), *times])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return [lines[0], rule, *lines[1:]]


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Without the ratios to nothing."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in values.items()}


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
