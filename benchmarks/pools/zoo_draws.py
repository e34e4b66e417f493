"""Windows on which a planner is judged: sliding over one long trace, and fresh draws of several zoos.

A fresh draw takes models of a zoo without replacement and moves each one's requests in time, round the end
of the trace, so that other models are busy at the same moments. What was seen and what comes next are
different hours of the same models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from crosspool.core.kv_layout import choose_page_bytes, make_layout
from crosspool.models.geometries import GEOMETRIES
from crosspool.models.registry import read_spec
from crosspool.planner.demand import Pace
from crosspool.planner.history import Geometry, History, make_history
from crosspool.planner.trace import HOUR, Trace, make_trace, read_trace

DATA = Path(__file__).parent.parent / "data"
MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")
DAY = 24 * HOUR


class Shift(StrEnum):
    """How a draw moves models in time. COMMON: all by the same, so that bursts they share stay shared."""

    NONE = "not moved"
    EACH = "each by a random time"
    COMMON = "all by the same random time"
    DAYS = "each by a random number of whole days"


@dataclass(frozen=True, slots=True)
class Series:
    """Windows of one kind. ``models`` of the zoo are drawn, ``draws`` times; each draw is fitted on
    ``fit`` hours and judged on the ``next`` ones, first at ``first`` hours and then every ``every`` until
    ``hours``."""

    name: str
    trace: str
    models: int
    shift: Shift
    draws: int
    fit: float
    next: float
    first: float
    every: float
    hours: float


SERIES = (
    Series("lang, sliding", "zoo_lang_24_14d", 24, Shift.NONE, 1, 24, 24, 24, 6, 336),
    Series("lang, draws", "zoo_lang_24_14d", 12, Shift.DAYS, 30, 24, 24, 72, 24, 96),
    Series("cold", "zoo_cold_64", 24, Shift.EACH, 30, 16, 8, 16, 8, 24),
    Series("zipf", "zoo_zipf_64", 24, Shift.EACH, 30, 16, 8, 16, 8, 24),
    Series("longburst", "zoo_longburst_8", 8, Shift.COMMON, 20, 16, 8, 16, 8, 24),
)


def draw(trace: Trace, series: Series, seed: int) -> Trace:
    """The zoo of one draw, from its beginning to ``series.hours``."""
    if series.shift is Shift.NONE:
        return trace
    rng = np.random.default_rng(seed)
    chosen = rng.choice(trace.models, series.models, replace=False)
    length = np.ceil(trace.seconds / HOUR) * HOUR
    if series.shift is Shift.DAYS:
        moved = rng.integers(0, int(length / DAY), series.models) * DAY
    elif series.shift is Shift.EACH:
        moved = rng.uniform(0, length, series.models)
    else:
        moved = np.full(series.models, rng.uniform(0, length))
    parts = []
    for place, (model, by) in enumerate(zip(chosen, moved, strict=True)):
        one = trace.of_model(int(model))
        parts.append(((one.start + by) % length, np.full(len(one), place), one.prompt, one.output))
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    drawn = make_trace(*columns, models=series.models, seconds=float(length))
    return drawn.between(0.0, series.hours * HOUR)


def histories(series: Series) -> Iterator[tuple[int, History]]:
    """The seed and the history of every draw."""
    specs = [read_spec(GEOMETRIES / name) for name in MODELS]
    page_bytes = choose_page_bytes(specs)
    kinds = [Geometry(make_layout(spec, page_bytes), spec.kv_bytes_per_token) for spec in specs]
    trace, _ = read_trace(DATA / f"{series.trace}.parquet")
    for seed in range(series.draws):
        drawn = draw(trace, series, seed)
        geometries = [kinds[place % len(kinds)] for place in range(drawn.models)]
        yield seed, make_history(drawn, geometries, Pace())


def moments(series: Series) -> Iterator[tuple[float, float, float]]:
    """Begin of the fit, now, end of what comes next: seconds."""
    now = series.first
    while now + series.next <= series.hours:
        yield (now - series.fit) * HOUR, now * HOUR, (now + series.next) * HOUR
        now += series.every
