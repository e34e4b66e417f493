from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import poisson

from crosspool.planner.law import BINS, Grid, compound_poisson
from crosspool.planner.quantiles import weighted, within

pytestmark = pytest.mark.unit


def test_clusters_of_one_size_are_poisson() -> None:
    measure = np.zeros(BINS)
    measure[100] = 3.0
    law = compound_poisson(measure)
    counts = np.arange(40)
    assert np.allclose(law[100 * counts], poisson.pmf(counts, 3.0), atol=1e-10)
    grid = Grid(width=0.5)
    for share in (0.5, 0.99, 0.999, 0.999999):
        assert grid.quantile(law, share) == 50 * poisson.ppf(share, 3.0)


def test_mean_and_variance_are_those_of_the_measure() -> None:
    rng = np.random.default_rng(0)
    measure = np.zeros(BINS)
    measure[rng.integers(1, 900, 30)] = rng.uniform(0, 0.4, 30)
    law, x = compound_poisson(measure), np.arange(BINS)
    mean = law @ x
    assert mean == pytest.approx(measure @ x, rel=1e-6)
    assert law @ (x - mean) ** 2 == pytest.approx(measure @ x**2, rel=1e-6)


def test_values_lie_in_the_nearest_place() -> None:
    grid = Grid.up_to(BINS - 1)
    assert grid.bins(np.array([0.0, 0.6, 7.4, 1e9])).tolist() == [0, 1, 7, BINS - 1]
    assert grid.measure(np.array([3, 3, 5]), np.array([1.0, 0.5, 2.0]))[:6].tolist() == [0, 0, 0, 1.5, 0, 2]


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1), (0.5, 5), (0.89, 9), (0.9, 9), (0.91, 10), (0.999, 10)]
)
def test_within_leaves_no_more_than_the_rest_beyond(share: float, value: float) -> None:
    assert within(np.random.default_rng(1).permutation(np.arange(1.0, 11.0)), share) == value


def test_weighted_quantile() -> None:
    values, weights = np.array([5.0, 1.0, 3.0]), np.array([1.0, 2.0, 1.0])
    assert [weighted(values, weights, share) for share in (0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 3, 3, 5, 5]


def test_nothing_needs_nothing() -> None:
    assert within(np.array([]), 0.999) == 0
