"""Scores and weighted sums of attention over one block of bfloat16 keys and values, by the matrix unit.

Keys are the left-hand side of their products, as they lie in their pages; value rows are the right-hand side,
interleaved by pairs. Steps of positions begin at multiples of their size from the block's begin on, whatever
part of the block is seen. Weights are rounded to bfloat16.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.amx import copy_halves
from crosspool.kernels.numba.amx_tile import (
    DEPTH,
    SIDE,
    TILE_BYTES,
    configure,
    make_products,
    make_room,
    release,
    transpose,
)
from crosspool.kernels.numba.attention_ahead import ask
from crosspool.kernels.numba.attention_tile import CHUNK, add_tiles, copy_chunks, pair_rows, put_in_order
from crosspool.kernels.numba.batch import BLOCK, TILE, region_of
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import BFLOAT16, element_bytes, narrow
from crosspool.kernels.numba.intrinsics import floats, halves, words

WIDEST = 1024
"""Elements of the keys, or of the values, of one position that are read together, at most."""

PADDED = 2 * WIDEST
"""Elements of the same when each head's are filled up to whole chunks, at most."""

STEP = 2 * SIDE
_products = make_products(2, 1)

QUERY_BYTES = (TILE + SIDE) * 2 * WIDEST + TILE_BYTES
KEY_BYTES = STEP * (2 * PADDED + 64)
_score_room = make_room(QUERY_BYTES + KEY_BYTES + 2 * TILE_BYTES + 8 * (STEP + 2 * SIDE))
"""Of the stack: query heads, keys, sums, addresses."""

ROUNDED_BYTES = (TILE + SIDE) * 2 * BLOCK
ROW_TILE_BYTES = TILE_BYTES + 64
"""From one tile of values to the next, so that the rows of many tiles fall on all sets of the cache."""

VALUE_BYTES = PADDED // SIDE * ROW_TILE_BYTES
SUM_BYTES = 3 * WIDEST // SIDE * TILE_BYTES
_sum_room = make_room(ROUNDED_BYTES + VALUE_BYTES + SUM_BYTES + 4 * CHUNK + 4 * CHUNK + 8 * DEPTH)
"""Of the stack: weights, values of one step, sums, the ends of two rows, a row of sums, addresses."""


@kernel
def score_block(shape, batch, kv, tile, base, begin, end, query, ahead, pace, mine, scores):
    """Products of a tile's queries with the keys from position ``begin`` to ``end - 1`` of the block that
    begins at ``base``: that of the tile's query head number n and position p goes to address ``scores + 4 *
    (n * BLOCK + p - base)``. Others of the block become anything."""
    queries = _score_room()
    keys = queries + QUERY_BYTES
    sums = keys + KEY_BYTES
    pointers = sums + 2 * TILE_BYTES
    turned = pointers + 8 * STEP
    rows = words(turned, 2 * SIDE)
    for i in range(2 * SIDE):
        rows[i] = sums + 64 * i
    deep, columns = -(-shape.key_width // DEPTH), min(SIDE, tile.size)
    step = 2 * DEPTH * deep
    stride = tile.kv_heads * step + 64
    asks = pace * STEP // 4
    _pack_queries(shape, batch, tile, query, columns, deep, queries, pointers)
    configure(np.int64(SIDE), np.int64(columns))
    for group in range((begin - base) // STEP * STEP, end - base, STEP):
        _point(shape, batch, kv, tile, base + group, STEP, begin, end, np.int64(0), words(pointers, STEP))
        _copy_keys(shape, tile, words(pointers, STEP), step, keys, stride, ahead, pace)
        packed, target = queries, scores + 4 * group
        for head in range(tile.kv_heads):
            for first in range(0, tile.size, SIDE):
                at = keys + head * step
                _products(at, stride, deep, np.int64(0), packed, np.int64(4 * columns), np.int64(0), sums)
                packed += 64 * columns * deep
                count = min(SIDE, tile.size - first)
                for half in range(2):
                    ask(ahead, asks // (2 * tile.kv_heads))
                    _turn(sums + half * TILE_BYTES, turned + 8 * SIDE * half, count, target + 4 * SIDE * half)
                target += 4 * BLOCK * count
    release()


@inline
def _turn(sums, rows, count, out):
    """A tile's sums, [position][head], to where the scores of its first ``count`` heads go."""
    if count == SIDE:
        transpose(rows, np.int64(0), out, np.int64(4 * BLOCK))
    else:
        transpose(rows, np.int64(0), sums, np.int64(64))
        _copy_sums(sums, count, out)


@kernel
def sum_block(shape, batch, kv, tile, base, begin, end, weights, out, out_stride, head_stride, ahead, pace):
    """Values from position ``begin`` to ``end - 1``, weighted and added up: that of the tile's query head
    number n and position p has the float32 weight at ``weights + 4 * (n * BLOCK + p - base)``; the sums of
    head v of key-value head h of the tile go to ``out + h * head_stride + v * out_stride``."""
    rounded = _sum_room()
    values = rounded + ROUNDED_BYTES
    sums = values + VALUE_BYTES
    ends = sums + SUM_BYTES
    pointers = ends + 8 * CHUNK
    first_step, steps = (begin - base) // DEPTH, -(-(end - base) // DEPTH)
    _round_weights(tile.kv_heads * tile.size, begin - base, end - base, weights, rounded)
    rows = min(SIDE, tile.size)
    tiles = 2 * -(-shape.value_width // CHUNK)
    groups = -(-tile.size // SIDE)
    _clear(sums, tile.kv_heads * groups * tiles * 16 * rows)
    configure(np.int64(rows), np.int64(SIDE))
    for step in range(first_step, steps):
        place = base + step * DEPTH
        _point(shape, batch, kv, tile, place, DEPTH, begin, end, shape.value_offset, words(pointers, DEPTH))
        _pair_values(shape, tile, words(pointers, DEPTH), ends, values, ahead, pace)
        total = sums
        for head in range(tile.kv_heads):
            right = values + head * tiles * ROW_TILE_BYTES
            for first in range(0, tile.size, SIDE):
                left = rounded + 2 * ((head * tile.size + first) * BLOCK + step * DEPTH)
                add_tiles(
                    left, np.int64(2 * BLOCK), right, np.int64(ROW_TILE_BYTES), tiles // 2, total, 64 * rows
                )
                total += tiles * 64 * rows
    release()
    for head in range(tile.kv_heads):
        for v in range(tile.size):
            source = sums + 64 * ((head * groups + v // SIDE) * tiles * rows + v % SIDE)
            _order(source, 64 * rows, shape.value_width, ends, out + head * head_stride + v * out_stride)


@inline
def _pack_queries(shape, batch, tile, query, columns, deep, packed, pointers):
    """Of each key-value head and up to SIDE of its query heads, of each pair of elements the values of all
    heads beside one another: [key-value head][SIDE heads][pair][head], with zeros up to whole steps."""
    group, whole = shape.heads // shape.kv_heads, shape.key_width // DEPTH
    sources = words(pointers, SIDE)
    for head in range(tile.kv_heads):
        for first in range(0, tile.size, SIDE):
            for i in range(SIDE):
                v = tile.first + min(first + i, tile.size - 1)
                place = (batch.starts[tile.row] + v // group) * shape.heads
                place += (tile.kv_head + head) * group + v % group
                sources[i] = query + place * shape.key_width * element_bytes(batch.dtype)
            for step in range(whole):
                # A row ends where the next begins, which is written after it.
                transpose(
                    pointers, np.int64(2 * DEPTH * step), packed + 64 * columns * step, np.int64(4 * columns)
                )
            if whole < deep:
                for i in range(columns):
                    _put_end(
                        sources[i],
                        whole * DEPTH,
                        shape.key_width,
                        columns,
                        packed + 64 * columns * whole + 4 * i,
                    )
            packed += 64 * columns * deep


@inline
def _put_end(source, begin, end, columns, target):
    """One vector's last pairs into its column of packed ones."""
    read = halves(source, end)
    for i in range(DEPTH):
        place = target + 4 * columns * (i // 2) + 2 * (i % 2)
        halves(place, 1)[0] = read[begin + i] if begin + i < end else 0


@inline
def _copy_keys(shape, tile, sources, step, keys, stride, ahead, pace):
    """STEP positions' keys, ``stride`` bytes apart, each head's filled up to ``step`` bytes with zeros."""
    for i in range(STEP):
        if i % 4 == 0:
            ask(ahead, pace)
        place = keys + i * stride
        if step == shape.head_bytes:
            copy_chunks(sources[i], tile.kv_heads * step // (2 * CHUNK), place)
        else:
            for head in range(tile.kv_heads):
                at = sources[i] + head * shape.head_bytes
                copy_halves(at, shape.key_width, place + head * step, step // 2)


@inline
def _pair_values(shape, tile, sources, ends, values, ahead, pace):
    """DEPTH positions' values as tiles: [key-value head][tile]."""
    whole = shape.value_width // CHUNK
    rest = shape.value_width - whole * CHUNK
    tiles = 2 * -(-shape.value_width // CHUNK)
    for pair in range(DEPTH // 2):
        ask(ahead, max(1, pace // 2))
        for head in range(tile.kv_heads):
            offset = head * shape.head_bytes
            one, two = sources[2 * pair] + offset, sources[2 * pair + 1] + offset
            place = values + head * tiles * ROW_TILE_BYTES + 64 * pair
            pair_rows(one, two, whole, place, np.int64(ROW_TILE_BYTES))
            if rest > 0:
                copy_halves(one + 2 * CHUNK * whole, rest, ends, CHUNK)
                copy_halves(two + 2 * CHUNK * whole, rest, ends + 2 * CHUNK, CHUNK)
                place += 2 * whole * ROW_TILE_BYTES
                pair_rows(ends, ends + 2 * CHUNK, np.int64(1), place, np.int64(ROW_TILE_BYTES))


@inline
def _order(sums, tile_bytes, width, room, out):
    """One query head's row of sums out of its tiles."""
    for column in range(0, width, CHUNK):
        first = sums + column // CHUNK * 2 * tile_bytes
        if column + CHUNK <= width:
            put_in_order(first, first + tile_bytes, out + 4 * column)
        else:
            put_in_order(first, first + tile_bytes, room)
            read, written = floats(room, CHUNK), floats(out + 4 * column, width - column)
            for i in range(width - column):
                written[i] = read[i]


@inline
def _point(shape, batch, kv, tile, position, count, begin, end, offset, pointers):
    """Addresses of ``count`` positions' keys, ``offset`` bytes further; those that are not seen get that of
    one that is, for what is there may be no number."""
    seen = min(max(position, begin), end - 1)
    slot = seen % kv.tokens_per_page
    region = region_of(batch, kv, tile.row, seen // kv.tokens_per_page)
    place = region + offset + tile.kv_head * shape.head_bytes
    for i in range(count):
        pointers[i] = place + slot * shape.token_bytes
        if begin <= position + i < end - 1:
            seen += 1
            slot += 1
            if slot == kv.tokens_per_page:
                slot = 0
                region = region_of(batch, kv, tile.row, seen // kv.tokens_per_page)
                place = region + offset + tile.kv_head * shape.head_bytes


@inline
def _round_weights(size, begin, end, weights, rounded):
    """The weights in bfloat16, and zeros around them up to whole steps."""
    low, high = begin // DEPTH * DEPTH, -(-end // DEPTH) * DEPTH
    for n in range(size):
        place = rounded + 2 * n * BLOCK
        own = floats(weights + 4 * (n * BLOCK + begin), end - begin)
        narrow(own, end - begin, place + 2 * begin, BFLOAT16)
        written = halves(place, high)
        for i in range(low, begin):
            written[i] = 0
        for i in range(end, high):
            written[i] = 0


@inline
def _clear(address, count):
    """Make ``count`` float32 zero."""
    values = floats(address, count)
    for i in range(count):
        values[i] = np.float32(0)


@inline
def _copy_sums(sums, rows, out):
    """The first rows of a tile of sums to where they go."""
    for row in range(rows):
        read, written = floats(sums + 64 * row, SIDE), floats(out + row * 4 * BLOCK, SIDE)
        for i in range(SIDE):
            written[i] = read[i]
