"""The model of helpers_fake_devices.py where contexts lie on several devices: a key is on its page's own
device, and whoever has it says so in the states that it sends."""

from __future__ import annotations

from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.kernels.triton import words as w
from crosspool.kernels.triton.attend import NOTHING
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.states import States
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.attention import HomeSurroundings, KvPages
from crosspool.workers.cuda.attention_elsewhere import carve_part, carve_states
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, Ring
from crosspool.workers.cuda.room import Room
from helpers_fake_devices import FakeAttention, FakeSides, attended, key_place, put_pair


class SpreadSides(FakeSides):
    def spread_attention(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
        part: int,
        parts: int,
    ) -> FakeSpreadAttention:
        return FakeSpreadAttention(geometry, limits, around, ring, room, part, parts)

    def attention_elsewhere(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        pages: KvPages,
        chip: Chip,
        words: Tensor,
        room: Room,
    ) -> FakeElsewhere:
        return FakeElsewhere(geometry, limits, pages, words, room)


class FakeSpreadAttention(FakeAttention):
    """See attention_elsewhere.SpreadAttentionPass."""

    def __init__(
        self,
        geometry: Geometry,
        limits: Limits,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
        part: int,
        parts: int,
    ) -> None:
        super().__init__(geometry, limits, around, ring, room)
        self.states = carve_states(room, geometry, limits.queries, parts)
        self._own = self.states.part(part)

    def norm(self, layer: int) -> None:
        for query in range(int(self.lane[w.QUERIES])):
            put_pair(self.hidden.normed, query, self._input(layer, query))

    def part(self, layer: int) -> None:
        attend_here(self.batch, self._arena, self._tokens, layer, self.hidden.normed, self._own)

    def merge(self, layer: int) -> None:
        for query in range(int(self.lane[w.QUERIES])):
            values, counts = self.states.sums[:, query, ..., 0], self.states.scores[:, query, ..., 1]
            before = int((values * counts).sum())
            state, _ = attended(tuple(self.hidden.normed[query].tolist()), layer, before)
            for target in (self.hidden.stream, self.hidden.normed):
                put_pair(target, query, state)


class FakeElsewhere:
    """See attention_elsewhere.AttentionElsewhere."""

    def __init__(self, geometry: Geometry, limits: Limits, pages: KvPages, words: Tensor, room: Room) -> None:
        self.batch = carve_part(room, geometry, limits, words)
        self.normed = room.take((limits.queries, geometry.hidden), geometry.dtype)
        self.folded = carve_states(room, geometry, limits.queries, 1)
        self._pages, self._tokens = pages, geometry.layout.tokens_per_page

    def begin(self) -> None:
        rows, own = int(self.batch.lane[w.ROWS]), self._pages.numbers
        page = -2 - self.batch.pages[:rows] - own.start
        self.batch.pages[:rows] = page.where((page >= 0) & (page < len(own)), -1)

    def attention(self, layer: int) -> None:
        attend_here(self.batch, self._pages.arena, self._tokens, layer, self.normed, self.folded)


def attend_here(batch: Pass, arena: Tensor, tokens: int, layer: int, normed: Tensor, folded: States) -> None:
    """Write the keys whose pages are here, and say what is here of the positions before."""
    queries = range(int(batch.lane[w.QUERIES]))
    for query in queries:
        _, key = attended(tuple(normed[query].tolist()), layer, 0)
        place = key_place(batch, arena, tokens, layer, query, 0)
        if place is not None:
            place[0] = key
    for query in queries:
        place = key_place(batch, arena, tokens, layer, query, 1)
        folded.sums[0, query] = 0 if place is None else int(place)
        folded.scores[0, query, ..., 0] = NOTHING.value if place is None else 0
        folded.scores[0, query, ..., 1] = int(place is not None)
