"""The two kinds of attention as launches, between the norms of an attention half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.core.spec import GqaSpec, MlaSpec
from crosspool.kernels.triton import words
from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.batch import KvPlace, Pass
from crosspool.kernels.triton.decode import attend_blocks, decode_attention
from crosspool.kernels.triton.gqa_write import gqa_write
from crosspool.kernels.triton.latents import latents_into_values, queries_into_latents
from crosspool.kernels.triton.linear import Projection, linear, linear_room
from crosspool.kernels.triton.mla_write import mla_write, rotate_queries
from crosspool.kernels.triton.prefill import attend_part, prefill_attention
from crosspool.kernels.triton.states import States, fold_states
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits
from crosspool.workers.cuda.room import META, Room


@dataclass(frozen=True, slots=True)
class KvPages:
    """The pages of one KV device: ``arena`` (uint8 [pages, page_bytes]) has the pool's from ``first`` on."""

    arena: Tensor
    first: int

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.arena))


@dataclass(frozen=True, slots=True)
class HomeSurroundings:
    """What a lane shares with others on its home: the ``arena`` of pages (uint8 [pages, page_bytes]), the
    chip and how many programs it runs side by side, how many bytes grant memory's host mirror is further on,
    and the ``most_rows`` of any grant. Each FFN is made in so many ``parts``. ``others`` are the pages of
    other KV devices that a sequence may have pages on, by their teams."""

    arena: Tensor
    chip: Chip
    processors: int
    mirror: int
    most_rows: int
    parts: int
    others: Mapping[int, KvPages] = field(default_factory=dict)


class AttentionLaunches(Protocol):
    """One kind of attention, between the norms, but for attention itself."""

    def project(self, layer: int, kv: KvPlace, normed: Tensor) -> None:
        """Of normed hidden states [T, H], queries to where they are attended from, and keys and values to
        those of their pages that are on this device."""
        ...

    def output(self, layer: int, out: Tensor) -> None:
        """Of what was attended, to ``out`` [T, H]."""
        ...


def attention_launches(
    geometry: Geometry,
    limits: Limits,
    chip: Chip,
    batch: Pass,
    query: Tensor,
    attended: Tensor | None,
    room: Room,
) -> AttentionLaunches:
    """``query`` [T, N, key width] and ``attended`` [T, N, width] are rooms of attention; without the latter
    there is no output."""
    match geometry.attention:
        case GqaSpec() as gqa:
            return GqaLaunches(geometry, gqa, limits, chip, batch, query, attended, room)
        case MlaSpec() as mla:
            return MlaLaunches(geometry, mla, limits, chip, batch, query, attended, room)


def attention_shape(geometry: Geometry) -> AttentionShape:
    match geometry.attention:
        case GqaSpec() as gqa:
            return AttentionShape(gqa.num_heads, gqa.num_kv_heads, gqa.head_dim, 0, gqa.scale)
        case MlaSpec() as mla:
            return AttentionShape(mla.num_heads, 1, mla.kv_lora_rank, mla.qk_rope_head_dim, mla.scale)


def kv_place(geometry: Geometry, layer: int, arena: Tensor) -> KvPlace:
    layout, kv = geometry.layout, geometry.kv(layer)
    return KvPlace(arena, layout.page_bytes, kv.offset, layout.tokens_per_page, kv.group, kv.window or 0)


class Attend:
    """Attention itself: for a decode every query's context is split over programs, for prompts each program
    has some queries."""

    def __init__(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        room: Room,
    ) -> None:
        self._shape = shape = attention_shape(geometry)
        self._states: States | None = None
        if phase is Phase.DECODE:
            context = geometry.spec.max_context
            self._states = room.like(States.room(shape, limits.queries, context, 1, META))
            programs = limits.queries * shape.kv_heads
            self._splits = min(self._states.most_blocks, max(1, 2 * around.processors // programs))
        self.query = room.take((limits.queries, shape.heads, shape.key_width), geometry.dtype)
        self.attended = room.take((limits.queries, shape.heads, shape.width), geometry.dtype)

    def __call__(self, batch: Pass, kv: KvPlace) -> None:
        """From ``query`` to ``attended``."""
        if self._states is None:
            prefill_attention(batch, kv, self._shape, self.query, self.attended)
        else:
            decode_attention(batch, kv, self._shape, self.query, self._states, self.attended, self._splits)

    def fold(self, batch: Pass, kv: KvPlace, folded: States) -> None:
        """From ``query`` to one state of each query and head, of what is on this device."""
        if self._states is None:
            attend_part(batch, kv, self._shape, self.query, folded)
        else:
            attend_blocks(batch, kv, self._shape, self.query, self._states, self._splits, sparse=True)
            fold_states(batch, self._states, kv.window, folded)


class GqaLaunches:
    """Grouped-query attention."""

    def __init__(
        self,
        geometry: Geometry,
        spec: GqaSpec,
        limits: Limits,
        chip: Chip,
        batch: Pass,
        query: Tensor,
        attended: Tensor | None,
        room: Room,
    ) -> None:
        self._geometry, self._spec, self._batch, self._chip = geometry, spec, batch, chip
        self._query, self._attended = query, attended
        hidden, width = geometry.hidden, spec.num_heads * spec.head_dim
        stacked = width + 2 * spec.num_kv_heads * spec.head_dim
        self._qkv = Projection(stacked, hidden, words.QKV, words.QKV_BIAS if spec.qkv_bias else None)
        self._output = Projection(
            hidden, width, words.OUTPUT, words.OUTPUT_BIAS if spec.output_bias else None
        )
        self._projected = room.take((limits.queries, stacked), geometry.dtype)
        pattern = linear_room([self._qkv, self._output], limits.queries, geometry.dtype, chip, META)
        self._room = room.like(pattern)

    def project(self, layer: int, kv: KvPlace, normed: Tensor) -> None:
        batch, spec, rope = self._batch, self._spec, self._geometry.spec.rope
        linear(self._qkv, batch.lane, layer, normed, self._projected, self._room, self._chip)
        gqa_write(
            batch,
            kv,
            layer,
            self._projected,
            self._query,
            spec.num_kv_heads,
            rope.dim,
            interleaved=rope.interleaved,
            gain=self._geometry.gain,
            norm_epsilon=self._geometry.spec.norm_eps if spec.qk_norm else None,
        )

    def output(self, layer: int, out: Tensor) -> None:
        assert self._attended is not None
        attended = self._attended.view(len(out), -1)
        linear(self._output, self._batch.lane, layer, attended, out, self._room, self._chip)


class MlaLaunches:
    """Multi-head latent attention in its absorbed form."""

    def __init__(
        self,
        geometry: Geometry,
        spec: MlaSpec,
        limits: Limits,
        chip: Chip,
        batch: Pass,
        query: Tensor,
        attended: Tensor | None,
        room: Room,
    ) -> None:
        self._geometry, self._spec, self._batch, self._chip = geometry, spec, batch, chip
        self._absorbed, self._attended = query, attended
        hidden, heads, queries, dtype = geometry.hidden, spec.num_heads, limits.queries, geometry.dtype
        rank, rotary, own_rank = spec.kv_lora_rank, spec.qk_rope_head_dim, spec.q_lora_rank or 0
        width = spec.qk_nope_head_dim + rotary
        bias = words.DOWN_BIAS if spec.bias else None
        self._down = Projection(own_rank + rank + rotary, hidden, words.DOWN, bias)
        self._query = Projection(heads * width, own_rank or hidden, words.QUERY)
        bias = words.OUTPUT_BIAS if spec.bias else None
        self._output = Projection(hidden, heads * spec.v_head_dim, words.OUTPUT, bias)
        self._latents = room.take((queries, self._down.outputs), dtype)
        self._query_latents = room.take((queries, own_rank), dtype) if own_rank else None
        self._projected = room.take((queries, heads, width), dtype)
        self._values = None if attended is None else room.take((queries, heads, spec.v_head_dim), dtype)
        pattern = linear_room([self._down, self._query, self._output], queries, dtype, chip, META)
        self._room = room.like(pattern)

    def project(self, layer: int, kv: KvPlace, normed: Tensor) -> None:
        batch, spec, query = self._batch, self._spec, self._absorbed
        rotary, nope = spec.qk_rope_head_dim, spec.qk_nope_head_dim
        interleaved, gain = self._geometry.spec.rope.interleaved, self._geometry.gain
        self._linear(self._down, layer, normed, self._latents)
        mla_write(
            batch,
            kv,
            layer,
            self._latents,
            self._query_latents,
            rotary,
            interleaved=interleaved,
            gain=gain,
            norm_epsilon=spec.latent_norm_eps,
        )
        source = normed if self._query_latents is None else self._query_latents
        self._linear(self._query, layer, source, self._projected.view(len(normed), -1))
        queries_into_latents(batch, layer, self._projected, nope, query)
        rotate_queries(batch, self._projected, query, rotary, interleaved=interleaved, gain=gain)

    def output(self, layer: int, out: Tensor) -> None:
        assert self._attended is not None and self._values is not None
        latents_into_values(self._batch, layer, self._attended, self._values)
        self._linear(self._output, layer, self._values.view(len(out), -1), out)

    def _linear(self, projection: Projection, layer: int, source: Tensor, out: Tensor) -> None:
        linear(projection, self._batch.lane, layer, source, out, self._room, self._chip)
