"""A zoo's past: its trace, what the requests held, and what that says of any window in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crosspool.core.kv_layout import KvLayout
from crosspool.planner.clusters import Clusters, find_clusters
from crosspool.planner.demand import Cells, Demand, Pace, choose_cell, find_demand, lay_out
from crosspool.planner.estimate import Window
from crosspool.planner.quantiles import within
from crosspool.planner.trace import HOUR, Floats, Ints, Trace

STEP = 10.0
"""Seconds in which a model's own demand counts with its greatest."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """One model's KV: its layout in pages, and bytes per token."""

    layout: KvLayout
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class History:
    """Times are seconds from the beginning of the trace. Windows begin and end at multiples of half an hour,
    where clusters do."""

    trace: Trace
    geometries: tuple[Geometry, ...]
    pace: Pace
    cells: Cells = field(repr=False)
    demand: Demand = field(repr=False)
    clusters: Clusters = field(repr=False)

    def window(self, begin: float, end: float, observed: Floats | None = None) -> Window:
        """What was seen from ``begin`` to ``end``.

        ``observed``: for how many hours of it each model was there (all of them, if not given).
        """
        hours = (end - begin) / HOUR
        first, last = (round(time / self.cells.seconds) for time in (begin, end))
        return Window(
            clusters=self.clusters.between(begin, end),
            hours=np.full(self.trace.models, hours) if observed is None else np.minimum(observed, hours),
            bytes_per_token=self.bytes_per_token,
            most_seen=float(self.demand.total[first:last].max(initial=0.0)),
        )

    @property
    def bytes_per_token(self) -> Floats:
        return np.array([geometry.bytes_per_token for geometry in self.geometries], np.float64)

    def levels(self, begin: float, end: float) -> Floats:
        """The levels of the requests that started in a window (see ``pile_up``)."""
        first, last = np.searchsorted(self.trace.start, (begin, end))
        return self.demand.level[first:last]

    def need(self, begin: float, end: float, risk: float) -> float:
        """The truth of a window, in hindsight: the least pool, in bytes, in which at most a share ``risk``
        of its requests would have had to wait for pages, were those who come first served first."""
        return within(self.levels(begin, end), 1 - risk)

    def alone(self, begin: float, end: float) -> Alone:
        """What each model held by itself within a window."""
        first, last = np.searchsorted(self.trace.start, (begin, end))
        size = int((end - begin) / STEP) + 1
        held = np.zeros((self.trace.models, size))
        cell = np.repeat(self.cells.first[first:last], self.cells.count[first:last])
        request = np.repeat(np.arange(first, last), self.cells.count[first:last])
        part = slice(int(self.cells.offset[first]), int(self.cells.offset[last]))
        cell += np.arange(part.start, part.stop) - self.cells.offset[request]
        model = self.trace.model[request]
        # Summed in cells, of which the greatest in each step counts.
        for index in range(self.trace.models):
            mine = model == index
            total = np.bincount(cell[mine] - round(begin / self.cells.seconds), self.cells.held[part][mine])
            step = (np.arange(len(total)) * self.cells.seconds / STEP).astype(np.int64)
            inside = step < size
            np.maximum.at(held[index], step[inside], total[inside])
        start = ((self.trace.start[first:last] - begin) / STEP).astype(np.int64)
        return Alone(held, self.trace.model[first:last], start)


@dataclass(frozen=True, slots=True)
class Alone:
    """Bytes that each model held, the most within each STEP: ``held[model, step]``. Of every request: its
    ``model``, and the step in which it came."""

    held: Floats
    model: Ints
    start: Ints

    @property
    def peaks(self) -> Floats:
        return np.asarray(self.held.max(axis=1), np.float64)

    def need(self, models: NDArray[np.bool_], share: float) -> float:
        """Bytes that some models held together when their requests came, for this share of them."""
        return within(self.held[models].sum(axis=0)[self.start[models[self.model]]], share)


def make_history(trace: Trace, geometries: Sequence[Geometry], pace: Pace) -> History:
    """``geometries`` has one entry for each model of the trace."""
    cells = lay_out(trace, [geometry.layout for geometry in geometries], pace, choose_cell(trace, pace))
    sizes = np.array([geometry.bytes_per_token for geometry in geometries], np.float64)
    demand, clusters = find_demand(trace, cells), find_clusters(trace, cells, sizes)
    return History(trace, tuple(geometries), pace, cells, demand, clusters)
