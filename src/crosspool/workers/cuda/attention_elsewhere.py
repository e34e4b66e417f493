"""Attention to contexts that lie on several KV devices: what the home launches then, and what the others do.

Each device makes queries, keys and values of the same normed hidden states, writes those keys and values
whose pages it has, and folds what it attends to into one state of each query and head
(kernels/triton/states.py). The home merges the states of all devices, in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.kernels.triton.batch import BLOCK, Pass
from crosspool.kernels.triton.decode import SPLITS, attend_splits
from crosspool.kernels.triton.pass_begin import find_pages
from crosspool.kernels.triton.prefill import attend_part
from crosspool.kernels.triton.states import States, fold_states, merge_states
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.attention import (
    HomeSurroundings,
    KvPages,
    attention_launches,
    attention_shape,
    kv_place,
)
from crosspool.workers.cuda.attention_side import AttentionSidePass
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, Ring
from crosspool.workers.cuda.room import META, Room


class SpreadAttentionPass(AttentionSidePass):
    """The home's launches. It is device ``part`` of ``parts``; ``states`` has room for what all of them have
    of a layer."""

    def __init__(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
        part: int,
        parts: int,
    ) -> None:
        super().__init__(geometry, limits, phase, around, ring, room)
        self.states = carve_states(room, geometry, limits.queries, parts)
        self._own = self.states.part(part)

    def norm(self, layer: int) -> None:
        """What all devices begin with, to ``hidden.normed``."""
        self._norm(layer)

    def part(self, layer: int) -> None:
        """The home's own part of a layer's attention."""
        kv = self._project(layer)
        self._attend.fold(self.batch, kv, self._own)

    def merge(self, layer: int) -> None:
        """The rest of the attention half: ``states`` has what the others have made."""
        merge_states(self.batch, self.states, None, self._attend.attended)
        self._output(layer)


class AttentionElsewhere:
    """The launches on another KV device, which has ``pages``. What it is given of a pass are its numbers in
    ``words``, and ``batch`` with the home's page tables; of a layer, ``normed`` [T, H]. What it makes of a
    layer is ``folded``, of one part and one block."""

    def __init__(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        pages: KvPages,
        chip: Chip,
        words: Tensor,
        room: Room,
    ) -> None:
        self._geometry, self._pages = geometry, pages
        self._shape = shape = attention_shape(geometry)
        queries, dtype = limits.queries, geometry.dtype
        self.batch = carve_part(room, geometry, limits, words)
        self.normed = room.take((queries, geometry.hidden), dtype)
        self.folded = carve_states(room, geometry, queries, 1)
        self._states: States | None = None
        if phase is Phase.DECODE:
            context = min(geometry.spec.max_context, SPLITS * BLOCK)
            self._states = room.like(States.room(shape, queries, context, 1, META))
        self._query = room.take((queries, shape.heads, shape.key_width), dtype)
        self._attention = attention_launches(geometry, limits, chip, self.batch, self._query, None, room)

    def begin(self) -> None:
        """Of a pass: the page tables become this device's."""
        pages = self._pages.numbers
        find_pages(self.batch, pages.start, len(pages))

    def attention(self, layer: int) -> None:
        """This device's part of a layer's attention."""
        kv = kv_place(self._geometry, layer, self._pages.arena)
        self._attention.project(layer, kv, self.normed)
        if self._states is None:
            attend_part(self.batch, kv, self._shape, self._query, self.folded)
        else:
            attend_splits(self.batch, kv, self._shape, self._query, self._states)
            fold_states(self.batch, self._states, None, self.folded)


def carve_part(room: Room, geometry: Geometry, limits: Limits, words: Tensor) -> Pass:
    """What another device than the home has to know of a pass."""
    rows = limits.rows
    starts, firsts = (room.take((count,), torch.int32) for count in (rows + 1, rows))
    row_of = room.take((limits.queries,), torch.int32)
    pages = room.take((rows, geometry.groups, geometry.most_chunks), torch.int32)
    return Pass(words, starts, firsts, row_of, pages)


def carve_states(room: Room, geometry: Geometry, queries: int, parts: int) -> States:
    """One state of each query and head, of so many devices."""
    return room.like(States.room(attention_shape(geometry), queries, 1, parts, META))
