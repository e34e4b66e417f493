"""What a model's home launches in a pass: its begin, the attention halves, and its head."""

from __future__ import annotations

from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import KvPlace
from crosspool.kernels.triton.choice import choose
from crosspool.kernels.triton.linear import Projection, linear, linear_room
from crosspool.kernels.triton.logprobs import report
from crosspool.kernels.triton.norm import embed, final_norm, layer_norm
from crosspool.kernels.triton.parts import add_parts
from crosspool.kernels.triton.pass_again import ask_again
from crosspool.kernels.triton.pass_begin import begin_pass
from crosspool.kernels.triton.pass_end import end_pass
from crosspool.workers.cuda.attention import Attend, HomeSurroundings, attention_launches, kv_place
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, Ring, carve_head, carve_hidden, carve_pass
from crosspool.workers.cuda.room import META, Room


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
        self._attend = attend = Attend(geometry, limits, phase, around, room)
        self._attention = attention_launches(
            geometry, limits, around.chip, self.batch, attend.query, attend.attended, room
        )

    @property
    def lane(self) -> Tensor:
        """The lane's words."""
        return self.batch.lane

    def ask_again(self) -> None:
        """Before a loop: whether there is a pass to be made."""
        ask_again(self.lane)

    def begin(self) -> None:
        """Which rows go on, and their embeddings."""
        begin_pass(self.batch, self.rows, self._around.most_rows)
        embed(self.batch, self.rows.tokens, self.hidden.stream)

    def attention(self, layer: int) -> None:
        """The attention half of a layer, from what the FFNs of the layer before have made."""
        self._norm(layer)
        kv = self._project(layer)
        self._attend(self.batch, kv)
        self._output(layer)

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

    def _norm(self, layer: int) -> None:
        hidden, epsilon = self.hidden, self.geometry.spec.norm_eps
        before = self._ffn_output() if layer > 0 else None
        layer_norm(self.batch, layer, words.INPUT_NORM, hidden.stream, before, hidden.normed, epsilon)

    def _project(self, layer: int) -> KvPlace:
        kv = kv_place(self.geometry, layer, self._around.arena)
        self._attention.project(layer, kv, self.hidden.normed)
        return kv

    def _output(self, layer: int) -> None:
        hidden, epsilon = self.hidden, self.geometry.spec.norm_eps
        self._attention.output(layer, hidden.addend)
        layer_norm(self.batch, layer, words.FFN_NORM, hidden.stream, hidden.addend, hidden.normed, epsilon)

    def _ffn_output(self) -> Tensor:
        if self._around.parts == 1:
            return self.hidden.outputs[0]
        add_parts(self.batch.lane, self.hidden.outputs, self.hidden.addend)
        return self.hidden.addend
