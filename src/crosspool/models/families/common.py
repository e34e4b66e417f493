"""What the families share: the pieces of a ModelSpec that public configs spell alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from crosspool.core.spec import (
    AttentionSpec,
    DType,
    FfnSpec,
    GqaSpec,
    LayerSpec,
    MlaSpec,
    ModelSpec,
    RopeSpec,
    RouterSpec,
)
from crosspool.models.public_config import PublicConfig
from crosspool.models.rope_config import read_max_context, read_rope, softmax_gain
from crosspool.models.weight_names import WeightNames

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a family makes of a config; the registry adds what does not depend on the family."""

    attention: AttentionSpec
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of public checkpoints.

    ``defaults`` are those of the public config class, for the fields that a config.json leaves out.
    """

    architecture: str
    defaults: Mapping[str, Any]
    geometry: Callable[[PublicConfig], Geometry]
    names: WeightNames = field(default_factory=WeightNames)


def model_spec(
    family: Family, config: PublicConfig, dtype: DType, eos_token_ids: tuple[int, ...]
) -> ModelSpec:
    geometry = family.geometry(config)
    return ModelSpec(
        architecture=family.architecture,
        hidden_size=config.size("hidden_size"),
        vocab_size=config.size("vocab_size"),
        max_context=read_max_context(config, geometry.rope),
        layers=geometry.layers,
        attention=geometry.attention,
        rope=geometry.rope,
        norm_eps=config.number("rms_norm_eps"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=dtype,
        eos_token_ids=eos_token_ids,
    )


def gqa(
    config: PublicConfig, *, qkv_bias: bool = False, output_bias: bool = False, qk_norm: bool = False
) -> tuple[GqaSpec, RopeSpec]:
    """Grouped-query attention and the rotary embedding over its whole heads."""
    heads = config.count("num_attention_heads")
    kv_heads = config.optional_size("num_key_value_heads") or heads
    head_dim = config.optional_size("head_dim") or config.size("hidden_size") // heads
    if head_dim == 0:
        raise config.unsupported(
            f"a hidden size of {config.size('hidden_size')} leaves {heads} heads nothing"
        )
    if heads % kv_heads:
        raise config.unsupported(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    spec = GqaSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )
    return spec, read_rope(config, head_dim)


def mla(config: PublicConfig, *, interleaved: bool) -> tuple[MlaSpec, RopeSpec]:
    """Latent attention and the rotary embedding over the rotary part of its heads."""
    nope = config.size("qk_nope_head_dim")
    rotary = config.size("qk_rope_head_dim")
    rope = read_rope(config, rotary, interleaved=interleaved)
    spec = MlaSpec(
        num_heads=config.count("num_attention_heads"),
        q_lora_rank=config.optional_size("q_lora_rank"),
        kv_lora_rank=config.size("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=config.size("v_head_dim"),
        scale=(nope + rotary) ** -0.5 * softmax_gain(rope),
        bias=config.flag("attention_bias"),
    )
    return spec, rope


def dense_ffn(config: PublicConfig) -> FfnSpec:
    return FfnSpec(intermediate=config.size("intermediate_size"), activation=activation(config))


def moe_ffn(config: PublicConfig, router: RouterSpec, *, intermediate: int, shared: int = 0) -> FfnSpec:
    """Routed experts. Raises CorruptCheckpointError for a router that cannot choose ``top_k`` experts."""
    if router.num_experts % router.groups:
        raise config.wrong("n_group", router.groups, f"a divisor of {router.num_experts} experts")
    if router.top_groups > router.groups:
        raise config.wrong("topk_group", router.top_groups, f"at most the {router.groups} groups")
    candidates = router.num_experts // router.groups * router.top_groups
    if router.top_k > candidates:
        raise config.wrong(
            "num_experts_per_tok", router.top_k, f"at most the {candidates} experts to choose from"
        )
    return FfnSpec(
        intermediate=intermediate,
        activation=activation(config),
        router=router,
        shared_intermediate=shared,
    )


def activation(config: PublicConfig) -> str:
    name = config.text("hidden_act")
    if name not in ACTIVATIONS:
        raise config.unsupported(f"hidden_act {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return name


def uniform(config: PublicConfig, ffn: FfnSpec, window: int | None = None) -> tuple[LayerSpec, ...]:
    """All layers alike."""
    return (LayerSpec(ffn, window),) * config.count("num_hidden_layers")


def leading_dense(
    config: PublicConfig, dense_layers: int, dense: FfnSpec, sparse: FfnSpec
) -> Iterable[LayerSpec]:
    """The first ``dense_layers`` layers are dense, the others have experts."""
    for layer in range(config.count("num_hidden_layers")):
        yield LayerSpec(dense if layer < dense_layers else sparse)


def layer_windows(config: PublicConfig) -> list[int | None]:
    """Each layer's window as Qwen2 and Qwen3 configs say it: ``layer_types`` if given, otherwise the layers
    from ``max_window_layers`` on; none at all unless ``use_sliding_window``."""
    count = config.count("num_hidden_layers")
    window = config.optional_size("sliding_window") if config.flag("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.size("max_window_layers", low=0)
        return [window if layer >= first else None for layer in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise config.wrong("layer_types", types, f"a list of {count} layer types")
    if "sliding_attention" in types and window is None:
        raise config.wrong("sliding_window", config.get("sliding_window"), "set, for layer_types names it")
    windows = {"full_attention": None, "sliding_attention": window}
    if any(kind not in windows for kind in types):
        raise config.unsupported(f"layer_types other than {', '.join(windows)} are not supported: {types}")
    return [windows[kind] for kind in types]


def require_no_mlp_bias(config: PublicConfig) -> None:
    if config.flag("mlp_bias"):
        raise config.unsupported("an FFN with biases (mlp_bias) is not supported")
