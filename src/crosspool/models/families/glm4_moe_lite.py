"""GLM-4.7-Flash: latent attention, a sigmoid router with a selection bias, a leading dense layer."""

from crosspool.core.spec import FfnSpec, GroupScore, LayerSpec, RouterSpec, Scoring
from crosspool.models.families.common import Family, Geometry, dense_ffn, leading_dense, mla, moe_ffn
from crosspool.models.public_config import PublicConfig


def geometry(config: PublicConfig) -> Geometry:
    attention, rope = mla(config, interleaved=config.flag("rope_interleave"))
    method = config.text("topk_method")
    if method != "noaux_tc":
        raise config.unsupported(f"topk_method {method!r} is not supported, only noaux_tc")
    router = RouterSpec(
        num_experts=config.count("n_routed_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        scoring=Scoring.SIGMOID,
        normalise=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor"),
        groups=config.size("n_group"),
        top_groups=config.size("topk_group"),
        group_score=GroupScore.TOP2_SUM,
        selection_bias=True,
    )
    if router.num_experts < 2 * router.groups:
        raise config.wrong("n_group", router.groups, f"at most half of {router.num_experts} experts")
    width = config.size("moe_intermediate_size")
    shared = width * config.size("n_shared_experts", low=0)
    sparse = moe_ffn(config, router, intermediate=width, shared=shared)
    return Geometry(attention, rope, _layers(config, dense_ffn(config), sparse))


def _layers(config: PublicConfig, dense: FfnSpec, sparse: FfnSpec) -> tuple[LayerSpec, ...]:
    """``mlp_layer_types`` says which layers have experts; without it the first few are dense."""
    types = config.get("mlp_layer_types")
    if types is None:
        return tuple(leading_dense(config, config.size("first_k_dense_replace", low=0), dense, sparse))
    kinds = {"dense": dense, "sparse": sparse}
    count = config.count("num_hidden_layers")
    if not isinstance(types, list) or len(types) != count or any(kind not in kinds for kind in types):
        raise config.wrong("mlp_layer_types", types, f"a list of {count} times dense or sparse")
    return tuple(LayerSpec(kinds[kind]) for kind in types)


FAMILY = Family(
    architecture="Glm4MoeLiteForCausalLM",
    defaults={
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.8,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "qk_nope_head_dim": 192,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
    },
    geometry=geometry,
)
