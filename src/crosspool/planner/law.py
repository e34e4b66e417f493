"""Distributions of bytes on a grid, and the law of a sum of independent clusters.

How many clusters are alive at one moment, and with how many bytes each, is a Poisson process, so that their
sum is compound Poisson: its characteristic function is exp(sum of measure * (exp(iux) - 1)), inverted here
by a fast Fourier transform (Embrechts and Frei 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from crosspool.planner.trace import Floats, Ints

Complexes = NDArray[np.complex128]

BINS = next_fast_len(1 << 14, real=True)


@dataclass(frozen=True, slots=True)
class Grid:
    """BINS values of bytes, ``width`` apart, from 0."""

    width: float

    @classmethod
    def up_to(cls, most: float) -> Grid:
        return cls(max(most, 1.0) / (BINS - 1))

    def bins(self, values: Floats) -> Ints:
        """The nearest place of each value; the last for what is beyond."""
        return np.asarray(np.minimum(np.rint(values / self.width), BINS - 1), np.int64)

    def measure(self, bins: Ints, weights: Floats) -> Floats:
        """The weights in each place."""
        return np.asarray(np.bincount(bins, weights=weights, minlength=BINS), np.float64)

    def quantile(self, probabilities: Floats, share: float) -> float:
        """The least value that is exceeded with a probability of at most 1 - ``share``."""
        # Summed from the far end: the tail is small beside the rounding of a sum near 1.
        beyond = np.cumsum(probabilities[::-1])[::-1] - probabilities
        return float(np.argmax(beyond <= max(1 - share, 0.0) + TRANSFORM_ERROR)) * self.width


TRANSFORM_ERROR = 1e-12
"""Probabilities less than this come from rounding in the transform."""


def compound_poisson(measure: Floats) -> Floats:
    """Probabilities of the sum. ``measure[x]``: the expected number of clusters alive with x."""
    return invert(np.exp(rfft(measure) - measure.sum()))


def invert(transformed: Complexes) -> Floats:
    """The probabilities that have this real Fourier transform, but for a factor."""
    probabilities = irfft(transformed, BINS)
    cleaned = np.where(probabilities > TRANSFORM_ERROR * probabilities.sum(), probabilities, 0.0)
    return np.asarray(cleaned / cleaned.sum(), np.float64)
