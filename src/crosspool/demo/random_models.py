"""Two models of seeded random weights, for architectures of which no small real checkpoint is at hand.

They exercise routing, shared experts and latent attention at about 100M parameters each. Their answers mean
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from crosspool.demo.checkpoint import NamedTensor, to_bf16

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def qwen3_moe_config(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A small Qwen3-MoE. ``tokenizer`` gives the vocabulary size and the special token ids."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "max_window_layers": 8,
        "mlp_only_layers": [],
        "moe_intermediate_size": 384,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        **tokenizer,
    }


def deepseek_v2_config(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A small DeepSeek-V2 after the manner of V2-Lite: latent attention, yarn, one leading dense layer."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "kv_lora_rank": 128,
        "max_position_embeddings": 16384,
        "moe_intermediate_size": 384,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 8,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 4.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "v_head_dim": 64,
        **tokenizer,
    }


def qwen3_moe_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of all weights of a Qwen3-MoE with tied embeddings, in the hub's names."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from _ffn(f"{layer}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
    yield "model.norm.weight", (hidden,)


def deepseek_v2_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of all weights of a DeepSeek-V2 without query compression, in the hub's names."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    width = config["moe_intermediate_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (heads * (nope + rope), hidden)
        yield f"{layer}.self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
        yield f"{layer}.self_attn.kv_a_layernorm.weight", (rank,)
        yield f"{layer}.self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * value)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if index < config["first_k_dense_replace"]:
            yield from _ffn(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{layer}.mlp.gate.weight", (config["n_routed_experts"], hidden)
        for expert in range(config["n_routed_experts"]):
            yield from _ffn(f"{layer}.mlp.experts.{expert}", hidden, width)
        yield from _ffn(f"{layer}.mlp.shared_experts", hidden, config["n_shared_experts"] * width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def random_tensors(shapes: Shapes, seed: int) -> list[NamedTensor]:
    """Normal weights of variance 1 / inputs, which keeps activations near 1. Norms, the vectors, are 1."""
    rng = np.random.default_rng(seed)
    tensors = []
    for name, shape in shapes:
        if len(shape) == 1:
            values = np.ones(shape, dtype=np.float32)
        else:
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
        tensors.append((name, to_bf16(values)))
    return tensors


def _ffn(name: str, hidden: int, width: int) -> Shapes:
    yield f"{name}.gate_proj.weight", (width, hidden)
    yield f"{name}.up_proj.weight", (width, hidden)
    yield f"{name}.down_proj.weight", (hidden, width)
