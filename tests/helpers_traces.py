"""Traces whose demand is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from crosspool.core.kv_layout import make_layout
from crosspool.planner.demand import Pace
from crosspool.planner.history import Geometry, History, make_history
from crosspool.planner.trace import HOUR, Trace, make_trace
from helpers_specs import gqa_spec

SPEC = gqa_spec()
LAYOUT = make_layout(SPEC, 4096)
"""32 tokens a page in one group."""
PAGE = LAYOUT.page_bytes
GEOMETRY = Geometry(LAYOUT, SPEC.kv_bytes_per_token)
PACE = Pace(prefill_tps=1e9, tbt=4.0)
TOKENS = 25
"""Output tokens of a request that holds one page for 100 s at PACE."""
LIFE = TOKENS * PACE.tbt


def one_page_trace(starts: Sequence[np.ndarray], hours: float) -> Trace:
    """Requests at these times, by model, that hold one page for LIFE seconds each."""
    count = [len(some) for some in starts]
    return make_trace(
        np.concatenate(starts),
        np.repeat(np.arange(len(starts)), count),
        np.ones(sum(count), np.int64),
        np.full(sum(count), TOKENS),
        models=len(starts),
        seconds=hours * HOUR,
    )


def poisson_starts(rng: np.random.Generator, rates: Sequence[float], hours: float) -> list[np.ndarray]:
    """Independent arrivals, by model, at these rates an hour."""
    return [rng.uniform(0, hours * HOUR, rng.poisson(rate * hours)) for rate in rates]


def history_of(trace: Trace) -> History:
    return make_history(trace, [GEOMETRY] * trace.models, PACE)


def write_parquet(path: Path, trace: Trace, names: Sequence[str] | None = None) -> Path:
    """The trace as a file; with names in place of the models' numbers."""
    model = (
        {"model_index": trace.model.astype(np.int16)}
        if names is None
        else {"model": [names[index] for index in trace.model]}
    )
    columns = {
        "t_seconds": trace.start,
        **model,
        "prompt_tokens": trace.prompt,
        "output_tokens": trace.output,
    }
    parquet.write_table(pa.table(columns), path)
    return path
