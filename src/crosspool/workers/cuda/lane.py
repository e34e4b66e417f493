"""A lane: the fixed memory in which one pass at a time runs, on its home and on every weights device.

What a pass of a geometry works in is carved from the lane's room, always in the same way, so that a graph
may be recorded over it. Nothing in a room outlives a pass, but for a prompt chunk's, which has its lane to
itself from its first layer to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from crosspool.backends.device import Device
from crosspool.core.errors import InvariantError
from crosspool.kernels.triton.grant_words import RECORD_WORDS
from crosspool.kernels.triton.words import LANE_WORDS
from crosspool.workers.cuda.geometry import Geometry

ALIGNMENT = 256
"""Bytes. Of all that begins in device memory."""

RING_RECORDS = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """The most of a pass: ``rows``, and ``queries`` of all rows together."""

    rows: int
    queries: int


@dataclass(frozen=True, slots=True)
class PassArrays:
    """What a pass is about, made on the device by its first kernels out of the rows that go on.

    ``words`` int64 [LANE_WORDS]. Of each query: its ``tokens`` and ``positions`` and the row it is of
    (``row_of``), int32 [queries]. Of each row: where its queries begin (``starts``, [rows + 1]), how many
    tokens its context has with this pass's (``lengths``), its ``numbers`` in the grant, int32 [rows]; and
    ``tables`` int32 [rows, groups, most chunks]. ``choosers`` are the last queries of the rows that choose a
    token, int32 [rows], and ``chosen`` int64 [rows] what they have chosen, or -1.
    """

    words: Tensor
    tokens: Tensor
    positions: Tensor
    row_of: Tensor
    starts: Tensor
    lengths: Tensor
    numbers: Tensor
    tables: Tensor
    choosers: Tensor
    chosen: Tensor


@dataclass(frozen=True, slots=True)
class Ring:
    """Where a lane writes what the host is to know: ``records`` int64 [RING_RECORDS, RECORD_WORDS] and
    ``written`` int64 [1], pinned. Nobody else writes there."""

    records: Tensor
    written: Tensor

    @staticmethod
    def on(device: Device) -> Ring:
        records = device.pinned((RING_RECORDS, RECORD_WORDS), torch.int64)
        return Ring(records, device.pinned((1,), torch.int64))


class Room:
    """Memory to be carved: each ``take`` gives what comes next."""

    def __init__(self, memory: Tensor | None) -> None:
        """``memory`` uint8, or None to learn how much there has to be."""
        self._memory = memory
        self.used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises InvariantError if there is too little left."""
        size = prod(shape) * dtype.itemsize
        begin, self.used = self.used, self.used + -(-size // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            return torch.empty(*shape, dtype=dtype, device="meta")
        if self.used > self._memory.numel():
            raise InvariantError(f"{self.used:,} bytes carved from a room of {self._memory.numel():,}")
        return self._memory[begin : begin + size].view(dtype).view(*shape)


def carve_arrays(room: Room, geometry: Geometry, limits: Limits) -> PassArrays:
    """Comes first in a lane's home room."""
    rows, queries = limits.rows, limits.queries
    words = room.take((LANE_WORDS,), torch.int64)
    tokens, positions, row_of = (room.take((queries,), torch.int32) for _ in range(3))
    starts = room.take((rows + 1,), torch.int32)
    lengths, numbers, choosers = (room.take((rows,), torch.int32) for _ in range(3))
    chosen = room.take((rows,), torch.int64)
    tables = room.take((rows, geometry.groups, geometry.most_chunks), torch.int32)
    return PassArrays(words, tokens, positions, row_of, starts, lengths, numbers, tables, choosers, chosen)
