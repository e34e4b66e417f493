"""The weights of one model as tensors: attention side and FFN halves, which live in different pools.

Shapes: H hidden size, V vocabulary, E experts, I intermediate size; matrices are [out, in] as public
checkpoints store them. ``None`` where the model has no such weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from crosspool.core.spec import FLOAT8_BLOCK, DType, FfnSpec
from crosspool.kernels.interface import ExpertWeights

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}


def torch_dtype(dtype: DType) -> torch.dtype:
    return _TORCH_DTYPES[dtype]


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """Grouped-query attention of one layer; the norms are over one head."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """Multi-head latent attention of one layer.

    ``latent`` [rank + R, H] makes the latent and the rotary key; ``expand_key`` [N, nope, rank] and
    ``expand_value`` [N, v, rank] are each head's matrices from a latent to its key and its value. With
    ``query_down`` queries have a latent of their own.
    """

    query: Tensor
    latent: Tensor
    latent_norm: Tensor
    expand_key: Tensor
    expand_value: Tensor
    output: Tensor
    query_down: Tensor | None = None
    query_down_bias: Tensor | None = None
    query_norm: Tensor | None = None
    latent_bias: Tensor | None = None
    output_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionLayerWeights:
    """One layer's attention half, and the norm [H] that its FFN half's input goes through."""

    input_norm: Tensor
    attention: GqaWeights | MlaWeights
    ffn_norm: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.input_norm, self.ffn_norm)
        for field in fields(self.attention):
            weight = getattr(self.attention, field.name)
            if weight is not None:
                yield weight


@dataclass(frozen=True, slots=True)
class AttentionSideWeights:
    """Everything of a model that is not FFN. A tied ``head`` [V, H] is the ``embedding`` itself."""

    embedding: Tensor
    layers: tuple[AttentionLayerWeights, ...]
    final_norm: Tensor
    head: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.embedding, self.final_norm)
        if self.head is not self.embedding:
            yield self.head
        for layer in self.layers:
            yield from layer.tensors()

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """The FFN half of one layer, or one shard of it.

    ``router`` [E, H] and ``selection_bias`` float32 [E]; a dense FFN has no router and one expert.
    ``shared`` is the shared experts taken together. ``mapped``: every matrix is a view of the mapped file.
    Matrices in float8 have scales: in place of a matrix [R, C] its blocks', float32 [R / 128, C / 128].
    """

    router: Tensor | None
    selection_bias: Tensor | None
    experts: tuple[ExpertWeights, ...]
    shared: ExpertWeights | None
    mapped: bool
    expert_scales: tuple[ExpertWeights, ...] = ()
    shared_scales: ExpertWeights | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor for tensor in (self.router, self.selection_bias) if tensor is not None)
        for expert in (*self.experts, *self.expert_scales):
            yield from expert
        for shared in (self.shared, self.shared_scales):
            if shared is not None:
                yield from shared

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def part_of(width: int, index: int, count: int, unit: int = 1) -> slice:
    """Part ``index`` of ``count`` of so many intermediate elements, cut at multiples of ``unit``."""
    units = -(-width // unit)
    begin, end = (min(unit * (number * units // count), width) for number in (index, index + 1))
    return slice(begin, end)


def part_of_ffn(ffn: FfnSpec, index: int, count: int) -> FfnSpec:
    """What shard ``index`` of ``count`` is of an FFN."""
    unit = FLOAT8_BLOCK if ffn.float8 else 1

    def columns(width: int) -> int:
        return len(range(width)[part_of(width, index, count, unit)])

    return replace(
        ffn, intermediate=columns(ffn.intermediate), shared_intermediate=columns(ffn.shared_intermediate)
    )


def shard_ffn(weights: FfnWeights, index: int, count: int) -> FfnWeights:
    """Shard ``index`` of ``count``: a slice of every expert's intermediate dimension, as views.

    Slices may differ in width by one, and be empty where there are fewer columns than shards. Those of float8
    matrices are whole blocks, so that their numbers and scales are the same on every placement. Every shard
    has the router. The sum of all shards' results is the result of the whole.
    """
    unit = FLOAT8_BLOCK if weights.expert_scales else 1

    def cut(expert: ExpertWeights, unit: int) -> ExpertWeights:
        part = part_of(expert.gate.shape[0], index, count, unit)
        return ExpertWeights(expert.gate[part], expert.up[part], expert.down[:, part])

    return replace(
        weights,
        experts=tuple(cut(expert, unit) for expert in weights.experts),
        shared=None if weights.shared is None else cut(weights.shared, unit),
        expert_scales=tuple(cut(scales, 1) for scales in weights.expert_scales),
        shared_scales=None if weights.shared_scales is None else cut(weights.shared_scales, 1),
    )
