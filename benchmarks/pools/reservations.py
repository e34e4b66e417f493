"""Baselines for waiting: whoever starts reserves the pages of prompt and output, and takes what it takes.

The time a request takes does not depend on others, so this needs no control plane: arrivals, lines, ends.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from crosspool.core.config import SECOND
from crosspool.core.kv_layout import KvLayout
from crosspool.sim.fluid import Rates
from crosspool.sim.workload import Trace


def reservation_waits(
    trace: Trace, layouts: Sequence[KvLayout], rates: Rates, pages: int, *, line_per_model: bool
) -> npt.NDArray[np.float64]:
    """Seconds that each request waits for its reservation in a pool of ``pages`` pages.

    First come, first served: in one line for all models, or in one for each, where the head that came first
    among those that fit goes first.
    """
    needs = [
        layouts[model].pages(int(prompt + output - 1))
        for model, prompt, output in zip(trace.models, trace.prompts, trace.outputs, strict=True)
    ]
    takes = trace.prompts / rates.prefill_tokens_per_second + (trace.outputs - 1) * (rates.tbt / SECOND)
    lines: dict[int, deque[int]] = {}
    ends: list[tuple[float, int]] = []
    waits = np.zeros(len(trace))
    free, arrived = pages, 0
    while arrived < len(trace) or ends:
        if ends and (arrived == len(trace) or ends[0][0] <= trace.times[arrived]):
            now, ended = heapq.heappop(ends)
            free += needs[ended]
        else:
            now = float(trace.times[arrived])
            lines.setdefault(int(trace.models[arrived]) if line_per_model else 0, deque()).append(arrived)
            arrived += 1
        while heads := [line[0] for line in lines.values() if line and needs[line[0]] <= free]:
            first = min(heads)
            lines[int(trace.models[first]) if line_per_model else 0].popleft()
            waits[first] = now - trace.times[first]
            free -= needs[first]
            heapq.heappush(ends, (now + takes[first], first))
    return waits
