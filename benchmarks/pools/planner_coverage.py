"""How often the planner's pool is enough for the next window, and how large it is.

    PYTHONPATH=src python benchmarks/pools/planner_coverage.py --to docs/measurements/DATE-planner

Truth is found in hindsight: the least pool in which at most the stated share of the next window's requests
would have had to wait, with all requests served first come, first served (History.need). The planner is
given what ended before the window began, and nothing else; so are the estimates it is compared with. Each
of them is then scaled by many factors: that is its frontier of coverage against provision.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from zoo_draws import SERIES, Series, histories, moments

from crosspool.planner.baselines import find_baselines
from crosspool.planner.conformal import PastWindow, past_windows, scaled_by
from crosspool.planner.estimate import estimate
from crosspool.planner.history import History

RISK = 0.001
CONFIDENCE = 0.90
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
FACTORS = np.geomspace(0.1, 20, 400)
TARGET = 0.85
RESAMPLES = 2000
ESTIMATES = {
    "clusters": "clusters, one factor for all",
    "empirical": "empirical quantile by request",
    "maximum": "maximum seen",
    "sum_of_peaks": "sum of peaks",
    "chernoff": "Chernoff, independent requests",
    "monte_carlo": "Monte Carlo, independent requests",
}
Row = dict[str, Any]


def evaluate(series: Series, report: Callable[[str], None]) -> list[Row]:
    """One row for each window of a series."""
    rows: list[Row] = []
    for seed, history in histories(series):
        known: dict[float, list[PastWindow]] = {}
        for begin, now, end in moments(series):
            past = _past(history, series.fit, now, known)
            upper = float(estimate(history.window(begin, now), [1 - RISK]).upper()[0])
            rows.append(
                {
                    "series": series.name,
                    "seed": seed,
                    "now_hours": now / 3600,
                    "need": history.need(now, end, RISK),
                    "clusters": upper,
                    **find_baselines(history, begin, now, RISK).as_dict(),
                    "scores": [window.score for window in past],
                }
            )
            report(f"{series.name}: draw {seed + 1} of {series.draws}, {len(rows)} windows")
    return rows


def _past(history: History, fit: float, now: float, known: dict[float, list[PastWindow]]) -> list[PastWindow]:
    """The past windows as ``past_windows`` finds them at ``now``; those of full length once for all."""
    if now / 4 < fit * 3600:
        return list(past_windows(history, fit, RISK, now))
    if fit not in known:
        known[fit] = list(past_windows(history, fit, RISK, history.trace.seconds))
    return [window for window in known[fit] if window.end <= now]


def planned(rows: list[Row], confidence: float) -> np.ndarray:
    """The pool over the need, for each window."""
    return np.array([row["clusters"] * scaled_by(row["scores"], confidence) / row["need"] for row in rows])


def ratios(rows: list[Row], name: str) -> np.ndarray:
    return np.array([row[name] / row["need"] for row in rows])


def summary(provided: np.ndarray) -> dict[str, float]:
    return {"coverage": float((provided >= 1).mean()), "median_provision": float(np.median(provided))}


def interval(rows: list[Row], provided: np.ndarray) -> dict[str, list[float]]:
    """95% intervals by resampling draws, and of sliding windows days: those of one day overlap."""
    keys = [(row["series"], row["seed"], row["now_hours"] // 24) for row in rows]
    blocks = [np.flatnonzero([key == other for other in keys]) for key in dict.fromkeys(keys)]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        some = np.concatenate([blocks[index] for index in rng.integers(len(blocks), size=len(blocks))])
        found.append(tuple(summary(provided[some]).values()))
    low, high = np.quantile(found, (0.025, 0.975), axis=0)
    return {
        "coverage": [float(low[0]), float(high[0])],
        "median_provision": [float(low[1]), float(high[1])],
    }


def frontier(provided: np.ndarray) -> list[dict[str, float]]:
    return [{"factor": float(factor), **summary(provided * factor)} for factor in FACTORS]


def at_target(provided: np.ndarray) -> dict[str, float]:
    """The least factor with which TARGET of the windows are covered, and the median provision then."""
    ordered = np.sort(provided)
    factor = 1 / ordered[int((1 - TARGET) * len(ordered) + 1e-9)]
    return {"factor": float(factor), **summary(provided * factor * (1 + 1e-9))}


def make_report(rows: list[Row], seconds: float) -> dict[str, Any]:
    plan = planned(rows, CONFIDENCE)
    by_series = {}
    for series in SERIES:
        some = [row for row in rows if row["series"] == series.name]
        if some:
            by_series[series.name] = {
                "windows": len(some),
                **summary(planned(some, CONFIDENCE)),
                "at_target": {name: at_target(ratios(some, name)) for name in ESTIMATES},
            }
    return {
        "command": " ".join(sys.argv),
        "cpu_seconds": seconds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
        },
        "versions": {name: version(name) for name in ("numpy", "scipy", "pyarrow")},
        "risk": RISK,
        "confidence": CONFIDENCE,
        "series": [asdict(series) for series in SERIES],
        "planner": {"windows": len(rows), **summary(plan), "interval_95": interval(rows, plan)},
        "planner_by_confidence": [
            {"confidence": confidence, **summary(planned(rows, confidence))} for confidence in CONFIDENCES
        ],
        "unscaled": {name: summary(ratios(rows, name)) for name in ESTIMATES},
        "at_target": {name: at_target(ratios(rows, name)) for name in ESTIMATES},
        "by_series": by_series,
        "frontier": {name: frontier(ratios(rows, name)) for name in ESTIMATES},
        "windows": rows,
    }


def write_plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    together, single = figure.subplots(1, 2)
    for name, label in ESTIMATES.items():
        points = report["frontier"][name]
        line = [point["median_provision"] for point in points], [point["coverage"] for point in points]
        (drawn,) = together.plot(*line, label=label, linewidth=1.2)
        own = report["unscaled"][name]
        together.plot(own["median_provision"], own["coverage"], "o", color=drawn.get_color(), markersize=4)
    points = report["planner_by_confidence"]
    line = [point["median_provision"] for point in points], [point["coverage"] for point in points]
    together.plot(*line, "k.-", linewidth=1.8, label="planner, by its confidence (0.5 to 0.99)")
    plan = report["planner"]
    together.plot(plan["median_provision"], plan["coverage"], "k*", markersize=14, label="planner as it is")
    together.axhline(TARGET, color="0.7", linewidth=0.8)
    together.axvline(2.2, color="0.7", linewidth=0.8)
    together.set(
        title=f"{plan['windows']} windows (dots: estimates unscaled)",
        xlabel="median of pool over need",
        ylabel=f"share of windows with at most {100 * RISK:g}% waiting",
        xscale="log",
        xlim=(0.4, 6),
        ylim=(0, 1.01),
    )
    together.set_xticks([0.5, 1, 1.5, 2, 3, 4, 5], ["0.5", "1", "1.5", "2", "3", "4", "5"])
    together.minorticks_off()
    together.legend(fontsize=8)
    for series in report["by_series"]:
        some = [row for row in report["windows"] if row["series"] == series]
        ordered = np.sort(planned(some, CONFIDENCE))
        single.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=f"{series} ({len(some)})")
    single.axvline(1, color="0.5", linewidth=0.8)
    single.set(
        title="The planner by series", xlabel="pool over need", ylabel="share of windows", xscale="log"
    )
    single.legend(fontsize=8)
    for axes in (together, single):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def print_report(report: dict[str, Any]) -> None:
    plan = report["planner"]
    low, high = plan["interval_95"]["coverage"]
    print(f"\n{report['command']}\n{report['machine']}, {report['versions']}")
    print(f"{report['cpu_seconds']:.0f} s of CPU time")
    print(
        f"planner: {plan['windows']} windows, coverage {plan['coverage']:.3f} ({low:.3f} to {high:.3f}), "
        f"median provision {plan['median_provision']:.2f}"
    )
    for name, series in report["by_series"].items():
        print(f"  {name:14} {series['windows']:4} {series['coverage']:.3f} {series['median_provision']:.2f}")
    print(f"\n{'estimate':36} unscaled: coverage, provision   scaled to {TARGET:.0%}: factor, provision")
    for name, label in ESTIMATES.items():
        own, scaled = report["unscaled"][name], report["at_target"][name]
        print(
            f"{label:36} {own['coverage']:18.2f} {own['median_provision']:10.2f} "
            f"{scaled['factor']:21.2f} {scaled['median_provision']:10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, help="write TO.json and TO.png")
    parser.add_argument("--only", help="series to run, by name, with semicolons")
    parser.add_argument("--again", type=Path, help="judge the windows in this JSON again, without estimating")
    arguments = parser.parse_args()
    chosen = [s for s in SERIES if arguments.only is None or s.name in arguments.only.split(";")]
    begin = time.process_time()

    def say(text: str) -> None:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    if arguments.again is None:
        rows = [row for series in chosen for row in evaluate(series, say)]
        seconds = time.process_time() - begin
    else:
        known = json.loads(arguments.again.read_text(encoding="utf-8"))
        rows, seconds = known["windows"], known["cpu_seconds"]
    report = make_report(rows, seconds)
    print_report(report)
    if arguments.to is not None:
        arguments.to.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
        write_plot(report, arguments.to.with_suffix(".png"))


if __name__ == "__main__":
    main()
