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
from crosspool.kernels.triton.random_draw import uniform
from crosspool.kernels.triton.words import ROWS

BLOCK = 1024
_BLOCK = tl.constexpr(BLOCK)
_LISTED = tl.constexpr(256)
"""Entries of a history, or stop tokens, that are looked at together."""

_ROWS = tl.constexpr(ROWS)
_SEED, _INDEX = tl.constexpr(choice_fields.SEED), tl.constexpr(choice_fields.INDEX)
_TEMPERATURE, _MIN_P = tl.constexpr(choice_fields.TEMPERATURE), tl.constexpr(choice_fields.MIN_P)
_TOP_K, _TOP_P = tl.constexpr(choice_fields.TOP_K), tl.constexpr(choice_fields.TOP_P)
_REPETITION, _PRESENCE = tl.constexpr(choice_fields.REPETITION), tl.constexpr(choice_fields.PRESENCE)
_FREQUENCY, _MIN_TOKENS = tl.constexpr(choice_fields.FREQUENCY), tl.constexpr(choice_fields.MIN_TOKENS)
_STOPS, _STOP_COUNT = tl.constexpr(choice_fields.STOPS), tl.constexpr(choice_fields.STOP_COUNT)
_HISTORY, _HISTORY_COUNT = tl.constexpr(choice_fields.HISTORY), tl.constexpr(choice_fields.HISTORY_COUNT)
_LOGPROBS = tl.constexpr(choice_fields.LOGPROBS)

_INFINITY = tl.constexpr(float("inf"))
_BEYOND_ONE = tl.constexpr(0x3FF0000000000001)
"""The bits of the next float64 after 1, which is the largest weight."""

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
    _change[(rows,)](lane, choices, logits, room.altered, vocab, **_OPTIONS)
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
def chooses(lane, choices, row):
    """Whether there is such a row, and it chooses a token."""
    there = row < tl.load(lane + _ROWS)
    return there & (tl.load(choices + row) != 0)


@triton.jit
def fields_of(choices, row):
    """The fields of a row's choice."""
    return tl.load(choices + row).to(tl.pointer_type(tl.int64))


@triton.jit
def _real(fields, FIELD: tl.constexpr):
    return tl.load(fields + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def _suppresses(fields):
    return (tl.load(fields + _STOP_COUNT) > 0) & (tl.load(fields + _INDEX) < tl.load(fields + _MIN_TOKENS))


@triton.jit
def _source(fields, logits, altered, row, vocab):
    """The logits that the token is drawn from: those given, unless they are to be reported as they were."""
    changes = (tl.load(fields + _HISTORY_COUNT) > 0) | _suppresses(fields)
    source = logits + row.to(tl.int64) * vocab
    if changes & (tl.load(fields + _LOGPROBS) >= 0):
        source = altered + row.to(tl.int64) * vocab
    return source


@triton.jit
def _change(lane, choices, logits, altered, vocab):
    """Penalise and suppress. One program a row. What refuses the row makes its first logit no number."""
    row = tl.program_id(0)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    history_count, suppresses = tl.load(fields + _HISTORY_COUNT), _suppresses(fields)
    if (history_count == 0) & (not suppresses):
        return
    source = _source(fields, logits, altered, row, vocab)
    at = tl.arange(0, _BLOCK)
    if tl.load(fields + _LOGPROBS) >= 0:
        given = logits + row.to(tl.int64) * vocab
        for begin in range(0, vocab, _BLOCK):
            inside = begin + at < vocab
            tl.store(source + begin + at, tl.load(given + begin + at, inside, 0.0), inside)
        tl.debug_barrier()
    broken = _penalise(fields, source, history_count, vocab)
    if suppresses:
        tl.debug_barrier()
        broken += _suppress(fields, source, vocab)
    if broken > 0:
        tl.debug_barrier()
        tl.store(source, float("nan"))


@triton.jit
def _penalise(fields, source, history_count, vocab):
    """Returns how many tokens are none of the vocabulary."""
    repetition = _real(fields, _REPETITION).to(tl.float32)
    presence, frequency = _real(fields, _PRESENCE).to(tl.float32), _real(fields, _FREQUENCY).to(tl.float32)
    history = fields + tl.load(fields + _HISTORY)
    at = tl.arange(0, _LISTED)
    strangers = 0
    for begin in range(0, history_count, _LISTED):
        known = begin + at < history_count
        token = tl.load(history + 2 * (begin + at), known, 0)
        count = tl.load(history + 2 * (begin + at) + 1, known, 0)
        own = known & (token >= 0) & (token < vocab)
        strangers += tl.sum((known & (~own)).to(tl.int32))
        value = tl.load(source + token, own, 0.0)
        value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = tl.where(count > 0, value - presence - frequency * count.to(tl.float32), value)
        tl.store(source + token, value, own)
    return strangers


@triton.jit
def _suppress(fields, source, vocab):
    """Returns how many of the logits that are taken away were infinite or no numbers."""
    stop_count = tl.load(fields + _STOP_COUNT)
    stops = fields + tl.load(fields + _STOPS)
    at = tl.arange(0, _LISTED)
    broken = 0
    for begin in range(0, stop_count, _LISTED):
        token = tl.load(stops + begin + at, begin + at < stop_count, -1)
        own = (token >= 0) & (token < vocab)
        value = tl.load(source + token, own, 0.0)
        broken += tl.sum(((value != value) | (value == _INFINITY)).to(tl.int32))
        tl.store(source + token, -_INFINITY, own)
    return broken


@triton.jit
def _find_largest(lane, choices, logits, altered, largest, places, vocab, blocks):
    """The largest logit of each block, infinity if one is NaN, and the lowest place that has it."""
    row, block = tl.program_id(0), tl.program_id(1)
    if not chooses(lane, choices, row):
        return
    source = _source(fields_of(choices, row), logits, altered, row, vocab)
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
    floor = _real(fields, _MIN_P)
    top_k, top_p = tl.load(fields + _TOP_K), _real(fields, _TOP_P)
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
    most, temperature = tl.max(maxima), _real(fields, _TEMPERATURE)
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
    source = _source(fields, logits, altered, row, vocab)
    _, weights, kept = _candidates(fields, source, largest, row, block, vocab, blocks, WIDE)
    tl.store(counts + row * blocks + block, tl.sum(kept.to(tl.int32)))
    own = tl.where(weights >= _real(fields, _MIN_P), weights, 0.0)
    tl.store(sums + row * blocks + block, tl.sum(own))


@triton.jit
def _gather(lane, choices, logits, altered, largest, counts, weights, ids, vocab, blocks, WIDE: tl.constexpr):
    """The tokens that may be drawn, by their ids, side by side."""
    row, block = tl.program_id(0), tl.program_id(1)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    source = _source(fields, logits, altered, row, vocab)
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
        if _real(fields, _TEMPERATURE) > 0:
            count = tl.sum(tl.load(counts + row * blocks + wide, wide < blocks, 0))
            total = tl.sum(tl.load(sums + row * blocks + wide, wide < blocks, 0.0))
            begin = row.to(tl.int64) * vocab
            place = _drawn(fields, weights + begin, count, total)
            token = tl.load(ids + begin + place)
        else:
            first = tl.load(places + row * blocks + wide, (wide < blocks) & (maxima == most), _NO_TOKEN)
            token = tl.min(first)
        _remember(fields, token)
    tl.store(chosen + row, token.to(tl.int64))


@triton.jit
def _drawn(fields, weights, count, total):
    """The place of the drawn one of ``count`` weights, of ``total`` with all that can not be drawn.

    Kept are the weights whose bits are ``end`` or more, and the first ``most`` of those between ``begin`` and
    it.
    """
    begin, end, most = tl.full((), 1, tl.int64), tl.full((), _BEYOND_ONE, tl.int64), count
    above_count, above = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    inside, between = _sum_from(weights, count, begin)
    top_k, top_p = tl.load(fields + _TOP_K), _real(fields, _TOP_P)
    if (top_k > 0) & (top_k < count):
        begin, end, above_count, above, inside, between = _narrow(
            weights, count, begin, end, inside, between, top_k.to(tl.float64), True
        )
        most = top_k.to(tl.int32) - above_count
        between = between * (most.to(tl.float64) / inside.to(tl.float64))
        total = above + between
    if top_p < 1:
        target = top_p * total
        # What has the last place of top_k is not all kept: it is counted to be, once it is reached.
        begin, end, above_count, above, inside, between = _narrow(
            weights,
            count,
            begin,
            tl.full((), _BEYOND_ONE, tl.int64),
            above_count + most,
            above + between,
            target,
            False,
        )
        each = between / inside.to(tl.float64)
        reach = tl.ceil((target - above) / each).to(tl.int32)
        most = tl.minimum(tl.maximum(reach, 1), inside)
    u = uniform(tl.load(fields + _SEED), tl.load(fields + _INDEX))
    return _invert(weights, count, begin, end, most, u)


@triton.jit
def _sum_from(weights, count, begin):
    """Number and sum of the weights whose bits are ``begin`` or more."""
    number, total = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    for first in range(0, count, _BLOCK):
        at = first + tl.arange(0, _BLOCK)
        own = tl.load(weights + at, at < count, 0.0)
        own = tl.where(own.to(tl.int64, bitcast=True) >= begin, own, 0.0)
        number += tl.sum((own > 0).to(tl.int32))
        total += tl.sum(own)
    return number, total


@triton.jit
def _narrow(weights, count, begin, end, inside, between, target, COUNTED: tl.constexpr):
    """Halve the range of bits from ``begin`` to ``end`` in which ``target`` is reached, from the largest
    weight down, until it holds one weight or equal ones.

    The target is a number of weights if COUNTED, else their sum. At first ``inside`` weights, whose sum is
    ``between``, are in the range and none beyond it. Returns the range, number and sum of the weights beyond
    it, and of those in it.
    """
    above_count, above = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    while (end - begin > 1) & (inside > 1):
        middle = begin + (end - begin) // 2
        number, total = _sum_from(weights, count, middle)
        reached = total
        if COUNTED:
            reached = number.to(tl.float64)
        if reached >= target:
            begin = middle
            inside, between = number - above_count, total - above
        else:
            end = middle
            inside, between = inside + above_count - number, between + above - total
            above_count, above = number, total
    return begin, end, above_count, above, inside, between


@triton.jit
def _invert(weights, count, begin, end, most, u):
    """Invert the cumulative distribution of the kept weights at ``u`` in [0, 1)."""
    total, seen = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)
    for first in range(0, count, _BLOCK):
        own, seen = _kept(weights, first, count, begin, end, most, seen)
        total += tl.sum(own)
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    target = tl.minimum(u * total, below)
    before, place, last = tl.full((), 0.0, tl.float64), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    first, seen = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while (first < count) & (place < 0):
        own, seen = _kept(weights, first, count, begin, end, most, seen)
        at = first + tl.arange(0, _BLOCK)
        passes = (before + tl.cumsum(own) > target) & (own > 0)
        found = tl.min(tl.where(passes, at, _NO_TOKEN))
        place = tl.where(found < _NO_TOKEN, found, -1)
        last = tl.maximum(last, tl.max(tl.where(own > 0, at, 0)))
        before += tl.sum(own)
        first += _BLOCK
    # Should this order of adding not reach what the other did, it is the last one.
    return tl.where(place < 0, last, place)


@triton.jit
def _kept(weights, first, count, begin, end, most, seen):
    """A block of weights, those that are not kept as 0. ``seen`` counts those in the range before it."""
    at = first + tl.arange(0, _BLOCK)
    own = tl.load(weights + at, at < count, 0.0)
    bits = own.to(tl.int64, bitcast=True)
    within = (bits >= begin) & (bits < end)
    number = seen + tl.cumsum(within.to(tl.int32))
    kept = (bits >= end) | (within & (number <= most))
    return tl.where(kept, own, 0.0), seen + tl.sum(within.to(tl.int32))


@triton.jit
def _remember(fields, token):
    """Count one more output token in the history, if there is one, and step the index."""
    tl.store(fields + _INDEX, tl.load(fields + _INDEX) + 1)
    place = tl.load(fields + _HISTORY)
    if place > 0:
        history, count = fields + place, tl.load(fields + _HISTORY_COUNT)
        at = tl.arange(0, _LISTED)
        own, made = count, tl.full((), 0, tl.int64)
        for begin in range(0, count, _LISTED):
            entry = history + 2 * (begin + at)
            same = (begin + at < count) & (tl.load(entry, begin + at < count, -1) == token)
            own = tl.minimum(own, tl.min(tl.where(same, begin + at, _NO_TOKEN)).to(tl.int64))
            made += tl.sum(tl.load(entry + 1, same, 0))
        tl.store(history + 2 * own, token.to(tl.int64))
        tl.store(history + 2 * own + 1, made + 1)
        tl.store(fields + _HISTORY_COUNT, tl.maximum(count, own + 1))
