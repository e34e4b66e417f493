"""What a trace would hold in a KV pool without end, where every request starts when it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crosspool.core.config import SECOND
from crosspool.core.kv_layout import KvLayout
from crosspool.sim.fluid import Rates
from crosspool.sim.workload import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """A step function of time: ``pages`` are held from ``times`` (seconds, ascending) on."""

    times: npt.NDArray[np.float64]
    pages: npt.NDArray[np.int64]

    def quantile(self, share: float, until: float) -> int:
        """The least number of pages that are enough for this share of the time from 0 to ``until``."""
        spans = np.diff(np.append(self.times, max(until, self.times[-1])).clip(max=until))
        order = np.argsort(self.pages, kind="stable")
        covered = until - spans.sum() + np.cumsum(spans[order])
        return int(self.pages[order][np.searchsorted(covered, share * until)])


def open_loop_demand(trace: Trace, layouts: Sequence[KvLayout], rates: Rates) -> Demand:
    """Pages of all requests together: a page is taken with its first token, and given back at the end of its
    request. ``layouts`` are those of the trace's models; none may have windows."""
    per_page = np.array([layout.tokens_per_page for layout in layouts])[trace.models]
    groups = np.array([len(layout.groups) for layout in layouts])[trace.models]
    chunks = -(-(trace.prompts + trace.outputs - 1) // per_page)
    owner = np.repeat(np.arange(len(trace)), chunks)
    chunk = np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    token_time = rates.tbt / SECOND
    read = trace.prompts / rates.prefill_tokens_per_second
    position = chunk * per_page[owner]
    made = np.maximum(position - trace.prompts[owner], 0) * token_time
    taken = trace.times[owner] + np.minimum(position / rates.prefill_tokens_per_second, read[owner]) + made
    ended = trace.times + read + (trace.outputs - 1) * token_time
    times = np.concatenate([taken, ended])
    changes = np.concatenate([groups[owner], -groups * chunks])
    order = np.argsort(times, kind="stable")
    return Demand(times[order], np.cumsum(changes[order]))
