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
from crosspool.kernels.numba.attention_ahead import AHEAD_WORDS, ask, asks_a_position, look_ahead
from crosspool.kernels.numba.attention_tile import exponentials, fold
from crosspool.kernels.numba.batch import BLOCK, TILE, first_seen, region_of
from crosspool.kernels.numba.compile import cpu_features, inline, kernel
from crosspool.kernels.numba.elements import BFLOAT16, element_bytes, narrow
from crosspool.kernels.numba.exp import exp
from crosspool.kernels.numba.intrinsics import address_of, floats, words
from crosspool.kernels.numba.linear import dot_rows
from crosspool.kernels.numba.matrix import Matrix
from crosspool.kernels.numba.sum_tile import add_weighted

BLOCK_MINE_BYTES = 8 * (AHEAD_WORDS + TILE) + 4 * TILE * BLOCK
"""Scratch of each thread for ``attend_block``: what to ask for, addresses of queries, their scores."""

WEIGHING, PARTS = 64, 4
"""Positions of a block that are asked for while weights are made, and after how many parts of each."""

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
    """``size`` query heads of each of ``kv_heads`` key-value heads of a row, from number ``kv_head`` on. With
    G query heads to a key-value head, number v of these is head v % G of the row's query v // G; the tile
    begins at number ``first``. All its query heads are TILE at most, numbered [key-value head][size]."""

    row: int
    kv_head: int
    kv_heads: int
    first: int
    size: int


@inline
def state_bytes(shape):
    """Bytes of a state."""
    return 4 * (shape.value_width + 2)


@kernel
def attend_block(shape, batch, kv, tile, block, query, out, head_stride, mine):
    """The states of a tile's query heads over what they see of a block, to address ``out``: [size] for each
    key-value head, ``head_stride`` bytes apart.

    ``query`` is the address of the pass's queries [T, heads, key_width] in model dtype. Nothing is written
    where nobody sees anything.
    """
    group, base = shape.heads // shape.kv_heads, block * BLOCK
    position = batch.firsts[tile.row]
    begin, end = seen_of_block(shape, batch, kv, tile, block)
    if begin >= end:
        return
    pace = asks_a_position(mine)
    addresses = mine + 8 * AHEAD_WORDS
    scores = addresses + 8 * TILE
    by_unit = batch.dtype == BFLOAT16 and shape.key_width <= WIDEST
    if by_unit:
        _score_bfloat16(shape, batch, kv, tile, base, begin, end, query, mine, pace, addresses, scores)
    else:
        _score(shape, batch, kv, tile, base, begin, end, query, mine, pace, addresses, scores)
    width, stride = shape.value_width, state_bytes(shape)
    asks = WEIGHING * pace // (PARTS * tile.kv_heads * tile.size)
    for n in range(tile.kv_heads * tile.size):
        head, v = n // tile.size, n % tile.size
        own = position + (tile.first + v) // group
        first = min(max(begin, first_seen(own, kv.window)), end)
        seen = max(first, min(end, own + 1))
        state = floats(out + head * head_stride + v * stride, width + 2)
        weights = floats(scores + 4 * n * BLOCK, BLOCK)
        state[width], state[width + 1] = _weigh(
            weights, first - base, seen - base, np.float32(shape.scale), mine, asks
        )
    if by_unit:
        _sum_bfloat16(shape, batch, kv, tile, base, begin, end, scores, out, stride, head_stride, mine, pace)
    else:
        _sum(shape, batch, kv, tile, base, begin, end, scores, out, stride, head_stride, mine, pace)
    ask(mine, pace * BLOCK)


@inline
def seen_of_block(shape, batch, kv, tile, block):
    """The first position of a block that any of a tile's queries sees, and the first after them."""
    group, position = shape.heads // shape.kv_heads, batch.firsts[tile.row]
    last = position + (tile.first + tile.size - 1) // group
    begin = max(block * BLOCK, first_seen(position + tile.first // group, kv.window))
    return begin, min((block + 1) * BLOCK, last + 1)


@inline
def look_at_block(shape, batch, kv, tile, block, mine):
    """From now on ask for what a tile needs of a block. ``mine`` is that of ``attend_block``."""
    begin, end = seen_of_block(shape, batch, kv, tile, block)
    look_ahead(shape, batch, kv, tile, begin, end, mine)


@kernel
def _score(shape, batch, kv, tile, base, begin, end, query, ahead, pace, mine, scores):
    """Products of the tile's queries with the keys from position ``begin`` to ``end - 1``; that of
    query head number n and position p goes to address ``scores + 4 * (n * BLOCK + p - base)``."""
    group, addresses = shape.heads // shape.kv_heads, words(mine, tile.size)
    for head in range(tile.kv_head, tile.kv_head + tile.kv_heads):
        for v in range(tile.size):
            place = batch.starts[tile.row] + (tile.first + v) // group
            number = place * shape.heads + head * group + (tile.first + v) % group
            addresses[v] = query + number * shape.key_width * element_bytes(batch.dtype)
        position = begin
        while position < end:
            slot = position % kv.tokens_per_page
            count = min(kv.tokens_per_page - slot, end - position)
            region = region_of(batch, kv, tile.row, position // kv.tokens_per_page)
            place = region + slot * shape.token_bytes + head * shape.head_bytes
            keys = Matrix(place, shape.token_bytes, count, shape.key_width, batch.dtype, 0)
            out = scores + 4 * ((head - tile.kv_head) * tile.size * BLOCK + position - base)
            dot_rows(keys, np.int64(0), count, addresses, batch.dtype, tile.size, out, 4 * BLOCK)
            ask(ahead, pace * count // (2 * tile.kv_heads))
            position += count


@kernel
def _sum(shape, batch, kv, tile, base, begin, end, weights, out, out_stride, head_stride, ahead, pace):
    """The values from position ``begin`` to ``end - 1``, added up by their weights, which are placed like the
    scores, to the tile's states at ``out``."""
    for head in range(tile.kv_heads):
        states = out + head * head_stride
        for v in range(tile.size):
            _fill(floats(states + v * out_stride, shape.value_width), 0, shape.value_width, np.float32(0))
        position = begin
        while position < end:
            slot = position % kv.tokens_per_page
            count = min(kv.tokens_per_page - slot, end - position)
            region = region_of(batch, kv, tile.row, position // kv.tokens_per_page) + shape.value_offset
            add_weighted(
                region + slot * shape.token_bytes + (tile.kv_head + head) * shape.head_bytes,
                shape.token_bytes,
                count,
                shape.value_width,
                batch.dtype,
                weights + 4 * (head * tile.size * BLOCK + position - base),
                4 * BLOCK,
                tile.size,
                states,
                out_stride,
            )
            ask(ahead, pace * count // (2 * tile.kv_heads))
            position += count


_by_unit = "amx-bf16" in cpu_features()
_score_bfloat16 = score_block if _by_unit else _score
_sum_bfloat16 = sum_block if _by_unit else _sum


@kernel
def _weigh(weights, first, seen, scale, ahead, asks):
    """Make weights e**(score - highest) of a block's products from ``first`` to ``seen - 1``, and 0 of all
    others. Returns the highest score and the sum of the weights.

    Both are found by halves of the whole block, so that no element moves when a chunk or a window ends
    elsewhere.
    """
    if first == seen:
        _fill(weights, 0, BLOCK, np.float32(0))
        return MINUS_INFINITY, np.float32(0)
    _fill(weights, 0, first, MINUS_INFINITY)
    _fill(weights, seen, BLOCK, MINUS_INFINITY)
    own = _part(weights, 0, BLOCK)
    for i in range(BLOCK):
        own[i] *= scale
    highest = fold(address_of(weights), True)
    for begin in range(0, BLOCK, BLOCK // PARTS):
        if begin < seen:
            exponentials(address_of(weights) + 4 * begin, np.int64(BLOCK // PARTS), highest)
        else:
            _fill(weights, begin, begin + BLOCK // PARTS, np.float32(0))
        ask(ahead, asks)
    return highest, fold(address_of(weights), False)


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
    total = state[width + 1]
    for i in range(width):
        state[i] /= total
    narrow(state, width, out, dtype)
