"""Rotary embedding of a public config: the old keys ``rope_theta`` and ``rope_scaling``, or the newer
``rope_parameters`` that holds both. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any

from crosspool.core.spec import RopeKind, RopeSpec
from crosspool.models.public_config import MAX_SIZE, PublicConfig

LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(config: PublicConfig, dim: int, *, interleaved: bool = False) -> RopeSpec:
    """The rotary embedding over ``dim`` elements of a head.

    Raises UnsupportedModelError for variants other than RopeKind's.
    """
    values = _parameters(config)
    if dim % 2:
        raise config.unsupported(f"a rotary embedding needs an even number of elements, not {dim}")
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise config.unsupported(f"partial_rotary_factor {partial!r} is not supported, only 1")
    kind = _kind(config, values)
    theta = config.number_in(values.get("rope_theta", config.get("rope_theta")), "rope_theta")
    if theta <= 1:
        raise config.wrong("rope_theta", theta, "a number above 1")
    rope = RopeSpec(dim=dim, theta=theta, kind=kind, interleaved=interleaved)
    if kind is RopeKind.DEFAULT:
        return rope
    original = _original_max_position(config, values)
    factor = values.get("factor")
    if factor is None and kind is RopeKind.YARN:
        factor = config.size("max_position_embeddings") / original
    rope = replace(
        rope,
        factor=config.number_in(factor, "the rotary embedding's factor"),
        original_max_position=original,
        mscale_all_dim=_optional(config, values, "mscale_all_dim"),
    )
    if kind is RopeKind.LLAMA3:
        low = config.number_in(values.get("low_freq_factor"), "low_freq_factor")
        high = config.number_in(values.get("high_freq_factor"), "high_freq_factor")
        if high <= low:
            raise config.wrong("high_freq_factor", high, f"above low_freq_factor {low:g}")
        return replace(rope, low_freq_factor=low, high_freq_factor=high)
    if kind is RopeKind.YARN:
        return replace(
            rope,
            beta_fast=_optional(config, values, "beta_fast") or rope.beta_fast,
            beta_slow=_optional(config, values, "beta_slow") or rope.beta_slow,
            mscale=_optional(config, values, "mscale"),
            attention_factor=_optional(config, values, "attention_factor"),
            truncate=bool(values.get("truncate", True)),
        )
    return rope


def read_max_context(config: PublicConfig, rope: RopeSpec) -> int:
    """The longest sequence, prompt and output together, that this model serves.

    Linear and yarn scaling stretch the positions that a model was trained on by their factor; in public
    configs ``max_position_embeddings`` may hold either length. The frequencies of dynamic NTK scaling depend
    on the length of the sequence as soon as it is longer than the trained one, so that keys written before
    and after do not fit together: such a model is served up to its trained length, where dynamic NTK is the
    unscaled embedding however the prompt is cut, and not beyond.
    """
    positions = config.size("max_position_embeddings")
    if rope.kind is RopeKind.LINEAR:
        return int(min(positions * rope.factor, MAX_SIZE))
    if rope.kind is RopeKind.YARN:
        return max(positions, int(min(rope.original_max_position * rope.factor, MAX_SIZE)))
    if rope.kind is RopeKind.DYNAMIC:
        return min(positions, rope.original_max_position)
    return positions


def softmax_gain(rope: RopeSpec) -> float:
    """What a scaled rotary embedding multiplies the softmax scale of latent attention with (DeepSeek-V2)."""
    return yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2 if rope.mscale_all_dim else 1.0


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """The gain of attention for a context stretched by ``factor`` (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0


def _parameters(config: PublicConfig) -> Mapping[str, Any]:
    """The one set of parameters, wherever it is. One set per layer type is taken if all are equal."""
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict):
        raise config.wrong("rope_parameters", values, "an object")
    nested = [values[name] for name in LAYER_TYPES if name in values]
    if not nested:
        return values
    if any(other != nested[0] for other in nested) or not isinstance(nested[0], dict):
        raise config.unsupported("rotary embeddings that differ between layer types are not supported")
    return nested[0]


def _kind(config: PublicConfig, values: Mapping[str, Any]) -> RopeKind:
    name = values.get("rope_type", values.get("type", "default"))
    if name not in tuple(RopeKind):
        known = ", ".join(RopeKind)
        raise config.unsupported(f"the rotary embedding {name!r} is not supported, only {known}")
    return RopeKind(name)


def _original_max_position(config: PublicConfig, values: Mapping[str, Any]) -> int:
    """Positions the model was trained on before scaling; a key outside the parameters goes first."""
    for place in (config.values, values):
        if place.get("original_max_position_embeddings") is not None:
            value = place["original_max_position_embeddings"]
            length = int(config.number_in(value, "original_max_position_embeddings"))
            if not 1 <= length <= MAX_SIZE:
                raise config.wrong("original_max_position_embeddings", value, f"1 to {MAX_SIZE:,}")
            return length
    return config.size("max_position_embeddings")


def _optional(config: PublicConfig, values: Mapping[str, Any], name: str) -> float | None:
    """A number that may be left out; null and 0 mean the same."""
    value = values.get(name)
    return None if value is None or value == 0 else config.number_in(value, name)
