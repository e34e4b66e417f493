"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, shared experts, leading dense layers."""

from crosspool.core.spec import RouterSpec
from crosspool.models.families.common import (
    Family,
    Geometry,
    dense_ffn,
    leading_dense,
    mla,
    moe_ffn,
    require_no_mlp_bias,
)
from crosspool.models.public_config import PublicConfig


def geometry(config: PublicConfig) -> Geometry:
    require_no_mlp_bias(config)
    attention, rope = mla(config, interleaved=True)
    width = config.size("moe_intermediate_size")
    shared = width * (config.optional_size("n_shared_experts", low=0) or 0)
    sparse = moe_ffn(config, _router(config), intermediate=width, shared=shared)
    dense_layers = config.size("first_k_dense_replace", low=0)
    layers = tuple(leading_dense(config, dense_layers, dense_ffn(config), sparse))
    return Geometry(attention, rope, layers)


def _router(config: PublicConfig) -> RouterSpec:
    """Variants whose meaning differs between public implementations of this architecture are refused."""
    method = config.text("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise config.unsupported(
            f"topk_method {method!r} is not supported, only greedy and group_limited_greedy"
        )
    if config.get("norm_topk_prob"):
        raise config.unsupported(
            "norm_topk_prob is not supported: released models of this family have it off"
        )
    if config.text("scoring_func") != "softmax":
        raise config.unsupported(
            f"scoring_func {config.get('scoring_func')!r} is not supported, only softmax"
        )
    if config.size("moe_layer_freq") != 1:
        raise config.unsupported(f"moe_layer_freq {config.get('moe_layer_freq')} is not supported, only 1")
    grouped = method == "group_limited_greedy"
    return RouterSpec(
        num_experts=config.count("n_routed_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok"),
        scale=config.number("routed_scaling_factor"),
        groups=config.size("n_group") if grouped else 1,
        top_groups=config.size("topk_group") if grouped else 1,
    )


FAMILY = Family(
    architecture="DeepseekV2ForCausalLM",
    defaults={
        "vocab_size": 102400,
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
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "v_head_dim": 128,
        "moe_intermediate_size": 1407,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    },
    geometry=geometry,
)
