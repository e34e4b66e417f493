"""The weights of one model as tensors: attention side and FFN halves, which live in different pools.

Shapes: H hidden size, V vocabulary, E experts, I intermediate size; matrices are [out, in] as public
checkpoints store them. ``None`` where the model has no such weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from crosspool.core.spec import DType
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
    """

    router: Tensor | None
    selection_bias: Tensor | None
    experts: tuple[ExpertWeights, ...]
    shared: ExpertWeights | None
    mapped: bool

    def tensors(self) -> Iterator[Tensor]:
        yield from (tensor for tensor in (self.router, self.selection_bias) if tensor is not None)
        for expert in self.experts:
            yield from expert
        if self.shared is not None:
            yield from self.shared

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def part_of(width: int, index: int, count: int) -> slice:
    """Part ``index`` of ``count`` of so many intermediate elements."""
    return slice(index * width // count, (index + 1) * width // count)


def shard_ffn(weights: FfnWeights, index: int, count: int) -> FfnWeights:
    """Shard ``index`` of ``count``: a slice of every expert's intermediate dimension, as views.

    Slices may differ in width by one, and be empty where there are fewer columns than shards. Every shard has
    the router. The sum of all shards' results is the result of the whole.
    """

    def cut(expert: ExpertWeights) -> ExpertWeights:
        part = part_of(expert.gate.shape[0], index, count)
        return ExpertWeights(expert.gate[part], expert.up[part], expert.down[:, part])

    return replace(
        weights,
        experts=tuple(cut(expert) for expert in weights.experts),
        shared=None if weights.shared is None else cut(weights.shared),
    )
