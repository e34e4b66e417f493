"""Small model geometries for tests of the control plane."""

from __future__ import annotations

from crosspool.core.spec import (
    DType,
    FfnSpec,
    GqaSpec,
    LayerSpec,
    MlaSpec,
    ModelSpec,
    RopeSpec,
    RouterSpec,
)


def gqa_spec(
    *,
    layers: int = 4,
    kv_heads: int = 1,
    head_dim: int = 8,
    windows: tuple[int | None, ...] | None = None,
    max_context: int = 4096,
    hidden: int = 32,
    vocab: int = 97,
) -> ModelSpec:
    """A MoE model with grouped-query attention; ``windows`` gives each layer's, None is full attention."""
    ffn = FfnSpec(intermediate=24, router=RouterSpec(num_experts=5, top_k=2))
    return ModelSpec(
        architecture="TestGqa",
        hidden_size=hidden,
        vocab_size=vocab,
        max_context=max_context,
        layers=tuple(LayerSpec(ffn, window) for window in (windows or (None,) * layers)),
        attention=GqaSpec(num_heads=3 * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=0.35),
        rope=RopeSpec(dim=head_dim, theta=10_000.0),
        norm_eps=1e-6,
        tied_embeddings=True,
        dtype=DType.BFLOAT16,
    )


def mla_spec(*, layers: int = 3, latent: int = 20, rope: int = 4, max_context: int = 4096) -> ModelSpec:
    """A model with latent attention and a leading dense layer."""
    dense = LayerSpec(FfnSpec(intermediate=40))
    moe = LayerSpec(
        FfnSpec(intermediate=16, router=RouterSpec(num_experts=6, top_k=2), shared_intermediate=16)
    )
    return ModelSpec(
        architecture="TestMla",
        hidden_size=48,
        vocab_size=97,
        max_context=max_context,
        layers=(dense, *([moe] * (layers - 1))),
        attention=MlaSpec(
            num_heads=3,
            q_lora_rank=None,
            kv_lora_rank=latent,
            qk_nope_head_dim=8,
            qk_rope_head_dim=rope,
            v_head_dim=8,
            scale=0.28,
        ),
        rope=RopeSpec(dim=rope, theta=10_000.0, interleaved=True),
        norm_eps=1e-6,
        tied_embeddings=False,
        dtype=DType.BFLOAT16,
    )
