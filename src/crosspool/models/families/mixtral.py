"""Mixtral 8x7B and 8x22B: every layer has experts, and the chosen ones' weights sum to one."""

from crosspool.core.spec import RouterSpec
from crosspool.models.families.common import Family, Geometry, gqa, moe_ffn, uniform
from crosspool.models.public_config import PublicConfig
from crosspool.models.weight_names import WeightNames


def geometry(config: PublicConfig) -> Geometry:
    attention, rope = gqa(config)
    router = RouterSpec(
        num_experts=config.count("num_local_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok"),
        normalise=True,
    )
    ffn = moe_ffn(config, router, intermediate=config.size("intermediate_size"))
    return Geometry(attention, rope, uniform(config, ffn, config.optional_size("sliding_window")))


EXPERT = "block_sparse_moe.experts.{expert}."

FAMILY = Family(
    architecture="MixtralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    geometry=geometry,
    names=WeightNames(
        router="block_sparse_moe.gate.weight", expert=(EXPERT + "w1", EXPERT + "w3", EXPERT + "w2")
    ),
)
