"""The demand of the next window, from the clusters of a past one: quantiles by time and by request.

At any moment the demand is the sum of the clusters alive. Those of cold models are compound Poisson, all
together: each model is rarely busy, and many are (Le Cam 1960). A busy model has at most one cluster alive,
and its levels over time are its law. A request sees the sum from within its own cluster, and the others are
as they are at any moment (Slivnyak 1962). That is more than what time sees: requests come where clusters are.

What is not known of rates and sizes is drawn: rates from their gamma posterior, sizes by the Bayesian
bootstrap (Rubin 1981). Every draw gives quantiles; together they are an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray
from scipy.fft import rfft

from crosspool.planner.clusters import Clusters
from crosspool.planner.law import BINS, Grid, invert
from crosspool.planner.prior import fit_prior, own_share
from crosspool.planner.trace import HOUR, Floats, Ints

DRAWS = 24
CREDIBLE = 0.90
COLD = 0.05
"""Share of the time up to which a model that is busy counts as cold."""
HEADROOM = 4.0
"""The grid reaches so many times as far as anything seen. What is beyond folds back to its beginning."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a share of the time, or of the requests, stays within: [draw, share]."""

    by_time: Floats
    by_request: Floats

    def upper(self) -> Floats:
        """For each share, the bytes by request that hold with 90% credibility."""
        return np.asarray(np.quantile(self.by_request, CREDIBLE, axis=0), np.float64)


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen of all models in a past window.

    ``hours`` and ``bytes_per_token`` have one value for each model: how long it was observed, and its KV.
    ``most_seen`` is the greatest demand, in bytes, which sets the grid.
    """

    clusters: Clusters
    hours: Floats
    bytes_per_token: Floats
    most_seen: float


def estimate(
    window: Window,
    shares: Sequence[float],
    *,
    models: NDArray[np.bool_] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Bytes that these shares of time and of requests stay within, of some models or of all."""
    chosen = np.ones(len(window.hours), np.bool_) if models is None else models
    if len(window.clusters) == 0 or not chosen.any():
        return Estimate(np.zeros((draws, len(shares))), np.zeros((draws, len(shares))))
    law = _ClusterLaw(window, chosen)
    rng = np.random.default_rng(seed)
    pairs = [law.draw(rng, shares) for _ in range(draws)]
    by_time, by_request = (np.array(values) for values in zip(*pairs, strict=True))
    return Estimate(by_time, by_request)


class _ClusterLaw:
    """Clusters on a grid: those of cold models once for each different number of bytes per token."""

    def __init__(self, window: Window, chosen: NDArray[np.bool_]) -> None:
        self._clusters = clusters = window.clusters
        self._hours, self._chosen = window.hours, chosen
        self._prior = fit_prior(clusters, window.hours)
        self._count: Ints = np.bincount(clusters.model, minlength=len(window.hours))
        self._sizes, self._size_of = np.unique(window.bytes_per_token, return_inverse=True)
        largest = float(clusters.level.max()) * float(self._sizes[-1])
        self._grid = grid = Grid.up_to(HEADROOM * (window.most_seen + largest))
        self._bins = [grid.bins(clusters.level * size) for size in self._sizes]
        self._request_bins = [grid.bins(clusters.request_level * size) for size in self._sizes]
        seconds = np.bincount(clusters.model[clusters.cluster], clusters.seconds, len(window.hours))
        self._is_busy = (seconds > COLD * HOUR * window.hours) & chosen
        self._busy = [_part_of(clusters, int(model)) for model in np.flatnonzero(self._is_busy)]

    def draw(self, rng: np.random.Generator, shares: Sequence[float]) -> tuple[list[float], list[float]]:
        own, common = self._draw_weights(rng)
        cold_alive, cold_seen = self._cold(own, common)
        busy = [self._one(part, own) for part in self._busy]
        cold = np.exp(rfft(cold_alive) - cold_alive.sum())
        laws = [1 + rfft(alive) - alive.sum() for alive, _ in busy]
        # A busy model's requests see all laws but their own model's: products from both ends.
        before = list(accumulate(laws, mul, initial=cold))
        after = list(accumulate(reversed(laws), mul, initial=np.ones_like(cold)))[-2::-1]
        seen = rfft(cold_seen) * before[-1]
        for (_, mine), left, right in zip(busy, before[:-1], after, strict=True):
            seen = seen + rfft(mine) * left * right
        by_time, by_request = invert(before[-1]), invert(seen)
        return (
            [self._grid.quantile(by_time, share) for share in shares],
            [self._grid.quantile(by_request, share) for share in shares],
        )

    def _cold(self, own: Floats, common: Floats) -> tuple[Floats, Floats]:
        """Of the cold models' clusters: how many are alive with each value, and how many see it an hour."""
        clusters, grid = self._clusters, self._grid
        alive, seen = np.zeros(BINS), np.zeros(BINS)
        for size, (bins, request_bins) in enumerate(zip(self._bins, self._request_bins, strict=True)):
            mine = (self._size_of == size)[clusters.model] & ~self._is_busy[clusters.model]
            weight = common[size] + np.where(mine, own, 0.0)
            alive += grid.measure(bins, weight[clusters.cluster] * clusters.seconds / HOUR)
            seen += grid.measure(request_bins, weight[clusters.request_cluster])
        return alive, seen

    def _one(self, part: _Part, own: Floats) -> tuple[Floats, Floats]:
        """The same of one busy model, which has no more than one cluster alive."""
        clusters, grid, size = self._clusters, self._grid, self._size_of[part.model]
        weight = own[clusters.cluster[part.entries]] * clusters.seconds[part.entries] / HOUR
        alive = grid.measure(self._bins[size][part.entries], weight / max(1.0, weight.sum()))
        seen = own[clusters.request_cluster[part.requests]]
        return alive, grid.measure(self._request_bins[size][part.requests], seen)

    def _draw_weights(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """How often an hour each cluster comes: as its own model's, and for each size as somebody else's."""
        clusters, count = self._clusters, self._count
        rate = rng.gamma(self._prior.shape + count, 1 / (self._prior.hours + self._hours)) * self._chosen
        # A busy model is known by its own clusters; others' beside them would be alive at the same time.
        share = np.where(self._is_busy, 1.0, own_share(self._prior, count))
        mass = rng.exponential(size=len(clusters))
        mass = mass / np.bincount(clusters.model, mass, len(count))[clusters.model]
        # Of the common share, every model's clusters are an equal part.
        others = np.bincount(self._size_of, rate * (1 - share), len(self._sizes)) / np.count_nonzero(count)
        return (rate * share)[clusters.model] * mass, others[:, None] * mass


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one model's entries and requests are."""

    model: int
    entries: Ints
    requests: Ints


def _part_of(clusters: Clusters, model: int) -> _Part:
    entries = np.flatnonzero(clusters.model[clusters.cluster] == model)
    return _Part(model, entries, np.flatnonzero(clusters.model[clusters.request_cluster] == model))
