"""Paged grouped-query attention."""

from __future__ import annotations

import torch
from torch import Tensor

from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.reference.paged_context import attend, visible_context


def gqa_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    batch: AttentionBatch,
    group: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """See interface.GqaAttention."""
    attended = torch.empty_like(query)
    tokens_per_page = key_pages.shape[1]
    for row in range(batch.num_rows):
        queries = slice(batch.query_starts[row], batch.query_starts[row + 1])
        context = visible_context(batch, row, group, tokens_per_page, window)
        keys, values = context.gather(key_pages), context.gather(value_pages)
        attended[queries] = attend(query[queries], keys, values, context.mask, scale)
    return attended
