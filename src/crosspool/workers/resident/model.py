"""A model as compiled code sees it: int64 words that lead to its weights.

The weight table of the weights pool is part of it: of each layer, the FFN's descriptor on every device that
takes part (kernels/numba/ffn.py). Everything else is the attention side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from crosspool.core.errors import InvariantError
from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import GqaSpec, MlaSpec, ModelSpec, RouterSpec
from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.numba.choice import choice_mine_bytes
from crosspool.kernels.numba.ffn_fields import Expert, describe_ffn, ffn_mine_bytes, ffn_room_bytes
from crosspool.kernels.numba.gqa import gqa_mine_bytes, gqa_room_bytes, gqa_spread_room_bytes
from crosspool.kernels.numba.gqa_fields import GqaTensors, describe_gqa
from crosspool.kernels.numba.head import describe_head, head_mine_bytes, head_room_bytes
from crosspool.kernels.numba.matrix import CODES, Weight
from crosspool.kernels.numba.mla import mla_mine_bytes, mla_room_bytes, mla_spread_room_bytes
from crosspool.kernels.numba.mla_fields import MlaTensors, describe_mla
from crosspool.kernels.numba.router import describe_router
from crosspool.models.layers import rope_frequencies
from crosspool.models.placement import WHOLE, InPlace, Placement
from crosspool.models.weights import (
    AttentionLayerWeights,
    AttentionSideWeights,
    FfnWeights,
    GqaWeights,
    MlaWeights,
    part_of,
    torch_dtype,
)
from crosspool.workers.resident.model_words import (
    ATTENTION,
    ATTENTION_WORDS,
    DTYPE,
    EMBEDDING,
    EPSILON,
    FFN_NORM,
    FFNS,
    FREQUENCIES,
    GROUPS,
    HEAD,
    HIDDEN,
    INPUT_NORM,
    KV_GROUP,
    KV_OFFSET,
    KV_WINDOW,
    LATENT,
    LAYER_TABLE,
    LAYER_WORDS,
    LAYERS,
    MODEL_WORDS,
    ROTARY_GAIN,
    ROTARY_PAIRS,
    TOKENS_PER_PAGE,
    VOCABULARY,
)


class ResidentModel:
    """The words of one model, and everything that they lead to, kept alive with it.

    ``parts`` is the number of devices that share each FFN. A model can be run when every part of every
    layer's FFN has been put. What it keeps of the weights given is what ``place`` makes of them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: KvLayout,
        weights: AttentionSideWeights,
        *,
        parts: int,
        place: Placement | None = None,
    ) -> None:
        place = place or InPlace()
        self.spec = spec
        self.layout = layout
        self._parts = parts
        self._keep: list[object] = []
        self._routers: dict[int, np.ndarray] = {}
        self._layers = np.zeros((spec.num_layers, LAYER_WORDS), np.int64)
        self._ffns = np.zeros((spec.num_layers, parts, 2), np.int64)
        self._attention: list[np.ndarray] = []
        self._ffn_words: dict[tuple[int, int], np.ndarray] = {}
        self._words = self._describe(weights, place)
        for layer, own in enumerate(weights.layers):
            self._put_layer(layer, own, place)

    @property
    def address(self) -> int:
        return int(self._words.ctypes.data)

    def put_ffn(self, layer: int, part: int, weights: FfnWeights, place: Placement | None = None) -> None:
        """One device's share of a layer's FFN, of which ``weights`` is the whole. All share one router."""
        place, spec = place or InPlace(), self.spec.layers[layer].ffn
        if layer not in self._routers and spec.router is not None:
            self._routers[layer] = self._describe_router(spec.router, weights, place)
        experts = [self._expert(expert, part, place) for expert in weights.experts]
        shared = None if weights.shared is None else self._expert(weights.shared, part, place)
        words = describe_ffn(spec.activation, experts, self._routers.get(layer), shared)
        self._ffn_words[layer, part] = words
        self._ffns[layer, part] = words.ctypes.data, len(words)

    def check_complete(self) -> None:
        """Raises InvariantError while a part of an FFN is missing."""
        missing = np.argwhere(self._ffns[:, :, 0] == 0)
        if len(missing):
            raise InvariantError(f"layer {missing[0][0]} lacks part {missing[0][1]} of its FFN")

    def room_bytes(self, tokens: int, heads: int) -> int:
        """Scratch that a team shares, for passes of ``tokens`` tokens of which ``heads`` choose a token."""
        attention = mla_room_bytes if isinstance(self.spec.attention, MlaSpec) else gqa_room_bytes
        head = int(head_room_bytes(self.spec.hidden_size, heads)) + 4 * heads * self.spec.vocab_size
        ffns = (ffn_room_bytes(words, tokens) for words in self._ffn_words.values())
        return max(head, *(attention(words, tokens) for words in self._attention), *ffns)

    def half_room_bytes(self, tokens: int, states: int) -> int:
        """Room of an attention half whose context is spread over devices: see gqa_spread_room_bytes. Layers
        differ in no width."""
        room = mla_spread_room_bytes if isinstance(self.spec.attention, MlaSpec) else gqa_spread_room_bytes
        return room(self._attention[0], tokens, states)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the states of all heads of a query over one block."""
        return self.half_room_bytes(0, 1) - self.half_room_bytes(0, 0)

    def mine_bytes(self, tokens: int, rows: int) -> int:
        """Scratch of each thread, for passes of ``tokens`` tokens in ``rows`` rows."""
        attention = mla_mine_bytes if isinstance(self.spec.attention, MlaSpec) else gqa_mine_bytes
        norms = 4 * (3 * self.spec.hidden_size + 16)
        ffns = (ffn_mine_bytes(words, tokens) for words in self._ffn_words.values())
        halves = (attention(words, rows) for words in self._attention)
        head = max(head_mine_bytes(self.spec.hidden_size), choice_mine_bytes(self.spec.vocab_size))
        return max(norms, head, *halves, *ffns)

    def _tensor(self, tensor: Tensor, place: Placement) -> Tensor:
        kept = place.tensor(tensor)
        self._keep.append(kept)
        return kept

    def _matrix(self, weight: Tensor, place: Placement, columns: slice = WHOLE) -> Weight:
        kept = place.matrix(weight, columns)
        self._keep.append(kept)
        return kept

    def _describe(self, weights: AttentionSideWeights, place: Placement) -> np.ndarray:
        spec = self.spec
        frequencies, gain = rope_frequencies(spec.rope)
        embedding = self._tensor(weights.embedding, place)
        tied = weights.head is weights.embedding and not spec.int8_weights
        matrix = embedding if tied else self._matrix(weights.head, place)
        head = describe_head(self._tensor(weights.final_norm, place), spec.norm_eps, matrix)
        self._keep += [frequencies, head]
        words = np.zeros(MODEL_WORDS, np.int64)
        words[LAYERS], words[HIDDEN] = spec.num_layers, spec.hidden_size
        words[DTYPE], words[VOCABULARY] = CODES[torch_dtype(spec.dtype)], spec.vocab_size
        words[EMBEDDING], words[HEAD] = embedding.data_ptr(), head.ctypes.data
        words[LAYER_TABLE] = self._layers.ctypes.data
        words[GROUPS], words[TOKENS_PER_PAGE] = len(self.layout.groups), self.layout.tokens_per_page
        words[ROTARY_PAIRS], words[FREQUENCIES] = len(frequencies), frequencies.data_ptr()
        words.view(np.float64)[ROTARY_GAIN], words.view(np.float64)[EPSILON] = gain, spec.norm_eps
        return words

    def _put_layer(self, layer: int, own: AttentionLayerWeights, place: Placement) -> None:
        layout = self.layout
        attention = self._describe_attention(own.attention, place)
        self._attention.append(attention)
        words = self._layers[layer]
        words[LATENT] = isinstance(own.attention, MlaWeights)
        words[ATTENTION], words[ATTENTION_WORDS] = attention.ctypes.data, len(attention)
        norms = [self._tensor(norm, place) for norm in (own.input_norm, own.ffn_norm)]
        words[INPUT_NORM], words[FFN_NORM] = (norm.data_ptr() for norm in norms)
        group = layout.group_of_layer[layer]
        words[KV_OFFSET] = (
            layout.place_of_layer[layer] * layout.tokens_per_page * layout.bytes_per_token_layer
        )
        words[KV_GROUP], words[KV_WINDOW] = group, layout.groups[group].window or 0
        words[FFNS] = self._ffns[layer].ctypes.data

    def _describe_attention(self, weights: GqaWeights | MlaWeights, place: Placement) -> np.ndarray:
        placed: dict[str, Any] = {
            field.name: self._attention_weight(field.name, getattr(weights, field.name), place)
            for field in fields(weights)
        }
        match self.spec.attention, weights:
            case GqaSpec() as gqa, GqaWeights():
                return describe_gqa(
                    GqaTensors(**placed),
                    heads=gqa.num_heads,
                    kv_heads=gqa.num_kv_heads,
                    scale=gqa.scale,
                    epsilon=self.spec.norm_eps,
                    interleaved=self.spec.rope.interleaved,
                )
            case MlaSpec() as mla, MlaWeights():
                words, turned = describe_mla(
                    MlaTensors(**placed),
                    rotary=mla.qk_rope_head_dim,
                    scale=mla.scale,
                    epsilon=mla.latent_norm_eps,
                    interleaved=self.spec.rope.interleaved,
                )
                self._keep.append(turned)
                return words
        raise InvariantError("weights of another kind of attention than the spec's")

    def _attention_weight(self, name: str, weight: Tensor | None, place: Placement) -> Weight | None:
        if weight is None:
            return None
        if name == "expand_key":
            # Kernels want it turned: placed like that, turning it again makes no further copy.
            return self._tensor(weight.transpose(1, 2).contiguous(), place).transpose(1, 2)
        return self._matrix(weight, place) if weight.dim() == 2 else self._tensor(weight, place)

    def _expert(self, weights: ExpertWeights, part: int, place: Placement) -> Expert:
        own = part_of(weights.gate.shape[0], part, self._parts)
        gate, up = (self._matrix(weight[own], place) for weight in (weights.gate, weights.up))
        return Expert(gate, up, self._matrix(weights.down, place, columns=own))

    def _describe_router(self, rules: RouterSpec, weights: FfnWeights, place: Placement) -> np.ndarray:
        bias = weights.selection_bias
        if weights.router is None:
            raise InvariantError("the weights of an FFN with experts lack their router")
        return describe_router(
            self._tensor(weights.router, place),
            None if bias is None else self._tensor(bias, place),
            top_k=rules.top_k,
            scoring=rules.scoring,
            normalise=rules.normalise,
            scale=rules.scale,
            groups=rules.groups,
            top_groups=rules.top_groups,
            group_score=rules.group_score,
        )


def largest(models: Sequence[ResidentModel], tokens: int, rows: int) -> tuple[int, int]:
    """Scratch that is enough for every model: shared by a team, and of each thread. ``tokens`` and ``rows``
    are the most of a pass."""
    room = max(model.room_bytes(tokens, rows) for model in models)
    mine = max(model.mine_bytes(tokens, rows) for model in models)
    return room, mine
