"""The compiled exponential, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.exp import exp

pytestmark = pytest.mark.backend


@kernel
def exp_of_all(values, out):
    for i in range(len(values)):
        out[i] = exp(values[i])


def test_it_is_within_two_units_in_the_last_place() -> None:
    values = np.concatenate((np.linspace(-87, 88.7, 1_000_001), np.linspace(-1, 1, 100_001))).astype(
        np.float32
    )
    out = np.empty_like(values)
    exp_of_all(values, out)
    expected = np.exp(values.astype(np.float64))
    assert (np.abs(out - expected) <= 2 * np.spacing(expected.astype(np.float32))).all()


def test_the_ends() -> None:
    """No result has lost bits: there is 0 instead."""
    below = np.nextafter(np.float32(-87), np.float32(-88))
    values = np.array([-np.inf, -200, -104, below, -87, 0, 89, 200, np.inf, np.nan], np.float32)
    out = np.empty_like(values)
    exp_of_all(values, out)
    assert out[:4].tolist() == [0, 0, 0, 0]
    assert out[4] >= np.finfo(np.float32).tiny
    assert out[5] == 1
    assert np.isinf(out[6:9]).all()
    assert np.isnan(out[9])
