"""Sparse upcycling (arXiv 2212.05055) of a dense Llama into the Mixtral architecture, exactly.

Each FFN is copied into every expert. Router rows come in identical pairs, so the two best experts of a token
are equally good and weigh 0.5 each; 0.5 y + 0.5 y is y without rounding. So the upcycled model computes what
the dense one does, but routes different tokens to different experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crosspool.demo.checkpoint import Bf16, NamedTensor, to_bf16

_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def upcycle_config(dense: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """The config.json of the upcycled model."""
    return {
        **dense,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "sliding_window": None,
    }


def upcycle(dense: list[NamedTensor], experts: int, seed: int) -> list[NamedTensor]:
    """The weights of the upcycled model, in the hub's names for Mixtral. Expert copies share their arrays."""
    rng = np.random.default_rng(seed)
    tensors: list[NamedTensor] = []
    for name, values in dense:
        layer, _, slot = name.partition(".mlp.")
        if not slot:
            tensors.append((name, values))
            continue
        projection = slot.removesuffix(".weight")
        moe = f"{layer}.block_sparse_moe"
        if projection == "gate_proj":
            tensors.append((f"{moe}.gate.weight", paired_router(experts, values.shape[1], rng)))
        weight = f"{_EXPERT_NAMES[projection]}.weight"
        tensors.extend((f"{moe}.experts.{expert}.{weight}", values) for expert in range(experts))
    return tensors


def paired_router(experts: int, hidden: int, rng: np.random.Generator) -> Bf16:
    """Router rows [experts, hidden]: rows 2i and 2i + 1 are the same, and differ from all others.

    Each row has one element that is not zero, so a router logit is one product and does not depend on the
    order in which a kernel sums: the logits of a pair are equal in every implementation and dtype.
    """
    if experts % 2 or not 2 <= experts <= 2 * hidden:
        raise ValueError(f"experts must be even and at most twice the hidden size, not {experts}")
    pairs = np.zeros((experts // 2, hidden), dtype=np.float32)
    columns = rng.choice(hidden, size=experts // 2, replace=False)
    pairs[np.arange(experts // 2), columns] = rng.choice([-1.0, 1.0], size=experts // 2)
    return to_bf16(np.repeat(pairs, 2, axis=0))
