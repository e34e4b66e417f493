"""What a model's home launches in a pass: its begin, the attention halves, and its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.core.errors import InvariantError
from crosspool.core.spec import GqaSpec
from crosspool.kernels.triton import words
from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.batch import KvPlace, Pass
from crosspool.kernels.triton.choice import choose
from crosspool.kernels.triton.decode import decode_attention
from crosspool.kernels.triton.gqa_write import gqa_write
from crosspool.kernels.triton.linear import Projection, linear, linear_room
from crosspool.kernels.triton.logprobs import report
from crosspool.kernels.triton.norm import embed, final_norm, layer_norm
from crosspool.kernels.triton.parts import add_parts
from crosspool.kernels.triton.pass_begin import begin_pass
from crosspool.kernels.triton.pass_end import end_pass
from crosspool.kernels.triton.prefill import prefill_attention
from crosspool.kernels.triton.states import States
from crosspool.kernels.triton.tiles import Chip, PartsRoom
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, Ring, carve_head, carve_hidden, carve_pass
from crosspool.workers.cuda.room import META, Room


@dataclass(frozen=True, slots=True)
class HomeSurroundings:
    """What a lane shares with others on its home: the ``arena`` of pages (uint8 [pages, page_bytes]), the
    chip and how many programs it runs side by side, how many bytes grant memory's host mirror is further on,
    and the ``most_rows`` of any grant. Each FFN is made in so many ``parts``."""

    arena: Tensor
    chip: Chip
    processors: int
    mirror: int
    most_rows: int
    parts: int


class AttentionLaunches(Protocol):
    """One kind of attention, between the norms."""

    def __call__(self, layer: int, normed: Tensor, out: Tensor) -> None:
        """Of normed hidden states [T, H], whose keys and values go to their pages, to ``out`` [T, H]."""
        ...


class AttentionSidePass:
    """The launches of passes of one geometry, within ``limits``, in one lane. All of them go where kernels
    launched now go. Without room for memory it says how much there must be."""

    def __init__(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
    ) -> None:
        self.geometry = geometry
        self._around = around
        self._ring = ring
        self.batch, self.rows = carve_pass(room, geometry, limits)
        self.hidden = carve_hidden(room, geometry, limits.queries, around.parts)
        self._head = carve_head(room, geometry, limits.rows)
        spec = geometry.spec
        self._head_projection = Projection(spec.vocab_size, spec.hidden_size, words.HEAD, of_lane=True)
        self._head_room = room.like(
            linear_room([self._head_projection], limits.rows, geometry.dtype, around.chip, META)
        )
        self._attention = attention_launches(geometry, limits, phase, around, self.batch, room)

    @property
    def lane(self) -> Tensor:
        """The lane's words."""
        return self.batch.lane

    def begin(self) -> None:
        """Which rows go on, and their embeddings."""
        begin_pass(self.batch, self.rows, self._around.most_rows)
        embed(self.batch, self.rows.tokens, self.hidden.stream)

    def attention(self, layer: int) -> None:
        """The attention half of a layer, from what the FFNs of the layer before have made."""
        hidden, epsilon = self.hidden, self.geometry.spec.norm_eps
        before = self._ffn_output() if layer > 0 else None
        layer_norm(self.batch, layer, words.INPUT_NORM, hidden.stream, before, hidden.normed, epsilon)
        self._attention(layer, hidden.normed, hidden.addend)
        layer_norm(self.batch, layer, words.FFN_NORM, hidden.stream, hidden.addend, hidden.normed, epsilon)

    def head(self) -> None:
        """Final norm, LM head and token choice, and the end of the pass."""
        batch, rows, head, lane = self.batch, self.rows, self._head, self.batch.lane
        final_norm(batch, self.hidden.stream, self._ffn_output(), head.normed, self.geometry.spec.norm_eps)
        linear(
            self._head_projection,
            lane,
            0,
            head.normed,
            head.logits,
            self._head_room,
            self._around.chip,
            count=words.ROWS,
        )
        choose(lane, rows.choices, head.logits, head.choice, rows.chosen)
        report(lane, rows.choices, head.logits, rows.chosen, self._around.mirror)
        self.end()

    def end(self) -> None:
        """Of a pass without head: no row chooses a token."""
        end_pass(self.batch.lane, self.rows, self._around.most_rows, self._ring.records, self._ring.written)

    def _ffn_output(self) -> Tensor:
        if self._around.parts == 1:
            return self.hidden.outputs[0]
        add_parts(self.batch.lane, self.hidden.outputs, self.hidden.addend)
        return self.hidden.addend


def attention_launches(
    geometry: Geometry, limits: Limits, phase: Phase, around: HomeSurroundings, batch: Pass, room: Room
) -> AttentionLaunches:
    if isinstance(geometry.attention, GqaSpec):
        return GqaLaunches(geometry, geometry.attention, limits, phase, around, batch, room)
    raise InvariantError("latent attention is not there yet")


class Attend:
    """Attention itself: for a decode every query's context is split over programs, for prompts each program
    has some queries."""

    def __init__(
        self,
        geometry: Geometry,
        shape: AttentionShape,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        room: Room,
    ) -> None:
        self._geometry = geometry
        self._shape = shape
        self._arena = around.arena
        self._states: States | None = None
        if phase is Phase.DECODE:
            context = geometry.spec.max_context
            self._states = room.like(States.room(shape, limits.queries, context, 1, META))
            programs = limits.queries * shape.kv_heads
            self._splits = min(self._states.most_blocks, max(1, 2 * around.processors // programs))
        self.query = room.take((limits.queries, shape.heads, shape.key_width), geometry.dtype)
        self.attended = room.take((limits.queries, shape.heads, shape.width), geometry.dtype)

    def place(self, layer: int) -> KvPlace:
        layout, kv = self._geometry.layout, self._geometry.kv(layer)
        return KvPlace(
            self._arena, layout.page_bytes, kv.offset, layout.tokens_per_page, kv.group, kv.window or 0
        )

    def __call__(self, batch: Pass, kv: KvPlace) -> None:
        """From ``query`` to ``attended``."""
        if self._states is None:
            prefill_attention(batch, kv, self._shape, self.query, self.attended)
        else:
            decode_attention(batch, kv, self._shape, self.query, self._states, self.attended, self._splits)


class GqaLaunches:
    """Grouped-query attention."""

    def __init__(
        self,
        geometry: Geometry,
        spec: GqaSpec,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        batch: Pass,
        room: Room,
    ) -> None:
        self._geometry, self._spec, self._batch, self._chip = geometry, spec, batch, around.chip
        hidden, width = geometry.hidden, spec.num_heads * spec.head_dim
        stacked = width + 2 * spec.num_kv_heads * spec.head_dim
        self._qkv = Projection(stacked, hidden, words.QKV, words.QKV_BIAS if spec.qkv_bias else None)
        self._output = Projection(
            hidden, width, words.OUTPUT, words.OUTPUT_BIAS if spec.output_bias else None
        )
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, 0, spec.scale)
        self._attend = Attend(geometry, shape, limits, phase, around, room)
        self._projected = room.take((limits.queries, stacked), geometry.dtype)
        pattern = linear_room([self._qkv, self._output], limits.queries, geometry.dtype, around.chip, META)
        self._room: PartsRoom = room.like(pattern)

    def __call__(self, layer: int, normed: Tensor, out: Tensor) -> None:
        batch, spec, rope, attend = self._batch, self._spec, self._geometry.spec.rope, self._attend
        kv = attend.place(layer)
        linear(self._qkv, batch.lane, layer, normed, self._projected, self._room, self._chip)
        gqa_write(
            batch,
            kv,
            layer,
            self._projected,
            attend.query,
            spec.num_kv_heads,
            rope.dim,
            interleaved=rope.interleaved,
            gain=self._geometry.gain,
            norm_epsilon=self._geometry.spec.norm_eps if spec.qk_norm else None,
        )
        attend(batch, kv)
        attended = attend.attended.view(len(normed), -1)
        linear(self._output, batch.lane, layer, attended, out, self._room, self._chip)
