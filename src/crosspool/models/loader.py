"""From a mapped checkpoint to the weights of the two sides."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from crosspool.core.errors import CorruptCheckpointError
from crosspool.core.spec import GqaSpec, ModelSpec
from crosspool.kernels.float8 import Float8Weight, quantise_fp8
from crosspool.kernels.interface import ExpertWeights
from crosspool.models import registry, weight_names
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.weight_names import ExpertSlots, FfnSlots, TensorSlot
from crosspool.models.weights import (
    AttentionLayerWeights,
    AttentionSideWeights,
    FfnWeights,
    GqaWeights,
    MlaWeights,
    torch_dtype,
)

__all__ = ["Checkpoint", "check_tensors", "load_attention_side", "load_ffn"]


def check_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Hold every tensor's header against the spec; no data is read.

    Raises MissingTensorError or TensorShapeError naming file and tensor.
    """
    for slot in weight_names.all_slots(spec, registry.family(spec.architecture).names):
        checkpoint.check(slot)


def load_attention_side(spec: ModelSpec, checkpoint: Checkpoint) -> AttentionSideWeights:
    """Everything that is not FFN: views of the mapped files where they store the model's dtype.

    The matrices that expand latents are copied apart, for batched products want them contiguous. Raises
    MissingTensorError or TensorShapeError naming file and tensor.
    """
    model = _tensors(checkpoint, weight_names.model_slots(spec), spec)
    model.setdefault("head", model["embedding"])
    layers = tuple(_load_layer(spec, checkpoint, layer) for layer in range(spec.num_layers))
    return AttentionSideWeights(layers=layers, **model)


def _load_layer(spec: ModelSpec, checkpoint: Checkpoint, layer: int) -> AttentionLayerWeights:
    norms = _tensors(checkpoint, weight_names.norm_slots(spec, layer), spec)
    tensors = _tensors(checkpoint, weight_names.attention_slots(spec, layer), spec)
    if isinstance(spec.attention, GqaSpec):
        return AttentionLayerWeights(attention=GqaWeights(**tensors), **norms)
    expand = tensors.pop("expand").view(spec.attention.num_heads, -1, spec.attention.kv_lora_rank)
    nope = spec.attention.qk_nope_head_dim
    tensors["expand_key"] = expand[:, :nope].contiguous()
    tensors["expand_value"] = expand[:, nope:].contiguous()
    return AttentionLayerWeights(attention=MlaWeights(**tensors), **norms)


def load_ffn(spec: ModelSpec, checkpoint: Checkpoint, layer: int) -> FfnWeights:
    """The FFN half of one layer: views of the mapped files where they store what is held.

    A selection bias is always float32: it decides between experts whose scores are close. Of an FFN that is
    held in float8, what is stored otherwise is quantised. Raises MissingTensorError, TensorShapeError, or
    CorruptCheckpointError for what cannot be quantised, naming file and tensor.
    """
    names = registry.family(spec.architecture).names
    slots = weight_names.ffn_slots(spec, names, layer)
    dtype, float8 = torch_dtype(spec.dtype), spec.layers[layer].ffn.float8
    scales: dict[TensorSlot, torch.Tensor] = {}
    if float8:
        quantised = {slot: _load_float8(checkpoint, slot, dtype) for slot in slots.matrices()}
        loaded = {slot: weight.numbers for slot, weight in quantised.items()}
        scales = {slot: weight.scales for slot, weight in quantised.items()}
    else:
        loaded = {slot: checkpoint.tensor(slot, dtype) for slot in slots.matrices()}
    experts, shared = _by_expert(slots, loaded)
    expert_scales, shared_scales = _by_expert(slots, scales) if float8 else ((), None)
    return FfnWeights(
        router=None if slots.router is None else checkpoint.tensor(slots.router, dtype),
        selection_bias=(
            None if slots.selection_bias is None else checkpoint.tensor(slots.selection_bias, torch.float32)
        ),
        experts=experts,
        shared=shared,
        mapped=all(
            checkpoint.is_float8(slot) if slot in loaded and float8 else checkpoint.stored_as(slot, dtype)
            for slot in slots.all()
            if slot is not slots.selection_bias
        ),
        expert_scales=expert_scales,
        shared_scales=shared_scales,
    )


def _load_float8(checkpoint: Checkpoint, slot: TensorSlot, dtype: torch.dtype) -> Float8Weight:
    if checkpoint.is_float8(slot):
        return checkpoint.float8(slot)
    try:
        return quantise_fp8(checkpoint.tensor(slot, dtype))
    except ValueError as error:
        raise CorruptCheckpointError(f"{checkpoint.folder}: {slot.name}: {error}") from error


def _by_expert(
    slots: FfnSlots, loaded: Mapping[TensorSlot, torch.Tensor]
) -> tuple[tuple[ExpertWeights, ...], ExpertWeights | None]:
    """Routed experts, and the shared ones."""

    def expert(part: ExpertSlots) -> ExpertWeights:
        return ExpertWeights(*(loaded[slot] for slot in part.all()))

    shared = None if slots.shared is None else expert(slots.shared)
    return tuple(expert(part) for part in slots.experts), shared


def _tensors(
    checkpoint: Checkpoint, slots: dict[str, TensorSlot], spec: ModelSpec
) -> dict[str, torch.Tensor]:
    dtype = torch_dtype(spec.dtype)
    return {field: checkpoint.tensor(slot, dtype) for field, slot in slots.items()}
