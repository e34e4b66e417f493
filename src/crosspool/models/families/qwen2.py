"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from crosspool.core.spec import LayerSpec
from crosspool.models.families.common import Family, Geometry, dense_ffn, gqa, layer_windows
from crosspool.models.public_config import PublicConfig


def geometry(config: PublicConfig) -> Geometry:
    attention, rope = gqa(config, qkv_bias=True)
    ffn = dense_ffn(config)
    return Geometry(attention, rope, tuple(LayerSpec(ffn, window) for window in layer_windows(config)))


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    geometry=geometry,
)
