"""A model on devices: its weights in their arenas, and the words that lead kernels to them
(kernels/triton/words.py).

The attention side is on the model's home, or on every KV device where models have no homes. The weight table
of the weights pool is the other part: on every weights device a table of layers, which has the words of those
FFNs, or shards of FFNs, that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crosspool.core.errors import InvariantError
from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import ModelSpec
from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.triton import words
from crosspool.models.layers import rope_frequencies
from crosspool.models.weights import (
    AttentionLayerWeights,
    AttentionSideWeights,
    FfnWeights,
    GqaWeights,
    MlaWeights,
    shard_ffn,
)
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.weights import WeightsArena

TENSORS_PER_LAYER = 24
"""At most, of both halves."""

Words = Mapping[int, Tensor | None]


class FfnPlace(NamedTuple):
    """Which part of how many of an FFN is where: a logical device by its number among the teams."""

    team: int
    part: int
    parts: int


class DeviceModel:
    """``arenas`` are those of all teams. Each of the teams ``homes`` has the attention side."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: KvLayout,
        weights: AttentionSideWeights,
        arenas: Mapping[int, WeightsArena],
        homes: Sequence[int],
    ) -> None:
        self.geometry = Geometry.of(spec, layout)
        self.homes = tuple(homes)
        self._arenas = arenas
        self._tables: dict[int, Tensor] = {}
        self._host: dict[int, Tensor] = {}
        self._present: set[tuple[int, int]] = set()
        self._lane_tensors = {home: self._put_attention_side(spec, weights, home) for home in homes}

    def _put_attention_side(
        self, spec: ModelSpec, weights: AttentionSideWeights, home: int
    ) -> tuple[Tensor, ...]:
        """Returns what the words of a lane behind the first lead to."""
        arena = self._arenas[home]
        embedding = arena.put(weights.embedding)
        head = embedding if weights.head is weights.embedding else arena.put(weights.head)
        frequencies = arena.put(rope_frequencies(spec.rope)[0])
        for layer, own in enumerate(weights.layers):
            self._note(home, layer, _attention_words(own, arena))
        return embedding, arena.put(weights.final_norm), head, frequencies

    def put_ffn(self, layer: int, place: FfnPlace, weights: FfnWeights) -> None:
        """A layer's FFN, of which ``weights`` is the whole, as far as the place has it."""
        shard = shard_ffn(weights, place.part, place.parts)
        arena = self._arenas[place.team]
        own: dict[int, Tensor | None] = {
            words.ROUTER: None if shard.router is None else arena.put(shard.router),
            words.SELECTION_BIAS: None if shard.selection_bias is None else arena.put(shard.selection_bias),
        }
        stacks = [
            (words.GATE_UP, words.EXPERT_DOWN, shard.experts),
            (words.GATE_UP_SCALES, words.EXPERT_DOWN_SCALES, shard.expert_scales),
            (words.SHARED_GATE_UP, words.SHARED_DOWN, _some(shard.shared)),
            (words.SHARED_GATE_UP_SCALES, words.SHARED_DOWN_SCALES, _some(shard.shared_scales)),
        ]
        for gate_up, down, experts in stacks:
            if experts:
                own[gate_up] = arena.stack([matrix for it in experts for matrix in (it.gate, it.up)])
                own[down] = arena.stack([it.down for it in experts])
        self._note(place.team, layer, own)
        self._present.add((layer, place.part))

    def finish(self, parts: int) -> None:
        """Everything has been put: copy the tables of words. Raises InvariantError while a part of an FFN is
        missing."""
        for layer in range(self.geometry.num_layers):
            for part in range(parts):
                if (layer, part) not in self._present:
                    raise InvariantError(f"layer {layer} lacks part {part} of its FFN")
        for team, table in self._host.items():
            self._tables[team] = self._arenas[team].put(table)
            self._arenas[team].staging.finish()

    def lane_words(self, team: int) -> list[int]:
        """The first MODEL_WORDS words of a lane on a device that has a part of the model."""
        layers = self._tables[team].data_ptr()
        if team not in self.homes:
            return [layers] + [0] * (words.MODEL_WORDS - 1)
        return [layers, *(tensor.data_ptr() for tensor in self._lane_tensors[team])]

    def _note(self, team: int, layer: int, own: Words) -> None:
        if team not in self._host:
            self._host[team] = torch.zeros(self.geometry.num_layers, words.LAYER_WORDS, dtype=torch.int64)
        for word, tensor in own.items():
            if tensor is not None:
                self._host[team][layer, word] = tensor.data_ptr()


def _some(expert: ExpertWeights | None) -> tuple[ExpertWeights, ...]:
    return () if expert is None else (expert,)


def _attention_words(own: AttentionLayerWeights, arena: WeightsArena) -> Words:
    def put(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else arena.put(tensor)

    norms: dict[int, Tensor | None] = {
        words.INPUT_NORM: arena.put(own.input_norm),
        words.FFN_NORM: arena.put(own.ffn_norm),
    }
    match own.attention:
        case GqaWeights() as gqa:
            biases = (gqa.query_bias, gqa.key_bias, gqa.value_bias)
            return norms | {
                words.QKV: arena.stack([gqa.query, gqa.key, gqa.value]),
                words.QKV_BIAS: arena.stack(_all_of(biases)) if any_of(biases) else None,
                words.QUERY_NORM: put(gqa.query_norm),
                words.KEY_NORM: put(gqa.key_norm),
                words.OUTPUT: arena.put(gqa.output),
                words.OUTPUT_BIAS: put(gqa.output_bias),
            }
        case MlaWeights() as mla:
            down = [mla.latent] if mla.query_down is None else [mla.query_down, mla.latent]
            own_biases = (
                (mla.latent_bias,) if mla.query_down is None else (mla.query_down_bias, mla.latent_bias)
            )
            return norms | {
                words.DOWN: arena.stack(down),
                words.DOWN_BIAS: arena.stack(_all_of(own_biases)) if any_of(own_biases) else None,
                words.QUERY_NORM: put(mla.query_norm),
                words.LATENT_NORM: arena.put(mla.latent_norm),
                words.QUERY: arena.put(mla.query),
                words.EXPAND_KEY: arena.put(mla.expand_key),
                words.EXPAND_VALUE: arena.put(mla.expand_value),
                words.OUTPUT: arena.put(mla.output),
                words.OUTPUT_BIAS: put(mla.output_bias),
            }


def any_of(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(tensor is not None for tensor in tensors)


def _all_of(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Raises InvariantError if some are there and some are not: what is stacked has one bias, or none."""
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) < len(tensors):
        raise InvariantError("of projections that are stacked some have a bias and some have none")
    return found
