"""A lane's arrays on its home: what a pass is about, and what it works in.

A lane's memory stays where it is, so that graphs can be recorded over it. Nothing outlives a pass but the
number of records in its words, and a prompt chunk has its lane to itself from its first layer to its last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.backends.device import Device, Stream
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.choice import ChoiceRoom, blocks_of
from crosspool.kernels.triton.grant_words import RECORD_WORDS
from crosspool.kernels.triton.pass_begin import PassRows
from crosspool.kernels.triton.words import LANE_WORDS
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.room import Room

RING_RECORDS = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """The most of a pass: ``rows``, and ``queries`` of all rows together."""

    rows: int
    queries: int


@dataclass(frozen=True, slots=True)
class Track:
    """A lane on one device: its stream there, and the memory it works in."""

    device: Device
    stream: Stream
    memory: Tensor
    zeros: Tensor


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


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """[T, H] each, in model dtype: the residual ``stream``; what the next half reads (``normed``); what a
    half has made (``addend``); and of the FFN what each device has made of it, ``outputs`` [parts, T, H]."""

    stream: Tensor
    normed: Tensor
    addend: Tensor
    outputs: Tensor


@dataclass(frozen=True, slots=True)
class HeadRoom:
    """``normed`` [R, H] of the last queries, and ``logits`` float32 [R, V]."""

    normed: Tensor
    logits: Tensor
    choice: ChoiceRoom


def carve_pass(room: Room, geometry: Geometry, limits: Limits) -> tuple[Pass, PassRows]:
    """Comes first in a lane's room, and its words first of all: their place depends on nothing."""
    rows, queries = limits.rows, limits.queries
    words = room.take((LANE_WORDS,), torch.int64)
    starts = room.take((rows + 1,), torch.int32)
    firsts, numbers = (room.take((rows,), torch.int32) for _ in range(2))
    row_of, tokens = (room.take((queries,), torch.int32) for _ in range(2))
    choices, chosen = (room.take((rows,), torch.int64) for _ in range(2))
    pages = room.take((rows, geometry.groups, geometry.most_chunks), torch.int32)
    return Pass(words, starts, firsts, row_of, pages), PassRows(tokens, numbers, choices, chosen)


def carve_hidden(room: Room, geometry: Geometry, queries: int, parts: int) -> HiddenStates:
    shape = (queries, geometry.hidden)
    stream, normed, addend = (room.take(shape, geometry.dtype) for _ in range(3))
    return HiddenStates(stream, normed, addend, room.take((parts, *shape), geometry.dtype))


def carve_head(room: Room, geometry: Geometry, rows: int) -> HeadRoom:
    vocab = geometry.spec.vocab_size
    blocks = blocks_of(vocab)
    choice = ChoiceRoom(
        altered=room.take((rows, vocab), torch.float32),
        largest=room.take((rows, blocks), torch.float32),
        places=room.take((rows, blocks), torch.int32),
        sums=room.take((rows, blocks), torch.float64),
        counts=room.take((rows, blocks), torch.int32),
        weights=room.take((rows, vocab), torch.float64),
        ids=room.take((rows, vocab), torch.int32),
    )
    normed = room.take((rows, geometry.hidden), geometry.dtype)
    return HeadRoom(normed, room.take((rows, vocab), torch.float32), choice)
