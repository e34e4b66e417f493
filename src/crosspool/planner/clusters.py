"""Busy clusters: what a model does between two times of rest.

Requests come in bursts and sessions, so that a law which takes them to be independent of each other is far
too low in its tail. Clusters are cut where a model has rested (runs declustering; Smith and Weissman 1994),
and a model that never rests is cut now and then: its clusters are what is drawn again where uncertainty is
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crosspool.planner.demand import Cells, pile_up
from crosspool.planner.trace import Floats, Ints, Trace

REST = 60.0
"""Seconds without any request after which a new cluster begins."""
LONGEST = 1800.0
"""Seconds after whose multiples a new cluster begins in any case."""
STEPS = 200
"""Levels within a cluster are kept to one part in so many."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """Clusters of all models, with levels in tokens: bytes over the model's bytes per token, so that one
    model's clusters can stand for another's.

    Of cluster c: ``model[c]``, ``start[c]`` in seconds. Its levels over time: the entries with ``cluster``
    c, of ``level`` tokens for ``seconds``. As its requests see it: ``request_level[i]`` is the most that
    request i and those before it in cluster ``request_cluster[i]`` hold together while it lives.
    """

    model: Ints
    start: Floats
    cluster: Ints
    level: Floats
    seconds: Floats
    request_cluster: Ints
    request_level: Floats

    def __len__(self) -> int:
        return len(self.model)

    def between(self, begin: float, end: float) -> Clusters:
        """The clusters that start within [begin, end), numbered anew."""
        return self.select((self.start >= begin) & (self.start < end))

    def select(self, chosen: NDArray[np.bool_]) -> Clusters:
        """The clusters for which ``chosen`` is true, numbered anew."""
        number = np.cumsum(chosen) - 1
        entries, requests = chosen[self.cluster], chosen[self.request_cluster]
        return Clusters(
            model=self.model[chosen],
            start=self.start[chosen],
            cluster=number[self.cluster[entries]],
            level=self.level[entries],
            seconds=self.seconds[entries],
            request_cluster=number[self.request_cluster[requests]],
            request_level=self.request_level[requests],
        )


def find_clusters(trace: Trace, cells: Cells, bytes_per_token: Floats) -> Clusters:
    """The clusters of a trace. ``bytes_per_token`` has one value for each model."""
    of_request = _number(trace, cells)
    first_request = np.unique(of_request, return_index=True)[1]
    begin, end = cells.first[first_request], np.zeros(len(first_request), np.int64)
    np.maximum.at(end, of_request, cells.first + cells.count)
    # Clusters are laid behind each other, so that one pass piles up all of them.
    offset = np.concatenate(([0], np.cumsum(end - begin)))
    total, level = pile_up(cells, offset[of_request] + cells.first - begin[of_request], int(offset[-1]))
    cluster = np.repeat(np.arange(len(begin)), end - begin)
    model = trace.model[first_request]
    cluster, tokens, count = _distinct(cluster, total / bytes_per_token[model][cluster])
    return Clusters(
        model=model,
        start=trace.start[first_request],
        cluster=cluster,
        level=tokens,
        seconds=count * cells.seconds,
        request_cluster=of_request,
        request_level=level / bytes_per_token[trace.model],
    )


def _number(trace: Trace, cells: Cells) -> Ints:
    """The cluster of every request, numbered by their starts."""
    first_request = np.zeros(len(trace), np.int64)
    ends = (cells.first + cells.count) * cells.seconds
    for model in np.unique(trace.model):
        mine = np.flatnonzero(trace.model == model)
        busy_until = np.maximum.accumulate(ends[mine])
        new = np.diff(np.floor(trace.start[mine] / LONGEST), prepend=-1) > 0
        new[1:] |= trace.start[mine][1:] > busy_until[:-1] + REST
        first_request[mine] = mine[np.maximum.accumulate(np.where(new, np.arange(len(mine)), 0))]
    return np.unique(first_request, return_inverse=True)[1]


def _distinct(cluster: Ints, level: Floats) -> tuple[Ints, Floats, Floats]:
    """Levels that differ by less than one part in STEPS put together: cluster, level, number of cells."""
    held = level > 0
    cluster, level = cluster[held], level[held]
    step = np.rint(np.log1p(level) * STEPS).astype(np.int64)
    span = int(step.max(initial=0)) + 1
    unique, index = np.unique(cluster * span + step, return_inverse=True)
    count = np.bincount(index).astype(np.float64)
    return unique // span, np.bincount(index, weights=level) / count, count
