"""Llama 2 and 3, and the many models of its shape."""

from crosspool.models.families.common import Family, Geometry, dense_ffn, gqa, require_no_mlp_bias, uniform
from crosspool.models.public_config import PublicConfig


def geometry(config: PublicConfig) -> Geometry:
    require_no_mlp_bias(config)
    bias = config.flag("attention_bias")
    attention, rope = gqa(config, qkv_bias=bias, output_bias=bias)
    return Geometry(attention, rope, uniform(config, dense_ffn(config)))


FAMILY = Family(
    architecture="LlamaForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    geometry=geometry,
)
