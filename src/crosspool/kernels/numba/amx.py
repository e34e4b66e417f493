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
_products22 = make_products(2, 2)
_room = make_room(PACKED_BYTES + 6 * TILE_BYTES + 8 * SIDE)
"""Of the stack: packed vectors, 4 tiles of sums, the ends of 2 tiles of rows, addresses."""


@kernel
def amx_rows(weights, stride, rows, columns, x, count, out, out_stride):
    """``rows`` rows of ``columns`` bfloat16 at ``weights``, ``stride`` bytes apart, by ``count`` vectors at
    the addresses ``x`` (int64 [>= count]). The float32 product of row r and vector v goes to address ``out +
    v * out_stride + 4 * r``."""
    packed = _room()
    sums = packed + PACKED_BYTES
    rests, pointers = sums + 4 * TILE_BYTES, sums + 6 * TILE_BYTES
    deep = -(-columns // DEPTH)
    at_once = min(VECTORS_AT_ONCE, PACKED_BYTES // (deep * SIDE * 2 * DEPTH) * SIDE)
    at_once = max(1, at_once)
    for begin in range(0, count, at_once):
        vectors = min(at_once, count - begin)
        width = 1 if vectors == 1 else SIDE
        _pack(x[begin : begin + vectors], columns, deep, packed, pointers)
        configure(np.int64(SIDE), np.int64(width))
        whole = rows - rows % SIDE
        row = 0
        while row < whole:
            tiles = 2 if vectors > SIDE and whole - row >= 2 * SIDE else 1
            _multiply(weights + row * stride, stride, tiles, SIDE, columns, packed, vectors, rests, sums)
            place = out + begin * out_stride + 4 * row
            _unload(sums, tiles, SIDE, vectors, place, out_stride, pointers)
            row += tiles * SIDE
        if row < rows:
            configure(np.int64(rows - row), np.int64(width))
            place = out + begin * out_stride + 4 * row
            _multiply(weights + row * stride, stride, 1, rows - row, columns, packed, vectors, rests, sums)
            _unload(sums, 1, rows - row, vectors, place, out_stride, pointers)
    release()


@inline
def _pack(x, columns, deep, packed, pointers):
    """Of each pair of elements the values of all vectors beside one another, SIDE vectors a tile; a lone
    vector is as it is. Beyond the vectors' ends there are zeros."""
    if len(x) == 1:
        copy_halves(x[0], columns, packed, deep * DEPTH)
        return
    whole = columns // DEPTH
    for first in range(0, len(x), SIDE):
        rows = words(pointers, SIDE)
        for i in range(SIDE):
            rows[i] = x[min(first + i, len(x) - 1)]
        place = packed + first * deep * 2 * DEPTH
        for step in range(whole):
            transpose(pointers, np.int64(64 * step), place + step * TILE_BYTES, np.int64(64))
        if whole < deep:
            for i in range(SIDE):
                put_rest(rows[i], whole * DEPTH, columns, place + whole * TILE_BYTES + 4 * i)


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
def _multiply(weights, stride, tiles, rows, columns, packed, vectors, rests, sums):
    """One or two tiles of ``rows`` rows by all vectors, to the sums.

    Up to a tile of vectors the weights come from memory, which is read fastest with few rows at a time.
    """
    deep, whole = -(-columns // DEPTH), columns // DEPTH
    rest = 0
    if whole < deep:
        rest = rests
        for row in range(tiles * rows):
            left = columns - whole * DEPTH
            copy_halves(weights + row * stride + whole * 2 * DEPTH, left, rests + 64 * row, DEPTH)
    x_stride = 4 if vectors == 1 else 4 * SIDE
    x_tile = deep * SIDE * x_stride
    if vectors > SIDE:
        if tiles == 2:
            _products22(weights, stride, whole, rest, packed, x_stride, x_tile, sums)
        else:
            _products12(weights, stride, whole, rest, packed, x_stride, x_tile, sums)
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
