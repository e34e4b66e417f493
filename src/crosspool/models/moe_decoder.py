"""A decoder-only model in its two halves, one per pool: the attention side, and the FFN of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from crosspool.core.errors import ConfigError, InvariantError
from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import FfnSpec, GqaSpec, MlaSpec, ModelSpec
from crosspool.kernels import reference as kernels
from crosspool.kernels.interface import AttentionBatch
from crosspool.models import layers
from crosspool.models.weights import (
    AttentionSideWeights,
    FfnWeights,
    GqaWeights,
    MlaWeights,
    shard_ffn,
    torch_dtype,
)

__all__ = ["AttentionSide", "AttentionSideWeights", "FfnWeights", "ffn", "shard_ffn"]


class AttentionSide:
    """Everything of one model that is not FFN. It keeps no state of sequences: that is in the pages.

    T queries of a pass, H hidden size, V vocabulary; hidden states are in the model's dtype.
    """

    def __init__(self, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights) -> None:
        if layout.page_bytes % spec.dtype.bytes:
            raise ConfigError(
                f"a KV page of {layout.page_bytes:,} bytes is not a multiple of {spec.dtype.bytes}, "
                f"the bytes of one {spec.dtype} element of {spec.architecture}"
            )
        self.spec = spec
        self.layout = layout
        self._weights = weights
        self._dtype = torch_dtype(spec.dtype)
        self._rope = layers.RopeTable(spec.rope, spec.max_context)

    @property
    def bytes(self) -> int:
        return self._weights.bytes

    def batch(
        self,
        first_positions: Sequence[int],
        query_counts: Sequence[int],
        page_tables: Sequence[Sequence[Tensor]],
    ) -> AttentionBatch:
        """What ``attention`` needs to know of one pass, made once for all layers.

        Row r has ``query_counts[r]`` queries from ``first_positions[r]`` on; ``page_tables[r][g]`` is its
        int64 page table of layer group g. Raises InvariantError if a page that a query writes or sees has
        been given back or is beyond the table.
        """
        positions, chunks, starts = [], [], [0]
        for row, (first, count) in enumerate(zip(first_positions, query_counts, strict=True)):
            self._check_pages(row, first, count, page_tables[row])
            own = torch.arange(first, first + count)
            positions.append(own)
            chunks.append(own // self.layout.tokens_per_page)
            starts.append(starts[-1] + count)
        pages_written = tuple(
            torch.cat([tables[group][chunk] for tables, chunk in zip(page_tables, chunks, strict=True)])
            for group in range(len(self.layout.groups))
        )
        joined = torch.cat(positions)
        return AttentionBatch(
            positions=joined,
            query_starts=tuple(starts),
            first_positions=tuple(first_positions),
            page_tables=tuple(tuple(tables) for tables in page_tables),
            pages_written=pages_written,
            slots_written=joined % self.layout.tokens_per_page,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return functional.embedding(token_ids, self._weights.embedding)

    def attention(
        self, layer: int, hidden: Tensor, batch: AttentionBatch, arena: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The attention half of one layer: appends this pass's KV to its pages, and attends.

        ``hidden`` [T, H]; ``arena`` uint8 [pages, page_bytes] of the rows' KV device. Returns the hidden
        states after the attention residual [T, H] and the normed input of the FFN half [T, H], whose result
        the caller adds to the former.
        """
        weights = self._weights.layers[layer]
        normed = kernels.rms_norm(hidden, weights.input_norm, self.spec.norm_eps)
        kv = layers.PagedLayer.of(arena, self.layout, layer, self._dtype, batch)
        match self.spec.attention, weights.attention:
            case GqaSpec() as spec, GqaWeights() as own:
                attended = layers.gqa(spec, own, normed, self._rope, kv, self.spec.norm_eps)
            case MlaSpec() as spec, MlaWeights() as own:
                attended = layers.mla(spec, own, normed, self._rope, kv)
            case _:
                raise InvariantError(f"layer {layer}: weights of another kind of attention than the spec's")
        hidden = hidden + attended
        return hidden, kernels.rms_norm(hidden, weights.ffn_norm, self.spec.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [R, H] -> float32 [R, V]."""
        normed = kernels.rms_norm(hidden, self._weights.final_norm, self.spec.norm_eps)
        return kernels.linear(normed, self._weights.head).float()

    def _check_pages(self, row: int, first: int, count: int, tables: Sequence[Tensor]) -> None:
        """A page id of -1 would silently be the arena's last page, and so another sequence's KV."""
        needed = self.layout.chunks(first + count)
        for group, table in enumerate(tables):
            visible = table[self.layout.first_kept_chunk(group, first) : needed]
            if len(table) < needed or int(visible.min()) < 0:
                raise InvariantError(
                    f"row {row}, layer group {group}: positions {first} to {first + count - 1} need pages "
                    f"{self.layout.first_kept_chunk(group, first)} to {needed - 1} of {table.tolist()}"
                )


def ffn(spec: FfnSpec, weights: FfnWeights, hidden: Tensor) -> Tensor:
    """The FFN half of one layer: normed hidden states [T, H] -> [T, H], without the residual."""
    router = spec.router
    if router is None:
        return kernels.dense_ffn(hidden, weights.experts[0], spec.activation)
    if weights.router is None:
        raise InvariantError("the weights of an FFN with experts lack their router")
    chosen, chosen_weights = kernels.router(
        hidden,
        weights.router,
        weights.selection_bias,
        top_k=router.top_k,
        scoring=router.scoring,
        normalise=router.normalise,
        scale=router.scale,
        groups=router.groups,
        top_groups=router.top_groups,
        group_score=router.group_score,
    )
    return kernels.moe_ffn(hidden, chosen, chosen_weights, weights.experts, weights.shared, spec.activation)
