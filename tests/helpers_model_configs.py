"""Tiny configs of odd geometry for every family, in the public config classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    DeepseekV2Config,
    Glm4MoeLiteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
}
YARN_MSCALE = {**YARN, "mscale": 0.9, "mscale_all_dim": 0.6}


def gqa(kind: type[PreTrainedConfig], **changes: Any) -> Callable[[], PreTrainedConfig]:
    geometry: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 22,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": 128,
    }
    return lambda: kind(**{**geometry, **changes})


def mla(kind: type[PreTrainedConfig], **changes: Any) -> Callable[[], PreTrainedConfig]:
    geometry: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 22,
        "moe_intermediate_size": 14,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": None,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 14,
        "qk_rope_head_dim": 6,
        "v_head_dim": 10,
        "num_experts_per_tok": 2,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "max_position_embeddings": 128,
    }
    return lambda: kind(**{**geometry, **changes})


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": gqa(LlamaConfig),
    "llama-one-kv-head-bias-linear": gqa(
        LlamaConfig, num_key_value_heads=1, attention_bias=True, rope_parameters=LINEAR
    ),
    "llama-tied-llama3": gqa(LlamaConfig, tie_word_embeddings=True, head_dim=24, rope_parameters=LLAMA3),
    "llama-derived-head-dim-dynamic": gqa(
        LlamaConfig, head_dim=None, num_key_value_heads=None, rope_parameters=DYNAMIC
    ),
    "llama-yarn-gelu": gqa(
        LlamaConfig, head_dim=24, rope_parameters=YARN, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-3
    ),
    "mistral-window-shorter-than-page": gqa(MistralConfig, sliding_window=7),
    "mistral-window-one-kv-head": gqa(MistralConfig, sliding_window=23, num_key_value_heads=1),
    "mistral-full-tied": gqa(MistralConfig, sliding_window=None, tie_word_embeddings=True),
    "mistral-window-yarn": gqa(
        MistralConfig, sliding_window=40, rope_parameters={**YARN, "truncate": False}, num_hidden_layers=3
    ),
    "qwen2": gqa(Qwen2Config, head_dim=14),
    "qwen2-tied-last-layers-window": gqa(
        Qwen2Config, tie_word_embeddings=True, use_sliding_window=True, sliding_window=21, max_window_layers=1
    ),
    "qwen2-layer-types-one-kv-head": gqa(
        Qwen2Config,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    "qwen2-yarn": gqa(Qwen2Config, head_dim=24, rope_parameters=YARN_MSCALE),
    "qwen3": gqa(Qwen3Config),
    "qwen3-bias-tied": gqa(Qwen3Config, attention_bias=True, tie_word_embeddings=True),
    "qwen3-window-one-kv-head": gqa(
        Qwen3Config,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=22,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3-dynamic": gqa(Qwen3Config, head_dim=18, rope_parameters=DYNAMIC),
    "mixtral-3-experts": gqa(MixtralConfig, num_local_experts=3),
    "mixtral-5-experts-top-1-tied": gqa(
        MixtralConfig, num_local_experts=5, num_experts_per_tok=1, tie_word_embeddings=True
    ),
    "mixtral-7-experts-window": gqa(
        MixtralConfig, num_local_experts=7, num_experts_per_tok=3, sliding_window=20, num_key_value_heads=1
    ),
    "mixtral-all-experts-linear": gqa(
        MixtralConfig, num_local_experts=3, num_experts_per_tok=3, rope_parameters=LINEAR
    ),
    "qwen3-moe-normalised": gqa(
        Qwen3MoeConfig, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=13, norm_topk_prob=True
    ),
    "qwen3-moe-every-other-layer-bias": gqa(
        Qwen3MoeConfig,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=13,
        decoder_sparse_step=2,
        attention_bias=True,
        num_hidden_layers=5,
    ),
    "qwen3-moe-dense-layers-tied": gqa(
        Qwen3MoeConfig,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=13,
        mlp_only_layers=[0, 2],
        tie_word_embeddings=True,
        num_key_value_heads=1,
    ),
    "qwen3-moe-window-yarn": gqa(
        Qwen3MoeConfig,
        num_experts=6,
        num_experts_per_tok=1,
        moe_intermediate_size=13,
        use_sliding_window=True,
        sliding_window=25,
        head_dim=24,
        rope_parameters=YARN,
    ),
    "deepseek-v2-greedy": mla(DeepseekV2Config, first_k_dense_replace=1, n_shared_experts=2),
    "deepseek-v2-query-latent-groups": mla(
        DeepseekV2Config,
        q_lora_rank=17,
        n_routed_experts=15,
        num_experts_per_tok=4,
        topk_method="group_limited_greedy",
        n_group=5,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    "deepseek-v2-yarn": mla(
        DeepseekV2Config, rope_parameters=YARN_MSCALE, qk_rope_head_dim=12, first_k_dense_replace=2
    ),
    "deepseek-v2-query-latent-bias-tied": mla(
        DeepseekV2Config,
        q_lora_rank=11,
        attention_bias=True,
        tie_word_embeddings=True,
        n_routed_experts=3,
        rope_parameters={**YARN_MSCALE, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek-v2-one-head": mla(
        DeepseekV2Config, num_attention_heads=1, num_key_value_heads=1, n_shared_experts=3, rms_norm_eps=1e-3
    ),
    "glm-query-latent": mla(Glm4MoeLiteConfig, q_lora_rank=17, routed_scaling_factor=1.8),
    "glm-groups": mla(
        Glm4MoeLiteConfig,
        n_routed_experts=15,
        num_experts_per_tok=4,
        n_group=5,
        topk_group=2,
        norm_topk_prob=False,
        n_shared_experts=2,
    ),
    "glm-halves-yarn-tied": mla(
        Glm4MoeLiteConfig,
        rope_interleave=False,
        rope_parameters=YARN_MSCALE,
        qk_rope_head_dim=12,
        tie_word_embeddings=True,
    ),
    "glm-layer-types-bias": mla(
        Glm4MoeLiteConfig,
        q_lora_rank=9,
        attention_bias=True,
        n_routed_experts=7,
        num_experts_per_tok=3,
        mlp_layer_types=["sparse", "dense", "dense", "sparse"],
        rope_parameters=LINEAR,
    ),
}
