"""KV in pages: appending this pass's, gathering what one row can see, and attending to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from crosspool.kernels.interface import AttentionBatch


def write_pages(pages: Tensor, values: Tensor, page_ids: Tensor, slots: Tensor) -> None:
    """See interface.WritePages."""
    pages.index_put_((page_ids, slots), values)


class VisibleContext(NamedTuple):
    """What one row's queries can see: ``pages`` (int64 ids), of whose tokens ``first:last`` count.

    ``mask`` is bool [queries, last - first], true where a query sees a token; None where all see all.
    """

    pages: Tensor
    first: int
    last: int
    mask: Tensor | None

    def gather(self, pages: Tensor) -> Tensor:
        """``pages`` [P, S, ...] -> the visible tokens [last - first, ...], a copy."""
        return pages[self.pages].flatten(0, 1)[self.first : self.last]


def visible_context(
    batch: AttentionBatch, row: int, group: int, tokens_per_page: int, window: int | None
) -> VisibleContext:
    """Only pages that hold a visible token are named, so what lies outside a window is not read."""
    position = batch.first_positions[row]
    queries = batch.query_starts[row + 1] - batch.query_starts[row]
    context = position + queries
    begin = 0 if window is None else max(0, position - window + 1)
    first_chunk, end_chunk = begin // tokens_per_page, -(-context // tokens_per_page)
    base = first_chunk * tokens_per_page
    table = batch.page_tables[row][group]
    mask = None
    if queries > 1:
        key = torch.arange(begin, context, device=table.device)
        query = torch.arange(position, context, device=table.device).unsqueeze(1)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
    return VisibleContext(table[first_chunk:end_chunk], begin - base, context - base, mask)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one row: ``query`` [T, N, D] over ``key`` and ``value`` [C, K, D] -> [T, N, D].

    Query head n reads key-value head n // (N / K). A single query's heads of one group take the place of
    queries in one matrix product, instead of N products of one row each.
    """
    single = len(query) == 1
    rows = query.view(key.shape[1], -1, query.shape[-1]) if single else query.transpose(0, 1)
    attended = functional.scaled_dot_product_attention(
        rows.unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=scale,
        enable_gqa=not single,
    )[0]
    return attended.reshape(query.shape) if single else attended.transpose(0, 1)
