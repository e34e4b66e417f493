from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspool.demo.checkpoint import to_bf16
from crosspool.demo.upcycle import paired_router, upcycle, upcycle_config
from helpers_bf16 import from_bf16

pytestmark = pytest.mark.backend

HIDDEN = 48


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_router_rows_come_in_pairs_that_differ(experts: int) -> None:
    rows = from_bf16(paired_router(experts, HIDDEN, np.random.default_rng(0)))
    assert rows.shape == (experts, HIDDEN)
    assert np.array_equal(rows[0::2], rows[1::2])
    assert len(np.unique(rows, axis=0)) == experts // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_two_experts_are_a_pair_of_exactly_equal_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router = torch.from_numpy(from_bf16(paired_router(8, HIDDEN, np.random.default_rng(3)))).to(dtype)
    hidden = torch.randn(200, HIDDEN).to(dtype)
    scores = torch.softmax(hidden @ router.T, dim=-1, dtype=torch.float32)
    weights, chosen = scores.topk(2, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(dtype)
    assert torch.equal(weights, torch.full_like(weights, 0.5))
    assert torch.equal(chosen.sort(dim=-1).values[:, 1] // 2, chosen.sort(dim=-1).values[:, 0] // 2)
    assert len(set((chosen[:, 0] // 2).tolist())) == 4


def test_router_logits_do_not_depend_on_the_order_of_summation() -> None:
    router = from_bf16(paired_router(8, HIDDEN, np.random.default_rng(3)))
    hidden = np.random.default_rng(4).standard_normal((50, HIDDEN)).astype(np.float32)
    forwards, backwards = np.zeros((50, 8), np.float32), np.zeros((50, 8), np.float32)
    for column in range(HIDDEN):
        forwards += np.outer(hidden[:, column], router[:, column])
        backwards += np.outer(hidden[:, -1 - column], router[:, -1 - column])
    assert np.array_equal(forwards, backwards)


@pytest.mark.parametrize("experts", [0, 3, 98])
def test_a_number_of_experts_that_has_no_pairs_is_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=f"not {experts}"):
        paired_router(experts, HIDDEN, np.random.default_rng(0))


def test_every_ffn_is_copied_and_the_rest_is_kept() -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (10, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": (20, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (20, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, 20),
    }
    dense = [(name, to_bf16(rng.standard_normal(s, dtype=np.float32))) for name, s in shapes.items()]
    moe = dict(upcycle(dense, 4, seed=1))
    assert len(moe) == 2 + 1 + 3 * 4
    layer, block = "model.layers.0.mlp", "model.layers.0.block_sparse_moe"
    for expert in range(4):
        for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            assert np.array_equal(
                moe[f"{block}.experts.{expert}.{ours}.weight"], dict(dense)[f"{layer}.{theirs}.weight"]
            )
    assert moe[f"{block}.gate.weight"].shape == (4, HIDDEN)
    assert np.array_equal(moe["model.embed_tokens.weight"], dense[0][1])


def test_the_config_says_mixtral_and_keeps_the_geometry() -> None:
    config = upcycle_config({"architectures": ["LlamaForCausalLM"], "hidden_size": 48}, 4)
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert config["hidden_size"] == 48
