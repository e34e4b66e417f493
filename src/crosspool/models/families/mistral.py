"""Mistral 7B and its successors."""

from crosspool.models.families.common import Family, Geometry, dense_ffn, gqa, uniform
from crosspool.models.public_config import PublicConfig


def geometry(config: PublicConfig) -> Geometry:
    attention, rope = gqa(config)
    window = config.optional_size("sliding_window")
    return Geometry(attention, rope, uniform(config, dense_ffn(config), window))


FAMILY = Family(
    architecture="MistralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    geometry=geometry,
)
