"""Token choice on the device: penalties, suppression, temperature, filters, draw.

The rules are those of kernels/reference/sampling.py: a row's token depends on its own logits, seed and index
alone, and among equals the lowest token id comes first, everywhere. Nothing is sorted: what top_k and top_p
keep is the beginning of one order, and where it ends is found by halving the range of the bits of a weight.
Blocks of BLOCK tokens are looked at side by side, and each of their sums has one order.

All is done for the lane's ROWS of ``logits`` float32 [rows, V], which may be changed. ``choices`` int64
[rows] are the addresses of how each chooses (choice_fields.py), 0 if a row chooses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels import choice_fields
from crosspool.kernels.triton.choice_draw import drawn
from crosspool.kernels.triton.choice_row import chooses, fields_of, real, source_of
from crosspool.kernels.triton.penalties import change, remember

BLOCK = 1024
_BLOCK = tl.constexpr(BLOCK)
_TEMPERATURE, _MIN_P = tl.constexpr(choice_fields.TEMPERATURE), tl.constexpr(choice_fields.MIN_P)
_TOP_K, _TOP_P = tl.constexpr(choice_fields.TOP_K), tl.constexpr(choice_fields.TOP_P)
_INFINITY = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(2**31 - 1)
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Without fusion penalties are rounded as the reference rounds them."""


@dataclass(frozen=True, slots=True)
class ChoiceRoom:
    """Scratch for [rows, V] logits in B blocks: ``altered`` float32 [rows, V]; of each block its ``largest``
    float32 and where it is (``places`` int32), the sum of its weights (``sums`` float64), and how many
    ``counts`` int32 may be drawn, [rows, B]; these are then the first of ``weights`` float64 and ``ids``
    int32 [rows, V]."""

    altered: Tensor
    largest: Tensor
    places: Tensor
    sums: Tensor
    counts: Tensor
    weights: Tensor
    ids: Tensor


def blocks_of(vocab: int) -> int:
    return -(-vocab // BLOCK)


def choose(lane: Tensor, choices: Tensor, logits: Tensor, room: ChoiceRoom, chosen: Tensor) -> None:
    """Write into ``chosen`` (int64 [rows]) each row's next token, or -1 if there is none: NaN or infinity is
    among its logits, every token is suppressed, or one that is to be penalised is none of the vocabulary.

    ``lane`` has the lane's words. A row's choice counts the token in its history and steps its index.
    """
    rows, vocab = logits.shape
    blocks = blocks_of(vocab)
    wide = max(2, triton.next_power_of_2(blocks))
    change[(rows,)](lane, choices, logits, room.altered, vocab, **_OPTIONS)
    _find_largest[(rows, blocks)](
        lane, choices, logits, room.altered, room.largest, room.places, vocab, blocks, **_OPTIONS
    )
    sources = (lane, choices, logits, room.altered, room.largest, room.counts)
    _count[(rows, blocks)](*sources, room.sums, vocab, blocks, wide, **_OPTIONS)
    _gather[(rows, blocks)](*sources, room.weights, room.ids, vocab, blocks, wide, **_OPTIONS)
    _draw[(rows,)](
        lane,
        choices,
        room.largest,
        room.places,
        room.sums,
        room.counts,
        room.weights,
        room.ids,
        chosen,
        vocab,
        blocks,
        wide,
        **_OPTIONS | {"num_warps": 16},
    )


@triton.jit
def _find_largest(lane, choices, logits, altered, largest, places, vocab, blocks):
    """The largest logit of each block, infinity if one is NaN, and the lowest place that has it."""
    row, block = tl.program_id(0), tl.program_id(1)
    if not chooses(lane, choices, row):
        return
    source = source_of(fields_of(choices, row), logits, altered, row, vocab)
    token = block * _BLOCK + tl.arange(0, _BLOCK)
    values = tl.load(source + token, token < vocab, -_INFINITY)
    broken = tl.sum((values != values).to(tl.int32)) > 0
    most = tl.where(broken, _INFINITY, tl.max(tl.where(values != values, -_INFINITY, values)))
    tl.store(largest + row * blocks + block, most)
    tl.store(places + row * blocks + block, tl.min(tl.where(values == most, token, _NO_TOKEN)))


@triton.jit
def _weight(value, most, temperature):
    """At most 0 is divided, so no temperature can make it overflow upwards."""
    return tl.exp((value.to(tl.float64) - most.to(tl.float64)) / temperature)


@triton.jit
def _floor(fields, maxima, most, temperature, vocab, blocks, WIDE: tl.constexpr):
    """A weight below which nothing is kept: ``maxima`` [WIDE] are the largest logits of the blocks.

    Of as many blocks as top_k keeps, each has one weight that is as large as its largest. For top_p: all that
    is below its share of 1 - top_p, were it spread evenly, is together less than that; and the largest of the
    blocks are at most the whole.
    """
    floor = real(fields, _MIN_P)
    top_k, top_p = tl.load(fields + _TOP_K), real(fields, _TOP_P)
    if (top_k > 0) & (top_k < vocab):
        if top_k <= blocks:
            last = tl.sort(maxima, descending=True)
            kth = tl.max(tl.where(tl.arange(0, WIDE) == top_k - 1, last, -_INFINITY))
            floor = tl.maximum(floor, _weight(kth, most, temperature))
    elif top_p < 1:
        sure = _weight(maxima, most, temperature)
        sure = tl.sum(tl.where(sure >= floor, sure, 0.0))
        floor = tl.maximum(floor, (1 - top_p) * sure / vocab)
    return floor


@triton.jit
def _candidates(fields, source, largest, row, block, vocab, blocks, WIDE: tl.constexpr):
    """The weights of a block, and which of them may be drawn: none if nothing is drawn in this row."""
    wide = tl.arange(0, WIDE)
    maxima = tl.load(largest + row * blocks + wide, wide < blocks, -_INFINITY)
    most, temperature = tl.max(maxima), real(fields, _TEMPERATURE)
    token = block * _BLOCK + tl.arange(0, _BLOCK)
    weights = tl.zeros((_BLOCK,), tl.float64)
    kept = token < 0
    if (temperature > 0) & (tl.abs(most) < _INFINITY):
        floor = _floor(fields, maxima, most, temperature, vocab, blocks, WIDE)
        values = tl.load(source + token, token < vocab, -_INFINITY)
        weights = _weight(values, most, temperature)
        kept = (weights >= floor) & (weights > 0)
    return token, weights, kept


@triton.jit
def _count(lane, choices, logits, altered, largest, counts, sums, vocab, blocks, WIDE: tl.constexpr):
    """How many tokens of each block may be drawn, and the sum of its weights that min_p keeps."""
    row, block = tl.program_id(0), tl.program_id(1)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    source = source_of(fields, logits, altered, row, vocab)
    _, weights, kept = _candidates(fields, source, largest, row, block, vocab, blocks, WIDE)
    tl.store(counts + row * blocks + block, tl.sum(kept.to(tl.int32)))
    own = tl.where(weights >= real(fields, _MIN_P), weights, 0.0)
    tl.store(sums + row * blocks + block, tl.sum(own))


@triton.jit
def _gather(lane, choices, logits, altered, largest, counts, weights, ids, vocab, blocks, WIDE: tl.constexpr):
    """The tokens that may be drawn, by their ids, side by side."""
    row, block = tl.program_id(0), tl.program_id(1)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    source = source_of(fields, logits, altered, row, vocab)
    token, own, kept = _candidates(fields, source, largest, row, block, vocab, blocks, WIDE)
    wide = tl.arange(0, WIDE)
    before = tl.sum(tl.load(counts + row * blocks + wide, wide < block, 0))
    at = row.to(tl.int64) * vocab + before + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(weights + at, own, kept)
    tl.store(ids + at, token, kept)


@triton.jit
def _draw(
    lane,
    choices,
    largest,
    places,
    sums,
    counts,
    weights,
    ids,
    chosen,
    vocab,
    blocks,
    WIDE: tl.constexpr,
):
    """One program a row: where the filters end, and the draw from what they keep."""
    row = tl.program_id(0)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    wide = tl.arange(0, WIDE)
    maxima = tl.load(largest + row * blocks + wide, wide < blocks, -_INFINITY)
    most = tl.max(maxima)
    token = tl.full((), -1, tl.int32)
    if tl.abs(most) < _INFINITY:
        if real(fields, _TEMPERATURE) > 0:
            count = tl.sum(tl.load(counts + row * blocks + wide, wide < blocks, 0))
            total = tl.sum(tl.load(sums + row * blocks + wide, wide < blocks, 0.0))
            begin = row.to(tl.int64) * vocab
            place = drawn(fields, weights + begin, count, total)
            token = tl.load(ids + begin + place)
        else:
            first = tl.load(places + row * blocks + wide, (wide < blocks) & (maxima == most), _NO_TOKEN)
            token = tl.min(first)
        remember(fields, token)
    tl.store(chosen + row, token.to(tl.int64))
