"""The parts of a layer's attention half: rotary tables, the layer's pages, and the two kinds of attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi

import torch
from torch import Tensor

from crosspool.core.errors import InvariantError
from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import GqaSpec, MlaSpec, RopeKind, RopeSpec
from crosspool.kernels import reference as kernels
from crosspool.kernels.interface import AttentionBatch
from crosspool.models.rope_config import yarn_mscale
from crosspool.models.weights import GqaWeights, MlaWeights


class RopeTable:
    """Cosines and sines of all positions so far needed, float32 [positions, dim / 2]; grows by doubling."""

    def __init__(self, rope: RopeSpec, max_context: int) -> None:
        self.interleaved = rope.interleaved
        self._max_context = max_context
        self._frequencies, self._gain = rope_frequencies(rope)
        self._table = (self._frequencies.new_empty(0, rope.dim // 2),) * 2

    def at(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, dim / 2] at the batch's positions."""
        context = batch.longest_context
        cos, sin = self._table
        if context > len(cos):
            cos, sin = self._grow(context)
        return cos[batch.positions], sin[batch.positions]

    def _grow(self, context: int) -> tuple[Tensor, Tensor]:
        if context > self._max_context:
            raise InvariantError(
                f"a sequence of {context} tokens, the model's context is {self._max_context}"
            )
        length = min(max(context, 2 * len(self._table[0]), 256), self._max_context)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        self._table = (angles.cos() * self._gain, angles.sin() * self._gain)
        return self._table


def rope_frequencies(rope: RopeSpec) -> tuple[Tensor, float]:
    """Angle per position of each pair, float32 [dim / 2], and what cosines and sines are multiplied with.

    Dynamic NTK scaling is the unscaled embedding within the context that is served (read_max_context).
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor, 1.0
    if rope.kind is RopeKind.LLAMA3:
        return _llama3_frequencies(rope, frequencies), 1.0
    if rope.kind is RopeKind.YARN:
        return _yarn_frequencies(rope, frequencies), _yarn_gain(rope)
    return frequencies, 1.0


def _llama3_frequencies(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1 model card)."""
    turns = rope.original_max_position * frequencies / (2 * pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def _yarn_frequencies(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Pairs that turn often in the trained context are kept, those that turn rarely are stretched, with a
    linear ramp over the pairs between (arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(times: float) -> float:
        return rope.dim * log(rope.original_max_position / (times * 2 * pi)) / (2 * log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return stretched * frequencies / rope.factor + (1 - stretched) * frequencies


def _yarn_gain(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One layer's part of every page, for one pass.

    ``tokens`` [P, ...] is a view of the arena in model dtype, with the inside of a page as in
    core/kv_layout.py.
    """

    tokens: Tensor
    batch: AttentionBatch
    group: int
    window: int | None

    @staticmethod
    def of(
        arena: Tensor, layout: KvLayout, layer: int, dtype: torch.dtype, batch: AttentionBatch
    ) -> PagedLayer:
        """``arena`` is uint8 [P, page_bytes]; ``tokens`` is [P, tokens_per_page * elements]."""
        group = layout.group_of_layer[layer]
        size = layout.tokens_per_page * layout.bytes_per_token_layer
        begin = layout.place_of_layer[layer] * size
        tokens = arena[:, begin : begin + size].view(dtype)
        return PagedLayer(tokens, batch, group, layout.groups[group].window)

    def write(self, pages: Tensor, values: Tensor) -> None:
        kernels.write_pages(pages, values, self.batch.pages_written[self.group], self.batch.slots_written)


def gqa(
    spec: GqaSpec, weights: GqaWeights, hidden: Tensor, rope: RopeTable, kv: PagedLayer, norm_eps: float
) -> Tensor:
    """Grouped-query attention of normed ``hidden`` [T, H] -> [T, H]. Writes this pass's keys and values."""
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
    query = kernels.linear(hidden, weights.query, weights.query_bias).view(-1, heads, width)
    key = kernels.linear(hidden, weights.key, weights.key_bias).view(-1, kv_heads, width)
    value = kernels.linear(hidden, weights.value, weights.value_bias).view(-1, kv_heads, width)
    if weights.query_norm is not None and weights.key_norm is not None:
        query = kernels.rms_norm(query, weights.query_norm, norm_eps)
        key = kernels.rms_norm(key, weights.key_norm, norm_eps)
    cos, sin = rope.at(kv.batch)
    query = kernels.rope(query, cos, sin, rope.interleaved)
    key_pages, value_pages = kv.tokens.view(len(kv.tokens), 2, -1, kv_heads, width).unbind(1)
    kv.write(key_pages, kernels.rope(key, cos, sin, rope.interleaved))
    kv.write(value_pages, value)
    attended = kernels.gqa_attention(query, key_pages, value_pages, kv.batch, kv.group, kv.window, spec.scale)
    return kernels.linear(attended.flatten(1), weights.output, weights.output_bias)


def mla(spec: MlaSpec, weights: MlaWeights, hidden: Tensor, rope: RopeTable, kv: PagedLayer) -> Tensor:
    """Latent attention of normed ``hidden`` [T, H] -> [T, H]. Writes this pass's latents and rotary keys.

    The matrices that would expand a latent into keys and values are applied to the query before attention
    and to the attended latent after it (arXiv 2405.04434, section 2.1.2).
    """
    nope, rank = spec.qk_nope_head_dim, spec.kv_lora_rank
    cos, sin = rope.at(kv.batch)
    latent = kernels.linear(hidden, weights.latent, weights.latent_bias)
    latent, rotary_key = latent[:, :rank], latent[:, rank:]
    latent = kernels.rms_norm(latent, weights.latent_norm, spec.latent_norm_eps)
    rotary_key = kernels.rope(rotary_key.unsqueeze(1), cos, sin, rope.interleaved).squeeze(1)
    pages = kv.tokens.view(len(kv.tokens), -1, rank + spec.qk_rope_head_dim)
    kv.write(pages, torch.cat((latent, rotary_key), dim=-1))

    if weights.query_down is not None and weights.query_norm is not None:
        hidden = kernels.linear(hidden, weights.query_down, weights.query_down_bias)
        hidden = kernels.rms_norm(hidden, weights.query_norm, spec.latent_norm_eps)
    query = kernels.linear(hidden, weights.query).view(len(hidden), spec.num_heads, -1)
    query_latent = torch.bmm(query[..., :nope].transpose(0, 1), weights.expand_key).transpose(0, 1)
    query_rotary = kernels.rope(query[..., nope:], cos, sin, rope.interleaved)
    attended = kernels.mla_attention(
        torch.cat((query_latent, query_rotary), dim=-1),
        pages,
        rank,
        kv.batch,
        kv.group,
        kv.window,
        spec.scale,
    )
    values = torch.bmm(attended.transpose(0, 1), weights.expand_value.transpose(1, 2)).transpose(0, 1)
    return kernels.linear(values.flatten(1), weights.output, weights.output_bias)
