"""Products of bfloat16 weights with bfloat16 vectors by the matrix unit, from one vector to many."""

from __future__ import annotations

import numpy as np

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
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import floats, halves, words

PACKED_BYTES = 1_048_576
"""Packed vectors of one round, at most: they stay in the core's cache while the rows pass by."""

VECTORS_AT_ONCE = 2 * SIDE

products11 = make_products(1, 1)
_products12 = make_products(1, 2)
_products21 = make_products(2, 1)
_products22 = make_products(2, 2)
_room = make_room(PACKED_BYTES + 6 * TILE_BYTES + 8 * SIDE)
"""Of the stack: packed vectors, 4 tiles of sums, the ends of 2 tiles of rows, addresses."""


_sums_room = make_room(6 * TILE_BYTES + 8 * SIDE)
"""The same without packed vectors."""


@kernel
def amx_rows(weights, stride, rows, columns, x, count, out, out_stride):
    """``rows`` rows of ``columns`` bfloat16 at ``weights``, ``stride`` bytes apart, by ``count`` vectors at
    the addresses ``x`` (int64 [>= count]). The float32 product of row r and vector v goes to address ``out +
    v * out_stride + 4 * r``."""
    packed = _room()
    sums = packed + PACKED_BYTES
    deep = -(-columns // DEPTH)
    at_once = min(VECTORS_AT_ONCE, PACKED_BYTES // (deep * SIDE * 2 * DEPTH) * SIDE)
    at_once = max(1, at_once)
    for begin in range(0, count, at_once):
        vectors = min(at_once, count - begin)
        _pack(x[begin : begin + vectors], columns, deep, packed, sums + 6 * TILE_BYTES)
        place = out + begin * out_stride
        width, tiles = 1 if vectors == 1 else SIDE, 2 if vectors > SIDE else 1
        _by_packed(weights, stride, rows, columns, packed, vectors, width, tiles, sums, place, out_stride)
    release()


@inline
def group_bytes(columns):
    """Of a group of SIDE packed vectors."""
    return -(-columns // DEPTH) * TILE_BYTES


@kernel
def pack_vectors(x, count, columns, packed):
    """Pack up to SIDE vectors at the addresses ``x`` as one group at ``packed``."""
    _pack_group(x, count, columns, packed, _sums_room())


@kernel
def packed_rows(weights, stride, rows, columns, packed, count, again, out, out_stride):
    """As ``amx_rows``, to the bit, of up to VECTORS_AT_ONCE vectors that are packed already: in groups of
    SIDE one after the other. ``again``: the weights have just been read, and are in the core's cache."""
    tiles = 2 if again or count > SIDE else 1
    _by_packed(weights, stride, rows, columns, packed, count, SIDE, tiles, _sums_room(), out, out_stride)
    release()


@inline
def _by_packed(weights, stride, rows, columns, packed, vectors, width, tiles, sums, out, out_stride):
    """All rows, up to ``tiles`` tiles at once, by vectors packed ``width`` a tile. At ``sums`` is room for
    sums, ends of rows, addresses."""
    rests, pointers = sums + 4 * TILE_BYTES, sums + 6 * TILE_BYTES
    configure(np.int64(SIDE), np.int64(width))
    whole = rows - rows % SIDE
    row = 0
    while row < whole:
        own = min(tiles, (whole - row) // SIDE)
        _multiply(weights + row * stride, stride, own, SIDE, columns, packed, vectors, width, rests, sums)
        _unload(sums, own, SIDE, vectors, out + 4 * row, out_stride, pointers)
        row += own * SIDE
    if row < rows:
        configure(np.int64(rows - row), np.int64(width))
        _multiply(weights + row * stride, stride, 1, rows - row, columns, packed, vectors, width, rests, sums)
        _unload(sums, 1, rows - row, vectors, out + 4 * row, out_stride, pointers)


@inline
def _pack(x, columns, deep, packed, pointers):
    """Of each pair of elements the values of all vectors beside one another, SIDE vectors a tile; a lone
    vector is as it is. Beyond the vectors' ends there are zeros."""
    if len(x) == 1:
        copy_halves(x[0], columns, packed, deep * DEPTH)
        return
    for first in range(0, len(x), SIDE):
        _pack_group(
            x[first:], min(SIDE, len(x) - first), columns, packed + first * deep * 2 * DEPTH, pointers
        )


@inline
def _pack_group(x, count, columns, packed, pointers):
    whole = columns // DEPTH
    rows = words(pointers, SIDE)
    for i in range(SIDE):
        rows[i] = x[min(i, count - 1)]
    for step in range(whole):
        transpose(pointers, np.int64(64 * step), packed + step * TILE_BYTES, np.int64(64))
    if whole * DEPTH < columns:
        for i in range(SIDE):
            put_rest(rows[i], whole * DEPTH, columns, packed + whole * TILE_BYTES + 4 * i)


@inline
def copy_halves(source, count, target, size):
    """``count`` halves, and zeros up to ``size``."""
    read, written = halves(source, count), halves(target, size)
    for i in range(count):
        written[i] = read[i]
    for i in range(count, size):
        written[i] = 0


@inline
def put_rest(source, begin, columns, target):
    """One vector's last pairs into its column of a tile."""
    read = halves(source, columns)
    for i in range(DEPTH):
        halves(target + 64 * (i // 2) + 2 * (i % 2), 1)[0] = read[begin + i] if begin + i < columns else 0


@inline
def _multiply(weights, stride, tiles, rows, columns, packed, vectors, width, rests, sums):
    """One or two tiles of ``rows`` rows by all vectors, to the sums.

    Memory is read fastest with few rows at a time: so one tile where weights come from there for up to SIDE
    vectors.
    """
    deep, whole = -(-columns // DEPTH), columns // DEPTH
    rest = 0
    if whole < deep:
        rest = rests
        for row in range(tiles * rows):
            left = columns - whole * DEPTH
            copy_halves(weights + row * stride + whole * 2 * DEPTH, left, rests + 64 * row, DEPTH)
    x_stride = 4 * width
    x_tile = deep * SIDE * x_stride
    if vectors > SIDE:
        if tiles == 2:
            _products22(weights, stride, whole, rest, packed, x_stride, x_tile, sums)
        else:
            _products12(weights, stride, whole, rest, packed, x_stride, x_tile, sums)
    elif tiles == 2:
        _products21(weights, stride, whole, rest, packed, x_stride, x_tile, sums)
    else:
        products11(weights, stride, whole, rest, packed, x_stride, x_tile, sums)


@inline
def _unload(sums, tiles, rows, vectors, out, out_stride, pointers):
    """The sums, [row tile][vector tile][row][vector], to where each vector's products go."""
    across = -(-vectors // SIDE)
    for tile in range(tiles):
        for block in range(across):
            source = sums + TILE_BYTES * (tile * across + block)
            target = out + block * SIDE * out_stride + 4 * SIDE * tile
            if rows == SIDE and vectors - block * SIDE >= SIDE:
                places = words(pointers, SIDE)
                for i in range(SIDE):
                    places[i] = source + 64 * i
                transpose(pointers, np.int64(0), target, out_stride)
            else:
                values = floats(source, SIDE * SIDE)
                for v in range(min(SIDE, vectors - block * SIDE)):
                    products = floats(target + v * out_stride, rows)
                    for row in range(rows):
                        products[row] = values[SIDE * row + v]
