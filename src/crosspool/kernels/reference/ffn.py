"""Gated feed-forward networks: dense, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.reference.linear import linear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
        "relu": functional.relu,
    }
)


def dense_ffn(hidden: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
    """See interface.DenseFfn."""
    gate = ACTIVATIONS[activation](linear(hidden, weights.gate))
    return linear(gate * linear(hidden, weights.up), weights.down)


def moe_ffn(
    hidden: Tensor,
    chosen: Tensor,
    chosen_weights: Tensor,
    experts: Sequence[ExpertWeights],
    shared: ExpertWeights | None,
    activation: str,
) -> Tensor:
    """See interface.MoeFfn. Each expert that some token chose runs once, over all its tokens."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    by_expert = chosen.flatten().argsort(stable=True)
    tokens = by_expert // chosen.shape[-1]
    gains = chosen_weights.flatten()[by_expert].unsqueeze(-1)
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    begin = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        span = slice(begin, begin + count)
        result = dense_ffn(hidden[tokens[span]], experts[expert], activation)
        total.index_add_(0, tokens[span], result.float() * gains[span])
        begin += count
    if shared is not None:
        total += dense_ffn(hidden, shared, activation)
    return total.to(hidden.dtype)
