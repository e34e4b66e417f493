"""The bytes of KV that requests hold over time, were there always room: the demand.

A request holds pages from its start, while its prompt is computed at a rate of tokens and then one token
comes after another, until its last. Time is cut into cells; in each, a request counts with the most that it
holds there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crosspool.core.kv_layout import KvLayout
from crosspool.planner.trace import Floats, Ints, Trace

STEP_TOKENS = 512
"""By how much a prompt grows at once at most, as SchedulerConfig has it: a window group holds that more."""
CELLS_PER_LIFE = 8
SHORTEST_CELL, LONGEST_CELL = 0.25, 1.0
UNBOUNDED = 1 << 40
"""Tokens of a sequence that holds no more pages however long it becomes."""
BLOCK = 1 << 16
"""Requests whose cells are laid out in memory together."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a request goes: its prompt in tokens per second, its output in seconds per token."""

    prefill_tps: float = 8000.0
    tbt: float = 0.040

    def lives(self, trace: Trace) -> Floats:
        """Seconds for which each request holds KV."""
        return trace.prompt / self.prefill_tps + trace.output * self.tbt


@dataclass(frozen=True, slots=True)
class Cells:
    """Where requests lie on the grid of cells of ``seconds``: request i in ``count[i]`` cells from
    ``first[i]``. ``held[offset[i]:offset[i + 1]]`` are the bytes it holds in each."""

    seconds: float
    first: Ints
    count: Ints
    offset: Ints
    held: Floats


def held_bytes(layout: KvLayout, tokens: NDArray[np.generic]) -> Floats:
    """Bytes of the pages that one sequence holds at each of these numbers of tokens.

    The same as ``KvPool.pages_for``: a window group gives back what fell out of its window.
    """
    chunks = np.ceil(np.asarray(tokens, np.float64) / layout.tokens_per_page)
    pages = np.zeros_like(chunks)
    for group in layout.groups:
        most = np.inf if group.window is None else layout.chunks(group.window + STEP_TOKENS) + 1
        pages += np.minimum(chunks, most)
    return pages * layout.page_bytes


def choose_cell(trace: Trace, pace: Pace) -> float:
    """Seconds of a cell: an eighth of the mean life, from a quarter of a second to one."""
    mean = float(pace.lives(trace).mean())
    return min(LONGEST_CELL, max(SHORTEST_CELL, mean / CELLS_PER_LIFE))


def lay_out(trace: Trace, layouts: Sequence[KvLayout], pace: Pace, cell: float) -> Cells:
    """The cells of every request. ``layouts`` has one entry for each model of the trace."""
    lives = pace.lives(trace)
    first = (trace.start / cell).astype(np.int64)
    count = np.maximum(((trace.start + lives) / cell).astype(np.int64), first) - first + 1
    offset = np.concatenate(([0], np.cumsum(count)))
    held = np.empty(int(offset[-1]))
    for begin in range(0, len(trace), BLOCK):
        some = slice(begin, min(begin + BLOCK, len(trace)))
        part = slice(int(offset[some.start]), int(offset[some.stop]))
        request = np.repeat(np.arange(some.start, some.stop), count[some])
        place = np.arange(part.start, part.stop) - offset[request]
        age = np.minimum((first[request] + place + 1) * cell - trace.start[request], lives[request])
        held[part] = _held(trace, layouts, pace, request, age)
    return Cells(cell, first, count, offset, held)


def _held(
    trace: Trace, layouts: Sequence[KvLayout], pace: Pace, request: Ints, age: Floats
) -> NDArray[np.float64]:
    prompt = trace.prompt[request]
    prefilled = np.minimum(np.ceil(age * pace.prefill_tps), prompt)
    made = np.clip(np.floor((age - prompt / pace.prefill_tps) / pace.tbt + 1e-6), 0, trace.output[request])
    kinds = list(dict.fromkeys(layouts))
    kind = np.array([kinds.index(layout) for layout in layouts])[trace.model[request]]
    tokens, held = prefilled + made, np.empty(len(request))
    for index, layout in enumerate(kinds):
        mine = kind == index
        held[mine] = held_bytes(layout, tokens[mine])
    return held


def pile_up(cells: Cells, first: Ints, size: int) -> tuple[Floats, Floats]:
    """Lay the requests on each other in their order, request i from cell ``first[i]``, in ``size`` cells.

    Returns the sum in every cell, and for every request its level: the most that it and those before it
    hold together while it lives. In a pool smaller than its level a request has to wait, be it at its start
    or later, where those who came first are served first.
    """
    total = np.zeros(size)
    level = np.empty(len(first))
    held, offsets = cells.held, cells.offset.tolist()
    begins, ends = first.tolist(), np.minimum(first + cells.count, size).tolist()
    for request, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        mine = total[begin:end]
        mine += held[offsets[request] : offsets[request] + end - begin]
        level[request] = mine.max()
    return total, level


@dataclass(frozen=True, slots=True)
class Demand:
    """The demand of a trace: bytes in every cell, and every request's level (see ``pile_up``)."""

    cell: float
    total: Floats
    level: Floats


def find_demand(trace: Trace, cells: Cells) -> Demand:
    """The demand of all models together, until the end of the trace."""
    size = max(int(np.ceil(trace.seconds / cells.seconds)), int(cells.first.max(initial=0)) + 1)
    total, level = pile_up(cells, cells.first, size)
    return Demand(cells.seconds, total, level)


def most_tokens(layout: KvLayout, room: float) -> int:
    """The longest sequence, in whole chunks, whose pages fit in ``room`` bytes."""
    if room < len(layout.groups) * layout.page_bytes:
        return 0
    if all(group.window is not None for group in layout.groups):
        widest = max(group.window or 0 for group in layout.groups) + STEP_TOKENS
        if held_bytes(layout, np.array([2 * widest + layout.tokens_per_page]))[0] <= room:
            return UNBOUNDED
    low, high = 1, int(room) // layout.page_bytes
    while low < high:
        middle = (low + high + 1) // 2
        fits = held_bytes(layout, np.array([middle * layout.tokens_per_page]))[0] <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * layout.tokens_per_page
