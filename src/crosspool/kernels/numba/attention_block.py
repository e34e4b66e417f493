"""Attention of a few queries over one block of positions, and how the results of blocks are put together.

Blocks are cut at multiples of BLOCK absolute positions, never by page, thread or chunk of a prompt, and are
merged in order, so a query's result depends on its own row's tokens alone.

The **state** of a query head over some positions is float32 [value_width + 2]: values weighted by e**(score -
highest), added up; the highest score; the sum of the weights (arXiv 1805.02867). A sum of 0: nothing seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.amx_attention import WIDEST, score_block, sum_block
from crosspool.kernels.numba.batch import BLOCK, TILE, first_seen, region_of
from crosspool.kernels.numba.compile import cpu_features, inline, kernel
from crosspool.kernels.numba.elements import BFLOAT16, element_bytes, narrow
from crosspool.kernels.numba.exp import exp
from crosspool.kernels.numba.intrinsics import address_of, floats, words
from crosspool.kernels.numba.linear import dot_rows
from crosspool.kernels.numba.matrix import Matrix
from crosspool.kernels.numba.sum_tile import add_weighted

LANES = 16
BLOCK_MINE_BYTES = 8 * TILE + 4 * (TILE * BLOCK + BLOCK)
"""Scratch of each thread for ``attend_block``: addresses of queries, their scores, a block of floats."""

MINUS_INFINITY = np.float32(-np.inf)


class AttentionShape(NamedTuple):
    """``heads`` query heads share ``kv_heads`` key-value heads; widths are in elements, the rest in bytes.

    In a page's region, the key of head k in slot s is at ``s * token_bytes + k * head_bytes``, its value
    ``value_offset`` further. A latent is one head whose value is the begin of its key.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    value_offset: int
    token_bytes: int
    head_bytes: int
    scale: float


class Tile(NamedTuple):
    """``size`` query heads of one key-value head of a row. With G query heads to a key-value head, number v
    is head v % G of the row's query v // G; the tile begins at number ``first``."""

    row: int
    kv_head: int
    first: int
    size: int


@inline
def state_bytes(shape):
    """Bytes of a state."""
    return 4 * (shape.value_width + 2)


@kernel
def attend_block(shape, batch, kv, tile, block, query, out, mine):
    """The states of a tile's query heads over what they see of a block, to address ``out`` [count].

    ``query`` is the address of the pass's queries [T, heads, key_width] in model dtype. Nothing is written
    where nobody sees anything.
    """
    group, base = shape.heads // shape.kv_heads, block * BLOCK
    position = batch.firsts[tile.row]
    last = position + (tile.first + tile.size - 1) // group
    begin = max(base, first_seen(position + tile.first // group, kv.window))
    end = min(base + BLOCK, last + 1)
    if begin >= end:
        return
    scores = mine + 8 * TILE
    by_unit = batch.dtype == BFLOAT16 and shape.key_width <= WIDEST
    if by_unit:
        _score_bfloat16(shape, batch, kv, tile, base, begin, end, query, mine, scores)
    else:
        _score(shape, batch, kv, tile, base, begin, end, query, mine, scores)
    width, stride = shape.value_width, state_bytes(shape)
    room = floats(scores + 4 * TILE * BLOCK, BLOCK)
    for v in range(tile.size):
        own = position + (tile.first + v) // group
        first = min(max(begin, first_seen(own, kv.window)), end)
        seen = max(first, min(end, own + 1))
        state = floats(out + v * stride, width + 2)
        _fill(state, 0, width, np.float32(0))
        weights = floats(scores + 4 * v * BLOCK, BLOCK)
        state[width], state[width + 1] = _weigh(
            weights, begin - base, first - base, seen - base, end - base, np.float32(shape.scale), room
        )
    if by_unit:
        _sum_bfloat16(shape, batch, kv, tile, base, begin, end, scores, out, stride)
    else:
        _sum(shape, batch, kv, tile, base, begin, end, scores, out, stride)


@kernel
def _score(shape, batch, kv, tile, base, begin, end, query, mine, scores):
    """Products of the tile's queries with the keys from position ``begin`` to ``end - 1``; that of
    query head v and position p goes to address ``scores + 4 * (v * BLOCK + p - base)``."""
    group, addresses = shape.heads // shape.kv_heads, words(mine, tile.size)
    for v in range(tile.size):
        place = batch.starts[tile.row] + (tile.first + v) // group
        head = tile.kv_head * group + (tile.first + v) % group
        step = shape.key_width * element_bytes(batch.dtype)
        addresses[v] = query + (place * shape.heads + head) * step
    position = begin
    while position < end:
        slot = position % kv.tokens_per_page
        count = min(kv.tokens_per_page - slot, end - position)
        region = region_of(batch, kv, tile.row, position // kv.tokens_per_page)
        place = region + slot * shape.token_bytes + tile.kv_head * shape.head_bytes
        keys = Matrix(place, shape.token_bytes, count, shape.key_width, batch.dtype, 0)
        out = scores + 4 * (position - base)
        dot_rows(keys, np.int64(0), count, addresses, batch.dtype, tile.size, out, 4 * BLOCK)
        position += count


@kernel
def _sum(shape, batch, kv, tile, base, begin, end, weights, out, out_stride):
    """Add to the tile's states at ``out`` the values from position ``begin`` to ``end - 1`` by their weights,
    which are placed like the scores."""
    position = begin
    while position < end:
        slot = position % kv.tokens_per_page
        count = min(kv.tokens_per_page - slot, end - position)
        region = region_of(batch, kv, tile.row, position // kv.tokens_per_page) + shape.value_offset
        add_weighted(
            region + slot * shape.token_bytes + tile.kv_head * shape.head_bytes,
            shape.token_bytes,
            count,
            shape.value_width,
            batch.dtype,
            weights + 4 * (position - base),
            4 * BLOCK,
            tile.size,
            out,
            out_stride,
        )
        position += count


_by_unit = "amx-bf16" in cpu_features()
_score_bfloat16 = score_block if _by_unit else _score
_sum_bfloat16 = sum_block if _by_unit else _sum


@kernel
def _weigh(weights, begin, first, seen, end, scale, room):
    """Make weights e**(score - highest) of a block's products from ``first`` to ``seen - 1``, and 0 of the
    others from ``begin`` to ``end - 1``. Returns the highest score and the sum of the weights.

    Both are found by halves of a power of two from the block's begin on, so that no element moves when a
    chunk or a window ends elsewhere. ``room`` is float32 [BLOCK].
    """
    if first == seen:
        _fill(weights, begin, end, np.float32(0))
        return MINUS_INFINITY, np.float32(0)
    size = LANES
    while size < seen:
        size *= 2
    count = seen - first
    own, copy = _part(weights, first, count), _part(room, first, count)
    _fill(room, 0, first, MINUS_INFINITY)
    _fill(room, seen, size, MINUS_INFINITY)
    for i in range(count):
        own[i] *= scale
        copy[i] = own[i]
    highest = _highest(room, size)
    for i in range(count):
        own[i] = exp(own[i] - highest)
    _fill(weights, begin, first, np.float32(0))
    _fill(weights, seen, end, np.float32(0))
    _fill(room, 0, first, np.float32(0))
    _fill(room, seen, size, np.float32(0))
    for i in range(count):
        copy[i] = own[i]
    return highest, _total(room, size)


@inline
def _part(values, first, count):
    """``count`` of the values from number ``first`` on; loops over it from 0 become vector code."""
    return floats(address_of(values) + 4 * first, count)


@inline
def _fill(values, first, last, value):
    part = _part(values, first, max(0, last - first))
    for i in range(len(part)):
        part[i] = value


@inline
def _highest(values, size):
    """The highest of ``size`` values, a power of two; overwrites them."""
    while size > 1:
        size //= 2
        low, high = _part(values, 0, size), _part(values, size, size)
        for i in range(size):
            low[i] = high[i] if high[i] > low[i] else low[i]
    return values[0]


@inline
def _total(values, size):
    """The sum of ``size`` values, a power of two, by halves; overwrites them."""
    while size > 1:
        size //= 2
        low, high = _part(values, 0, size), _part(values, size, size)
        for i in range(size):
            low[i] += high[i]
    return values[0]


@inline
def forget(state, width):
    """Make a state that of no position."""
    state[: width + 2] = np.float32(0)
    state[width] = MINUS_INFINITY


@kernel
def merge(state, other, width):
    """Add to a state that of the positions which follow."""
    if other[width + 1] == 0:
        return
    highest = other[width] if other[width] > state[width] else state[width]
    before, now = exp(state[width] - highest), exp(other[width] - highest)
    for i in range(width):
        state[i] = state[i] * before + other[i] * now
    state[width] = highest
    state[width + 1] = state[width + 1] * before + other[width + 1] * now


@kernel
def finish(state, width, out, dtype):
    """Store a state's mean value at address ``out`` in ``dtype``; the state's values are overwritten."""
    for i in range(width):
        state[i] /= state[width + 1]
    narrow(state, width, out, dtype)
