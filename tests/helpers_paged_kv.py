"""Rows of queries whose KV lies in shuffled pages, beside plain per-row tensors of the same values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.kernels.interface import AttentionBatch

TOKENS_PER_PAGE = 5


@dataclass(frozen=True)
class PagedRows:
    """``pages`` [P, S, ...] holds every row's context; slots that no token fills are not numbers."""

    batch: AttentionBatch
    pages: Tensor
    contexts: tuple[Tensor, ...]

    def queries(self, row: int) -> slice:
        return slice(self.batch.query_starts[row], self.batch.query_starts[row + 1])


def paged_rows(rows: list[tuple[int, int]], shape: tuple[int, ...], seed: int = 0) -> PagedRows:
    """Rows of (first position, queries); every token's KV has ``shape``. The tables are those of group 1,
    group 0 points nowhere."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [-(-(first + count) // TOKENS_PER_PAGE) for first, count in rows]
    ids = torch.randperm(2 * sum(chunks), generator=generator)
    pages = torch.full((len(ids), TOKENS_PER_PAGE, *shape), float("nan"))
    contexts, tables, starts = [], [], [0]
    for (first, count), own in zip(rows, ids[: sum(chunks)].split(chunks), strict=True):
        context = torch.randn(first + count, *shape, generator=generator)
        position = torch.arange(first + count)
        pages[own[position // TOKENS_PER_PAGE], position % TOKENS_PER_PAGE] = context
        contexts.append(context)
        tables.append((torch.empty(0, dtype=torch.int64), own))
        starts.append(starts[-1] + count)
    empty = torch.empty(0, dtype=torch.int64)
    batch = AttentionBatch(
        positions=torch.cat([torch.arange(first, first + count) for first, count in rows]),
        query_starts=tuple(starts),
        first_positions=tuple(first for first, _ in rows),
        page_tables=tuple(tables),
        pages_written=(empty, empty),
        slots_written=empty,
    )
    return PagedRows(batch, pages, tuple(contexts))


def forget_outside_window(rows: PagedRows, window: int) -> None:
    """Give back the pages that no query of the row can see any more."""
    for row, first in enumerate(rows.batch.first_positions):
        rows.batch.page_tables[row][1][: max(0, first - window + 1) // TOKENS_PER_PAGE] = -1
