"""Paged grouped-query attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.reference.paged_context import visible_context


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
        result = functional.scaled_dot_product_attention(
            query[queries].transpose(0, 1).unsqueeze(0),
            context.gather(key_pages).transpose(0, 1).unsqueeze(0),
            context.gather(value_pages).transpose(0, 1).unsqueeze(0),
            attn_mask=context.mask,
            scale=scale,
            enable_gqa=True,
        )
        attended[queries] = result[0].transpose(0, 1)
    return attended
