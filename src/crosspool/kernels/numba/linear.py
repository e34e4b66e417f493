"""Products of weight matrices with a few or many vectors."""

from __future__ import annotations

from collections.abc import Callable

from crosspool.kernels.numba.amx import amx_rows
from crosspool.kernels.numba.compile import cpu_features, inline, kernel
from crosspool.kernels.numba.dot_tile import ROWS, VECTORS, make_tile
from crosspool.kernels.numba.elements import BFLOAT16, FLOAT16, FLOAT32, INT8
from crosspool.kernels.numba.intrinsics import floats

VECTORS_AT_ONCE = 96
"""Vectors that stay in the core's cache while all rows of a block pass by. A multiple of VECTORS."""

UNIT_BYTES = 131072
"""Weights that a thread claims at once: some 6 us of reading. Less does not fill the memory's pipeline."""


def _make_dots(weight_dtype: int, vector_dtype: int):
    """dots(weights, stride, rows, columns, x, count, out, out_stride), for one pair of types.

    The last tile over a block of rows asks for the next block, which nothing else has asked for by then.
    """

    def tiles_of(rows: int, fetch_ahead: bool) -> list[Callable[..., None]]:
        sizes = (1, 2, VECTORS)
        return [make_tile(weight_dtype, vector_dtype, rows, n, fetch_ahead=fetch_ahead) for n in sizes]

    last1, last2, last3 = tiles_of(ROWS, True)
    _, _, many3 = tiles_of(ROWS, False)
    one1, one2, one3 = tiles_of(1, False)

    @kernel
    def dots(weights, stride, rows, columns, x, count, out, out_stride):
        whole = rows - rows % ROWS
        for begin in range(0, count, VECTORS_AT_ONCE):
            end = min(count, begin + VECTORS_AT_ONCE)
            for row in range(0, whole, ROWS):
                place, target = weights + row * stride, out + 4 * row
                v = begin
                while v < end:
                    o = target + v * out_stride
                    p, q = o + out_stride, o + 2 * out_stride
                    if v + VECTORS < end:
                        many3(place, stride, columns, x[v], x[v + 1], x[v + 2], o, p, q)
                    elif v + 3 == end:
                        last3(place, stride, columns, x[v], x[v + 1], x[v + 2], o, p, q)
                    elif v + 2 == end:
                        last2(place, stride, columns, x[v], x[v + 1], 0, o, p, 0)
                    else:
                        last1(place, stride, columns, x[v], 0, 0, o, 0, 0)
                    v += VECTORS
            for row in range(whole, rows):
                place, target = weights + row * stride, out + 4 * row
                v = begin
                while v < end:
                    o = target + v * out_stride
                    p, q = o + out_stride, o + 2 * out_stride
                    if v + VECTORS <= end:
                        one3(place, stride, columns, x[v], x[v + 1], x[v + 2], o, p, q)
                    elif v + 2 == end:
                        one2(place, stride, columns, x[v], x[v + 1], 0, o, p, 0)
                    else:
                        one1(place, stride, columns, x[v], 0, 0, o, 0, 0)
                    v += VECTORS

    return dots


_dots_bfloat16 = _make_dots(BFLOAT16, BFLOAT16)
_dots_float32 = _make_dots(FLOAT32, FLOAT32)
_dots_float16 = _make_dots(FLOAT16, FLOAT16)
_dots_int8_bfloat16 = _make_dots(INT8, BFLOAT16)
_dots_int8_float32 = _make_dots(INT8, FLOAT32)
_dots_int8_float16 = _make_dots(INT8, FLOAT16)


BY_UNIT = "amx-bf16" in cpu_features()
"""Whether there is a matrix unit for bfloat16."""

_bfloat16_rows = amx_rows if BY_UNIT else _dots_bfloat16


@kernel
def multiply_rows(matrix, first, last, x, x_dtype, count, out, out_stride):
    """Rows ``first`` to ``last - 1`` of a Matrix by ``count`` vectors.

    ``x`` is int64 [>= count], the addresses of vectors of ``x_dtype`` (the matrix's own type, unless it is
    INT8). The float32 product of row r and vector v goes to address ``out + v * out_stride + 4 * (r -
    first)``. A product's value depends on the row and the vector alone.
    """
    if matrix.dtype == BFLOAT16:
        weights, columns = matrix.address + first * matrix.stride, matrix.columns
        _bfloat16_rows(weights, matrix.stride, last - first, columns, x, count, out, out_stride)
    else:
        dot_rows(matrix, first, last, x, x_dtype, count, out, out_stride)


@kernel
def dot_rows(matrix, first, last, x, x_dtype, count, out, out_stride):
    """The same without the matrix unit, for matrices that are read in small pieces."""
    rows, columns, stride = last - first, matrix.columns, matrix.stride
    weights = matrix.address + first * stride
    if matrix.dtype == BFLOAT16:
        _dots_bfloat16(weights, stride, rows, columns, x, count, out, out_stride)
    elif matrix.dtype == FLOAT32:
        _dots_float32(weights, stride, rows, columns, x, count, out, out_stride)
    elif matrix.dtype == FLOAT16:
        _dots_float16(weights, stride, rows, columns, x, count, out, out_stride)
    else:
        if x_dtype == BFLOAT16:
            _dots_int8_bfloat16(weights, stride, rows, columns, x, count, out, out_stride)
        elif x_dtype == FLOAT32:
            _dots_int8_float32(weights, stride, rows, columns, x, count, out, out_stride)
        else:
            _dots_int8_float16(weights, stride, rows, columns, x, count, out, out_stride)
        scales = floats(matrix.scales + 4 * first, rows)
        for v in range(count):
            products = floats(out + v * out_stride, rows)
            for row in range(rows):
                products[row] *= scales[row]


@inline
def rows_of_unit(matrix):
    """Rows of a Matrix that one unit of a team's work takes: a multiple of ROWS, UNIT_BYTES or just above."""
    tiles = -(-UNIT_BYTES // max(1, matrix.stride * ROWS))
    return tiles * ROWS


@inline
def units_of(matrix):
    """Units of a team's work in which a Matrix is read once."""
    return -(-matrix.rows // rows_of_unit(matrix))
