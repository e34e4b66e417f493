"""What compiled token choice is made of, each part against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.exp_double import exp_of_negative
from crosspool.kernels.numba.largest import BLOCK, largest
from crosspool.kernels.numba.likely import keep_likely
from crosspool.kernels.numba.random_draw import draw, sums_floats, uniform
from crosspool.kernels.reference import sampling

pytestmark = pytest.mark.backend


@kernel
def exp_of_all(values, out):
    for i in range(len(values)):
        out[i] = exp_of_negative(values[i])


@kernel
def uniform_of(seed, index):
    return uniform(seed, index)


def place_of_largest(values: np.ndarray) -> int:
    return int(largest(values.ctypes.data, len(values)))


@pytest.mark.parametrize("count", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_the_largest_is_found_wherever_it_is(count: int, shift: float) -> None:
    rng = np.random.default_rng(count)
    for _ in range(50):
        values = (rng.normal(size=count) + shift).astype(np.float32)
        assert place_of_largest(values) == values.argmax()
        values = np.round(values)
        assert place_of_largest(values) == values.argmax()


def test_both_zeros_are_equal() -> None:
    values = np.full(2 * BLOCK, -1, np.float32)
    for first, second in ((-0.0, 0.0), (0.0, -0.0), (-0.0, -0.0)):
        for places in ((3, 9), (BLOCK - 1, BLOCK)):
            changed = values.copy()
            changed[list(places)] = first, second
            assert place_of_largest(changed) == places[0]


def test_the_least_numbers_are_numbers() -> None:
    lowest = np.finfo(np.float32).min
    assert place_of_largest(np.array([-np.inf, lowest, -np.inf], np.float32)) == 1
    assert place_of_largest(np.array([-np.inf, -1e-45, -2e-45], np.float32)) == 1
    assert place_of_largest(np.array([], np.float32)) == -1
    assert place_of_largest(np.full(BLOCK + 1, -np.inf, np.float32)) == -1


def test_the_exponential_is_within_one_unit_in_the_last_place() -> None:
    values = -np.concatenate((np.linspace(0, 745, 200_001), np.linspace(0, 2, 100_001), [1e-17, 1e-300]))
    out = np.empty_like(values)
    exp_of_all(values, out)
    exact = np.exp(values.astype(np.longdouble))
    units = np.abs(out - exact) / np.spacing(exact.astype(np.float64))
    assert units.max() < 1
    ends = np.array([0.0, -0.0, -746.0, -1e300, -np.inf])
    exp_of_all(ends, ends)
    assert ends.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_uniform_numbers_are_the_references(seed: int) -> None:
    for index in (0, 1, 2, 1000, 2**31):
        assert uniform_of(seed, index) == sampling.uniform(seed, index)


@pytest.mark.parametrize("count", [1, 5, 1024, 1025, 10_000])
def test_draws_invert_the_cumulative_distribution(count: int) -> None:
    rng = np.random.default_rng(count)
    sums = np.full(sums_floats(count), np.nan)
    for case in range(200):
        weights = np.exp(rng.normal(size=count) * 3)
        weights[rng.random(count) < (0, 0.5, 0.999)[case % 3]] = 0
        weights[rng.integers(count)] = 1
        u = (0.0, 1 - 2.0**-53, rng.random())[case % 3] if case < 50 else rng.random()
        assert draw(weights, count, u, sums) == sampling._draw(torch.from_numpy(weights), u)


def kept_by_definition(weights: np.ndarray, min_p: float, top_k: int, top_p: float) -> list[int]:
    """By sorting everything, and adding up exactly."""
    order = sorted(np.flatnonzero(weights >= min_p).tolist(), key=lambda i: (-weights[i], i))
    if top_k > 0:
        order = order[:top_k]
    total = math.fsum(weights[order])
    kept: list[int] = []
    while len(kept) < len(order) and math.fsum(weights[kept]) < top_p * total:
        kept.append(order[len(kept)])
    return sorted(kept)


@pytest.mark.parametrize("count", [1, 2, 9, 200, 3000])
def test_filters_keep_what_they_are_defined_to(count: int) -> None:
    rng = np.random.default_rng(count)
    for case in range(300 if count < 1000 else 30):
        levels = rng.integers(0, 12, size=count) if case % 2 else rng.random(count) * 12
        weights = 0.7**levels / (0.7 ** levels.min())
        rules = (
            (0, 0.03, 1.0)[case % 3],
            (0, 1, 3, count - 1, count)[case % 5],
            (0.13, 0.77, 0.97)[case % 3],
        )
        filtered = weights.copy()
        scratch = (np.full(count, np.nan), np.full(count, -1), np.full(sums_floats(count), np.nan))
        keep_likely(filtered, count, *rules, *scratch)
        kept = np.flatnonzero(filtered)
        assert kept.tolist() == kept_by_definition(weights, *rules), (weights, rules)
        assert (filtered[kept] == weights[kept]).all()
