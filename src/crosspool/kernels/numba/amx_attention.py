"""Scores and weighted sums of attention over one block of bfloat16 keys and values, by the matrix unit.

Query heads are the left-hand side. Keys are transposed and values interleaved into tiles, once for all query
heads of the tile; groups of positions begin at multiples of their size from the block's begin on, whatever
part of the block is seen. Weights are rounded to bfloat16.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.amx import copy_halves, products11, put_rest
from crosspool.kernels.numba.amx_tile import (
    DEPTH,
    SIDE,
    TILE_BYTES,
    configure,
    interleave,
    make_room,
    release,
    transpose,
)
from crosspool.kernels.numba.batch import BLOCK, TILE, region_of
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import BFLOAT16, element_bytes, narrow
from crosspool.kernels.numba.intrinsics import floats, halves, words

WIDEST = 1024
"""Elements of a key, at most."""

QUERY_BYTES = TILE * 2 * WIDEST
KEY_BYTES = WIDEST // DEPTH * TILE_BYTES
_room = make_room(QUERY_BYTES + KEY_BYTES + TILE_BYTES + 8 * BLOCK)
"""Of the stack: query heads or weights, a group of keys or a column of values, sums, addresses."""


@kernel
def score_block(shape, batch, kv, tile, base, begin, end, query, mine, scores):
    """Products of a tile's queries with the keys from position ``begin`` to ``end - 1`` of the block that
    begins at ``base``: that of query head v and position p goes to address ``scores + 4 * (v * BLOCK + p -
    base)``. Others of the block become anything."""
    queries = _room()
    keys = queries + QUERY_BYTES
    sums = keys + KEY_BYTES
    pointers = sums + TILE_BYTES
    deep = -(-shape.key_width // DEPTH)
    stride = deep * 2 * DEPTH
    _gather_queries(shape, batch, tile, query, queries, stride)
    configure(np.int64(min(SIDE, tile.size)), np.int64(SIDE))
    for group in range((begin - base) // SIDE * SIDE, end - base, SIDE):
        _point(shape, batch, kv, tile, base + group, SIDE, begin, end, np.int64(0), words(pointers, SIDE))
        _turn_keys(shape.key_width, keys, pointers)
        for first in range(0, tile.size, SIDE):
            left = queries + first * stride
            products11(left, stride, deep, np.int64(0), keys, np.int64(64), np.int64(0), sums)
            place = scores + 4 * (first * BLOCK + group)
            _copy_sums(sums, min(SIDE, tile.size - first), SIDE, place, 4 * BLOCK)
    release()


@kernel
def sum_block(shape, batch, kv, tile, base, begin, end, weights, out, out_stride):
    """Values from position ``begin`` to ``end - 1``, weighted and added up: that of query head v and position
    p has the float32 weight at ``weights + 4 * (v * BLOCK + p - base)``; the sums go to ``out + v *
    out_stride``."""
    rounded = _room()
    values = rounded + QUERY_BYTES
    sums = values + KEY_BYTES
    pointers = sums + TILE_BYTES
    first_step, steps = (begin - base) // DEPTH, -(-(end - base) // DEPTH)
    _round_weights(tile.size, begin - base, end - base, weights, rounded)
    count = (steps - first_step) * DEPTH
    place = base + first_step * DEPTH
    _point(shape, batch, kv, tile, place, count, begin, end, shape.value_offset, words(pointers, count))
    configure(np.int64(min(SIDE, tile.size)), np.int64(SIDE))
    for column in range(0, shape.value_width, SIDE):
        wide = min(SIDE, shape.value_width - column)
        for step in range(steps - first_step):
            source, target = pointers + 8 * DEPTH * step, values + TILE_BYTES * step
            if wide == SIDE:
                interleave(source, np.int64(2 * column), target)
            else:
                _interleave_some(words(source, DEPTH), column, wide, target)
        for first in range(0, tile.size, SIDE):
            left = rounded + 2 * (first * BLOCK + first_step * DEPTH)
            depth = steps - first_step
            products11(left, np.int64(2 * BLOCK), depth, np.int64(0), values, np.int64(64), np.int64(0), sums)
            rows = min(SIDE, tile.size - first)
            _copy_sums(sums, rows, wide, out + first * out_stride + 4 * column, out_stride)
    release()


@inline
def _gather_queries(shape, batch, tile, query, queries, stride):
    """The tile's query heads one after another, with zeros up to whole tiles."""
    group = shape.heads // shape.kv_heads
    for v in range(tile.size):
        place = batch.starts[tile.row] + (tile.first + v) // group
        head = tile.kv_head * group + (tile.first + v) % group
        source = query + (place * shape.heads + head) * shape.key_width * element_bytes(batch.dtype)
        copy_halves(source, shape.key_width, queries + v * stride, stride // 2)


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
def _turn_keys(width, keys, pointers):
    """SIDE keys as the right-hand side of a product."""
    whole = width // DEPTH
    for step in range(whole):
        transpose(pointers, np.int64(2 * DEPTH * step), keys + step * TILE_BYTES, np.int64(64))
    if whole * DEPTH < width:
        sources = words(pointers, SIDE)
        for i in range(SIDE):
            put_rest(sources[i], whole * DEPTH, width, keys + whole * TILE_BYTES + 4 * i)


@inline
def _round_weights(size, begin, end, weights, rounded):
    """The weights in bfloat16, and zeros around them up to whole steps."""
    low, high = begin // DEPTH * DEPTH, -(-end // DEPTH) * DEPTH
    for v in range(size):
        place = rounded + 2 * v * BLOCK
        own = floats(weights + 4 * (v * BLOCK + begin), end - begin)
        narrow(own, end - begin, place + 2 * begin, BFLOAT16)
        written = halves(place, high)
        for i in range(low, begin):
            written[i] = 0
        for i in range(end, high):
            written[i] = 0


@inline
def _interleave_some(sources, column, wide, target):
    """``interleave`` of fewer than SIDE columns, with zeros for the others."""
    for row in range(DEPTH):
        read, written = halves(sources[row] + 2 * column, wide), halves(target + 64 * (row // 2), 2 * SIDE)
        for i in range(SIDE):
            written[2 * i + row % 2] = read[i] if i < wide else 0


@inline
def _copy_sums(sums, rows, columns, out, out_stride):
    """Rows of a tile of sums to where they go."""
    for row in range(rows):
        read, written = floats(sums + 64 * row, SIDE), floats(out + row * out_stride, columns)
        for i in range(columns):
            written[i] = read[i]
