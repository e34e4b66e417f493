"""What recorded launches depend on. Models of one geometry share graphs: what differs between them is in
words."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import FfnSpec, GqaSpec, MlaSpec, ModelSpec, RopeKind, RopeSpec
from crosspool.models.layers import rope_frequencies
from crosspool.models.weights import torch_dtype

LEAST_QUERIES = 16


@dataclass(frozen=True, slots=True)
class LayerKv:
    """Where a layer's KV is in a page: ``offset`` bytes from its begin, of the pages of layer ``group``."""

    group: int
    offset: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Geometry:
    """Widths, numbers, rules and layout of a model, and ``gain``, what cosines and sines are multiplied with;
    no weights, names, frequencies or special tokens."""

    spec: ModelSpec
    layout: KvLayout
    gain: float

    @staticmethod
    def of(spec: ModelSpec, layout: KvLayout) -> Geometry:
        rope = RopeSpec(spec.rope.dim, theta=0.0, kind=RopeKind.DEFAULT, interleaved=spec.rope.interleaved)
        plain = replace(spec, architecture="", tied_embeddings=False, eos_token_ids=(), rope=rope)
        return Geometry(plain, layout, rope_frequencies(spec.rope)[1])

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.spec.dtype)

    @property
    def hidden(self) -> int:
        return self.spec.hidden_size

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def attention(self) -> GqaSpec | MlaSpec:
        return self.spec.attention

    def ffn(self, layer: int) -> FfnSpec:
        return self.spec.layers[layer].ffn

    @property
    def groups(self) -> int:
        return len(self.layout.groups)

    @property
    def most_chunks(self) -> int:
        """Entries of a page table of the longest sequence."""
        return self.layout.chunks(self.spec.max_context)

    def kv(self, layer: int) -> LayerKv:
        layout = self.layout
        group = layout.group_of_layer[layer]
        size = layout.tokens_per_page * layout.bytes_per_token_layer
        return LayerKv(group, layout.place_of_layer[layer] * size, layout.groups[group].window)


def buckets(most: int, least: int = 1) -> tuple[int, ...]:
    """What passes of up to ``most`` rows or queries are launched for: powers of two."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)
