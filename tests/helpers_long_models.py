"""Tiny models with room for contexts of many blocks, one of each kind of KV."""

from __future__ import annotations

from transformers import DeepseekV2Config, MistralConfig, Qwen3MoeConfig


def gqa(kv_heads: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=14,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


CONFIGS = {
    "gqa-1": gqa(1),
    "gqa-2": gqa(2),
    "gqa-3": gqa(3),
    "window": MistralConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        sliding_window=300,
        max_position_embeddings=2048,
    ),
    "mla": DeepseekV2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=2048,
    ),
}
