"""Quantiles of what was seen."""

from __future__ import annotations

import numpy as np

from crosspool.planner.trace import Floats


def within(values: Floats, share: float) -> float:
    """The least of the values that is exceeded by at most 1 - ``share`` of them."""
    if len(values) == 0:
        return 0.0
    exceeding = min(int((1 - share) * len(values) + 1e-9), len(values) - 1)
    return float(np.partition(values, -exceeding - 1)[-exceeding - 1])


def weighted(values: Floats, weights: Floats, share: float) -> float:
    """The least of the values up to which ``share`` of the weights lie."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(reached, share - 1e-12)), len(values) - 1)])
