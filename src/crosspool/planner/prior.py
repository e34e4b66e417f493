"""What models have in common, so that a model with hours of history is judged by the others too.

Rates of clusters: gamma across models, fitted by moments; with n clusters in h hours a model's rate is again
gamma (Poisson and gamma are conjugate). Sizes of clusters: a model's own, mixed with all models' clusters by
Buehlmann's credibility n / (n + k), where k is the variance within models over that between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosspool.planner.clusters import Clusters
from crosspool.planner.trace import Floats, Ints

LEAST_SHAPE, MOST_SHAPE = 0.1, 10.0
LEAST_CREDIBILITY, MOST_CREDIBILITY = 0.5, 50.0


@dataclass(frozen=True, slots=True)
class Prior:
    """Rates: gamma of ``shape`` and ``hours`` (its mean is shape / hours, in clusters per hour).

    ``strength``: with so many clusters of its own, a model is believed as much as the others.
    """

    shape: float
    hours: float
    strength: float


def fit_prior(clusters: Clusters, hours: Floats) -> Prior:
    """The prior from models observed for ``hours`` each."""
    count = np.bincount(clusters.model, minlength=len(hours)).astype(np.float64)
    mean = max(float(count.sum()), 0.5) / float(hours.sum())
    rates = count / hours
    # The variance of observed rates has that of Poisson counts in it.
    spread = float(rates.var()) - mean * float((1 / hours).mean())
    shape = MOST_SHAPE if spread <= 0 else min(MOST_SHAPE, max(LEAST_SHAPE, mean**2 / spread))
    return Prior(shape, shape / mean, _strength(clusters, count))


def _strength(clusters: Clusters, count: Floats) -> float:
    size = np.log1p(np.bincount(clusters.cluster, clusters.level * clusters.seconds, len(clusters)))
    seen, many = count > 0, count > 1
    if many.sum() < 2:
        return LEAST_CREDIBILITY
    means = np.bincount(clusters.model, size, len(count))[seen] / count[seen]
    squares = np.bincount(clusters.model, size**2, len(count))[seen] / count[seen] - means**2
    within = float((squares * count[seen]).sum() / max(1.0, (count[seen] - 1).sum()))
    between = float(means.var(ddof=1)) - within * float((1 / count[seen]).mean())
    if between <= 0:
        return MOST_CREDIBILITY
    return min(MOST_CREDIBILITY, max(LEAST_CREDIBILITY, within / between))


def own_share(prior: Prior, count: Ints) -> Floats:
    """How far a model with so many clusters is described by its own."""
    return np.asarray(count / (count + prior.strength), np.float64)
