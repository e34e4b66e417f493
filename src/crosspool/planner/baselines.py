"""Simpler answers to the same question, to compare with. All in bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from crosspool.planner.demand import Cells
from crosspool.planner.history import History
from crosspool.planner.quantiles import within
from crosspool.planner.trace import Floats

SAMPLES_BEYOND = 20
"""Monte Carlo draws so many moments beyond the quantile that it looks for."""
LEAST_SAMPLES, MOST_VALUES = 10_000, 20_000_000
HISTOGRAM = 4096


@dataclass(frozen=True, slots=True)
class Baselines:
    """``monte_carlo``: independent Poisson requests with the lengths seen, as in arXiv 2606.24506, by time.
    ``chernoff``: a bound on the same law. ``empirical``: the quantile by request of what was seen.
    ``maximum``: the most that all models held at once. ``sum_of_peaks``: the most that each held, added up.
    """

    monte_carlo: float
    chernoff: float
    empirical: float
    maximum: float
    sum_of_peaks: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def find_baselines(history: History, begin: float, end: float, risk: float, seed: int = 0) -> Baselines:
    """The baselines from what was seen in a window."""
    held = _held(history, begin, end)
    alive = len(held) * history.cells.seconds / (end - begin)
    levels = history.levels(begin, end)
    first, last = (round(time / history.cells.seconds) for time in (begin, end))
    return Baselines(
        monte_carlo=monte_carlo(held, alive, risk, seed),
        chernoff=chernoff(held, alive, risk),
        empirical=within(levels, 1 - risk),
        maximum=float(history.demand.total[first:last].max(initial=0.0)),
        sum_of_peaks=float(history.alone(begin, end).peaks.sum()),
    )


def _held(history: History, begin: float, end: float) -> Floats:
    """The bytes in every cell of every request that starts in a window."""
    cells: Cells = history.cells
    first, last = np.searchsorted(history.trace.start, (begin, end))
    return cells.held[cells.offset[first] : cells.offset[last]]


def monte_carlo(held: Floats, alive: float, risk: float, seed: int = 0) -> float:
    """The quantile of the sum of a Poisson number of values, with mean ``alive``, each one of ``held``."""
    if len(held) == 0:
        return 0.0
    rng = np.random.default_rng(seed)
    samples = max(LEAST_SAMPLES, int(SAMPLES_BEYOND / risk))
    counts = rng.poisson(alive, min(samples, int(MOST_VALUES / max(alive, 1.0)) + 1))
    sample = np.repeat(np.arange(len(counts)), counts)
    values = held[rng.integers(len(held), size=len(sample))]
    return within(np.asarray(np.bincount(sample, values, len(counts)), np.float64), 1 - risk)


def chernoff(held: Floats, alive: float, risk: float) -> float:
    """The least x with exp(K(t) - t x) <= risk for some t, where K(t) = alive * mean(exp(t held) - 1)."""
    if len(held) == 0:
        return 0.0
    count, edges = np.histogram(held, HISTOGRAM)
    value, share = (edges[1:] + edges[:-1]) / 2, count / len(held)

    def bound(log_t: float) -> float:
        t = np.exp(log_t)
        return float((alive * (share @ np.expm1(t * value)) - np.log(risk)) / t)

    top = np.log(300 / value[-1])
    return bound(float(minimize_scalar(bound, bounds=(top - 20, top), method="bounded").x))
