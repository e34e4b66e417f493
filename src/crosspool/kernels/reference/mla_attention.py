"""Paged multi-head latent attention, absorbed: one key-value head of latents serves all query heads."""

from __future__ import annotations

from torch import Tensor

from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.reference.paged_context import attend, visible_context


def mla_attention(
    query: Tensor,
    latent_pages: Tensor,
    latent_rank: int,
    batch: AttentionBatch,
    group: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """See interface.MlaAttention.

    The whole latent, rotary key included, is used as the value and its rotary part dropped from the result:
    torch's fused attention on the CPU wants keys and values of one width.
    """
    attended = query.new_empty(*query.shape[:2], latent_rank)
    tokens_per_page = latent_pages.shape[1]
    for row in range(batch.num_rows):
        queries = slice(batch.query_starts[row], batch.query_starts[row + 1])
        context = visible_context(batch, row, group, tokens_per_page, window)
        latents = context.gather(latent_pages).unsqueeze(1)
        result = attend(query[queries], latents, latents, context.mask, scale)
        attended[queries] = result[..., :latent_rank]
    return attended
