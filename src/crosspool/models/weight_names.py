"""Which tensor of a public checkpoint fills which slot, and its shape. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crosspool.core.spec import FfnSpec, GqaSpec, MlaSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A tensor's name in the checkpoint and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of the parts of a layer's FFN; everything else has the same name in all families.

    Names are relative to the layer; ``{expert}`` stands for an expert's number.
    """

    dense: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    router: str = "mlp.gate.weight"
    selection_bias: str = "mlp.gate.e_score_correction_bias"
    expert: tuple[str, str, str] = (
        "mlp.experts.{expert}.gate_proj",
        "mlp.experts.{expert}.up_proj",
        "mlp.experts.{expert}.down_proj",
    )
    shared: tuple[str, str, str] = (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
    )


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    gate: TensorSlot
    up: TensorSlot
    down: TensorSlot

    def all(self) -> tuple[TensorSlot, ...]:
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class FfnSlots:
    """The tensors of one layer's FFN. A dense one has one expert and no router."""

    router: TensorSlot | None
    selection_bias: TensorSlot | None
    experts: tuple[ExpertSlots, ...]
    shared: ExpertSlots | None

    def all(self) -> tuple[TensorSlot, ...]:
        single = tuple(slot for slot in (self.router, self.selection_bias) if slot is not None)
        return single + self.matrices()

    def matrices(self) -> tuple[TensorSlot, ...]:
        """Of the experts and the shared ones."""
        experts = self.experts if self.shared is None else (*self.experts, self.shared)
        return tuple(slot for expert in experts for slot in expert.all())


def all_slots(spec: ModelSpec, names: WeightNames) -> Iterator[TensorSlot]:
    """Every tensor of a model."""
    yield from model_slots(spec).values()
    for layer in range(spec.num_layers):
        yield from norm_slots(spec, layer).values()
        yield from attention_slots(spec, layer).values()
        yield from ffn_slots(spec, names, layer).all()


def model_slots(spec: ModelSpec) -> dict[str, TensorSlot]:
    """Slots outside the layers, by field of AttentionSideWeights. A tied head has none."""
    table = (spec.vocab_size, spec.hidden_size)
    slots = {
        "embedding": TensorSlot("model.embed_tokens.weight", table),
        "final_norm": TensorSlot("model.norm.weight", (spec.hidden_size,)),
    }
    if not spec.tied_embeddings:
        slots["head"] = TensorSlot("lm_head.weight", table)
    return slots


def norm_slots(spec: ModelSpec, layer: int) -> dict[str, TensorSlot]:
    """The two norms of a layer, by field of AttentionLayerWeights."""
    prefix, shape = _prefix(layer), (spec.hidden_size,)
    return {
        "input_norm": TensorSlot(f"{prefix}input_layernorm.weight", shape),
        "ffn_norm": TensorSlot(f"{prefix}post_attention_layernorm.weight", shape),
    }


def attention_slots(spec: ModelSpec, layer: int) -> dict[str, TensorSlot]:
    """A layer's attention weights, by field of GqaWeights or MlaWeights, without those it does not have.

    ``expand`` is an MLA's expand_key and expand_value together, per head one below the other.
    """
    prefix = f"{_prefix(layer)}self_attn."
    if isinstance(spec.attention, GqaSpec):
        return _gqa_slots(spec.attention, spec.hidden_size, prefix)
    return _mla_slots(spec.attention, spec.hidden_size, prefix)


def ffn_slots(spec: ModelSpec, names: WeightNames, layer: int) -> FfnSlots:
    ffn, hidden, prefix = spec.layers[layer].ffn, spec.hidden_size, _prefix(layer)
    if ffn.router is None:
        return FfnSlots(None, None, (_expert(prefix, names.dense, ffn.intermediate, hidden),), None)
    experts = ffn.router.num_experts
    bias = TensorSlot(prefix + names.selection_bias, (experts,)) if ffn.router.selection_bias else None
    return FfnSlots(
        router=TensorSlot(prefix + names.router, (experts, hidden)),
        selection_bias=bias,
        experts=tuple(
            _expert(
                prefix, tuple(name.format(expert=index) for name in names.expert), ffn.intermediate, hidden
            )
            for index in range(experts)
        ),
        shared=_shared(ffn, names, hidden, prefix),
    )


def _shared(ffn: FfnSpec, names: WeightNames, hidden: int, prefix: str) -> ExpertSlots | None:
    if ffn.shared_intermediate == 0:
        return None
    return _expert(prefix, names.shared, ffn.shared_intermediate, hidden)


def _expert(prefix: str, names: tuple[str, ...], width: int, hidden: int) -> ExpertSlots:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return ExpertSlots(
        TensorSlot(gate, (width, hidden)), TensorSlot(up, (width, hidden)), TensorSlot(down, (hidden, width))
    )


def _gqa_slots(a: GqaSpec, hidden: int, prefix: str) -> dict[str, TensorSlot]:
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    outputs = {"query": queries, "key": keys, "value": keys}
    slots = {"output": TensorSlot(f"{prefix}o_proj.weight", (hidden, queries))}
    for field, width in outputs.items():
        slots[field] = TensorSlot(f"{prefix}{field[0]}_proj.weight", (width, hidden))
        if a.qkv_bias:
            slots[f"{field}_bias"] = TensorSlot(f"{prefix}{field[0]}_proj.bias", (width,))
    if a.output_bias:
        slots["output_bias"] = TensorSlot(f"{prefix}o_proj.bias", (hidden,))
    if a.qk_norm:
        slots["query_norm"] = TensorSlot(f"{prefix}q_norm.weight", (a.head_dim,))
        slots["key_norm"] = TensorSlot(f"{prefix}k_norm.weight", (a.head_dim,))
    return slots


def _mla_slots(a: MlaSpec, hidden: int, prefix: str) -> dict[str, TensorSlot]:
    queries = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    latent = a.kv_lora_rank + a.qk_rope_head_dim
    expanded = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    slots = {
        "latent": TensorSlot(f"{prefix}kv_a_proj_with_mqa.weight", (latent, hidden)),
        "latent_norm": TensorSlot(f"{prefix}kv_a_layernorm.weight", (a.kv_lora_rank,)),
        "expand": TensorSlot(f"{prefix}kv_b_proj.weight", (expanded, a.kv_lora_rank)),
        "output": TensorSlot(f"{prefix}o_proj.weight", (hidden, a.num_heads * a.v_head_dim)),
    }
    if a.bias:
        slots["latent_bias"] = TensorSlot(f"{prefix}kv_a_proj_with_mqa.bias", (latent,))
        slots["output_bias"] = TensorSlot(f"{prefix}o_proj.bias", (hidden,))
    rank = a.q_lora_rank
    if rank is None:
        slots["query"] = TensorSlot(f"{prefix}q_proj.weight", (queries, hidden))
        return slots
    slots["query_down"] = TensorSlot(f"{prefix}q_a_proj.weight", (rank, hidden))
    slots["query_norm"] = TensorSlot(f"{prefix}q_a_layernorm.weight", (rank,))
    slots["query"] = TensorSlot(f"{prefix}q_b_proj.weight", (queries, rank))
    if a.bias:
        slots["query_down_bias"] = TensorSlot(f"{prefix}q_a_proj.bias", (rank,))
    return slots


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."
