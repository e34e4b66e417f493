"""Qwen3-MoE (Qwen3-30B-A3B and others): Qwen3's attention, experts in all or some of the layers."""

from crosspool.core.spec import LayerSpec, RouterSpec
from crosspool.models.families.common import Family, Geometry, dense_ffn, gqa, moe_ffn
from crosspool.models.public_config import PublicConfig


def geometry(config: PublicConfig) -> Geometry:
    bias = config.flag("attention_bias")
    attention, rope = gqa(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    router = RouterSpec(
        num_experts=config.count("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        normalise=config.flag("norm_topk_prob"),
    )
    sparse = moe_ffn(config, router, intermediate=config.size("moe_intermediate_size"))
    dense = dense_ffn(config)
    step = config.size("decoder_sparse_step")
    dense_layers = _mlp_only_layers(config)
    layers = tuple(
        LayerSpec(sparse if layer not in dense_layers and (layer + 1) % step == 0 else dense, window)
        for layer in range(config.count("num_hidden_layers"))
    )
    return Geometry(attention, rope, layers)


def _mlp_only_layers(config: PublicConfig) -> frozenset[int]:
    layers = config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise config.wrong("mlp_only_layers", layers, "a list of layer numbers")
    return frozenset(layers)


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    geometry=geometry,
)
