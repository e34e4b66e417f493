from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import poisson

from crosspool.planner.baselines import chernoff, find_baselines, monte_carlo
from crosspool.planner.trace import HOUR
from helpers_traces import PAGE, history_of, one_page_trace

pytestmark = pytest.mark.unit


def test_monte_carlo_of_one_size_is_poisson() -> None:
    held = np.full(1000, 7.0)
    assert monte_carlo(held, 4.0, 0.001) == pytest.approx(7 * poisson.ppf(0.999, 4.0), abs=7)
    assert monte_carlo(held, 4.0, 0.1) == 7 * poisson.ppf(0.9, 4.0)
    assert monte_carlo(held[:0], 0.0, 0.1) == 0


@pytest.mark.parametrize("risk", [0.1, 0.001, 1e-6])
def test_chernoff_bounds_from_above(risk: float) -> None:
    exact = 7 * poisson.ppf(1 - risk, 4.0)
    assert exact - 7 < chernoff(np.full(1000, 7.0), 4.0, risk) < 1.6 * exact
    # The bound of a Poisson law of mean m at x is exp(x - m) (m / x) ** x.
    x = chernoff(np.full(1000, 7.0), 4.0, risk) / 7
    assert np.exp(x - 4) * (4 / x) ** x == pytest.approx(risk, rel=0.02)


def test_peaks_and_maximum() -> None:
    # Model 0 has three requests at once at 100 s, model 1 two at 500 s, and one of each meet at 2,000 s.
    first = np.array([100.0, 101.0, 102.0, 2000.0, *range(4000, 9000, 500)])
    second = np.array([500.0, 501.0, 2010.0, *range(4200, 9200, 500)])
    history = history_of(one_page_trace([first, second], 3))
    found = find_baselines(history, 0, 3 * HOUR, 0.001)
    assert found.maximum == found.empirical == 3 * PAGE
    assert found.sum_of_peaks == 5 * PAGE
    alone = history.alone(0, 3 * HOUR)
    assert alone.peaks.tolist() == [3 * PAGE, 2 * PAGE]
    assert alone.need(np.array([True, True]), 1.0) == 3 * PAGE
    assert alone.need(np.array([False, True]), 1.0) == 2 * PAGE
    assert alone.need(np.array([False, True]), 0.5) == PAGE
    later = find_baselines(history, HOUR, 3 * HOUR, 0.001)
    assert later.maximum == PAGE and later.sum_of_peaks == 2 * PAGE
